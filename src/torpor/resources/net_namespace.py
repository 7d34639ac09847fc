"""The network namespace of a tree, when it is another one than ours.

All tasks of a tree are in one: that of whoever dumps it, or another. The dumping thread goes there, so that sockets
are looked at, and later made, among their like. What is in the namespace is saved and made anew, unless it is declared
external (--external net[INODE]:NAME): then whoever restores hands one over (--inherit-fd fd[N]:NAME). With --join-ns
net:FILE a restore goes into one that is there, whatever the images hold.

From the dump on, everything in the namespace is held back but packets with our mark: a server that is gone for a
moment must not be found gone. The namespace may outlive its tasks, and the restore joins it again.

Images: netns-ID (netns_entry) and those of net_link.py and net_rules.py. Kernel: net/core/net_namespace.c
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat

from .. import log
from ..errors import ImageError, TorporError, Unsupported, UsageError, doing
from ..images import schema as pb
from ..linux import netns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..linux.netns import Visit
    from .base import BuildContext, DumpContext, SourceFile

SIOCGSKNS = 0x894C  # include/uapi/linux/sockios.h
#: The number of a tree's own namespace in the images, behind those of the host's (engine/preflight.py).
NUMBER = 9


def external_key(inode: int, options: Any) -> str | None:
    """The name that --external gives a namespace; None if it is not declared external."""
    value: str | None = options.external_value(f"net[{inode}]")
    return value if value != "" else f"net[{inode}]"


# ---------------------------------------------------------------------- dump


def check(visit: Visit, options: Any) -> None:
    """Raise Unsupported for what is in the calling thread's namespace and cannot be made again. Nothing is changed."""
    if external_key(visit.inode, options) is None:
        from . import net_link, net_others, net_rules

        hint = f"--external net[{visit.inode}]:NAME, and --inherit-fd fd[N]:NAME at the restore, keep it out of this"
        net_link.refuse_others(lambda: Fresh().links, hint)
        net_rules.check()
        net_others.check(hint)


def check_socket(source: SourceFile, ctx: DumpContext) -> None:
    """Raise Unsupported for a socket of another network namespace than the tree is in: it stays where it was made."""
    visit: Visit | None = ctx.memo.get("network namespace")
    if visit is None or not stat.S_ISSOCK(source.stat.st_mode):
        return
    try:
        there = fcntl.ioctl(source.borrow(), SIOCGSKNS)
    except OSError:
        return  # not permitted to know
    inode = os.fstat(there).st_ino
    os.close(there)
    if inode != visit.inode:
        from .base import unsupported

        raise unsupported(
            source, "a socket of another network namespace than the program is in", "close it before the dump"
        )


class Fresh:
    """What a new network namespace has: settings, and the names of its interfaces."""

    def __init__(self) -> None:
        from . import net_link, net_sysctls

        with netns.Visit(netns.make()):
            self.settings = net_sysctls.read_all()
            self.links = {net_link.name_of(link) for link in net_link.links()}


def dump(visit: Visit, fresh: Fresh, ctx: DumpContext) -> None:
    """Write what is in the namespace, and hold its packets back. All tasks of the tree are stopped."""
    from . import inet_dump, net_link, net_others, net_rules, net_sysctls

    with doing("network namespace"):
        entry = pb.netns_entry()
        key = external_key(visit.inode, ctx.options)
        if key is not None:
            entry.ext_key = key
        else:
            check(visit, ctx.options)
            device = net_link.dump(ctx.images, NUMBER, entry)
            settings = net_sysctls.dump(entry, fresh.settings)
            net_sysctls.dump_link(device, settings, net_link.LOOPBACK)
            ctx.images.append(f"netdev-{NUMBER}", device)
            net_rules.dump(ctx.images, NUMBER)
            net_others.warn_of_expectations()
        ctx.images.write_one(f"netns-{NUMBER}", entry)
        inet_dump.hold_all(ctx)
        if key is None:
            net_rules.dump_tracked(ctx.images, NUMBER)


# ---------------------------------------------------------------------- restore


def number_in(snapshot: Any) -> int:
    """The number of the network namespace that a snapshot's tasks have of their own; 0 if they are in the host's.

    Raises Unsupported when they are in several, ImageError for what cannot be.
    """
    host = snapshot.inventory.root_ids.net_ns_id
    found = {
        task.ids.net_ns_id if task.ids.HasField("net_ns_id") else host
        for task in snapshot.tasks.values() if task.alive
    }  # fmt: skip
    if len(found) > 1:
        raise Unsupported(f"its tasks are in {len(found)} network namespaces", hint="only one can be restored yet")
    number: int = found.pop() if found else host
    return 0 if number == host else number


