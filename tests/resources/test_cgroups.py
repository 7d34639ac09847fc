"""Control groups: tasks come back in theirs, and groups that were removed in between come back as they were.

In groups of the tests' own: of version 2, of a named hierarchy that exists only for the test, and of controllers of
version 1 where the machine has them. Membership is what /proc says of the tasks.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from kit import Library, Targets, wait_until
from kit.files import slurp_text
from kit.target import Target
from torpor.errors import ImageError, TorporError, UsageError
from torpor.images import schema as pb
from torpor.images.store import ImageReader
from torpor.resources import cgroup_fs, cgroups_build

NAME = f"torpor-test-{os.getpid()}"

THREADS = """
static void *sleeper(void *file)
{
	tell(file, "");
	for (;;) pause();
}
int main(void)
{
	pthread_t one, two;

	if (fork() == 0)
		for (;;) pause();
	pthread_create(&one, 0, sleeper, "one");
	pthread_create(&two, 0, sleeper, "two");
	while (!told("one") || !told("two"))
		usleep(1000);
	ready();
	for (;;) pause();
}
"""


class Place:
    """A hierarchy, mounted for the test, and the test's own group in it: all others are below ``top``."""

    def __init__(self, folder: str, name: str) -> None:
        self.name = name
        self.mount = os.path.join(folder, name.removeprefix("name=") or "unified")
        self.top = f"/{NAME}"
        os.mkdir(self.mount)
        self.open()
        os.makedirs(self.path(self.top), exist_ok=True)

    def open(self) -> None:
        kind = "cgroup" if self.name else "cgroup2"
        options = f"none,{self.name}" if "=" in self.name else self.name
        words = ["-o", options] if options else []
        subprocess.run(["mount", "-t", kind, *words, "none", self.mount], check=True)

    def path(self, group: str, file: str = "") -> str:
        return os.path.join(self.mount, group.lstrip("/"), file)

    def make(self, below: str) -> str:
        """Make a group below ours; its path from the root of the hierarchy."""
        group = f"{self.top}/{below}"
        os.makedirs(self.path(group), exist_ok=True)
        if self.name == "cpuset":
            for step in (self.top, *(f"{self.top}/{'/'.join(below.split('/')[:n + 1])}" for n in range(9))):
                for file, value in (("cpuset.cpus", "0"), ("cpuset.mems", "0")):
                    if os.path.isdir(self.path(step)):
                        self.write(step, file, value)
        return group

    def write(self, group: str, file: str, text: object) -> None:
        fd = os.open(self.path(group, file), os.O_WRONLY)  # open() would swallow an error of close(2)
        try:
            os.write(fd, str(text).encode())
        finally:
            os.close(fd)

    def read(self, group: str, file: str) -> str:
        return slurp_text(self.path(group, file)).strip()

    def exists(self, group: str) -> bool:
        return os.path.isdir(self.path(group))

    def of(self, pid: int, tid: int = 0) -> str:
        """Where a thread is, by /proc."""
        for line in slurp_text(f"/proc/{pid}/task/{tid or pid}/cgroup").splitlines():
            _, name, path = line.split(":", 2)
            if name == self.name:
                return path
        raise AssertionError(f"no hierarchy {self.name}")

    def clear(self) -> None:
        """Remove all groups below ours."""
        for folder, below, _ in os.walk(self.path(self.top), topdown=False):
            for name in below:
                self._rmdir(os.path.join(folder, name))

    def close(self) -> None:
        self.clear()
        self._rmdir(self.path(self.top))

        def gone() -> bool:
            # One that is unmounted while a group of it is on its way out stays, until it has been mounted again.
            subprocess.run(["umount", self.mount], check=True)
            for _ in range(20):
                if "=" not in self.name or not has_controller(self.name):
                    return True
                time.sleep(0.01)
            self.open()
            return False

        wait_until(f"{self.name} is gone", gone)

    @staticmethod
    def _rmdir(path: str) -> None:
        def gone() -> bool:
            try:
                os.rmdir(path)
            except FileNotFoundError:
                return True
            except OSError:
                return False
            return True

        wait_until(f"{path} is empty", gone)


