"""fio with io_uring: what it has written is read again and compared by its checksum, whatever happens to it in between."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal

import pytest

from kit import Target, Targets
from kit.files import slurp_text
from kit.host import wait_until

from .conftest import Sleeps, need

#: Writes blocks of random data, reads them again a little later, and starts over when the file is full.
JOB = """
--name=job --ioengine=io_uring --filename_format=data.$jobnum --size=4m --rw=randwrite --bs=4k --iodepth=32 --loops=1000000
--verify=crc32c --verify_fatal=1 --verify_backlog=128 --rate_iops=4000 --output=report --output-format=json
""".split()
WAYS = {
    "files and buffers by their names": [],
    "registered, past the page cache": ["--direct=1", "--registerfiles", "--fixedbufs"],
    "polled by a kernel thread": ["--sqthread_poll", "--registerfiles", "--fixedbufs", "--direct=1"],
    "by workers, from two threads": ["--thread", "--numjobs=2", "--force_async=3", "--nonvectored=0"],
    "two processes that sync": ["--numjobs=2", "--fsync=16", "--direct=1", "--fixedbufs"],
}


def requests(target: Target) -> list[int]:
    """How many requests each ring of the tree has taken, modulo 2**32."""
    counts = []
    for folder in [f"/proc/{pid}" for pid in target.pids()]:
        with contextlib.suppress(FileNotFoundError):  # fio opens and closes files all the time
            for fd in os.listdir(f"{folder}/fd"):
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(f"{folder}/fd/{fd}") == "anon_inode:[io_uring]":
                        counts.append(requests_of(f"{folder}/fdinfo/{fd}"))
    return counts


def requests_of(fdinfo: str) -> int:
    while True:  # the kernel shows nothing of a ring that is being used at this moment
        if found := re.search(r"^CachedSqHead:\s*(\d+)", slurp_text(fdinfo), re.MULTILINE):
            return int(found[1])


@pytest.mark.parametrize("way", WAYS)
def test_everything_that_was_written_is_read_again(start: Targets, sleeps: Sleeps, way: str) -> None:
    need("fio")
    target = start.command("fio", *JOB, *WAYS[way])
    jobs = 2 if "--numjobs=2" in WAYS[way] else 1
    wait_until("fio is at work", lambda: len(requests(target)) == jobs and min(requests(target)) > 500, timeout=20)

    def awake() -> None:
        """Longer than it takes until what had been written before has been read."""
        before = requests(target)
        wait_until(
            f"fio goes on: {target.read('stdout')}",
            lambda: all(now - then > 600 for now, then in zip(requests(target), before, strict=True)),
            timeout=30,
        )

    sleeps(target, awake=awake)
    os.kill(target.pid, signal.SIGINT)
    target.wait_gone(timeout=30)
    report = target.read("report")
    ended = json.loads(report[report.index("{") :])["jobs"]
    assert len(ended) == jobs
    for job in ended:
        assert job["error"] == 0, target.read("stdout")
        assert job["read"]["total_ios"] > 200 and job["write"]["total_ios"] > 200
        assert job["read"]["short_ios"] == job["write"]["short_ios"] == 0
    assert "verify" not in target.read("stdout"), target.read("stdout")
