"""A build under way: processes come and go by the hundred while it is frozen."""

from __future__ import annotations

import os
import subprocess

import pytest

from kit import Targets
from kit.host import wait_until

from .conftest import Sleeps, need

#: A program of many parts, each with a step of its own that takes a moment; the jobs share make's tokens.
MAKEFILE = """
PARTS := $(shell seq 1 16)
program: $(PARTS:%=part%.o) main.o
	cc -o $@ $^
part%.c:
	sleep 0.0$*; echo 'int part$*(void) { return $*; }' > $@
main.c:
	until [ -e go ]; do sleep 0.01; done
	(for n in $(PARTS); do echo "int part$$n(void);"; done; echo '#include <stdio.h>'; echo 'int main(void) { return printf("%d", 0'; \\
	 for n in $(PARTS); do echo "+ part$$n()"; done; echo ') < 0; }') > $@
%.o: %.c
	cc -O1 -pipe -c -o $@ $<
sub:
	$(MAKE) program
"""


def test_make(start: Targets, sleeps: Sleeps) -> None:
    """make -j4 with a make below it: its tokens are in a pipe, a compiler and an assembler are joined by another."""
    need("make", "cc")
    target = start.command(
        "sh",
        "-c",
        "until [ -e Makefile ]; do :; done; make -j4 sub > log 2>&1; echo $? > status.new; mv status.new status",
    )
    target.tell("Makefile", MAKEFILE)
    wait_until("some parts are there", lambda: len(parts(target.folder)) >= 2, timeout=30)
    sleeps(target)
    target.tell("go")
    assert target.wait_file("status", timeout=40) == "0\n", target.read("log")
    assert "warning" not in target.read("log")
    made = subprocess.run([target.path("program")], capture_output=True, text=True, check=True)
    assert made.stdout == f"{sum(range(17))}"


def parts(folder: str) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".o")]


STORM = """
for job in 1 2 3 4; do
    (n=0 m=0; until [ -e go ]; do n=$(expr $n + 1); m=$((m + 1)); [ $n = 5 ] && echo > ready; done; echo $n $m > count.$job) &
done
wait
cat count.* > counts.new
mv counts.new counts
"""


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_shells_that_fork_all_the_time(start: Targets, sleeps: Sleeps, shell: str) -> None:
    """Every moment is one of fork, exec, exit or wait."""
    target = start.command(shell, "-c", STORM, wait=True)
    for _ in range(3):
        sleeps(target)
    target.tell("go")
    lines = target.wait_file("counts", timeout=40).splitlines()
    assert len(lines) == 4
    for line in lines:
        by_expr, by_shell = line.split()
        assert by_expr == by_shell
