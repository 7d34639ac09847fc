"""Control groups: where the threads of a tree are, and how those groups are set up. Image: cgroup.img.

A set is where a thread is in every hierarchy. Threads in the set that we are in ourselves stay with whoever restores
them; nothing is written if that is all. A tree may have a cgroup namespace of its own: what it takes for the root of a
hierarchy is where the namespace was made. Restore: cgroups_build.py. Kernel: kernel/cgroup/cgroup.c, namespace.c.
"""

from __future__ import annotations

import errno
import os

from ..errors import Unsupported, doing
from ..images import schema as pb
from ..linux.call import call
from ..proc.read import read
from . import cgroup_fs as fs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from .base import DumpContext

#: The number of our own set: inventory.root_cg_set.
OWN_SET = 1
#: The number of a tree's own namespace in the images, behind those of the host's and the network's.
NUMBER = 10
CLONE_NEWCGROUP = 0x02000000


class _Sets:
    """The sets found so far, numbered. ``roots``: what the tree's own namespace shows as the roots of hierarchies."""

    def __init__(self, options: Any, roots: dict[str, bytes]) -> None:
        self.options = options
        self.properties = fs.known_properties(options)
        self.own = read(os.getpid(), "cgroup")
        self.numbers: dict[bytes, int] = {}
        self.sets: list[dict[str, bytes]] = []  # set n is at n - 1
        self.roots: dict[str, bytes] = {}
        self.number(self.own)
        self.roots = roots
        if roots:  # seen from another namespace our set is not ours any more
            self.numbers.clear()

    def number(self, text: bytes) -> int:
        """The set of a /proc/PID/cgroup."""
        known = self.numbers.get(text)
        if known is None:
            groups = fs.groups_of(text, self.options.cgroup_dump_controller)
            known = next((n for n, one in enumerate(self.sets, 1) if one == groups and (n > 1 or not self.roots)), 0)
            if not known:
                self.sets.append(groups)
                known = len(self.sets)
            self.numbers[text] = known
        return known


def is_own(pid: int) -> bool:
    """Has a task another cgroup namespace than we have?"""
    return os.stat(f"/proc/{pid}/ns/cgroup").st_ino != os.stat("/proc/thread-self/ns/cgroup").st_ino


