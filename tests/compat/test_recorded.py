"""A set of images that CRIU 4.2 once made, restored by Torpor.

``data/criu-4.2-family.zip`` holds the program of ``data/family.c`` and the images that ``criu dump``
wrote of it. The program was built and dumped with::

    cc -O1 -static -nostdlib -fno-stack-protector -fno-pie -no-pie -fcf-protection=none -s \\
        -Wl,-z,noseparate-code,--build-id=none,-z,norelro -DVVAR=0x6000 family.c -o program
    setsid ./program </dev/null >/dev/null 2>&1 &
    criu dump -t $! -D images

(``VVAR``: the size of ``[vvar]`` and ``[vvar_vclock]`` there.) It has no vDSO, so its images suit
any kernel; what else belongs to the machine where they were made is put right before they are used:
where the files are, and which parts of the FPU's state were in use. Process ids are those of a pid
namespace of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from typing import Any

import pytest

from kit.files import slurp, slurp_text
from kit.verbs import SOURCES
from torpor.engine import load
from torpor.images.store import ImageReader
from torpor.model.snapshot import Snapshot

HERE = os.path.dirname(os.path.abspath(__file__))
MADE_IN = "/tmp/recorded"
X87_AND_SSE = 3
PARENT, CHILD = 2001, 2003


class Recorded:
    """The set, unpacked: ``folder`` is the tree's working directory, ``images`` where they are."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.images = os.path.join(folder, "images")
        with zipfile.ZipFile(os.path.join(HERE, "data", "criu-4.2-family.zip")) as archive:
            archive.extractall(folder)
        os.chmod(folder, 0o755)
        os.chmod(os.path.join(folder, "program"), 0o755)
        self._rewrite("files", self._move)
        for pid in (PARENT, CHILD):
            self._rewrite(f"core-{pid}", self._plain_registers)

    def _move(self, entry: Any) -> None:
        if entry.reg.name.startswith(MADE_IN):
            entry.reg.name = self.folder + entry.reg.name.removeprefix(MADE_IN)
        elif entry.reg.name == "/":
            entry.reg.mode = os.stat("/").st_mode

    def _plain_registers(self, entry: Any) -> None:
        entry.thread_info.fpregs.xsave.xstate_bv &= X87_AND_SSE

    def _rewrite(self, name: str, change: Any) -> None:
        path = os.path.join(self.images, f"{name}.img")
        parts = [slurp(path)[:8]]
        fd = os.open(self.images, os.O_RDONLY | os.O_DIRECTORY)
        try:
            for message in ImageReader(fd).read_all(name, required=True):
                change(message)
                content = message.SerializeToString()
                parts += [len(content).to_bytes(4, "little"), content]
        finally:
            os.close(fd)
        with open(path, "wb") as file:
            file.write(b"".join(parts))

    def run(self, script: str) -> str:
        """Run a shell script, ``$torpor`` being the command, in a pid namespace of its own."""
        env = {
            **os.environ, "PYTHONPATH": SOURCES, "images": self.images, "folder": self.folder,
            "torpor": f"{sys.executable} -m torpor",
        }  # fmt: skip
        done = subprocess.run(
            ["unshare", "-pf", "--mount-proc", "sh", "-c", script], env=env, timeout=60, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def recorded(tmp_path: Any) -> Recorded:
    return Recorded(str(tmp_path))


def test_loads(recorded: Recorded) -> None:
    fd = os.open(recorded.images, os.O_RDONLY | os.O_DIRECTORY)
    try:
        snapshot = Snapshot()
        load.load(ImageReader(fd), snapshot)
    finally:
        os.close(fd)
    parent, child = snapshot.tasks[PARENT], snapshot.tasks[CHILD]
    assert (snapshot.root, child.parent) == (parent, parent)
    assert (parent.session, child.session, child.group) == (PARENT, PARENT, PARENT)
    assert [fd for fd, _, _ in parent.fds] == [0, 1, 2, 3, 5]
    assert [fd for fd, _, _ in child.fds] == [0, 1, 2, 4, 5]
    assert sum(run.nr_pages for run in parent.runs) == 5
    assert parent.core.tc.comm == "program"
    for task in (parent, child):
        task.pages.close()


def test_plan(recorded: Recorded) -> None:
    plan = recorded.run("$torpor restore --explain $images")
    for call in ("setsid(", "clone3(", "pread", "dup3(", "task 2003:"):
        assert call in plan


def test_runs_again(recorded: Recorded) -> None:
    recorded.run(
        "$torpor criu restore -d -D $images -o restore.log -v4 || { cat $images/restore.log; exit 1; }; "
        "test ! -e $folder/gone && touch $folder/go; "
        "for i in $(seq 100); do test -e $folder/result && exit; sleep 0.1; done; exit 1"
    )
    assert slurp_text(os.path.join(recorded.folder, "result")) == "pass\n"
