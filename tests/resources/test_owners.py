"""What all kinds of files have: status flags and an owner who is told by signal, through the whole engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kit import Library, Targets
from kit.network import own_network

PROGRAM = """
import ctypes, fcntl, os, pty, struct, signal, subprocess, sys, time
from socket import *
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
made = {}
def add(name, fd):
    if fd >= 0: made[name] = fd
    else: print(name, os.strerror(ctypes.get_errno()))
def at(name, path, flags):
    if os.path.exists(path): made[name] = os.open(path, flags)
def call(name, *args): add(name, libc.syscall(*args))
add("eventfd", os.eventfd(0)); add("epoll", libc.epoll_create1(0)); add("inotify", libc.inotify_init1(0))
add("fanotify", libc.fanotify_init(0, 0)); add("timerfd", libc.timerfd_create(1, 0))
add("signalfd", libc.signalfd(-1, struct.pack("Q120x", 1 << 60), 0)); add("memfd", os.memfd_create("one"))
add("pidfd", os.pidfd_open(os.getpid()))
gone = os.fork() or os._exit(0)
add("pidfd of one that is gone", os.pidfd_open(gone)); os.waitpid(gone, 0)
add("reader", os.pipe()[0]); made["writer"] = os.pipe()[1]
os.mkfifo("fifo"); at("fifo", "fifo", os.O_RDWR); at("directory", ".", os.O_RDONLY)
open("file", "w").close(); at("file", "file", os.O_RDWR); open("deleted", "w").close()
at("deleted", "deleted", os.O_RDWR); os.unlink("deleted"); at("device", "/dev/zero", os.O_RDWR)
master, slave = pty.openpty(); made["master"], made["slave"] = master, slave; os.set_inheritable(slave, True)
at("tun", "/dev/net/tun", os.O_RDWR)
if "tun" in made: fcntl.ioctl(made["tun"], 0x400454ca, struct.pack("16sH22x", b"kit%d", 0x1001))
call("userfaultfd", 323, 0); call("message queue", 240, b"torpor-owner-%d" % os.getpid(), 0o102, 0o600, 0)
if "message queue" in made: libc.syscall(241, b"torpor-owner-%d" % os.getpid())
call("map", 321, 0, struct.pack("IIIIII", 2, 4, 8, 1, 0, 0).ljust(120, b"\\0"), 120)
kinds = {"stream": (AF_UNIX, SOCK_STREAM, 0), "datagram": (AF_UNIX, SOCK_DGRAM, 0), "tcp": (AF_INET, SOCK_STREAM, 0),
         "udp": (AF_INET6, SOCK_DGRAM, 0), "raw": (AF_INET, SOCK_RAW, 1), "netlink": (AF_NETLINK, SOCK_RAW, 0),
         "packet": (AF_PACKET, SOCK_RAW, 0), "vsock": (AF_VSOCK, SOCK_STREAM, 0)}
for name, kind in kinds.items():
    try: made[name] = socket(*kind).detach()
    except OSError: pass
server = create_server(("127.0.0.1", 0)); client = create_connection(server.getsockname()); made["listener"] = server.fileno()
made["client"], kept = client.fileno(), server.accept()[0]; made["accepted"] = kept.fileno()
for n, (name, fd) in enumerate(made.items()):
    fcntl.fcntl(fd, 15, struct.pack("ii", n % 2, os.getpid())); fcntl.fcntl(fd, 10, 36 + n % 20)
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) ^ os.O_NONBLOCK)
def look(fd):
    owner = [fcntl.fcntl(fd, option, bytes(8)) for option in (16, 17)]
    # Whether it was opened close-on-exec stays in its flags, where fdinfo hides it.
    return fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_CLOEXEC, fcntl.fcntl(fd, 11), owner, fcntl.fcntl(fd, fcntl.F_GETFD)
os.seteuid(77)
for name in list(made)[::3]: fcntl.fcntl(made[name], 15, struct.pack("ii", 1, os.getpid()))
os.seteuid(0)
before = {name: look(fd) for name, fd in made.items()}
tell("made", " ".join(made))
ready(); wait_told("go")
wrong = {name: (before[name], look(fd)) for name, fd in made.items() if look(fd) != before[name]}
done(not wrong, f"{wrong}"[:3000])
"""


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    with own_network():
        yield


def test_every_kind_of_file_keeps_its_owner_and_flags(start: Targets, library: Library, images: str) -> None:
    target = start.python(PROGRAM)
    assert len(target.read("made").split()) > 25, target.read("stdout")
    library.dump(target.pid, images, tcp_established=True)
    target.wait_gone()
    library.restore(images, tcp_established=True)
    target.go()
