"""Hierarchies of control groups, opened in private mounts, and the files in them that say how a group is set up.

A mount of our own always shows the whole hierarchy (as far as our cgroup namespace goes), read-write, whether or not
and how it is mounted for others; it is attached nowhere and goes with its descriptor. Kernel:
kernel/cgroup/cgroup-v1.c, cgroup1_parse_param(), cgroup1_get_tree().
"""

from __future__ import annotations

import os

from ..errors import KernelError, Unsupported, UsageError
from ..linux.call import call
from ..proc.read import read, read_system

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message

FSOPEN_CLOEXEC = FSMOUNT_CLOEXEC = 1
SET_FLAG, SET_STRING, CMD_CREATE = 0, 1, 6  # FSCONFIG_*, uapi/linux/mount.h
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
#: The name of version 2 in /proc/PID/cgroup and in images.
UNIFIED = ""

#: What sets a group up, by controller of version 1, in the order in which it has to be set.
V1_PROPERTIES = {
    "cpu": "cpu.shares cpu.cfs_period_us cpu.cfs_quota_us cpu.rt_period_us cpu.rt_runtime_us",
    "memory": "memory.limit_in_bytes memory.memsw.limit_in_bytes memory.swappiness memory.soft_limit_in_bytes "
    "memory.move_charge_at_immigrate memory.oom_control memory.use_hierarchy memory.kmem.limit_in_bytes "
    "memory.kmem.tcp.limit_in_bytes",
    "cpuset": "cpuset.cpus cpuset.mems cpuset.memory_migrate cpuset.cpu_exclusive cpuset.mem_exclusive "
    "cpuset.mem_hardwall cpuset.memory_spread_page cpuset.memory_spread_slab cpuset.sched_load_balance "
    "cpuset.sched_relax_domain_level",
    "blkio": "blkio.weight",
    "net_cls": "net_cls.classid",
    "net_prio": "net_prio.ifpriomap",
    "pids": "pids.max",
    "devices": "devices.list",
}
V1_GENERAL = "cgroup.clone_children notify_on_release cgroup.procs tasks"
V2_GENERAL = (
    "cgroup.subtree_control cgroup.max.descendants cgroup.max.depth cgroup.freeze cgroup.type cgroup.procs "
    "cgroup.threads"
)
#: Of version 2, stored where they are not what a new group has. CRIU stores none of these, and restores them.
V2_PROPERTIES = {
    "memory.max": "max", "memory.high": "max", "memory.low": "0", "memory.min": "0", "memory.swap.max": "max",
    "memory.oom.group": "0", "pids.max": "max", "cpu.weight": "100", "cpu.idle": "0", "cpu.max": "max 100000",
    "cpu.max.burst": "0", "io.max": "", "io.weight": "default 100", "cpuset.cpus": "", "cpuset.mems": "",
    "cpuset.cpus.partition": "member",
}  # fmt: skip
#: Files of which only the owner and mode matter.
PERMISSIONS_ONLY = frozenset(("cgroup.procs", "cgroup.threads", "tasks"))


def groups_of(text: bytes, chosen: tuple[str, ...] = ()) -> dict[str, bytes]:
    """/proc/PID/cgroup as name of the hierarchy ("cpu,cpuacct", "name=systemd", "") → path, sorted as CRIU does.

    ``chosen`` are the names of those that are wanted, if not all are.
    """
    from ..proc import cgroup as proc_cgroup

    found = {",".join(one.controllers): one.path for one in proc_cgroup.parse(text)}
    return {name: found[name] for name in sorted(found) if not chosen or name in chosen}


def own_groups() -> dict[str, bytes]:
    """Where we are ourselves, see :func:`groups_of`."""
    return groups_of(read(os.getpid(), "cgroup"))


