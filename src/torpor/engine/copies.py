"""What can be asked of a single copy: what stands behind its descriptors, where it runs, in which namespaces."""

from __future__ import annotations

import os

from ..errors import Unsupported, UsageError, doing
from ..images import schema as pb
from ..linux import netns
from ..linux.inet_diag import ESTABLISHED, IPPROTO_TCP
from ..model.snapshot import INIT_PID, RestoredTask, RestoredThread
from ..resources import generation, unix_remap
from ..resources.base import FileResource
from .overlays import Wanted
from .own_mounts import OwnMounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..images.schema import Message
    from ..model.snapshot import Snapshot
    from ..options import Options
    from ..remote.program import Program
    from ..resources.base import BuildContext
    from .own_mounts import Needed

CLONE_NEWUTS, CLONE_NEWNET = 0x4000000, 0x40000000
HOSTNAME_BYTES_MAX = 64
STANDARD = {"stdin": 0, "stdout": 1, "stderr": 2}


class CopyOptions:
    """How one copy differs from its siblings. Descriptors are the caller's, and stay open there.

    ``stdin``, ``stdout``, ``stderr``: descriptors that stand for what the root had there, wherever else the tree has
    it. ``files``: descriptors to have in addition, by their number in the root. ``cwd``: the root's working directory.
    ``hostname``: in a UTS namespace of its own. ``net``: "new" for a network namespace of its own, in which only the
    loopback interface is up, or the path of one. ``remap_address``: OLD=NEW, for sockets that the template has at OLD
    (resources/inet_remap.py, unix_remap.py). ``cgroup``: directories of control groups to run in.
    ``overlay``: directories in which what it writes is for it alone, in a tmpfs of ``overlay_size`` bytes (0: half of
    the memory) or in a new folder in ``overlay_upper``, removed when it has ended unless ``overlay_keep`` is set.
    ``fresh_pid``: no pid namespace: the one process has whatever pid is free, as if the program had forked.
    ``argument``: bytes for a program that takes some (torpor.guest).
    """

    __slots__ = (
        "argument", "cgroup", "cwd", "files", "fresh_pid", "hostname", "net", "overlays", "remap_address", "stderr",
        "stdin", "stdout",
    )  # fmt: skip

    def __init__(
        self, *, stdin: int | None = None, stdout: int | None = None, stderr: int | None = None,
        files: dict[int, int] | None = None, cwd: str = "", hostname: str = "", net: str = "",
        cgroup: tuple[str, ...] = (), fresh_pid: bool = False, argument: bytes = b"",
        remap_address: Sequence[str] = (), overlay: Sequence[str] = (), overlay_upper: str = "",
        overlay_size: int = 0, overlay_keep: bool = False,
    ) -> None:  # fmt: skip
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr
        self.files = files or {}
        self.cwd = cwd
        self.hostname = hostname
        self.net = net
        self.cgroup = cgroup
        self.fresh_pid = fresh_pid
        self.argument = argument
        self.remap_address = tuple(unix_remap.check(rule) for rule in remap_address)
        self.overlays = Wanted(overlay, upper=overlay_upper, size=overlay_size, keep=overlay_keep)
        generation.check(argument)
        if len(os.fsencode(hostname)) > HOSTNAME_BYTES_MAX:
            raise UsageError(f"a host name of {len(os.fsencode(hostname))} bytes: {HOSTNAME_BYTES_MAX} are the most")
        if fresh_pid and hostname:
            raise UsageError("a host name of its own needs a pid namespace of its own")


