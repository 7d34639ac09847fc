"""What stands in the way of a dump, all of it, found before anything is frozen."""

from __future__ import annotations

import os

from ..errors import Blockers, TaskGone, TorporError, Unsupported, UsageError
from ..linux import netns
from ..linux.kernel import pidfd_getfd
from ..model.source import Mapping, SourceTask
from ..proc import maps as proc_maps
from ..proc import smaps as proc_smaps
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import read
from ..resources import FileKinds, MappingKinds, cgroups, generation, ipc_space, net_namespace, sysv_ipc
from ..resources.base import DumpContext, MappingResource
from ..resources.files import tty
from . import collect, pid_spaces, threads
from . import home as homes
from .dump_files import open_source
from .dump_memory import mapping_trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, NoReturn

    from ..images.schema import Message
    from ..options import Options

PF_KTHREAD = 0x00200000
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE = 19, 21, 40
LOOKS_MAX = 5
NAMESPACES = {
    "pid": "pid_ns_id", "net": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id", "mnt": "mnt_ns_id",
    "user": "user_ns_id", "cgroup": "cgroup_ns_id", "time": "time_ns_id",
}  # fmt: skip
#: unshare(2) and setns(2) put only children into another one of these.
CHILDREN = ("pid", "time")
CHILDREN_HINT = "namespaces are not supported yet"


def set_namespace_ids(ids: Message, **own: int) -> None:
    """Number the namespaces of the host, which a tree without namespaces of its own lives in.

    ``own`` has the numbers of others that it is in, by kind.
    """
    for number, (kind, field) in enumerate(NAMESPACES.items(), 1):
        setattr(ids, field, own.get(kind) or number)


def check_target(pid: int) -> None:
    """Refuse what can never be dumped: ourselves, our ancestors, kernel threads, pid 1, a pid that does not exist."""
    if pid <= 0:
        raise UsageError(f"{pid} is no process id")
    try:
        stat = proc_stat.parse(read(pid, "stat"))
    except TaskGone:
        raise TaskGone(f"task {pid}: no such process") from None
    if stat.flags & PF_KTHREAD:
        raise Unsupported(f"task {pid} ({stat.comm.decode(errors='replace')}) is a kernel thread")
    if proc_status.parse(read(pid, "status")).Tgid != pid:
        raise UsageError(f"{pid} is a thread, not a process", hint="give the id of its process")
    if pid == 1:
        raise Unsupported("pid 1 is the init process of this system", hint="dump a process or a container instead")
    ancestor = os.getpid()
    if pid == ancestor:
        raise Unsupported("a process cannot dump itself", hint="dump it from another process")
    while ancestor > 1:
        ancestor = proc_stat.parse(read(ancestor, "stat")).ppid
        if ancestor == pid:
            raise Unsupported(f"task {pid} is an ancestor of this process", hint="run torpor from outside of its tree")
    if stat.state in "ZX" and stat.num_threads > 1:
        raise Unsupported(
            f"task {pid}: its main thread has ended while other threads go on", hint="such a process cannot be restored"
        )
    if stat.state in "ZX":
        raise Unsupported(f"task {pid} has ended already (a zombie)")
    check_privileges(pid)


def check_privileges(pid: int) -> None:
    """Refuse early when the kernel would refuse every step."""
    capabilities = proc_status.parse(read(os.getpid(), "status")).CapEff
    if not capabilities >> CAP_SYS_PTRACE & 1 or not capabilities >> CAP_SYS_ADMIN & 1:
        raise Unsupported(
            f"task {pid}: dumping needs CAP_SYS_PTRACE and CAP_SYS_ADMIN", hint="run as root, for example with sudo"
        )


def check_tree(pid: int, options: Options) -> None:
    """Raise Blockers with everything in the running tree that a dump would refuse. Nothing is changed or frozen."""
    found = blockers(pid, options, thorough=False)
    if found:
        refuse(found)


def refuse(found: list[TorporError]) -> NoReturn:
    """Raise what was found, in one error."""
    raise found[0] if len(found) == 1 else Blockers(found)


def blockers(
    pid: int, options: Options, *, thorough: bool = True, guests: list[tuple[int, int]] | None = None,
    hints: dict[Any, Any] | None = None,
) -> list[TorporError]:  # fmt: skip
    """Everything in the running tree that a dump would refuse, an error each.

    ``thorough`` looks also at the flags of all mappings. ``guests`` gets (pid, descriptor) of the pages of programs
    that know of snapshots, ``hints`` what a dump that follows may begin its searches with (DumpContext.hints).
    """
    ctx = DumpContext(options, None)
    ctx.hints = {} if hints is None else hints
    with netns.Visit(netns.of(pid)) as visit:
        ctx.memo["network namespace"] = visit
        return _blockers(pid, ctx, visit, thorough, guests)