class Places:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.all: list[Place] = []

    def __call__(self, name: str) -> Place:
        self.all.append(Place(self.folder, name))
        return self.all[-1]


@pytest.fixture
def places(start: Targets, tmp_path: object) -> Iterator[Places]:
    """Hierarchies by their names in /proc/PID/cgroup."""
    found = Places(str(tmp_path))
    yield found
    start.end()
    for place in found.all:
        place.close()


HIERARCHIES = pytest.mark.parametrize("name", ["", f"name={NAME}"])


def sleeper(start: Targets) -> Target:
    target = start.python("ready()\ntime.sleep(1000)")
    return target


def dumped(library: Library, target: Target, images: str, **options: object) -> None:
    target.pids()
    library.dump(target.pid, images, **options)
    target.wait_gone()


def refuse(groups: object) -> None:
    raise UsageError("enough")


def has_controller(name: str) -> bool:
    return any(name in line.split(":")[1].split(",") for line in slurp_text("/proc/self/cgroup").splitlines())


# ---------------------------------------------------------------------- round trips


@HIERARCHIES
def test_tasks_come_back_in_their_groups(
    start: Targets, places: Places, library: Library, images: str, name: str
) -> None:
    place = places(name)
    outer, inner = place.make("outer"), place.make("outer/inner")
    target = start.c(THREADS)
    child = target.pids()[1]
    place.write(outer, "cgroup.procs", target.pid)
    place.write(inner, "cgroup.procs", child)
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert place.of(target.pid) == outer
    assert {place.of(target.pid, int(tid)) for tid in os.listdir(f"/proc/{target.pid}/task")} == {outer}
    assert place.of(child) == inner
    assert place.of(os.getpid()) == "/"


