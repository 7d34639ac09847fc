"""What stands in the way of a dump, all of it, found before anything is frozen."""

from __future__ import annotations

import os

from ..errors import Blockers, TaskGone, TorporError, Unsupported, UsageError, doing
from ..linux.kernel import pidfd_getfd
from ..model.source import Mapping, SourceTask
from ..proc import maps as proc_maps
from ..proc import smaps as proc_smaps
from ..proc import stat as proc_stat
from ..proc import status as proc_status
from ..proc.read import numbers, read
from ..resources import FileKinds, MappingKinds, cgroups
from ..resources.base import DumpContext, MappingResource
from ..resources.files import tty
from . import collect
from .dump_files import open_source
from .dump_memory import mapping_trouble

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..images.schema import Message
    from ..options import Options

PF_KTHREAD = 0x00200000
CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE = 19, 21, 40
NAMESPACES = {
    "pid": "pid_ns_id", "net": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id", "mnt": "mnt_ns_id",
    "user": "user_ns_id", "cgroup": "cgroup_ns_id", "time": "time_ns_id",
}  # fmt: skip


def set_namespace_ids(ids: Message) -> None:
    """Number the namespaces of the host, which a tree without namespaces of its own lives in."""
    for number, field in enumerate(NAMESPACES.values(), 1):
        setattr(ids, field, number)


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
    ancestor = os.getpid()
    if pid == ancestor:
        raise Unsupported("a process cannot dump itself", hint="dump it from another process")
    while ancestor > 1:
        ancestor = proc_stat.parse(read(ancestor, "stat")).ppid
        if ancestor == pid:
            raise Unsupported(f"task {pid} is an ancestor of this process", hint="run torpor from outside of its tree")
    if pid == 1:
        raise Unsupported("pid 1 is the init process of this system", hint="dump a process or a container instead")
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
        raise found[0] if len(found) == 1 else Blockers(found)


def blockers(pid: int, options: Options, *, thorough: bool = True) -> list[TorporError]:
    """Everything in the running tree that a dump would refuse, an error each.

    ``thorough`` looks also at the flags of all mappings.
    """
    found: list[TorporError] = []
    ctx = DumpContext(options, None)
    files, mappings = FileKinds(), MappingKinds()
    try:
        tree = collect.look(pid)
        ctx.memo["pids"] = list(tree)
        outside = tree[pid][1].session
        if outside not in tree and not options.shell_job:
            error = Unsupported(
                f"its session leader ({outside}) is not in the tree", hint="--shell-job dumps the job of a shell"
            )
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
        found += tty.unpaired(ctx)
        return found
    finally:
        ctx.close()


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
        found.append(error)

    status = proc_status.parse(read(pid, "status"))
    tracer = status.TracerPid
    if tracer:
        note(Unsupported(f"it is traced by process {tracer}", hint="detach the debugger or strace first"))
    if "own namespaces" not in ctx.memo:
        ctx.memo["own namespaces"] = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in NAMESPACES}
    for kind, own in ctx.memo["own namespaces"].items():
        if os.stat(f"/proc/{pid}/ns/{kind}").st_ino != own:
            note(Unsupported(f"it has a {kind} namespace of its own", hint="namespaces are not supported yet"))
    try:
        cgroups.check(pid, ctx)
    except Unsupported as error:
        note(error)
    pidfd = os.pidfd_open(pid)
    try:
        for fd in numbers(pid, "fd"):
            try:
                with doing(f"fd {fd}"):
                    source = open_source(pid, fd, lambda fd=fd: pidfd_borrow(ctx, pidfd, pid, fd))  # type: ignore[misc]
                    files.find(source).check(source, ctx)
            except TorporError as error:
                if isinstance(error, OSError):
                    continue  # closed in the meantime
                error.context[:] = [text for text in error.context if text != f"fd {fd}"]
                note(error)
    finally:
        os.close(pidfd)
    for mapping in live_mappings(pid) if thorough else _suspects(pid, ctx, mappings):
        trouble = mapping_trouble(mapping)
        try:
            if trouble:
                vma = mapping.vma
                raise Unsupported(f"mapping {vma.start:x}-{vma.end:x}: {trouble[0]}", hint=trouble[1])
            mappings.find(mapping).check(mapping, pid, ctx)
        except Unsupported as error:
            note(error)
    return found


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
