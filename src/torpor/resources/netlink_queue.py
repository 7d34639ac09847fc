"""Messages that wait in netlink sockets, which nobody but the kernel could send again.

What was sent to a group (a link that came up, a device that was plugged in) may get lost by netlink's own rules: then
the next call on the socket fails with ENOBUFS, and the program looks for itself how things are (netlink(7)). A
restore brings about just that. What was sent to the socket alone, most likely the answer to a request, is not to be
lost: it is refused.

No call tells which kind waits: BPF reads it from the kernel's queue. Kernel: net/netlink/af_netlink.c
"""

from __future__ import annotations

import mmap
import os
import select
import struct

from .. import log
from ..errors import KernelError, Unsupported
from ..linux import sockets, userfault
from ..linux.call import call, try_call
from ..linux.kernel import writable_address
from . import sockopts
from .inet_options import put

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..linux import bpf

AF_NETLINK, SOCK_RAW = 16, 3
NLMSG_NOOP, NLM_F_REQUEST, NLM_F_ACK = 1, 1, 4
_HEAD = struct.Struct("=IHHII")
_NAME = struct.Struct("=HHII")
_MANY = 200
_PAGE = 4096
_BIG = 8192  # more than the least receive buffer
_SOON_MS = 2000


# ---------------------------------------------------------------------- dump


def waits(fd: int) -> bool:
    """Does a message wait, or the news that some were lost? Neither is taken."""
    return _polls(fd, select.POLLIN | select.POLLERR, 0)


def all_to_groups(fd: int) -> bool | None:
    """Were all messages that wait in our netlink socket ``fd`` sent to groups? None where that cannot be seen."""
    from ..linux import btf
    from ..linux.bpf import Place

    way = (
        "task_struct.files", "files_struct.fdt", "fdtable.fd", "file.private_data", "socket.sk",
        "sock.sk_receive_queue",
    )  # fmt: skip
    try:
        at = btf.lookup(
            [*way, "sk_buff_head.qlen", "sk_buff.next", "sk_buff.cb", "netlink_skb_parms.dst_group", "bpf_iter_task()"]
        )
        files, table, array, private, sock, queue = (at[name] for name in way)
        through = [files, table, array, 8 * fd, private, sock]
        (length,) = _read(at["bpf_iter_task()"], [Place(queue + at["sk_buff_head.qlen"], 4, through=through)])
        if length > _MANY:
            return None
        group = at["sk_buff.cb"] + at["netlink_skb_parms.dst_group"]
        places = [
            Place(group, 4, through=[*through, queue, *[at["sk_buff.next"]] * index]) for index in range(length)
        ]
        return all(_read(at["bpf_iter_task()"], places)) if places else True
    except (KernelError, Unsupported) as error:
        log.info(f"netlink: what waits in a socket cannot be seen here: {error}")
        return None


def _read(iterator: int, places: list[bpf.Place]) -> list[int]:
    from ..linux.bpf import read_own

    return [int.from_bytes(field, "little") for field in read_own(iterator, places)]


# ---------------------------------------------------------------------- restore


def overrun(fd: int, protocol: int, port: int) -> None:
    """Have the next call on our new socket ``fd``, bound to ``port``, fail with ENOBUFS; its queue stays empty.

    The kernel says so when an answer does not fit, that is, while a message takes the room. So a message waits, its
    reader is held in the middle of taking it, by a page that is missing, and the kernel is asked for a receipt.
    Its receive buffer is the smallest then.
    """
    put(fd, sockets.SOL_SOCKET, sockopts.SO_RCVBUFFORCE, 0)
    area = mmap.mmap(-1, _PAGE)
    address = writable_address(area)
    fault = call("userfaultfd", userfault.FLAGS)
    try:
        userfault.start(fault)
        userfault.register(fault, address, address + _PAGE)
        _send(protocol, port)
        _held(fd, fault, address)
        userfault.unregister(fault, address, address + _PAGE)
    finally:
        os.close(fault)
    if not _polls(fd, select.POLLERR, 0):
        log.warning(f"netlink protocol {protocol}: that events are lost cannot be told to the program")


def _send(protocol: int, port: int) -> None:
    sender = sockets.socket(AF_NETLINK, SOCK_RAW, protocol)
    try:
        message = _HEAD.pack(_BIG, NLMSG_NOOP, 0, 0, 0) + bytes(_BIG - _HEAD.size)
        name = _NAME.pack(AF_NETLINK, 0, port, 0)
        call("sendto", sender, message, len(message), 0, name, len(name))
    finally:
        os.close(sender)


def _held(fd: int, fault: int, address: int) -> None:
    import _thread

    done = _thread.allocate_lock()
    done.acquire()

    def take() -> None:
        try_call("recvfrom", fd, address, _PAGE, sockets.MSG_DONTWAIT, None, None)
        done.release()

    _thread.start_new_thread(take, ())
    if _polls(fault, select.POLLIN, _SOON_MS):
        request = _HEAD.pack(_HEAD.size, NLMSG_NOOP, NLM_F_REQUEST | NLM_F_ACK, 0, 0)
        name = _NAME.pack(AF_NETLINK, 0, 0, 0)
        try_call("sendto", fd, request, len(request), 0, name, len(name))
    userfault.zero(fault, address, _PAGE)
    done.acquire()


def _polls(fd: int, event: int, timeout_ms: int) -> bool:
    poll = select.poll()
    poll.register(fd, event)
    return any(events & event for _, events in poll.poll(timeout_ms))
