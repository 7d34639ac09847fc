"""Control groups, restored: groups that are missing are made before the first stub, and every stub is moved at birth.

At birth, because memory is charged to the group in which a task is when it first touches it. Groups that were made are
removed if the restore fails, and what was changed in others is put back. See cgroups.py for the dump.
"""

from __future__ import annotations

import errno
import os
import time

from .. import log
from ..errors import ImageError, Unsupported, doing
from ..images import schema as pb
from . import cgroup_fs as fs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..images.schema import Message
    from ..remote.program import Program
    from .base import BuildContext

IMAGE = "cgroup.img"
REMOVAL_S = 1.0  # a group stays busy for a moment after its last task has ended
#: Have to be set before there are tasks or groups in a group: as soon as it is made.
EARLY = frozenset((
    "cpuset.cpus", "cpuset.mems", "devices.list", "memory.kmem.limit_in_bytes", "memory.swappiness",
    "memory.oom_control", "memory.use_hierarchy",
))  # fmt: skip
#: Would hinder the restore: set when all tasks are there.
LATE = frozenset(("pids.max", "cpu.cfs_quota_us", "cpu.max"))
#: Would stop it: set when the tasks have been let go.
LAST = {"freezer.state": "FROZEN", "cgroup.freeze": "1"}
#: One record a write(2).
BY_LINE = frozenset(("io.max", "io.weight", "net_prio.ifpriomap"))
#: Newer kernels have no use for them, or do not have them any more.
GONE = frozenset((
    "memory.kmem.limit_in_bytes", "memory.kmem.tcp.limit_in_bytes", "memory.use_hierarchy",
    "memory.move_charge_at_immigrate",
))  # fmt: skip
ROOT = b"/"
CLONE_NEWCGROUP, SIGTRAP = 0x02000000, 5