class Hierarchies:
    """Opens the roots of hierarchies by name and keeps them open until close()."""

    def __init__(self, options: Any) -> None:
        self.yard = options.cgroup_yard
        if self.yard:
            self.yard = os.path.join(options.work_dir or options.images_dir, self.yard)
        self._roots: dict[str, int] = {}

    def root(self, name: str, *, create: bool = False) -> int:
        """The root of a hierarchy, open; it is ours. ``create``: a hierarchy of version 1 that is not there is made.

        Raises KernelError, and UsageError for a yard that lacks it.
        """
        if name not in self._roots:
            self._roots[name] = self._in_yard(name) if self.yard else self._open(name, create)
        return self._roots[name]

    def close(self) -> None:
        """Close all; mounts of our own go with that, and hierarchies without groups that nobody else has mounted."""
        while self._roots:
            os.close(self._roots.popitem()[1])

    def _in_yard(self, name: str) -> int:
        place = os.path.join(self.yard, name.removeprefix("name=") or "unified")
        try:
            return os.open(place, DIRECTORY)
        except OSError as error:
            raise UsageError(f"--cgroup-yard: `{place}`: {error.strerror}") from None

    def _open(self, name: str, create: bool) -> int:
        try:
            return _mount(name, create)
        except KernelError as error:
            visible = _mounted(name)
            if visible < 0:
                error.context.insert(0, f"hierarchy `{name or 'cgroup2'}`")
                raise
            return visible


