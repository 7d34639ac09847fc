"""The torpor command as people and their scripts see it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from torpor.cli import check, dump, restore
from torpor.cli.main import VERBS
from torpor.cli.terminal import seconds, size, table


def test_version(torpor) -> None:
    done = torpor("--version")
    assert (done.status, done.out, done.err) == (0, "torpor 0.1.0 (as criu: 4.2)\n", "")


def test_version_is_the_packages() -> None:
    import tomllib

    import torpor
    from torpor.cli.common import VERSION

    root = Path(__file__).parents[2]
    packaged = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert packaged == VERSION == torpor.__version__


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(torpor, words: list[str]) -> None:
    done = torpor(*words)
    assert (done.status, done.err) == (0, "")
    assert all(f"torpor {verb} " in done.out for verb in VERBS)


@pytest.mark.parametrize("verb", ["dump", "restore", "check", "show", "crit", "criu"])
def test_help_of_a_verb_teaches(torpor, verb: str) -> None:
    for words in ([verb, "--help"], [verb, "-h"], ["help", verb]):
        done = torpor(*words)
        assert (done.status, done.err) == (0, "")
        assert done.out.split()[0] in ("Usage:", "Torpor's")
        examples = done.out.partition("Examples:\n")[2]
        assert examples.count("\n") >= 3
        assert all(len(line) <= 100 for line in done.out.splitlines())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["thaw"], "there is no verb `thaw`"),
        (["dumb"], "did you mean `dump`?"),
        (["--nonsense"], "there is no option `--nonsense`"),
        (["dump"], "dump takes one process id"),
        (["dump", "1", "2"], "dump takes one process id"),
        (["dump", "x"], "`x` is not a process id"),
        (["dump", "-5"], "there is no option -5"),
        (["dump", "0"], "`0` is not a process id"),
        (["dump", "1", "--tree", "1"], "there is no option --tree"),
        (["dump", "1", "--track-mem"], "dump --track-mem is not implemented yet"),
        (["restore", "a", "b"], "restore takes one directory"),
        (["restore", ".", "--leave-stopped"], "restore --leave-stopped is not implemented yet"),
        (["restore", ".", "--leave-running"], "there is no option --leave-running"),
        (["check", "1", "2"], "check takes one process id"),
        (["show"], "show reads one directory"),
        (["show", "/no/such/dir"], "`/no/such/dir`: No such file or directory"),
        (["crit"], "usage: torpor crit"),
        (["crit", "melt"], "usage: torpor crit"),
        (["crit", "show", "/no/such.img"], "/no/such.img`: No such file or directory"),
    ],
)
def test_refusals(torpor, words: list[str], message: str) -> None:
    done = torpor(*words, fake="")
    assert done.status == 1
    assert message in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_without_words_it_shows_help(torpor) -> None:
    done = torpor()
    assert done.status == 1
    assert "torpor dump" in done.out


def test_dump_makes_the_directory_and_says_what_it_did(torpor, tmp_path: Path) -> None:
    done = torpor("dump", "42", "-D", "new/snap", "-R", fake="")
    assert (done.status, done.err) == (0, "")
    said, _, summary = done.out.partition("\n")
    assert said == (
        f"dump 42 Options(pid=42, images_dir='{tmp_path}/new/snap', "
        f"work_dir='{tmp_path}/new/snap', leave_running=True, log_level=3, "
        f"log_file='{tmp_path}/new/snap/dump.log')"
    )
    assert summary == (
        f"Dumped process 42 to {tmp_path}/new/snap. It runs on.\n"
        "  tasks     2 (3 threads)\n"
        "  mappings  1,110\n"
        "  files     5\n"
        "  pages     1,812 (7.1 MiB)\n"
        "  on disk   0 bytes\n"
        "  frozen    5.4 ms\n"
        "  in all    1.25 s\n"
        f"Wake it with: torpor restore {tmp_path}/new/snap\n"
    )
    assert (tmp_path / "new" / "snap").stat().st_mode & 0o777 == 0o700
    assert "dump: as such" in (tmp_path / "new" / "snap" / "dump.log").read_text()


def test_dump_says_how_it_left_the_process(torpor) -> None:
    assert "It was ended." in torpor("dump", "42", "-D", "s", fake="").out
    assert "It is left stopped." in torpor("dump", "42", "-D", "s", "-s", fake="").out


def test_dump_as_json(torpor, tmp_path: Path) -> None:
    done = torpor("dump", "42", "-D", "s", "--json", fake="")
    result = json.loads(done.out.splitlines()[1])
    assert result["pids"] == [42, 43]
    assert result["images_dir"] == f"{tmp_path}/s"
    assert result["frozen_s"] == 0.0054
    assert result["pages"] == 1812


def test_dump_counts_what_is_on_disk(torpor, tmp_path: Path) -> None:
    images = tmp_path / "s"
    images.mkdir()
    (images / "pages-1.img").write_bytes(b"x" * 8192)
    with open(images / "holes.img", "wb") as file:
        file.truncate(1 << 30)
    done = torpor("dump", "42", "-D", "s", "--json", fake="")
    assert 8192 <= json.loads(done.out.splitlines()[1])["image_bytes"] < 1 << 20


def test_a_failure_is_one_sentence_and_a_hint(torpor, tmp_path: Path) -> None:
    done = torpor("dump", "42", "-D", "s", fake="unsupported")
    assert done.status == 1
    assert done.err == (
        "Error: dump: task 42: fd 7 (io_uring): requests are in flight\n"
        "  hint: wait for them\n"
        "  undo: thaw: no such group\n"
    )
    assert "Error: dump: task 42: fd 7" in (tmp_path / "s" / "dump.log").read_text()


def test_a_bug_is_one_line(torpor, tmp_path: Path) -> None:
    done = torpor("dump", "42", "-D", "s", fake="bug")
    assert done.status == 1
    assert done.err.count("\n") == 1
    assert "internal error" in done.err
    assert "ZeroDivisionError" in (tmp_path / "s" / "dump.log").read_text()


def test_an_interrupted_dump_takes_back(torpor) -> None:
    with torpor.start("dump", "42", "-D", "s", fake="wait") as process:
        process.stdout.readline()
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert out == "taken back\n"
    assert err == "Error: torpor dump: interrupted\n"


@pytest.mark.parametrize(("fake", "status"), [("exit 0", 0), ("exit 7", 7), ("die 9", 137)])
def test_restore_ends_as_the_process_ends(torpor, fake: str, status: int) -> None:
    done = torpor("restore", ".", fake=fake)
    assert done.status == status
    assert done.err == ""


def test_restore_passes_on_signals(torpor) -> None:
    """The child answers SIGTERM with status 9; the command itself lives until then."""
    with torpor.start("restore", ".", fake="linger") as process:
        process.stdout.readline()
        child = int(process.stdout.readline().split()[1])
        wait_until_it_waits(process.pid)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 9
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def wait_until_it_waits(pid: int) -> None:
    """Until the command is in sigwait(3): 128 is rt_sigtimedwait."""
    while True:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            if file.read().split()[0] == "128":
                return


def test_restore_hears_of_its_child_where_children_are_ignored(torpor) -> None:
    """Who starts it may ignore SIGCHLD, which is inherited."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = torpor.start("restore", ".", fake="exit 7")
    finally:
        signal.signal(signal.SIGCHLD, before)
    with process:
        assert process.wait(timeout=30) == 7