class Groups:
    """The control groups of one restore."""

    def __init__(self, entry: Message, ctx: BuildContext) -> None:
        self.ctx = ctx
        self.mode: str = ctx.options.manage_cgroups
        self.hierarchies = fs.Hierarchies(ctx.options)
        ctx.undo.add("mounts of control groups", self.hierarchies.close)
        self.own = fs.own_groups()
        #: tid → RestoredThread
        self.threads: dict[int, Any] = {}
        #: set → hierarchy of this machine → path
        self.sets: dict[int, dict[str, bytes]] = {}
        #: The root's set → hierarchy → where it is to be when it makes a cgroup namespace of its own.
        self.roots: dict[int, dict[str, bytes]] = {}
        self.made: set[tuple[str, bytes]] = set()
        #: (hierarchy, path, entry) of what has properties to be set: all, when all groups exist, or at a later moment.
        self._chosen: list[tuple[str, bytes, Any]] = []
        self.late: list[tuple[str, bytes, Any]] = []
        self.last: list[tuple[str, bytes, Any]] = []
        self._checked: set[tuple[str, bytes]] = set()
        self._here = {name: self._hierarchies_here(list(name.split(","))) for name in _names(entry)}

    # ---------------------------------------------------------------- which hierarchy is which

    def _hierarchies_here(self, controllers: list[str]) -> list[str]:
        """The hierarchies here that stand for one of the snapshot's: controllers may be mounted together elsewhere."""
        found: list[str] = []
        missing = []
        for controller in controllers:
            name = next((name for name in self.own if controller in name.split(",")), None)
            if name is None:
                missing.append(controller)
            elif name not in found:
                found.append(name)
        return found + ([",".join(missing)] if missing else [])

    def here(self, name: str) -> list[str]:
        """See _hierarchies_here."""
        return self._here[name]

    def add_set(self, entry: Message) -> None:
        """Take over a cg_set_entry. Raises Unsupported where this machine has two hierarchies in one."""
        places = self.sets[entry.id] = {}
        for member in entry.ctls:
            for name in self.here(member.name):
                path = pb.get_bytes(member.path)
                if places.setdefault(name, path) != path:
                    raise Unsupported(
                        f"control groups of {name} are one hierarchy here, and tasks were in "
                        f"{_shown(name, places[name])} of one and {_shown(name, path)} of another",
                        hint="--cgroup-root",
                    )
                if member.cgns_prefix:
                    self.roots.setdefault(entry.id, {})[name] = path[: member.cgns_prefix]

    def root(self, name: str) -> int:
        """A hierarchy's root, open. Raises Unsupported where this machine cannot have it."""
        for controller in name.split(",") if name not in self.own else ():
            if controller.startswith("name=") or (controller and self._free(controller)):
                continue
            raise Unsupported(
                f"control groups of {controller or 'version 2'} are not to be had on this machine",
                hint="--manage-cgroups=ignore restores without them",
            )
        if name not in self.own:
            self.ctx.once(("hierarchy", name), lambda: self.ctx.on_failure.add(name, lambda: self._dissolve(name)))
        return self.hierarchies.root(name, create=name not in self.own)

    def _dissolve(self, name: str) -> None:
        """End a hierarchy that was made, after its groups have been removed.

        It ends with its last mount, unless a group that was removed is not quite gone at that moment; then it stays
        until there has been a mount again.
        """
        self.hierarchies.close()
        deadline = time.monotonic() + REMOVAL_S
        while not _within(REMOVAL_S / 5, lambda: name not in fs.own_groups()) and time.monotonic() < deadline:
            self.hierarchies.root(name)
            self.hierarchies.close()

    def _free(self, controller: str) -> bool:
        """Can a hierarchy of version 1 be made of it, without taking it from version 2?"""
        unified = fs.UNIFIED in self.own
        taken = fs.read_file(self.hierarchies.root(fs.UNIFIED), "cgroup.controllers").split() if unified else ()
        return controller not in taken and fs.kernel_has(controller)

    def open(self, name: str, path: bytes) -> int:
        """A group, open, for the caller to close."""
        return fs.open_group(self.root(name), path)

    # ---------------------------------------------------------------- making groups

    def _make(self, name: str, path: bytes, entry: Message) -> None:
        """Have the group of a cgroup_dir_entry and those below it, as the mode says."""
        if path != ROOT:
            with doing(f"control group `{_shown(name, path)}`"):
                new = self._have(name, path, entry)
            if new or self.mode in ("props", "full"):
                self._chosen.append((name, path, entry))
        for child in entry.children:
            self._make(name, path.rstrip(b"/") + b"/" + pb.get_bytes(child.dir_name), child)

    def make_all(self, entry: Message) -> None:
        """Make what is missing of all groups of a cgroup_entry, then set all that is to be set."""
        for controller in entry.controllers:
            for name in self.here(",".join(controller.cnames)):
                for top in controller.dirs:
                    self._make(name, _absolute(top.dir_name), top)
        for name, path, group in self._chosen:
            with doing(f"control group `{_shown(name, path)}`"):
                self._set_all(name, path, group)

    def _have(self, name: str, path: bytes, entry: Message) -> bool:
        """Make the group unless it is there; is it new?"""
        if (name, path) not in self.made and fs.exists(self.root(name), path.lstrip(b"/")):
            if self.mode == "strict" and not fs.is_below(self.own.get(name, ROOT), path):
                raise Unsupported("it exists", hint="--manage-cgroups=soft accepts that")
            return False
        if self.mode in ("none", "props"):
            raise Unsupported("it does not exist", hint="--manage-cgroups=soft makes it")
        steps = path.strip(b"/").split(b"/")
        for count in range(1, len(steps) + 1):
            self._mkdir(name, b"/" + b"/".join(steps[:count]))
        group = self.open(name, path)
        try:
            _set_permissions(group, entry.dir_perms if entry.HasField("dir_perms") else None)
            for prop in entry.properties:
                if (name and prop.name in EARLY) or prop.name == "cgroup.type":
                    self._set(name, path, group, prop)
        finally:
            os.close(group)
        return True

    def _mkdir(self, name: str, path: bytes) -> None:
        root = self.root(name)
        try:
            os.mkdir(path.lstrip(b"/"), 0o755, dir_fd=root)
        except FileExistsError:
            return
        self.made.add((name, path))
        self.ctx.on_failure.add(f"control group {_shown(name, path)}", lambda: _remove(root, path))
        if "cpuset" in name.split(","):
            self._copy_cpuset(name, path)

    def _copy_cpuset(self, name: str, path: bytes) -> None:
        """A new cpuset of version 1 has no processors, and then nobody can be in it or in those below it."""
        parent, group = self.open(name, _parent(path)), self.open(name, path)
        try:
            for file in ("cpuset.cpus", "cpuset.mems"):
                if not fs.read_file(group, file):
                    fs.write_file(group, file, fs.read_file(parent, file))
        finally:
            os.close(parent)
            os.close(group)

    # ---------------------------------------------------------------- properties

    def _set_all(self, name: str, path: bytes, entry: Message) -> None:
        group = self.open(name, path)
        try:
            if (name, path) not in self.made and entry.HasField("dir_perms"):
                self._keep_permissions(name, path, ".", os.fstat(group))
                _set_permissions(group, entry.dir_perms)
            for prop in entry.properties:
                if prop.name in LAST:
                    if prop.value == LAST[prop.name]:
                        self.last.append((name, path, prop))
                elif prop.name in LATE:
                    self.late.append((name, path, prop))
                elif prop.name != "cgroup.type" and not (name and prop.name in EARLY and (name, path) in self.made):
                    self._set(name, path, group, prop)
        finally:
            os.close(group)

    def set_late(self) -> None:
        """All tasks are there: set what would have hindered them."""
        for name, path, prop in self.late:
            with doing(f"control group `{_shown(name, path)}`"):
                group = self.open(name, path)
                try:
                    self._set(name, path, group, prop)
                finally:
                    os.close(group)

    def _set(self, name: str, path: bytes, group: int, prop: Message) -> None:
        """Give a property its value, owner and mode; nothing is written where it has that value already."""
        file = prop.name
        if not self._there(name, path, group, file):
            return
        if prop.HasField("perms"):
            if (name, path) not in self.made:
                self._keep_permissions(name, path, file, os.stat(file, dir_fd=group))
            _set_permissions(group, prop.perms, file)
        if file in fs.PERMISSIONS_ONLY or (file == "cgroup.type" and prop.value != "threaded"):
            return
        now = fs.value_of(group, file)
        if now == prop.value:
            return
        with doing(file):
            if file == "cgroup.subtree_control":
                for controller in prop.value.split():
                    self._enable(name, path, controller)
            _write(group, file, now, prop.value)
        if (name, path) not in self.made:
            self.ctx.on_failure.add(f"{file} of {_shown(name, path)}", lambda: self._put_back(name, path, file, now))

    def _there(self, name: str, path: bytes, group: int, file: str) -> bool:
        """Is there such a property? It may be another hierarchy's here, or of a controller that is to be enabled."""
        if fs.exists(group, file):
            return True
        controller = file.split(".")[0]
        if file in GONE or (name and controller in fs.V1_PROPERTIES and controller not in name.split(",")):
            return False
        if name == fs.UNIFIED and controller != "cgroup":
            with doing(file):
                self._enable(name, _parent(path), controller)
        if fs.exists(group, file):
            return True
        raise Unsupported(f"this kernel has no {file}", hint="--manage-cgroups=ignore restores without groups")

    def _enable(self, name: str, path: bytes, controller: str) -> None:
        """Have a controller of version 2 for the groups below ``path``; groups that were there stay as they are."""
        steps = path.strip(b"/").split(b"/") if path != ROOT else []
        for count in range(len(steps) + 1):
            above = b"/" + b"/".join(steps[:count])
            group = self.open(name, above)
            try:
                if controller in fs.read_file(group, "cgroup.subtree_control").split():
                    continue
                if (name, above) not in self.made:
                    raise Unsupported(
                        f"the controller {controller} is not enabled below `{above.decode(errors='replace')}`",
                        hint=f"write +{controller} to its cgroup.subtree_control",
                    )
                fs.write_file(group, "cgroup.subtree_control", f"+{controller}")
            finally:
                os.close(group)

    def _put_back(self, name: str, path: bytes, file: str, value: str) -> None:
        group = self.open(name, path)
        try:
            _write(group, file, fs.value_of(group, file), value)
        finally:
            os.close(group)

    def _keep_permissions(self, name: str, path: bytes, file: str, stat: os.stat_result) -> None:
        def put_back() -> None:
            group = self.open(name, path)
            try:
                os.chown(file, stat.st_uid, stat.st_gid, dir_fd=group)
                os.chmod(file, stat.st_mode & 0o7777, dir_fd=group)
            finally:
                os.close(group)

        self.ctx.on_failure.add(f"permissions of {file} of {_shown(name, path)}", put_back)

    # ---------------------------------------------------------------- moving tasks

    def _place(self, task: Any) -> dict[str, bytes]:
        """Where a RestoredTask is, hierarchy → path: that of its parent, if it is a zombie or a helper."""
        while task is not None:
            number = _set_of(task.core) if task.core is not None else 0
            if number:
                return self.sets.get(number, {})
            task = task.parent
        return {}

    def enter(self, tid: int, pid: int) -> None:
        """Move a thread that has just been born to where it belongs; it is stopped, ``pid`` is how we see it."""
        thread = self.threads.get(tid)
        if thread is None:
            return  # a helper: it stays with its parent
        task = thread.task
        first = thread is task.threads[0]
        before = self._place(task.parent if first else task)
        wanted = self.sets.get(_set_of(thread.core), {}) if _set_of(thread.core) else before
        if task.parent is None and first:
            wanted = {**wanted, **self.roots.get(_set_of(thread.core), {})}
        self._change(before, wanted, pid, whole=first)

    def enter_namespace(self, task: Any) -> None:
        """The root has made its cgroup namespace where its root is to be: move it on to where it belongs."""
        number = _set_of(task.core)
        wanted = self.sets[number]
        self._change({**wanted, **self.roots[number]}, wanted, task.live_pid, whole=True)

    def _change(self, before: dict[str, bytes], wanted: dict[str, bytes], pid: int, *, whole: bool) -> None:
        for name in {**before, **wanted}:
            path = wanted.get(name, self.own.get(name, ROOT))
            if path != before.get(name, self.own.get(name, ROOT)):
                with doing(f"control group `{_shown(name, path)}`"):
                    self._move(name, path, pid, whole=whole)

    def _move(self, name: str, path: bytes, pid: int, *, whole: bool) -> None:
        try:
            group = self.open(name, path)
        except FileNotFoundError:
            raise Unsupported("it does not exist", hint="--manage-cgroups=ignore does without it") from None
        try:
            if (name, path) not in self._checked:
                if fs.is_frozen(group, name):  # a stub would not run there
                    raise Unsupported("it is frozen", hint="thaw it first")
                self._checked.add((name, path))
            file = "cgroup.procs" if whole else "tasks" if name else "cgroup.threads"
            fs.write_file(group, file, str(pid))
        finally:
            os.close(group)

    def freeze(self) -> None:
        """The tasks have been let go: freeze the groups that were frozen. Failures can only be told."""
        for name, path, prop in self.last:
            try:
                with doing(f"control group `{_shown(name, path)}`"):
                    group = self.open(name, path)
                    try:
                        fs.write_file(group, prop.name, prop.value)
                    finally:
                        os.close(group)
            except Exception as error:
                log.warning(f"not frozen again: {error}")


