"""The commands with the real engine: from the words to a process that lives again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit import Target, Targets, wait_until
from kit.files import slurp_text

from .conftest import environment

# Ends with the status that it is told; SIGTERM makes it end with 9.
PROGRAM = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
ready()
while not os.path.exists(os.path.join(os.environ["KIT_DIR"], "end")):
    time.sleep(0.01)
with open(os.path.join(os.environ["KIT_DIR"], "end")) as file:
    os._exit(int(file.read()))
"""


@pytest.fixture
def target(start: Targets) -> Target:
    return start.python("import os\n" + PROGRAM)


def test_torpor_dump_show_and_restore(torpor, target: Target, images: str) -> None:
    done = torpor("dump", str(target.pid), "-D", images, "--json")
    assert done.status == 0, done
    result = json.loads(done.out)
    assert result["pids"] == [target.pid]
    assert result["image_bytes"] >= result["pages"] * result["page_bytes"] // 2
    target.wait_gone()

    shown = torpor("show", images)
    assert str(target.pid) in shown.out
    tasks = json.loads(torpor("show", images, "--json").out)["tasks"]
    assert [task["pid"] for task in tasks] == [target.pid]
    files = torpor("show", images, str(target.pid), "--files").out
    assert os.path.join(target.folder, "stdout") in files
    assert "[stack]" in torpor("show", images, str(target.pid), "-m").out

    target.tell("end", "7")
    done = torpor("restore", images)
    assert (done.status, done.out, done.err) == (7, "", "")


def test_torpor_restore_passes_on_a_signal(torpor, target: Target, images: str) -> None:
    words = slurp_text(f"/proc/{target.pid}/cmdline")
    assert torpor("dump", str(target.pid), "-D", images).status == 0
    target.wait_gone()
    with subprocess.Popen(torpor.argv("restore", images), env=environment()) as command:
        wait_until("the process is back", target.alive)
        wait_until("it has been let go", lambda: let_go(target.pid, words))
        command.send_signal(signal.SIGTERM)
        assert command.wait(timeout=30) == 9


def let_go(pid: int, words: str) -> bool:
    """Is it itself again, with its own words on the command line, and no longer traced?"""
    itself = slurp_text(f"/proc/{pid}/cmdline") == words
    return itself and "TracerPid:\t0" in slurp_text(f"/proc/{pid}/status")


def test_torpor_restore_detached(torpor, target: Target, images: str) -> None:
    assert torpor("dump", str(target.pid), "-D", images).status == 0
    target.wait_gone()
    done = torpor("restore", images, "-d")
    assert (done.status, done.out, done.err) == (0, f"{target.pid}\n", "")
    assert target.alive()


def test_torpor_restore_explained_does_nothing(torpor, target: Target, images: str) -> None:
    assert torpor("dump", str(target.pid), "-D", images).status == 0
    target.wait_gone()
    done = torpor("restore", images, "--explain")
    assert done.status == 0, done
    assert f"task {target.pid}:" in done.out
    assert "dup3" in done.out
    assert target.state() is None


def test_torpor_restore_explained_while_the_tree_runs(torpor, target: Target, images: str) -> None:
    assert torpor("dump", str(target.pid), "-D", images, "--leave-running").status == 0
    done = torpor("restore", images, "--explain")
    assert done.status == 0, done
    assert f"as things are it would fail: process id {target.pid} is in use" in done.out
    assert "dup3" in done.out
    assert torpor("restore", images, "-d").status == 1
    assert target.alive()


def test_torpor_check(torpor, target: Target) -> None:
    done = torpor("check", str(target.pid))
    assert (done.status, done.out) == (0, f"Process {target.pid} can be dumped.\n")
    assert target.alive()
    kernel = json.loads(torpor("check", "--json").out)
    assert {"name", "ok", "required", "text"} == kernel[0].keys()


def test_a_process_that_is_not_there(torpor, criu, images: str) -> None:
    pid = 4194304  # above the largest pid_max
    done = torpor("dump", str(pid), "-D", images)
    assert done.status == 1
    assert done.err.startswith(f"Error: dump: task {pid}: no such process")
    done = criu("dump", "-t", str(pid), "-D", images, "-o", "log")
    assert done.status == 1
    assert "Error" in (Path(images) / "log").read_text()
    assert torpor("check", str(pid)).status == 1