def test_restore_detached_prints_the_pid(torpor) -> None:
    done = torpor("restore", ".", "-d", fake="exit 0")
    assert done.status == 0
    lines = [line for line in done.out.splitlines() if line.isdigit()]
    assert len(lines) == 1


def test_restore_as_json(torpor) -> None:
    done = torpor("restore", ".", "-d", "--json", fake="exit 0")
    assert any(line.startswith('{"pid": ') for line in done.out.splitlines())


def test_restore_takes_the_directory_either_way(torpor, tmp_path: Path) -> None:
    for words in (["snap"], ["-D", "snap"]):
        done = torpor("restore", *words, "-d", "--pidfile", "p", fake="exit 0")
        assert f"images_dir='{tmp_path}/snap'" in done.out
        assert f"pidfile='{tmp_path}/p'" in done.out


def test_check_the_kernel(torpor) -> None:
    done = torpor("check", fake="")
    assert done.status == 0
    assert done.out == "yes  ptrace  fine\nyes  clone3  set_tid\nyes  guards  regions\n"
    done = torpor("check", fake="lacking")
    assert done.status == 1
    assert done.out == "yes  ptrace  fine\nNO   clone3  set_tid\nno   guards  regions\n"
    assert torpor("check", fake="wanting").status == 0
    done = torpor("check", "--json", fake="lacking")
    wanted = {"name": "clone3", "ok": False, "required": True, "text": "set_tid"}
    assert json.loads(done.out)[1] == wanted


def test_check_a_process(torpor) -> None:
    done = torpor("check", "42", fake="")
    assert (done.status, done.out) == (0, "Process 42 can be dumped.\n")
    done = torpor("check", "42", fake="lacking")
    assert done.status == 1
    assert done.out == (
        "2 things stand in the way of a dump of process 42:\n"
        "  - task 42: fd 3: odd\n"
        "    hint: close it\n"
        "  - fd 4: odd\n"
    )
    done = torpor("check", "42", "--json", fake="lacking")
    first = {"context": ["task 42"], "what": "fd 3: odd", "hint": "close it"}
    assert json.loads(done.out)[0] == first


def test_criu_is_the_criu_command(torpor) -> None:
    assert torpor("criu", "--version").out == "Version: 4.2\n"
    done = torpor("criu", "dump", "-t", "7", fake="")
    assert done.out.startswith("dump 7 ")


def test_python_dash_m(torpor) -> None:
    import subprocess
    import sys

    from .conftest import environment

    words = [sys.executable, "-m", "torpor", "--version"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == torpor("--version").out


def test_every_verb_has_help_with_its_own_options() -> None:
    for module in (dump, restore, check):
        text = module.HELP.render()
        assert "--images-dir" in text
        assert "(not yet)" not in text
    assert "--pidfile" in restore.HELP.render()
    assert "--pidfile" not in dump.HELP.render()


def test_sizes_and_times_for_people() -> None:
    assert [size(n) for n in (0, 1023, 1024, 1536, 1 << 20, 7 << 30, 3 << 50)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "1.0 MiB", "7.0 GiB", "3072.0 TiB",
    ]  # fmt: skip
    assert [seconds(t) for t in (0.00004, 0.0054, 1.25)] == ["0.0 ms", "5.4 ms", "1.25 s"]
    assert table([("a", "bcd"), ("ef", "g")]) == "a   bcd\nef  g\n"