def _mount(name: str, create: bool) -> int:
    context = call("fsopen", b"cgroup\0" if name else b"cgroup2\0", FSOPEN_CLOEXEC)
    try:
        controllers = name.split(",") if name else []
        for controller in controllers:
            if controller.startswith("name="):
                call("fsconfig", context, SET_STRING, b"name\0", controller[5:].encode() + b"\0", 0)
            else:
                call("fsconfig", context, SET_FLAG, controller.encode() + b"\0", None, 0)
        if create and controllers and all(one.startswith("name=") for one in controllers):
            call("fsconfig", context, SET_FLAG, b"none\0", None, 0)
        call("fsconfig", context, CMD_CREATE, None, None, 0)
        return call("fsmount", context, FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def _mounted(name: str) -> int:
    """The root of a hierarchy where it is mounted for us, open; -1 if it is not."""
    from ..proc import mountinfo

    wanted = {name.encode()} if name.startswith("name=") else set(name.encode().split(b","))
    for mount in mountinfo.parse(read(os.getpid(), "mountinfo")):
        fits = mount.fstype == b"cgroup2" if not name else (
            mount.fstype == b"cgroup" and wanted <= set(mount.super_options.split(b","))
        )  # fmt: skip
        if fits and mount.root == b"/":
            try:
                return os.open(mount.mountpoint, DIRECTORY)
            except OSError:
                continue
    return -1


def kernel_has(controller: str) -> bool:
    """Is it a controller of this kernel, enabled and in no hierarchy of version 1 so far?"""
    for line in read_system("cgroups").splitlines()[1:]:
        name, hierarchy, _, enabled = line.split()
        if name == controller.encode():
            return enabled == b"1" and hierarchy == b"0"
    return False


# ---------------------------------------------------------------------- one group


def open_group(root: int, path: bytes) -> int:
    """A group's directory, open; ``path`` is from the root of the hierarchy. Raises OSError."""
    return os.open(path.lstrip(b"/") or b".", DIRECTORY, dir_fd=root)


def is_below(path: bytes, other: bytes) -> bool:
    """Is the group that other one, or below it?"""
    return path == other or path.startswith(other.rstrip(b"/") + b"/")


def read_file(group: int, name: str) -> str:
    """What a file of a group says, without the last newline; KeyError if there is none. Raises OSError."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=group)
    except FileNotFoundError:
        raise KeyError(name) from None
    try:
        text = b""
        while part := os.read(fd, 1 << 16):
            text += part
    finally:
        os.close(fd)
    return text.decode(errors="replace").removesuffix("\n")


def write_file(group: int, name: str, text: str) -> None:
    """Write to a file of a group, in one write(2). Raises OSError."""
    fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=group)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def property_names(name: str, known: dict[str, list[str]]) -> list[str]:
    """The files that set up groups of a hierarchy, in order; ``known`` are those of each controller, "" version 2's."""
    own = [file for controller in name.split(",") for file in known.get(controller, ())]
    return V2_GENERAL.split() + own if name == UNIFIED else own + V1_GENERAL.split()


def known_properties(options: Any) -> dict[str, list[str]]:
    """The properties of each controller, with what --cgroup-props and --cgroup-props-file say. Raises UsageError."""
    known = {controller: files.split() for controller, files in V1_PROPERTIES.items()}
    known[UNIFIED] = list(V2_PROPERTIES)
    if options.cgroup_props:
        _add_properties(known, options.cgroup_props, "--cgroup-props")
    if options.cgroup_props_file:
        place = os.path.join(options.work_dir or options.images_dir, options.cgroup_props_file)
        try:
            with open(place) as file:
                text = file.read()
        except (OSError, ValueError) as error:
            raise UsageError(f"--cgroup-props-file: `{place}`: {error}") from None
        _add_properties(known, text, "--cgroup-props-file")
    return known


def _add_properties(known: dict[str, list[str]], text: str, option: str) -> None:
    """Three lines a controller, all names in quotes: ``"cpu":``, ``- "strategy": "merge"`` (or "replace"),
    ``- "properties": ["cpu.shares", …]``.
    """
    import json

    controller, strategy = "", ""
    for line in text.splitlines():
        words = line.strip()
        key, colon, rest = words.removeprefix("-").strip().partition('":')
        try:
            name, value = json.loads(key + '"'), json.loads(rest) if rest.strip() else None
        except ValueError:
            name, value = "", None
        if not words:
            continue
        if colon and name and value is None and words[0] != "-":
            controller, strategy = name, ""
        elif controller and name == "strategy" and value in ("merge", "replace"):
            strategy = value
        elif strategy and name == "properties" and _are_files(value):
            known[controller] = [*(known.get(controller, ()) if strategy == "merge" else ()), *(value or ())]
            controller = ""
        else:
            raise UsageError(f"{option}: cannot read `{words}`")


def _are_files(names: object) -> bool:
    return isinstance(names, list) and all(isinstance(one, str) and one and "/" not in one for one in names)


def value_of(group: int, name: str) -> str:
    """A property as it is stored, which is also what is written to have it again; KeyError if it is not there."""
    if name in PERMISSIONS_ONLY:
        if not exists(group, name):
            raise KeyError(name)
        return ""
    text = read_file(group, name)
    if name == "memory.oom_control":
        return text.split()[1] if text.startswith("oom_kill_disable ") else "0"
    return text


def exists(group: int, name: str | bytes) -> bool:
    """Is there a file or a group below with that name?"""
    try:
        os.stat(name, dir_fd=group)
    except FileNotFoundError:
        return False
    return True


def put_permissions(perms: Message, stat: os.stat_result) -> None:
    """Fill in a cgroup_perms."""
    perms.mode, perms.uid, perms.gid = stat.st_mode, stat.st_uid, stat.st_gid


def is_frozen(group: int, name: str) -> bool:
    """Is a group frozen, or one that it is in? ``name`` is that of its hierarchy."""
    file = "freezer.state" if name else "cgroup.events"
    state = read_file(group, file) if exists(group, file) else ""
    return state in ("FROZEN", "FREEZING") or "frozen 1" in state.splitlines()


def refuse_outside(name: str, path: bytes) -> None:
    """Raise Unsupported for a group that our cgroup namespace does not show."""
    if path.startswith(b"/.."):
        raise Unsupported(
            f"control group `{name}:{path.decode(errors='replace')}` is outside of our cgroup namespace",
            hint="run torpor in the cgroup namespace of the host",
        )