class Given(FileResource):
    """A description that the caller of a copy has made."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        """A descriptor for it."""
        return os.dup(self.fd)


class Wishes:
    """The options of one copy, applied to the snapshot for as long as it is made."""

    def __init__(
        self, options: CopyOptions, snapshot: Snapshot, ctx: BuildContext, overlays: Wanted, needed: Needed
    ) -> None:  # fmt: skip
        """``overlays`` are those of the copy, or else of all copies; ``needed``: what it has for itself besides."""
        self.options = options
        self.wanted = overlays
        self.needed = needed
        self.root = snapshot.root
        self.ctx = ctx
        self.net_fd = -1
        self.own_mounts: OwnMounts | None = None
        #: What of it goes into programs, beyond the numbers of descriptors.
        self.shape: tuple[object, ...] = (
            tuple(name for name in STANDARD if getattr(options, name) is not None),
            tuple(sorted(options.files)), options.cwd, overlays.dirs, options.remap_address,
        )  # fmt: skip

    def apply(self, snapshot: Snapshot) -> None:
        """Change what is to be built. Raises UsageError and KernelError; all of it is taken back with ctx.undo."""
        options = self.options
        if options.argument:
            self.ctx.memo["argument"] = options.argument
        given = {getattr(options, name): fd for name, fd in STANDARD.items() if getattr(options, name) is not None}
        if given or options.files:
            self.ctx.files = dict(self.ctx.files)
        for ours, fd in given.items():
            self._replace(fd, ours)
        if options.files:
            self._add_files(snapshot)
        if self.wanted or self.needed:
            self._make_mounts(snapshot)
        if options.cwd:
            self._move()
        if options.net:
            self._enter_net()
        if options.remap_address:
            self._remap()

    def _replace(self, fd: int, ours: int) -> None:
        file_id = next((file_id for number, file_id, _ in self.root.fds if number == fd), None)
        if file_id is None:
            raise UsageError(f"the root has no descriptor {fd} that another could stand for")
        self.ctx.files[file_id] = (Given(ours), pb.file_entry(id=file_id))

    def _add_files(self, snapshot: Snapshot) -> None:
        last = max((*self.ctx.files, *snapshot.files))
        before = self.root.fds
        extra = []
        for number, ours in sorted(self.options.files.items()):
            if not 0 <= number < self.ctx.first_free_fd:
                raise UsageError(f"descriptor {number} of a copy: it has to be below {self.ctx.first_free_fd}")
            last += 1
            self.ctx.files[last] = (Given(ours), pb.file_entry(id=last))
            extra.append((number, last, False))
        numbers = set(self.options.files)
        fds = [one for one in before if one[0] not in numbers] + extra
        sharers = [task for task in snapshot.tasks.values() if task.fds is before]

        def put(table: list[tuple[int, int, bool]]) -> None:
            for task in sharers:
                task.fds = table

        self.ctx.undo.add("additional descriptors", lambda: put(before))
        put(fds)

    def _move(self) -> None:
        before = self.root.fs
        entry = type(before)()
        entry.CopyFrom(before)
        entry.cwd_id = max(self.ctx.files) + 1
        try:
            fd = self._inside(lambda: os.open(self.options.cwd, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except OSError as error:
            raise UsageError(f"working directory `{self.options.cwd}`: {error.strerror}") from None
        self.ctx.memo["directory", entry.cwd_id] = self.ctx.keep(fd)
        self.ctx.undo.add("working directory", lambda: setattr(self.root, "fs", before))
        self.root.fs = entry

    def _make_mounts(self, snapshot: Snapshot) -> None:
        wanted = self.wanted
        if self.options.fresh_pid and wanted.upper and not wanted.keep:
            raise UsageError(
                f"nobody knows when the last process has ended that writes to {wanted.upper}, without a pid namespace",
                hint="--overlay-keep",
            )
        self.own_mounts = OwnMounts(wanted, self.needed, snapshot, self.ctx)

    def _inside(self, action: Callable[[], int]) -> int:
        """What ``action()`` gives where the copy's mounts are."""
        return action() if self.own_mounts is None else self.own_mounts.annex.run(action)

    def _enter_net(self) -> None:
        """Be in the copy's network namespace while its sockets are made."""
        back = netns.own()
        self.ctx.undo.add("descriptor of our network namespace", lambda: os.close(back))
        self.ctx.undo.add("network namespace", lambda: netns.enter(back))
        with doing(f"network namespace `{self.options.net}`"):
            if self.options.net == "new":
                netns.unshare()
                fd = netns.own()
            else:
                fd = os.open(self.options.net, os.O_RDONLY | os.O_CLOEXEC)
            self.ctx.undo.add("descriptor of the network namespace", lambda: os.close(fd))
            netns.enter(fd)
        self.net_fd = fd

    def _remap(self) -> None:
        """Let the sockets of this copy come up elsewhere; those of its siblings stay as the template has them."""
        ctx = self.ctx
        ctx.options = ctx.options.replace(remap_address=self.options.remap_address).freeze()
        ctx.files = dict(ctx.files)
        for key, value in list(ctx.memo.items()):
            if isinstance(key, tuple) and key[0] == "inet place":
                ctx.memo[key] = value.copy()
        own: dict[FileResource, list[Message]] = {}
        for file_id, (kind, entry) in list(ctx.files.items()):
            if kind.FIELD in ("isk", "usk"):
                mine = type(entry)()
                mine.CopyFrom(entry)
                own.setdefault(kind, []).append(mine)
                ctx.files[file_id] = kind, mine
        for kind, entries in own.items():
            kind.check_restore(entries, ctx)

    def emit(self, program: Program) -> None:
        """Emit what the copy's init does before it forks the root (or the root itself, without one)."""
        if self.options.hostname:
            name = os.fsencode(self.options.hostname)
            program.call("unshare", CLONE_NEWUTS, why="a host name of its own")
            program.call("sethostname", name, len(name))
        if self.net_fd >= 0:
            program.call("setns", self.net_fd, CLONE_NEWNET, why="network namespace")
        if self.own_mounts is not None:
            self.own_mounts.annex.emit(program, own_pids=not self.options.fresh_pid)

    @property
    def emits(self) -> bool:
        """Is there anything for :meth:`emit`?"""
        return bool(self.options.hostname) or self.net_fd >= 0 or self.own_mounts is not None

    def place(self, pid: int) -> None:
        """Put the copy's first process, which is stopped, into its control groups."""
        for path in self.options.cgroup:
            with doing(f"control group `{path}`"):
                fd = os.open(os.path.join(path, "cgroup.procs"), os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.write(fd, b"%d" % pid)
                finally:
                    os.close(fd)


def renumbered(task: RestoredTask, pid: int) -> RestoredTask:
    """The one process of a snapshot under another number, as if it had been dumped with it."""
    other = RestoredTask(
        pid, pid if task.group == task.pid else task.group, pid if task.session == task.pid else task.session
    )
    for name in ("core", "fds", "fs", "ids", "mm", "pages", "runs"):
        setattr(other, name, getattr(task, name))
    other.threads.append(RestoredThread(other, pid, task.core))
    return other


class Connections:
    """The established TCP connections of a snapshot. Each has one end, not one for each copy."""

    __slots__ = ("_found",)

    def __init__(self, snapshot: Snapshot, options: Options) -> None:
        self._found = [
            (entry.id, entry.isk.src_port)
            for entry in (snapshot.files.values() if not options.tcp_close else ())
            if entry.HasField("isk") and entry.isk.proto == IPPROTO_TCP and entry.isk.state == ESTABLISHED
        ]

    def check(self) -> None:
        """Raise Unsupported if there are any, and copies have no network namespace of their own."""
        for file_id, port in self._found:
            raise Unsupported(
                f"file {file_id}: an established TCP connection (port {port}) has one end, not many",
                hint="--tcp-close, or a network namespace for each copy",
            )


def check_fresh(snapshot: Snapshot) -> None:
    """Raise Unsupported when the tree would notice that its pid is another one."""
    root = snapshot.root
    why = ""
    if root.own_pid == INIT_PID:
        why = "it is process 1 of its pid namespace, to whom orphans come and whom few signals reach"
    elif len(snapshot.tasks) > 1:
        why = f"there are {len(snapshot.tasks)} processes, which know one another by their pids"
    elif len(root.threads) > 1:
        why = f"there are {len(root.threads)} threads, which know one another by their thread ids"
    elif any(timer.notify_thread_id for timer in root.core.tc.timers.posix):
        why = "a timer sends its signals to a thread by its thread id"
    for entry in snapshot.files.values():
        own = next((value for field, value in entry.ListFields() if field.name not in ("type", "id")), None)
        if own is None or why:
            continue
        if "fown" in own.DESCRIPTOR.fields_by_name and own.fown.pid:
            why = f"file {entry.id} sends signals to process {own.fown.pid}"
        elif "nspid" in own.DESCRIPTOR.fields_by_name:
            why = f"file {entry.id} stands for process {own.nspid}"
    if why:
        raise Unsupported(f"a copy cannot have a fresh pid: {why}", hint="leave it its own pids")