def prepare(snapshot: Any, ctx: BuildContext) -> None:
    """Read cgroup.img, if there is one, and make the groups that are missing. Raises ImageError and Unsupported."""
    if ctx.options.manage_cgroups == "ignore":
        return
    entries = ctx.images.read_all("cgroup")
    root_set = snapshot.inventory.root_cg_set
    known = {one.id for entry in entries for one in entry.sets} | {0, root_set}
    for task in snapshot.tasks.values():
        for thread in task.threads:
            if _set_of(thread.core) not in known:
                raise ImageError(thread.image, "cg_set", f"there is no set {_set_of(thread.core)} in {IMAGE}")
    if not entries or not entries[0].sets:
        return
    entry = entries[0]
    _check(entry)
    _relocate(entry, ctx.options.cgroup_root)
    groups = ctx.memo["cgroups"] = Groups(entry, ctx)
    groups.threads = {thread.tid: thread for task in snapshot.tasks.values() for thread in task.threads}
    for one in entry.sets:
        if one.id != root_set:
            groups.add_set(one)
    groups.make_all(entry)
    ctx.memo.setdefault("after_mappings", []).append(groups.set_late)
    if _set_of(snapshot.root.core) in groups.roots:
        ctx.memo["cgroup namespace"] = groups


def emit_namespace(program: Program, pid: int, ctx: BuildContext) -> None:
    """Emit what the root of a tree with a cgroup namespace of its own does first: make it, and wait to be moved on."""
    if "cgroup namespace" in ctx.memo:
        program.call("unshare", CLONE_NEWCGROUP, why="a cgroup namespace of its own")
        program.call("tgkill", pid, pid, SIGTRAP, why="wait to be moved to its groups")