def _blockers(
    pid: int, ctx: DumpContext, visit: netns.Visit, thorough: bool, guests: list[tuple[int, int]] | None
) -> list[TorporError]:
    """As blockers(), by a thread in the network namespace of the tree. Closes the context."""
    found: list[TorporError] = []
    options = ctx.options
    home = homes.find(pid)
    files, mappings = FileKinds(), MappingKinds()
    try:
        tree = collect.look(pid)
        ctx.memo["pids"] = list(tree)
        own = ctx.memo["own namespaces"] = {
            kind: os.stat(f"/proc/thread-self/ns/{kind}").st_ino
            for kind in NAMESPACES
            if kind != "pid"  # pid_spaces.py looks at those
        }
        # A tree may have one of its own, of which everything in it is seen from outside, too.
        own["cgroup"] = os.stat(f"/proc/{pid}/ns/cgroup").st_ino
        if home is not None:
            home.settle(ctx)
            own["mnt"] = home.inodes["mnt"]
            if ipc_space.is_whole(ctx):
                own["ipc"] = home.inodes["ipc"]
            found += _in_context(home.troubles(tree), pid)
        outside = tree[pid][1].session
        if outside not in tree and not options.shell_job:
            error = Unsupported(
                f"its session leader ({outside}) is not in the tree", hint="--shell-job dumps the job of a shell"
            )
            error.context.insert(0, f"task {pid}")
            found.append(error)
        if visit.elsewhere:
            try:
                net_namespace.check(visit, options)
            except Unsupported as error:
                error.context.insert(0, f"task {pid}")
                found.append(error)
        for one, (_, stat) in tree.items():
            if stat.state in "ZX":
                continue
            try:
                found += _task_blockers(one, ctx, files, mappings, thorough)
            except OSError:
                if _alive(one):
                    raise
            except TaskGone:
                continue  # it need not be dumped any more
        found += pid_spaces.check_running(tree, home, options.shell_job)
        found += tty.unpaired(ctx)
        stats = ((one, stat) for one, (_, stat) in tree.items() if stat.state not in "ZX" and stat.session == one)
        found += tty.unheld(((one, stat.tty_nr) for one, stat in stats), ctx)
        try:
            sysv_ipc.check(tree, ctx)
        except Unsupported as error:
            found.append(error)
        if guests is not None and options.guest:
            guests += ctx.memo.get("guests", ())
        return found
    finally:
        ctx.close()


def _in_context(errors: Iterable[TorporError], pid: int) -> list[TorporError]:
    found = list(errors)
    for error in found:
        error.context.insert(0, f"task {pid}")
    return found


def _alive(pid: int) -> bool:
    try:
        return proc_stat.parse(read(pid, "stat")).state not in "ZX"
    except TaskGone:
        return False


def _task_blockers(
    pid: int, ctx: DumpContext, files: FileKinds, mappings: MappingKinds, thorough: bool
) -> list[TorporError]:
    found: list[TorporError] = []

    def note(error: TorporError) -> None:
        error.context.insert(0, f"task {pid}")
        if str(error) not in map(str, found):  # of one file that has several descriptors
            found.append(error)

    status = proc_status.parse(read(pid, "status"))
    tracer = status.TracerPid
    if tracer:
        note(Unsupported(f"it is traced by process {tracer}", hint="detach the debugger or strace first"))
    for kind, own in ctx.memo["own namespaces"].items():
        if kind in CHILDREN and _of_children(pid, kind) != own:
            note(Unsupported(f"its children will have a {kind} namespace of their own", hint=CHILDREN_HINT))
        if os.stat(f"/proc/{pid}/ns/{kind}").st_ino == own:
            continue
        if kind in ("net", "cgroup"):
            name = {"net": "network"}.get(kind, kind)
            note(Unsupported(f"it is not in the {name} namespace of the root", hint="only one can be dumped yet"))
        else:
            note(Unsupported(f"it has a {kind} namespace of its own", hint="namespaces are not supported yet"))
    for trouble_of_threads in threads.troubles(pid):
        note(trouble_of_threads)
    try:
        cgroups.check(pid, ctx)
    except Unsupported as error:
        note(error)
    pidfd = os.pidfd_open(pid)
    try:
        for refused in _fd_troubles(pid, pidfd, ctx, files):
            note(refused)
    finally:
        os.close(pidfd)
    for mapping in live_mappings(pid) if thorough else _suspects(pid, ctx, mappings):
        trouble = mapping_trouble(mapping, served=("userfaultfd", pid) in ctx.memo)
        try:
            if trouble and not ("um" in mapping.flags and _is_served(mapping, pid, ctx)):  # a dump waits for that
                vma = mapping.vma
                raise Unsupported(f"mapping {vma.start:x}-{vma.end:x}: {trouble[0]}", hint=trouble[1])
            mappings.find(mapping).check(mapping, pid, ctx)
        except Unsupported as error:
            note(error)
    return found


