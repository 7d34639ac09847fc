"""Cgroup namespaces: a tree with one of its own finds the same roots, paths and groups in it."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

import pytest

import torpor
from kit import Library, Target, Targets, Verbs
from kit.apart import child_apart
from kit.files import slurp_text
from torpor.errors import ImageError, Unsupported

from .test_cgroups import NAME, Place, Places, dumped, entry_of, places, rewrite

__all__ = ["places"]  # a fixture
HIERARCHIES = pytest.mark.parametrize("name", [f"name={NAME}", ""])
CLONE_NEWCGROUP = 0x02000000
#: It makes its namespace in the group that it is put into, and goes deeper when it is told so.
PROGRAM = """
#include <sched.h>

static void look(char *into, const char *of)
{
	char path[64];
	FILE *file;
	size_t size;

	snprintf(path, sizeof(path), "/proc/%s/cgroup", of);
	file = fopen(path, "r");
	CHECK(file);
	size = fread(into, 1, 4000, file);
	into[size] = 0;
	fclose(file);
}

static char before[4096], after[4096];

int main(void)
{
	int pid, status;

	ready();
	wait_told("placed");
	MUST(unshare(CLONE_NEWCGROUP));
	pid = fork();
	if (pid == 0) {
		tell("made", "");
		wait_told("deeper");
		look(before, "self");
		tell("child", "");
		wait_told("go");
		look(after, "self");
		if (strcmp(before, after))
			fail("child: %s is now %s", before, after);
		return 0;
	}
	wait_told("deeper");
	wait_told("child");
	look(before, "self");
	tell("settled", "");
	wait_told("go");
	look(after, "self");
	if (strcmp(before, after))
		fail("%s is now %s", before, after);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	pass();
}
"""
Enclosed = Callable[[Place, str, str, str], Target]


@pytest.fixture
def enclosed(start: Targets) -> Enclosed:
    """Start the program with the root of its namespace in a group, itself and its child in others."""

    def begin(place: Place, root: str, inner: str, child: str) -> Target:
        target = start.c(PROGRAM)
        for group in (root, inner, child):
            place.make(group)
        place.write(f"{place.top}/{root}", "cgroup.procs", target.pid)
        target.tell("placed")
        target.wait_file("made")
        place.write(f"{place.top}/{inner}", "cgroup.procs", target.pid)
        place.write(f"{place.top}/{child}", "cgroup.procs", target.pids()[1])
        target.tell("deeper")
        target.wait_file("settled")
        return target

    return begin


def test_it_is_content_untouched(places: Places, enclosed: Enclosed) -> None:
    place = places(f"name={NAME}")
    enclosed(place, "root", "root/inner", "root/child").go()


@HIERARCHIES
@pytest.mark.parametrize(("inner", "child"), [("root", "root"), ("root/inner/most", "root/child")])
def test_it_comes_back_with_the_same_root(
    places: Places, enclosed: Enclosed, verbs: Verbs, images: str, name: str, inner: str, child: str
) -> None:
    place = places(name)
    target = enclosed(place, "root", inner, child)
    pids = target.pids()
    own = os.stat(f"/proc/{target.pid}/ns/cgroup").st_ino
    verbs.dump(target.pid, images)
    target.wait_gone()
    place.clear()
    verbs.restore(images)
    assert [place.of(pid) for pid in pids] == [f"{place.top}/{inner}", f"{place.top}/{child}"]
    found = {os.stat(f"/proc/{pid}/ns/cgroup").st_ino for pid in pids}
    assert len(found) == 1 and found != {os.stat("/proc/self/ns/cgroup").st_ino}
    assert own != os.stat("/proc/self/ns/cgroup").st_ino == os.stat("/proc/thread-self/ns/cgroup").st_ino
    target.go()


def test_one_that_was_made_in_our_own_groups(start: Targets, library: Library, images: str) -> None:
    """Then it is in no other group than we, and still sees itself at the root."""
    target = start.c(PROGRAM)
    target.tell("placed")
    target.tell("deeper")
    target.wait_file("settled")
    dumped(library, target, images)
    target.pid = library.restore(images)
    assert slurp_text(f"/proc/{target.pid}/cgroup") == slurp_text("/proc/self/cgroup")
    target.go()


def test_its_root_moves(places: Places, enclosed: Enclosed, library: Library, images: str) -> None:
    """Whoever moves a container moves what the tree takes for the root: it sees no other paths than before."""
    place = places(f"name={NAME}")
    target = enclosed(place, "old/root", "old/root/inner", "old/root/child")
    pids = target.pids()
    dumped(library, target, images)
    place.clear()
    library.restore(images, cgroup_root=((place.name, f"{place.top}/new/home"),))
    assert [place.of(pid) for pid in pids] == [f"{place.top}/new/home/{one}" for one in ("inner", "child")]
    assert not place.exists(f"{place.top}/old")
    target.go()


def test_a_task_outside_of_the_root_is_refused(
    places: Places, enclosed: Enclosed, library: Library, images: str
) -> None:
    place = places(f"name={NAME}")
    target = enclosed(place, "root", "root/inner", "elsewhere")
    with pytest.raises(Unsupported, match=r"outside of the root of its cgroup namespace") as error:
        library.dump(target.pid, images)
    assert "move it back" in error.value.hint
    assert not os.listdir(images)
    target.go()


@pytest.mark.parametrize(
    ("flag", "what"),
    [
        ("CLONE_NEWCGROUP", "not in the cgroup namespace of the root"),
        ("0x80", "its children will have a time namespace of their own"),
    ],
)
def test_other_namespaces_are_refused(start: Targets, images: str, flag: str, what: str) -> None:
    """CLONE_NEWTIME (0x80) concerns only what the task forks: it must not get lost unseen."""
    target = start.c(child_apart(flag))
    with pytest.raises(Unsupported, match=what):
        torpor.dump(target.pid, images)
    assert not os.listdir(images)
    target.go()


def test_bad_images_and_templates(places: Places, enclosed: Enclosed, library: Library, images: str) -> None:
    place = places(f"name={NAME}")
    target = enclosed(place, "root", "root/inner", "root/child")
    dumped(library, target, images)
    with pytest.raises(Unsupported, match="cgroup namespace of its own"):
        torpor.template(images)
    good = entry_of(images)
    entry = type(good).FromString(good.SerializeToString())
    member = next(one for one in entry.sets[0].ctls if one.name == place.name)
    member.cgns_prefix -= 1
    rewrite(images, entry)
    with pytest.raises(ImageError, match="cgns_prefix"):
        library.restore(images)
    assert not target.alive()
    rewrite(images, good)
    target.pid = library.restore(images)
    os.kill(target.pid, signal.SIGKILL)


def test_looking_from_inside_leaves_us_where_we_are() -> None:
    from torpor.resources import cgroups

    before = os.stat("/proc/thread-self/ns/cgroup").st_ino
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        ok = ctypes.CDLL(None).unshare(CLONE_NEWCGROUP) == 0
        os.write(writing, b"+" if ok else b"-")
        signal.pause()
    try:
        assert os.read(reading, 1) == b"+"
        own = {line.split(":")[1]: line.split(":")[2] for line in slurp_text("/proc/self/cgroup").splitlines()}
        found = {name: os.fsdecode(path) for name, path in cgroups.roots(pid).items()}
        assert found == own
        assert os.stat("/proc/thread-self/ns/cgroup").st_ino == before
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading), os.close(writing)