def entered_namespace(task: Any, ctx: BuildContext) -> bool:
    """Is this the stop of :func:`emit_namespace`, of the root? It has been moved on then. Asked once."""
    groups: Groups | None = ctx.memo.pop("cgroup namespace", None)
    if groups is None:
        return False
    groups.enter_namespace(task)
    return True


def enter(tid: int, pid: int, ctx: BuildContext) -> None:
    """Move a thread, stopped at its birth, to its control groups: ``tid`` in the images, ``pid`` as we see it."""
    groups: Groups | None = ctx.memo.get("cgroups")
    if groups is not None:
        groups.enter(tid, pid)


def freeze(ctx: BuildContext) -> None:
    """Freeze the groups that were frozen, after the tasks have been let go."""
    groups: Groups | None = ctx.memo.get("cgroups")
    if groups is not None:
        groups.freeze()


# ---------------------------------------------------------------------- the image


def _names(entry: Message) -> set[str]:
    return {member.name for one in entry.sets for member in one.ctls} | {
        ",".join(controller.cnames) for controller in entry.controllers
    }


def _check(entry: Message) -> None:
    """Names in the image must not lead out of a hierarchy. Raises ImageError."""
    for index, one in enumerate(entry.sets):
        for member in one.ctls:
            if not pb.get_bytes(member.path).startswith(b"/"):
                raise ImageError(IMAGE, f"sets[{index}]: {member.name}", "its path is not absolute")
            path, prefix = pb.get_bytes(member.path), member.cgns_prefix
            if prefix and (path + b"/")[prefix : prefix + 1] != b"/":
                raise ImageError(
                    IMAGE, f"sets[{index}]: {member.name}: cgns_prefix", f"{prefix} bytes of it are no group"
                )
            _check_steps(pb.get_bytes(member.path), f"sets[{index}]: {member.name}")
    for controller in entry.controllers:
        for top in controller.dirs:
            _check_dir(top, ",".join(controller.cnames))