@HIERARCHIES
def test_groups_come_back_as_they_were(
    start: Targets, places: Places, library: Library, images: str, name: str
) -> None:
    place = places(name)
    group, empty = place.make("group"), place.make("group/empty")
    file, value = ("notify_on_release", "1") if name else ("cgroup.max.depth", "7")
    place.write(group, file, value)
    os.chmod(place.path(group), 0o750)
    os.chown(place.path(group), 1000, 1001)
    os.chown(place.path(empty, "cgroup.procs"), 1002, 1003)
    os.chmod(place.path(empty, "cgroup.procs"), 0o620)
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert place.read(group, file) == value
    stat = os.stat(place.path(group))
    assert (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == (0o750, 1000, 1001)
    stat = os.stat(place.path(empty, "cgroup.procs"))
    assert (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid) == (0o620, 1002, 1003)


def test_threads_in_groups_of_version_1(
    start: Targets, places: Places, library: Library, images: str
) -> None:
    place = places(f"name={NAME}")
    first, second = place.make("first"), place.make("second")
    target = start.c(THREADS)
    threads = sorted(int(tid) for tid in os.listdir(f"/proc/{target.pid}/task"))
    place.write(first, "tasks", threads[0])
    place.write(second, "tasks", threads[2])
    before = [place.of(target.pid, tid) for tid in threads]
    assert before == [first, "/", second]
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert [place.of(target.pid, tid) for tid in threads] == before


def test_threads_in_groups_of_version_2(
    start: Targets, places: Places, library: Library, images: str
) -> None:
    place = places("")
    domain = place.make("domain")
    groups = [place.make("domain/one"), place.make("domain/two")]
    for group in groups:
        place.write(group, "cgroup.type", "threaded")
    target = start.c(THREADS)
    threads = sorted(int(tid) for tid in os.listdir(f"/proc/{target.pid}/task"))
    place.write(domain, "cgroup.procs", target.pid)
    place.write(groups[0], "cgroup.threads", threads[0])
    place.write(groups[1], "cgroup.threads", threads[2])
    before = [place.of(target.pid, tid) for tid in threads]
    assert before == [groups[0], domain, groups[1]]
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert [place.of(target.pid, tid) for tid in threads] == before
    assert place.read(groups[0], "cgroup.type") == "threaded"


def test_a_hierarchy_that_is_gone_is_made_again(
    start: Targets, places: Places, library: Library, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = places(f"name={NAME}")
    group = place.make("group")
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    dumped(library, target, images)
    place.close()
    try:
        assert NAME not in slurp_text("/proc/self/cgroup")
        monkeypatch.setattr(cgroups_build.Groups, "set_late", refuse)
        with pytest.raises(UsageError, match="enough"):
            library.restore(images)
        assert NAME not in slurp_text("/proc/self/cgroup")
        monkeypatch.undo()
        library.restore(images)
        assert place.of(target.pid) == group
    finally:
        place.open()  # for the fixture to clear it


def test_nothing_is_written_for_tasks_in_our_own_groups(start: Targets, library: Library, images: str) -> None:
    target = sleeper(start)
    dumped(library, target, images)
    assert "cgroup.img" not in os.listdir(images)
    library.restore(images)
    assert slurp_text(f"/proc/{target.pid}/cgroup") == slurp_text("/proc/self/cgroup")


@pytest.mark.parametrize("controller", ["pids", "cpuset"])
def test_limits_of_version_1(
    start: Targets, places: Places, library: Library, images: str, controller: str
) -> None:
    assert has_controller(controller)
    place = places(controller)
    group = place.make("between/group")
    file, value = {"pids": ("pids.max", "3"), "cpuset": ("cpuset.cpus", "0")}[controller]
    place.write(group, file, value)
    target = start.c(THREADS)
    child = target.pids()[1]
    place.write(group, "cgroup.procs", target.pid)
    if controller == "cpuset":
        place.write(group, "cgroup.procs", child)
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert place.of(target.pid) == group
    assert place.read(group, file) == value
    if controller == "cpuset":
        assert "Cpus_allowed_list:\t0\n" in slurp_text(f"/proc/{child}/status")


def test_memory_is_charged_to_the_group(start: Targets, places: Places, library: Library, images: str) -> None:
    assert has_controller("memory")
    place = places("memory")
    group = place.make("group")
    place.write(group, "memory.limit_in_bytes", 256 << 20)
    target = start.python("content = bytearray(os.urandom(40 << 20))\nready()\ntime.sleep(1000)")
    place.write(group, "cgroup.procs", target.pid)
    dumped(library, target, images)
    place.clear()
    library.restore(images)
    assert place.of(target.pid) == group
    assert int(place.read(group, "memory.limit_in_bytes")) == 256 << 20
    charged = dict(line.split() for line in place.read(group, "memory.stat").splitlines())
    assert int(charged["rss"]) >= 40 << 20


def test_frozen_tasks_are_refused(start: Targets, places: Places, library: Library, images: str) -> None:
    place = places("")
    group = place.make("group")
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    place.write(group, "cgroup.freeze", 1)
    wait_until("it is frozen", lambda: "frozen 1" in place.read(group, "cgroup.events"))
    try:
        with pytest.raises(TorporError, match="group` is frozen"):
            library.dump(target.pid, images)
    finally:
        place.write(group, "cgroup.freeze", 0)
    assert target.alive()


def test_a_group_is_frozen_after_the_restore(stored: Stored, library: Library, images: str) -> None:
    """Such images are CRIU's, which thaws the groups that it dumps."""
    entry = entry_of(images)
    for prop in entry.controllers[0].dirs[0].properties:
        if prop.name == "cgroup.freeze":
            prop.value = "1"
    rewrite(images, entry)
    stored.place.clear()
    library.restore(images)
    assert stored.place.of(stored.target.pid) == stored.group
    try:
        wait_until("it is frozen", lambda: "frozen 1" in stored.place.read(stored.group, "cgroup.events"))
    finally:
        stored.place.write(stored.group, "cgroup.freeze", 0)


def test_stops_and_goes_on_in_its_group(start: Targets, places: Places, library: Library, images: str) -> None:
    """A dump that lets the tree run leaves the groups alone."""
    place = places("")
    group = place.make("group")
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    library.dump(target.pid, images, leave_running=True)
    assert place.of(target.pid) == group
    assert target.alive()


# ---------------------------------------------------------------------- options


class Stored:
    """A sleeper in ``group``, which says it may have 7 levels below it, in a snapshot; the group is still there."""

    def __init__(self, start: Targets, places: Places, library: Library, images: str, **options: object) -> None:
        self.place = places("")
        self.group = self.place.make("group")
        self.place.write(self.group, "cgroup.max.depth", 7)
        self.target = sleeper(start)
        self.place.write(self.group, "cgroup.procs", self.target.pid)
        dumped(library, self.target, images, **options)


@pytest.fixture
def stored(start: Targets, places: Places, library: Library, images: str) -> Stored:
    return Stored(start, places, library, images)


@pytest.mark.parametrize(
    ("mode", "depth"), [("none", "3"), ("soft", "3"), ("props", "7"), ("full", "7")]
)
def test_groups_that_exist(stored: Stored, library: Library, images: str, mode: str, depth: str) -> None:
    stored.place.write(stored.group, "cgroup.max.depth", 3)
    library.restore(images, manage_cgroups=mode)
    assert stored.place.of(stored.target.pid) == stored.group
    assert stored.place.read(stored.group, "cgroup.max.depth") == depth


@pytest.mark.parametrize("mode", ["none", "props"])
def test_groups_that_must_exist(stored: Stored, library: Library, images: str, mode: str) -> None:
    stored.place.clear()
    with pytest.raises(TorporError, match="does not exist"):
        library.restore(images, manage_cgroups=mode)
    assert not stored.place.exists(stored.group)


def test_groups_that_must_not_exist(stored: Stored, library: Library, images: str) -> None:
    with pytest.raises(TorporError, match="it exists"):
        library.restore(images, manage_cgroups="strict")
    stored.place.clear()
    library.restore(images, manage_cgroups="strict")
    assert stored.place.of(stored.target.pid) == stored.group


def test_groups_are_ignored(stored: Stored, library: Library, images: str) -> None:
    stored.place.clear()
    library.restore(images, manage_cgroups="ignore")
    assert stored.place.of(stored.target.pid) == stored.place.of(os.getpid())
    assert not stored.place.exists(stored.group)


def test_a_tree_moves_to_another_group(start: Targets, places: Places, library: Library, images: str) -> None:
    place = places(f"name={NAME}")
    inner = place.make("old/inner")
    target = sleeper(start)
    place.write(inner, "cgroup.procs", target.pid)
    name = f"name={NAME}"
    dumped(library, target, images, cgroup_root=((name, f"{place.top}/old"),))
    place.clear()
    library.restore(images, cgroup_root=((name, f"{place.top}/new/home"),))
    assert place.of(target.pid) == f"{place.top}/new/home/inner"
    assert not place.exists(f"{place.top}/old")


def test_only_chosen_controllers(start: Targets, places: Places, library: Library, images: str) -> None:
    named, unified = places(f"name={NAME}"), places("")
    target = sleeper(start)
    for place in (named, unified):
        place.write(place.make("group"), "cgroup.procs", target.pid)
    dumped(library, target, images, cgroup_dump_controller=(f"name={NAME}",))
    library.restore(images)
    assert named.of(target.pid) == f"{named.top}/group"
    assert unified.of(target.pid) == unified.of(os.getpid())


PROPS = """"pids":
 - "strategy": "replace"
 - "properties": []
"freezer":
 - "strategy": "merge"
 - "properties": ["freezer.self_freezing", "freezer.nothing"]
"""


@pytest.mark.parametrize("option", ["cgroup_props", "cgroup_props_file"])
def test_chosen_properties(
    start: Targets, places: Places, library: Library, images: str, tmp_path: object, option: str
) -> None:
    pids, freezer = places("pids"), places("freezer")
    target = sleeper(start)
    for place in (pids, freezer):
        place.write(place.make("group"), "cgroup.procs", target.pid)
    pids.write(f"{pids.top}/group", "pids.max", 7)
    if option == "cgroup_props_file":
        with open(f"{tmp_path}/props", "w") as file:
            file.write(PROPS)
    dumped(library, target, images, **{option: PROPS if option == "cgroup_props" else f"{tmp_path}/props"})
    stored = {
        controller.cnames[0]: {prop.name for prop in controller.dirs[0].properties}
        for controller in entry_of(images).controllers
    }
    assert "freezer.self_freezing" in stored["freezer"] and "freezer.nothing" not in stored["freezer"]
    assert "tasks" in stored["pids"] and "pids.max" not in stored["pids"]


@pytest.mark.parametrize(
    "text", ["pids", '"pids":\n - "strategy": "other"', '"pids":\n - "properties": []', '- "strategy": "merge"',
             '"pids":\n - "strategy": "merge"\n - "properties": ["../x"]'],
)  # fmt: skip
def test_properties_that_cannot_be_read(start: Targets, library: Library, images: str, text: str) -> None:
    target = sleeper(start)
    with pytest.raises(UsageError, match="--cgroup-props: cannot read"):
        library.dump(target.pid, images, cgroup_props=text)
    assert target.alive()


def test_hierarchies_are_looked_for_in_the_yard(
    start: Targets, places: Places, library: Library, images: str
) -> None:
    place = places("")
    group = place.make("group")
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    yard = os.path.dirname(place.mount)
    with pytest.raises(UsageError, match="--cgroup-yard"):
        library.dump(target.pid, images, cgroup_yard=f"{yard}/nowhere")
    assert target.alive()
    dumped(library, target, images, cgroup_yard=yard, cgroup_dump_controller=("",))
    place.clear()
    library.restore(images, cgroup_yard=yard)
    assert place.of(target.pid) == group


# ---------------------------------------------------------------------- failures


def test_a_failed_restore_leaves_no_group(
    stored: Stored, library: Library, images: str, tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails when the tasks are in the groups."""
    stored.place.clear()
    seen: list[str] = []

    def fail(ctx: object) -> None:
        seen.append(stored.place.of(stored.target.pid))
        raise UsageError("enough")

    monkeypatch.setattr(cgroups_build.Groups, "set_late", fail)
    with pytest.raises(UsageError, match="enough"):
        library.restore(images)
    assert seen == [stored.group]
    assert not stored.place.exists(stored.group)
    assert not os.path.exists(f"/proc/{stored.target.pid}")


def test_a_failed_restore_puts_back_what_it_changed(
    stored: Stored, library: Library, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, group = stored.place, stored.group
    place.write(group, "cgroup.max.depth", 3)
    os.chown(place.path(group), 1000, 1001)

    def fail(ctx: object) -> None:
        assert place.read(group, "cgroup.max.depth") == "7"
        raise UsageError("enough")

    monkeypatch.setattr(cgroups_build.Groups, "set_late", fail)
    with pytest.raises(UsageError, match="enough"):
        library.restore(images, manage_cgroups="full")
    assert place.read(group, "cgroup.max.depth") == "3"
    assert os.stat(place.path(group)).st_uid == 1000


def test_nothing_is_made_to_explain(stored: Stored, images: str) -> None:
    import torpor

    stored.place.clear()
    assert list(torpor.explain(images))
    assert not stored.place.exists(stored.group)


def test_a_frozen_group_is_refused(stored: Stored, library: Library, images: str) -> None:
    stored.place.write(stored.group, "cgroup.freeze", 1)
    with pytest.raises(TorporError, match="it is frozen"):
        library.restore(images)
    stored.place.write(stored.group, "cgroup.freeze", 0)
    library.restore(images)


def test_no_mount_is_left(stored: Stored, library: Library, images: str) -> None:
    before = slurp_text("/proc/self/mountinfo"), len(os.listdir("/proc/self/fd"))
    library.restore(images)
    assert (slurp_text("/proc/self/mountinfo"), len(os.listdir("/proc/self/fd"))) == before


def entry_of(images: str) -> pb.Message:
    directory = os.open(images, os.O_RDONLY)
    try:
        return ImageReader(directory).read_one("cgroup")
    finally:
        os.close(directory)


def rewrite(images: str, entry: pb.Message) -> None:
    with open(f"{images}/cgroup.img", "r+b") as file:
        head = file.read(8)
        body = entry.SerializeToString()
        file.seek(0)
        file.write(head + len(body).to_bytes(4, "little") + body)
        file.truncate()


def test_images_that_lead_out_of_the_hierarchy(stored: Stored, library: Library, images: str) -> None:
    good = entry_of(images)
    for change in ("path", "relative", "dir", "property", "child", "set"):
        entry = pb.cgroup_entry.FromString(good.SerializeToString())
        if change == "path":
            entry.sets[0].ctls[0].path = "/../../etc"
        elif change == "relative":
            entry.sets[0].ctls[0].path = "etc"
        elif change == "dir":
            entry.controllers[0].dirs[0].dir_name = "a/../../../tmp"
        elif change == "property":
            entry.controllers[0].dirs[0].properties.add(name="../cgroup.max.depth", value="1")
        elif change == "child":
            entry.controllers[0].dirs[0].children.add(dir_name="")
        else:
            entry.sets[0].id = 99
        rewrite(images, entry)
        with pytest.raises(ImageError):
            library.restore(images)
    rewrite(images, good)
    library.restore(images)


def test_a_controller_that_this_machine_has_not(stored: Stored, library: Library, images: str) -> None:
    entry = entry_of(images)
    entry.sets[0].ctls.add(name="antigravity", path="/")
    controller = entry.controllers.add(cnames=["antigravity"])
    controller.dirs.add(dir_name="")
    rewrite(images, entry)
    library.restore(images)  # in its root everybody is anyway
    os.kill(stored.target.pid, signal.SIGKILL)
    stored.target.wait_gone()
    entry.sets[0].ctls[-1].path = "/group"
    rewrite(images, entry)
    with pytest.raises(TorporError, match="antigravity"):
        library.restore(images)


def test_groups_of_a_text() -> None:
    text = b"3:cpu,cpuacct:/a\n1:name=systemd:/b:c\n0::/d\n"
    assert cgroup_fs.groups_of(text) == {"": b"/d", "cpu,cpuacct": b"/a", "name=systemd": b"/b:c"}
    assert cgroup_fs.groups_of(text, ("name=systemd",)) == {"name=systemd": b"/b:c"}
    assert list(cgroup_fs.groups_of(text)) == ["", "cpu,cpuacct", "name=systemd"]


def test_a_group_that_stays_busy_for_a_moment(places: Places, start: Targets) -> None:
    place = places("")
    group = place.make("group")
    target = sleeper(start)
    place.write(group, "cgroup.procs", target.pid)
    root = os.open(place.mount, os.O_RDONLY)
    try:
        cgroups_build.REMOVAL_S, kept = 0.05, cgroups_build.REMOVAL_S
        try:
            with pytest.raises(TorporError, match="busy"):
                cgroups_build._remove(root, group.encode())
        finally:
            cgroups_build.REMOVAL_S = kept
        os.kill(target.pid, signal.SIGKILL)
        target.wait_gone()
        cgroups_build._remove(root, group.encode())
        assert not place.exists(group)
    finally:
        os.close(root)