def roots(pid: int) -> dict[str, bytes]:
    """What a task's cgroup namespace shows as the roots of hierarchies: name → path. Raises Unsupported.

    The calling thread looks from inside: what it does not see of a path any more lies above the root.
    """
    whole = fs.groups_of(read(pid, "cgroup"))
    back = os.open("/proc/thread-self/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/proc/{pid}/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
        try:
            call("setns", there, CLONE_NEWCGROUP)
            try:
                seen = fs.groups_of(read(pid, "cgroup"))
            finally:
                call("setns", back, CLONE_NEWCGROUP)
        finally:
            os.close(there)
    finally:
        os.close(back)
    found = {}
    for name, path in whole.items():
        inside = seen[name].rstrip(b"/")
        if not path.endswith(inside) or inside.startswith(b"/.."):
            raise Unsupported(
                f"it is in the control group `{name}:{path.decode(errors='replace')}`, outside of the root of its "
                "cgroup namespace",
                hint="move it back into a group below that root",
            )
        found[name] = path[: len(path) - len(inside)] or b"/"
    return found


def check(pid: int, ctx: DumpContext) -> None:
    """Raise Unsupported for a frozen task: it cannot run the few calls that a dump needs of it.

    And UsageError for options that cannot be read.
    """
    own = ctx.memo.get("own control groups")
    if own is None:
        fs.known_properties(ctx.options)
        own = ctx.memo["own control groups"] = read(os.getpid(), "cgroup")
    if is_own(pid):
        roots(pid)
    text = read(pid, "cgroup")
    if text == own:
        return  # we run there, so it is not frozen
    seen = ctx.memo.setdefault("frozen control groups", {})
    if text not in seen:
        seen[text] = _frozen(fs.groups_of(text), ctx.options)
    if seen[text]:
        raise Unsupported(f"its control group `{seen[text]}` is frozen", hint="thaw it first")


def _frozen(groups: dict[str, bytes], options: Any) -> str:
    """The one of a task's groups that is frozen; empty if none is."""
    hierarchies = fs.Hierarchies(options)
    try:
        for name, path in groups.items():
            if path != b"/" and not path.startswith(b"/..") and (not name or "freezer" in name.split(",")):
                group = fs.open_group(hierarchies.root(name), path)
                try:
                    if fs.is_frozen(group, name):
                        return f"{name}:{path.decode(errors='replace')}"
                finally:
                    os.close(group)
        return ""
    finally:
        hierarchies.close()


def dump_thread(thread: Any, core: Message, ctx: DumpContext) -> None:
    """Note the set of a SourceThread in its core_entry."""
    sets = _sets(ctx)
    core.thread_core.cg_set = sets.number(read(thread.task.pid, f"task/{thread.tid}/cgroup"))


def _sets(ctx: DumpContext) -> _Sets:
    if "cgroups" not in ctx.memo:
        root = next(iter(ctx.tasks))
        ctx.memo["cgroups"] = _Sets(ctx.options, roots(root) if is_own(root) else {})
    found: _Sets = ctx.memo["cgroups"]
    return found


def finish(ctx: DumpContext) -> None:
    """Write cgroup.img, if any thread is in another set than ours."""
    sets = _sets(ctx)
    if len(sets.sets) == OWN_SET:
        return
    entry = pb.cgroup_entry()
    for number, groups in enumerate(sets.sets, 1):
        if number != OWN_SET:
            _put_set(entry.sets.add(id=number), groups, sets.roots)
    hierarchies = fs.Hierarchies(ctx.options)
    try:
        for name in sorted({name for groups in sets.sets for name in groups}):
            with doing(f"control groups of `{name or 'cgroup2'}`"):
                _put_hierarchy(entry, name, sets, hierarchies)
    finally:
        hierarchies.close()
    ctx.images.write_one("cgroup", entry)


def _put_set(entry: Message, groups: dict[str, bytes], roots: dict[str, bytes]) -> None:
    for name, path in groups.items():
        fs.refuse_outside(name, path)
        member = entry.ctls.add(name=name)
        pb.put_bytes(member, "path", path)
        root = roots.get(name, b"/")
        if not fs.is_below(path, root):
            raise Unsupported(
                f"a task is in the control group `{name}:{path.decode(errors='replace')}`, outside of the root of its "
                "cgroup namespace",
                hint="move it back into a group below that root",
            )
        if root != b"/":
            member.cgns_prefix = len(root)


def _put_hierarchy(entry: Message, name: str, sets: _Sets, hierarchies: fs.Hierarchies) -> None:
    controller = entry.controllers.add(is_threaded=False)
    controller.cnames.extend(name.split(","))
    if sets.options.manage_cgroups == "ignore":
        return
    own = sets.sets[OWN_SET - 1].get(name, b"/")
    paths = {groups[name] for groups in sets.sets[OWN_SET:] if name in groups}
    top = _given_root(name, sets.options)
    tops: list[bytes] = []
    for path in sorted({top, *paths} if top else paths):
        if not any(fs.is_below(path, other) for other in tops):
            tops.append(path)
    for path in tops:
        head = controller.dirs.add()
        pb.put_bytes(head, "dir_name", path.strip(b"/"))
        if path == b"/":
            continue  # it is there on every machine, and all other groups are below it
        group = fs.open_group(hierarchies.root(name), path)
        try:
            # Groups below ours or below an ancestor of ours are, for the most part, not the tree's.
            deep = path == top or not fs.is_below(own, path)
            names = fs.property_names(name, sets.properties)
            controller.is_threaded |= _put_group(head, group, names, deep=deep)
        finally:
            os.close(group)


def _given_root(name: str, options: Any) -> bytes:
    """Which group is dumped with all below it, by --cgroup-root; empty if that was not said."""
    chosen = ""
    for controllers, path in options.cgroup_root:
        if set(controllers.split(",")) & set(name.split(",")) - {""} or not (controllers or chosen):
            chosen = path
    return b"/" + os.fsencode(chosen).strip(b"/") if chosen else b""


def _put_group(entry: Message, group: int, names: list[str], *, deep: bool) -> bool:
    """Fill in a cgroup_dir_entry but its name: the properties ``names``, the groups below it if ``deep``.

    Returns whether any is for threads.
    """
    fs.put_permissions(entry.dir_perms, os.fstat(group))
    threaded = False
    for prop in names:
        try:
            value = fs.value_of(group, prop)
        except KeyError:
            continue  # this kernel does not have it
        if "tasks" not in names and value == fs.V2_PROPERTIES.get(prop):
            continue
        stat = os.stat(prop, dir_fd=group)
        if prop == "cgroup.threads" and (stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (0, 0, 0o644):
            continue  # CRIU would not know what to do with it
        threaded |= prop == "tasks" or (prop == "cgroup.type" and value == "threaded")
        fs.put_permissions(entry.properties.add(name=prop, value=value).perms, stat)
    if deep:
        for below in sorted(one.name for one in os.scandir(group) if one.is_dir(follow_symlinks=False)):
            threaded |= _put_below(entry, group, os.fsencode(below), names)
    return threaded


def _put_below(entry: Message, group: int, below: bytes, names: list[str]) -> bool:
    try:
        fd = os.open(below, fs.DIRECTORY, dir_fd=group)
    except FileNotFoundError:  # removed by somebody just now
        return False
    try:
        child = entry.children.add()
        pb.put_bytes(child, "dir_name", below)
        return _put_group(child, fd, names, deep=True)
    except OSError as error:
        if error.errno not in (errno.ENODEV, errno.ENOENT):
            raise
        del entry.children[-1]
        return False
    finally:
        os.close(fd)