def _check_dir(entry: Message, place: str) -> None:
    _check_steps(pb.get_bytes(entry.dir_name), place)
    for prop in entry.properties:
        if not prop.name or prop.name[0] == "." or "/" in prop.name or "\0" in prop.name:
            raise ImageError(IMAGE, f"{place}: {entry.dir_name}", f"{prop.name!r} is no property")
    for child in entry.children:
        if not child.dir_name:
            raise ImageError(IMAGE, place, "a group without a name")
        _check_dir(child, place)


def _check_steps(path: bytes, place: str) -> None:
    if b"\0" in path or any(step in (b".", b"..") for step in path.split(b"/")):
        raise ImageError(IMAGE, place, f"{path!r} is no path of a control group")


def _relocate(entry: Message, roots: tuple[tuple[str, str], ...]) -> None:
    """--cgroup-root: the trees of groups in the image begin elsewhere."""
    everywhere = next((path for controllers, path in reversed(roots) if not controllers), "")
    for controller in entry.controllers:
        chosen = [
            path for names, path in roots if names and any(name in controller.cnames for name in names.split(","))
        ]
        new = chosen[-1] if chosen else everywhere
        if not new:
            continue
        target = b"/" + os.fsencode(new).strip(b"/")
        members = [
            member for one in entry.sets for member in one.ctls if set(controller.cnames) <= set(member.name.split(","))
        ]
        # In a cgroup namespace of its own a tree knows everything below its root by name.
        known = [pb.get_bytes(member.path)[: member.cgns_prefix] for member in members if member.cgns_prefix]
        olds = known[:1] or [_absolute(top.dir_name) for top in controller.dirs]
        for member in members:
            pb.put_bytes(member, "path", _moved(pb.get_bytes(member.path), olds, target))
            if member.cgns_prefix:
                member.cgns_prefix = len(target)
        for top in controller.dirs:
            place = _moved(_absolute(top.dir_name), olds, target) if known else target
            pb.put_bytes(top, "dir_name", place.strip(b"/"))


