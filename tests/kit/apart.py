"""Trees of which one process has left for a namespace of its own, and trees inside of a pid namespace."""

from __future__ import annotations

import os

from .target import Target, Targets

_SOURCE = """
#include <sched.h>

int main(void)
{
	if (fork() == 0) {
		MUST(unshare(FLAG));
		tell("child", "");
		for (;;)
			pause();
	}
	wait_told("child");
	ready();
	wait_told("go");
	pass();
}
"""


def child_apart(flag: str) -> str:
    """A program whose child has done unshare(2) with ``flag``, by the time that it is ready."""
    return _SOURCE.replace("FLAG", flag)


#: In a pid namespace where it is process 1.
AS_INIT = ("unshare", "--pid", "--fork")
_BASES = {os.path.basename(os.path.realpath(f"/usr/bin/{name}")) for name in ("unshare", "sh")}


def inside(start: Targets, program: str, *around: str, args: tuple[str, ...] = ()) -> tuple[Target, Target]:
    """(a program, which is ready, in a pid namespace that the command ``around`` makes, that command)."""
    outer = start.command(*around, program, *args, wait=True)
    inner = next(pid for pid in outer.pids() if os.path.basename(os.readlink(f"/proc/{pid}/exe")) not in _BASES)
    target = Target.__new__(Target)
    target.folder, target.argv, target.pid, target.seen = outer.folder, outer.argv, inner, {inner}
    return target, outer