def refuse(snapshot: Any) -> None:
    """Raise Unsupported when the snapshot has a network or cgroup namespace of its own, for templates."""
    ids, host = snapshot.root.ids, snapshot.inventory.root_ids
    own = ["network"] if number_in(snapshot) else []
    if ids.HasField("cgroup_ns_id") and ids.cgroup_ns_id != host.cgroup_ns_id:
        own.append("cgroup")
    for kind in own:
        raise Unsupported(
            f"copies of a tree with a {kind} namespace of its own cannot be made yet",
            hint=f"restore it, or dump the program in the {kind} namespace of the host",
        )


def prepare(snapshot: Any, ctx: BuildContext) -> None:
    """Go to the network namespace that the tree is to be in, and fill it if it is a new one.

    The calling thread stays there until ``ctx.undo`` is taken back; what it makes and forks meanwhile is there too.
    """
    number = number_in(snapshot)
    joined = [where for kind, where, _ in ctx.options.join_ns if kind == "net"]
    if not number and not joined:
        return
    from . import net_link, net_rules, net_sysctls

    with doing("network namespace"):
        entry = pb.netns_entry()
        if number and ctx.images.has(f"netns-{number}"):
            entry = ctx.images.read_one(f"netns-{number}")
        device = None
        if joined:
            fd = _open(joined[-1])
        elif entry.HasField("ext_key"):
            fd = _given(entry.ext_key, ctx)
        else:
            device = net_link.read_loopback(ctx.images, number)
            fd = netns.make()
        visit = ctx.memo["network namespace"] = netns.Visit(fd)
        ctx.undo.add("network namespace", lambda: _leave(visit, ctx))
        there = bool(joined) or entry.HasField("ext_key")
        if not there:
            net_sysctls.restore(entry, device, f"netns-{number}.img", weak=ctx.options.weak_sysctls)
            net_link.restore(ctx.images, number, entry, device)
            net_rules.restore(ctx.images, number)
        ctx.memo["network namespace numbers"] = number, snapshot.inventory.root_ids.net_ns_id
    if number and (there or not snapshot.inventory.HasField("torpor")):
        ctx.memo.setdefault("after_restore", []).append(lambda: _unlock(snapshot.inventory, there))


def _leave(visit: Visit, ctx: BuildContext) -> None:
    ctx.memo.pop("network namespace", None)
    visit.end()


def _open(where: str) -> int:
    """The namespace that --join-ns names: of a process or in a file. Raises UsageError."""
    try:
        return netns.of(int(where)) if where.isdigit() else os.open(where, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"--join-ns net:{where}: {error.strerror}") from None


def _given(key: str, ctx: BuildContext) -> int:
    fd = ctx.inherited.get(key)
    if fd is None:
        raise Unsupported(
            f"the snapshot leaves it to the caller, and none was given for `{key}`",
            hint=f"--inherit-fd fd[N]:{key}, or --join-ns net:FILE",
        )
    return os.dup(fd)


def _unlock(inventory: Message, there: bool) -> None:
    """The tasks are about to run: let their packets through. CRIU stores its lock among the rules of nftables."""
    from . import network_lock

    try:
        network_lock.lift(inventory.network_lock_method, inventory.dump_criu_run_id, whole=True)
    except TorporError as error:
        if there:
            raise
        log.warning(f"network lock: {error}")


def away(ctx: BuildContext) -> contextlib.AbstractContextManager[object]:
    """A context in which the calling thread is in the caller's network namespace."""
    visit: Visit | None = ctx.memo.get("network namespace")
    return visit.away() if visit is not None else contextlib.nullcontext()


def reopen(number: int, ctx: BuildContext) -> int:
    """A descriptor for the network namespace of this number in the images. Raises ImageError."""
    visit: Visit | None = ctx.memo.get("network namespace")
    if visit is None:
        return netns.own()
    own, host = ctx.memo["network namespace numbers"]
    if number == (own or host):
        return netns.own()
    if number != host:
        raise ImageError("files.img", "nsf.ns_id", f"{number} is no network namespace of the images")
    return visit.reopen_home()