def _moved(path: bytes, olds: list[bytes], new: bytes) -> bytes:
    """A path in one of the trees of groups ``olds``, when that is ``new``."""
    for old in sorted(olds, key=len, reverse=True):
        if path == old or path.startswith(old.rstrip(b"/") + b"/"):
            return b"/" + (new + path[len(old.rstrip(b"/")) :]).strip(b"/")
    return path


def _set_of(core: Message) -> int:
    """The set of a core_entry, 0 if it has none. Older images keep it elsewhere."""
    number: int = core.thread_core.cg_set if core.thread_core.HasField("cg_set") else core.tc.cg_set
    return number


def _absolute(name: str | bytes) -> bytes:
    return b"/" + pb.get_bytes(name).strip(b"/")


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0] or ROOT


def _shown(name: str, path: bytes) -> str:
    return f"{name}:{path.decode(errors='replace')}"


# ---------------------------------------------------------------------- files of a group


def _set_permissions(group: int, perms: Any, file: str = ".") -> None:
    if perms is None:
        return
    now = os.stat(file, dir_fd=group)
    if (now.st_uid, now.st_gid) != (perms.uid, perms.gid):
        os.chown(file, perms.uid, perms.gid, dir_fd=group)
    if now.st_mode & 0o7777 != perms.mode & 0o7777:
        os.chmod(file, perms.mode & 0o7777, dir_fd=group)


def _write(group: int, file: str, now: str, value: str) -> None:
    """Make a property ``value`` that is ``now`` another."""
    if file == "devices.list":  # what it says is denied or allowed a line at a time
        fs.write_file(group, "devices.deny", "a")
        for line in value.splitlines():
            fs.write_file(group, "devices.allow", line)
    elif file == "cgroup.subtree_control":
        before, after = set(now.split()), set(value.split())
        steps = [f"-{one}" for one in sorted(before - after)] + [f"+{one}" for one in sorted(after - before)]
        if steps:
            fs.write_file(group, file, " ".join(steps))
    elif file == "net_prio.ifpriomap":
        _write_priorities(group, file, now, value)
    elif file in BY_LINE:
        for line in value.splitlines():
            fs.write_file(group, file, line)
    else:
        try:
            fs.write_file(group, file, value)
        except OSError as error:
            # Linux kernel commit 58056f77502f ("memcg, kmem: further deprecate kmem.limit_in_bytes") (in v5.16)
            if error.errno != errno.EOPNOTSUPP or not file.startswith("memory.kmem."):
                raise


def _write_priorities(group: int, file: str, now: str, value: str) -> None:
    """Interfaces that are not here have no priority."""
    known = set(now.splitlines())
    here = {line.split(" ")[0] for line in known}
    for line in value.splitlines():
        if line not in known and line.split(" ")[0] in here:
            fs.write_file(group, file, line)


def _remove(root: int, path: bytes) -> None:
    def removed() -> bool:
        try:
            os.rmdir(path.lstrip(b"/"), dir_fd=root)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    if not _within(REMOVAL_S, removed):
        raise Unsupported(f"control group {path.decode(errors='replace')} is still busy")


def _within(seconds: float, condition: Callable[[], bool]) -> bool:
    """Does it come true within that time?"""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