def test_images_that_are_not_there(torpor, criu, images: str) -> None:
    for done in (torpor("restore", images), criu("restore", "-D", images)):
        assert done.status == 1
        assert "inventory" in done.err
        assert "Traceback" not in done.err
    assert torpor("restore", "/no/such/dir").status == 1


def test_criu_dump_and_restore(criu, target: Target, images: str) -> None:
    words = ["--no-default-config", "-D", images, "-v4"]
    done = criu("dump", *words, "-o", "dump.log", "-t", str(target.pid), "--timeout", "10")
    assert (done.status, done.out, done.err) == (0, "", "")
    target.wait_gone()
    pidfile = Path(images) / "pid"
    words += ["-o", "restore.log", "--pidfile", "pid"]
    done = criu("restore", *words, "--restore-detach")
    assert (done.status, done.out, done.err) == (0, "", "")
    assert pidfile.read_text() == str(target.pid)
    assert target.alive()
    assert "Version: 4.2" in (Path(images) / "restore.log").read_text()

    target.tell("end", "3")
    target.wait_gone()
    done = criu("restore", *words)
    assert done.status == 1
    assert "pid" in done.err
    assert target.state() is None, "a restore that cannot write its pidfile must leave nothing"
    pidfile.unlink()
    done = criu("restore", *words)
    assert (done.status, done.out, done.err) == (0, "", ""), "it waits, and ends with 0"
    assert target.state() is None


def test_criu_exec_cmd_gets_the_process_as_its_child(criu, target: Target, images: str) -> None:
    assert criu("dump", "-D", images, "-t", str(target.pid)).status == 0
    target.wait_gone()
    target.tell("end", "5")
    script = "import os; print(*os.wait())"
    command = ["--exec-cmd", "--", sys.executable, "-c", script]
    done = criu("restore", "-D", images, *command)
    assert done.status == 0, done
    assert done.out == f"{target.pid} {5 << 8}\n"


def test_criu_restore_sibling(criu, target: Target, images: str) -> None:
    assert criu("dump", "-D", images, "-t", str(target.pid)).status == 0
    target.wait_gone()
    done = criu("restore", "-D", images, "-d", "-S", "--display-stats")
    assert done.status == 0
    assert done.out.startswith("Displaying restore stats:\nRestore time: ")
    with open(f"/proc/{target.pid}/stat", encoding="ascii") as file:
        assert int(file.read().rpartition(")")[2].split()[1]) == os.getpid()


def test_criu_leave_running(criu, target: Target, images: str) -> None:
    done = criu("dump", "-D", images, "-t", str(target.pid), "-R", "--display-stats")
    assert done.status == 0
    lines = dict(line.split(": ") for line in done.out.splitlines()[1:])
    assert done.out.startswith("Displaying dump stats:\n")
    assert 0 < int(lines["Frozen time"].removesuffix(" us")) < 60_000_000
    pages = int(lines["Memory pages written"].split()[0])
    assert lines["Memory pages written"] == f"{pages} (0x{pages:x})"
    assert pages * 4096 == (Path(images) / "pages-1.img").stat().st_size
    assert target.alive()
    target.tell("end", "0")


def test_criu_check(criu) -> None:
    done = criu("check", "--no-default-config", "-verbosity=0", "--feature", "timerfd")
    assert (done.status, done.err) == (0, "")
    assert criu("check").out == "Looks good.\n"


def test_crit_round_trip(torpor, target: Target, images: str) -> None:
    assert torpor("dump", str(target.pid), "-D", images).status == 0
    image = os.path.join(images, f"core-{target.pid}.img")
    text = os.path.join(images, "core.json")
    assert torpor("crit", "decode", "-i", image, "-o", text).status == 0
    assert json.loads(Path(text).read_text())["magic"] == "CORE"
    again = os.path.join(images, "again")
    assert torpor("crit", "encode", "-i", text, "-o", again).status == 0
    assert Path(again).read_bytes() == Path(image).read_bytes()
    assert json.loads(torpor("crit", "info", image).out)["count"] == 1
    with open(image, "rb") as file:
        piped = subprocess.run(
            torpor.argv("crit", "decode"), env=environment(), stdin=file, capture_output=True,
            check=True,
        )  # fmt: skip
    assert json.loads(piped.stdout) == json.loads(Path(text).read_text())
    assert torpor("crit", "show", image).out.startswith('{\n    "magic": "CORE"')