def _of_children(pid: int, kind: str) -> int:
    """The inode of the namespace that a task's children will be in; 0 for one that nobody is in yet."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}_for_children").st_ino
    except FileNotFoundError:
        return 0


def _fd_troubles(pid: int, pidfd: int, ctx: DumpContext, files: FileKinds) -> list[TorporError]:
    """Why descriptors of a task cannot be dumped.

    The task runs: what is said of a descriptor that changes meanwhile, or of a socket that is younger than our list of
    all sockets, is not believed. Such ones are looked at anew, and once more when all stands.
    """
    troubles = _look_at(pid, ctx.descriptors.numbers(pid), pidfd, ctx, files)
    for _ in range(LOOKS_MAX):
        if not troubles:
            return []
        fresh = DumpContext(ctx.options, None)
        fresh.memo["network namespace"] = ctx.memo.get("network namespace")
        try:
            if "home" in ctx.memo:
                ctx.memo["home"].settle(fresh)
            fresh.memo["pids"] = list(collect.look(ctx.memo["pids"][0]))
            again = _look_at(pid, list(troubles), pidfd, fresh, files)
        finally:
            fresh.close()
        believed = {fd: trouble for fd, trouble in again.items() if trouble[0] == troubles[fd][0]}
        if len(believed) == len(again):
            return [error for _, error in believed.values()]
        troubles = again
    return []


def _look_at(
    pid: int, fds: list[int], pidfd: int, ctx: DumpContext, files: FileKinds
) -> dict[int, tuple[object, TorporError]]:
    """fd → (which file it is, why it cannot be dumped)."""
    found: dict[int, tuple[object, TorporError]] = {}
    table = ctx.descriptors.table(pid)
    seen: set[int] = set()  # a description that has several descriptors is looked at once
    for fd in fds:
        one = table.get(fd)
        if one is not None:
            if one.file in seen:
                continue
            seen.add(one.file)
        try:
            link = ctx.descriptors.link(pid, fd) if one is None else one.link
            if link in files.plain:
                files.expect(link)
                continue
            source = open_source(ctx, pid, fd, lambda fd=fd: pidfd_borrow(ctx, pidfd, pid, fd))  # type: ignore[misc]
            if generation.is_guest_page(source):
                ctx.memo.setdefault("guests", {})[pid, fd] = True
            try:
                net_namespace.check_socket(source, ctx)
                files.find(source).check(source, ctx)
            except TorporError as error:
                if isinstance(error, OSError):
                    raise
                found[fd] = (source.link, source.stat.st_dev, source.stat.st_ino), error
        except OSError:
            continue  # closed in the meantime
    return found


def _is_served(mapping: Mapping, pid: int, ctx: DumpContext) -> bool:
    """Is the memory still being brought in that a restore has left in the images, or has it been just now?"""
    key = "served", pid
    if key not in ctx.memo:
        from . import paging

        ctx.memo[key] = paging.is_served(pid)
    if ctx.memo[key]:
        return True
    now = {one.vma.start: one.flags for one in live_mappings(pid)}
    return "um" not in now.get(mapping.vma.start, ())


def _suspects(pid: int, ctx: DumpContext, mappings: MappingKinds) -> list[Mapping]:
    """Those mappings of a task that have to be looked at; asked once for all tasks with the same content of maps."""
    text = read(pid, "maps")
    key = "suspects", text
    if key not in ctx.memo:
        found = (Mapping(vma, frozenset()) for vma in proc_maps.parse(text))
        ctx.memo[key] = [mapping for mapping in found if _has_check(mapping, mappings)]
    suspects: list[Mapping] = ctx.memo[key]
    return suspects


def _has_check(mapping: Mapping, mappings: MappingKinds) -> bool:
    try:
        return type(mappings.find(mapping)).check is not MappingResource.check
    except Unsupported:
        return True


def quick_mappings(pid: int) -> list[Mapping]:
    """The mappings without their flags, which cost ten times as much; what they tell is looked at again when all
    stands.
    """
    return [Mapping(vma, frozenset()) for vma in proc_maps.parse(read(pid, "maps"))]


def live_mappings(pid: int) -> list[Mapping]:
    """The mappings of a running task."""
    flags = {start: names for start, _, names in proc_smaps.parse_flags(read(pid, "smaps"))}
    return [Mapping(vma, flags.get(vma.start, frozenset())) for vma in proc_maps.parse(read(pid, "maps"))]


def pidfd_borrow(ctx: DumpContext, pidfd: int, pid: int, fd: int) -> int:
    """A descriptor of ours for one of a running task."""
    key = ("borrowed", pid, fd)
    if key not in ctx.memo:
        ctx.memo[key] = pidfd_getfd(pidfd, fd)
        ctx.adopt(ctx.memo[key])
    return int(ctx.memo[key])


def check_frozen(tasks: dict[int, SourceTask]) -> None:
    """Refuse what can only be seen when the tree stands still: what processes share but cannot be made to share
    again.
    """
    for kind, what in (("vm", "memory"), ("sighand", "signal handlers"), ("fs", "root and working directory")):
        seen: dict[int, int] = {}
        for task in tasks.values():
            if task.zombie:
                continue
            other = seen.setdefault(task.ids[kind], task.pid)
            if other != task.pid and kind != "fs":
                raise Unsupported(
                    f"tasks {other} and {task.pid} are different processes that share their {what}",
                    hint="wait until the vfork(2) child has called exec",
                )
