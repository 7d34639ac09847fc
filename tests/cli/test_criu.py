"""The criu command as its callers see it: what it prints, where, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torpor.cli.criu import _check_capabilities
from torpor.errors import UsageError
from torpor.options import FEATURES, VERBS_NOT_YET, Options


def test_version_is_what_lxc_and_vllm_parse(criu) -> None:
    for word in ("--version", "-V", "--vers"):
        done = criu(word)
        assert (done.status, done.out, done.err) == (0, "Version: 4.2\n", "")


def test_version_comes_before_whatever_else_is_wrong(criu) -> None:
    assert criu("-V", "--nonsense").out == "Version: 4.2\n"
    assert criu("--nonsense", "-V").status == 1


def test_version_with_every_descriptor_closed(criu) -> None:
    """LXC closes stderr for its probe; CRIU's Python client closes all three."""
    words = [*criu.argv("--version")]
    close_all = "exec 0<&- 2>&-; exec \"$@\""
    done = subprocess.run(
        ["sh", "-c", close_all, "sh", *words], env={"PYTHONPATH": _sources()},
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "Version: 4.2\n")
    closed = subprocess.run(
        ["sh", "-c", "exec 0<&- 1>&- 2>&-; exec \"$@\"", "sh", *words],
        env={"PYTHONPATH": _sources()}, check=False,
    )  # fmt: skip
    assert closed.returncode == 0


def _sources() -> str:
    return os.path.join(os.path.dirname(__file__), "..", "..", "src")


@pytest.mark.parametrize(
    "words", [["-h"], ["--help"], ["dump", "--help"], ["--nonsense", "-h"], ["--hel"]]
)
def test_help(criu, words: list[str]) -> None:
    done = criu(*words)
    assert done.status == 0
    assert done.err == ""
    assert "-t, --tree PID" in done.out
    assert all(len(line) <= 100 for line in done.out.splitlines())
    assert "share-pages" in done.out
    assert "--explain" not in done.out


def test_help_of_the_command_to_execute_is_not_ours(criu) -> None:
    done = criu("restore", "--exec-cmd", "--", "sh", "-h", fake="")
    assert "-t, --tree" not in done.out


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 1, ""),
        (["--nonsense"], 1, "there is no option --nonsense"),
        (["-v"], 1, "No command was given"),
        (["dumb"], 1, "did you mean `dump`?"),
        (["dump"], 1, "no pid was given"),
        (["dump", "-t", "x"], 1, "--tree: `x`"),
        (["dump", "-v", "4", "-t", "1"], 1, "dump takes no other words, and `4` was given"),
        (["check", "a", "b"], 1, "check takes no other words"),
        (["cpuinfo"], 1, "cpuinfo needs one more word"),
        (["cpuinfo", "melt"], 1, "cpuinfo needs one more word"),
        (["restore", "--exec-cmd"], 1, "--exec-cmd needs a command"),
        (["dump", "--exec-cmd", "--", "true"], 1, "--exec-cmd is for restore only"),
        (["restore", "-d", "--exec-cmd", "--", "true"], 1, "contradict"),
        (["restore", "--restore-sibling"], 1, "--restore-sibling only makes sense"),
        (["check", "--feature", "telepathy"], 1, "there is no feature `telepathy`"),
        (["check", "-D", "/no/such/dir"], 1, "`/no/such/dir`: No such file or directory"),
        (["check", "-W", "/no/such/dir"], 1, "`/no/such/dir`: No such file or directory"),
        (["check", "-o", "/no/such/dir/log"], 1, "`/no/such/dir/log`: No such file or directory"),
        (["exec"], 255, "no longer exists"),
        (["show"], 255, "no longer exists"),
        *(([*verb.split()], 1, f"{verb} is not implemented yet") for verb in sorted(VERBS_NOT_YET)),
    ],
)
def test_refusals(criu, words: list[str], status: int, message: str) -> None:
    done = criu(*words, fake="")
    assert done.status == status
    assert message in done.err
    assert "Traceback" not in done.err


def test_without_words_it_shows_its_usage(criu) -> None:
    done = criu()
    assert done.out.startswith("Usage:\n  criu dump")


def test_dump_hands_the_options_to_the_engine(criu, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    done = criu(
        "dump", "--no-default-config", "--log-file", "dump.log", "--images-dir", "images",
        "--verbosity=4", "--tree", "42", "--timeout", "10", "-j", fake="",
    )  # fmt: skip
    assert done.status == 0
    assert done.err == ""
    wanted = (
        f"dump 42 Options(pid=42, images_dir='{tmp_path}/images', work_dir='{tmp_path}/images', "
        "shell_job=True, guest=False, log_level=4, "
        f"log_file='{tmp_path}/images/dump.log', no_default_config=True)\n"
    )
    assert done.out == wanted
    log = (tmp_path / "images" / "dump.log").read_text()
    assert "Version: 4.2" in log
    assert "dump: as such" in log
    assert "dump: in detail" in log
    assert (tmp_path / "images" / "dump.log").stat().st_mode & 0o777 == 0o600


def test_log_levels(criu, tmp_path: Path) -> None:
    criu("dump", "-t", "1", "-o", "log", "-v3", fake="")
    log = (tmp_path / "log").read_text()
    assert "dump: as such" in log
    assert "in detail" not in log
    done = criu("dump", "-t", "1", fake="")
    assert done.err == ""
    assert "dump: as such" in criu("dump", "-t", "1", "-v3", fake="").err
    assert "dump: as such" in criu("dump", "-t", "1", "-v3", "-o", "-", fake="").out


def test_relative_paths_count_from_the_work_directory(criu, tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "w").mkdir()
    done = criu("restore", "-D", "i", "-W", "w", "-o", "log", "--pidfile", "p", "-d", fake="")
    assert f"images_dir='{tmp_path}/i'" in done.out
    assert f"work_dir='{tmp_path}/w'" in done.out
    assert f"pidfile='{tmp_path}/w/p'" in done.out
    assert (tmp_path / "w" / "log").exists()
    absolute = tmp_path / "elsewhere.log"
    criu("restore", "-D", "i", "-W", "w", "-o", str(absolute), "-d", fake="")
    assert absolute.exists()


def test_a_log_is_started_afresh(criu, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("of yesterday\n")
    criu("dump", "-t", "1", "-o", "log", fake="")
    assert "yesterday" not in (tmp_path / "log").read_text()


def test_a_failure_is_one_sentence_in_the_log_and_on_stderr(criu, tmp_path: Path) -> None:
    done = criu("dump", "-t", "42", "-o", "log", fake="unsupported")
    assert done.status == 1
    assert done.err == (
        "Error: dump: task 42: fd 7 (io_uring): requests are in flight\n"
        "  hint: wait for them\n"
        "  undo: thaw: no such group\n"
    )
    log = (tmp_path / "log").read_text()
    assert "Error: dump: task 42: fd 7 (io_uring): requests are in flight (hint: wait" in log
    assert "Warn: undo: thaw" in log


def test_a_failure_is_said_once_when_the_log_is_stderr(criu) -> None:
    done = criu("dump", "-t", "42", fake="unsupported")
    assert done.status == 1
    assert done.err.count("requests are in flight") == 1


def test_silence(criu) -> None:
    for words in (["-v0"], ["-verbosity=0"], ["-v0", "-o", "log"]):
        done = criu("dump", "-t", "42", *words, fake="unsupported")
        assert (done.status, done.err) == (1, "")


def test_several_blockers(criu) -> None:
    done = criu("dump", "-t", "42", "-o", "log", fake="blockers")
    assert "2 things stand in the way" in done.err
    assert "fd 3: odd (hint: close it)" in done.err
    assert "fd 4: odd" in done.err


def test_an_error_of_the_system(criu) -> None:
    done = criu("dump", "-t", "42", "-o", "log", fake="oserror")
    assert (done.status, done.err) == (
        1,
        "Error: criu: `/no/such/place`: No such file or directory\n",
    )


def test_a_bug_is_one_line_and_a_trace_in_the_log(criu, tmp_path: Path) -> None:
    done = criu("dump", "-t", "42", "-o", "log", fake="bug")
    assert done.status == 1
    assert done.err == (
        f"Error: criu: internal error, please report it with the trace in {tmp_path}/log\n"
    )
    assert "ZeroDivisionError: of the engine" in (tmp_path / "log").read_text()


def test_a_bug_without_a_log_leaves_its_trace_in_a_file(criu, tmp_path: Path) -> None:
    done = criu("dump", "-t", "42", fake="bug", TMPDIR=str(tmp_path))
    (trace,) = tmp_path.glob("torpor-crash-*.log")
    assert str(trace) in done.err
    assert "Traceback" not in done.err
    assert "ZeroDivisionError" in trace.read_text()


def test_a_bug_shows_its_trace_when_asked(criu) -> None:
    assert "Traceback" in criu("dump", "-t", "42", fake="bug", TORPOR_DEBUG="1").err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_dump_takes_back_and_dies_of_the_signal(criu, number: int) -> None:
    with criu.start("dump", "-t", "42", "-o", "log", fake="wait") as process:
        while "waiting" not in process.stdout.readline():
            pass
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -number
    assert out == "taken back\n"
    assert err == "Error: criu: interrupted\n"


def test_restore_waits_and_is_always_0(criu) -> None:
    done = criu("restore", fake="exit 3")
    assert done.status == 0
    assert "\nchild " in done.out
    assert criu("restore", fake="").out.endswith("\nchild ends\n")
    assert criu("restore", fake="die 9").status == 0


def test_restore_detached_returns(criu) -> None:
    with criu.start("restore", "-d", fake="linger") as process:
        assert process.wait(timeout=30) == 0
        process.stdout.readline()
        word, pid = process.stdout.readline().split()
        assert word == "child"
        os.kill(int(pid), signal.SIGTERM)  # it is there, and would stay for half a minute
        process.stdout.read()


def test_exec_cmd_becomes_the_parent(criu) -> None:
    script = "import os,sys; print(sys.argv[1:], os.wait()[1] >> 8)"
    done = criu(
        "restore", "--exec-cmd", "--", sys.executable, "-c", script, "-d", "x", fake="exit 3"
    )
    assert done.status == 0
    assert "['-d', 'x'] 3\n" in done.out


def test_exec_cmd_that_cannot_be_executed(criu) -> None:
    done = criu("restore", "--exec-cmd", "--", "/no/such/command", fake="exit 0")
    assert done.status == 1
    assert "the tree runs, but not `/no/such/command`" in done.err


def test_a_waiting_restore_ends_by_a_signal_like_any_program(criu) -> None:
    with criu.start("restore", fake="linger") as process:
        process.stdout.readline()
        child = int(process.stdout.readline().split()[1])
        # The child has written its line before the parent may have begun to wait; either way the
        # parent dies of the signal.
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == -signal.SIGINT
        os.kill(child, signal.SIGTERM)
        process.stdout.read()


def test_check(criu) -> None:
    for fake in ("", "wanting"):
        done = criu("check", fake=fake)
        assert (done.status, done.out, done.err) == (0, "Looks good.\n", "")
    for word in ("--extra", "--all"):
        done = criu("check", word, fake="wanting")
        assert done.status == 1
        assert done.out.startswith("Looks good but")
        assert "guards: regions" in done.err
    done = criu("check", fake="lacking")
    assert (done.status, done.out) == (1, "")
    assert "does not look good: clone3" in done.err


def test_check_feature(criu) -> None:
    done = criu("check", "--feature", "userns", fake="")
    assert (done.status, done.out) == (0, "userns is supported\n")
    done = criu("check", "--no-default-config", "-verbosity=0", "--feature", "uffd", fake="")
    assert (done.status, done.out, done.err) == (1, "", "")
    assert criu("check", "--feature", "list").out.split() == list(FEATURES)


def test_configuration_files_and_their_order(criu, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / ".criu").mkdir(parents=True)
    (home / ".criu" / "default.conf").write_text("tcp-established\nghost-limit 2M\n")
    named = tmp_path / "named.conf"
    named.write_text("ghost-limit 3M\nfile-locks\n")
    done = criu("dump", "-t", "1", fake="", HOME=str(home))
    assert "ghost_limit=2097152" in done.out
    assert "tcp_established=True" in done.out
    done = criu("dump", "-t", "1", "--no-tcp-establ", fake="", HOME=str(home))
    assert "tcp_established" not in done.out
    done = criu("dump", "-t", "1", "--no-default-config", fake="", HOME=str(home))
    assert "ghost_limit" not in done.out
    words = ["dump", "-t", "1", "--config", str(named), "--ghost-limit", "4M"]
    done = criu(*words, fake="", HOME=str(home))
    assert "ghost_limit=4194304" in done.out
    assert "file_locks=True" in done.out
    assert "tcp_established" not in done.out
    done = criu("dump", "-t", "1", fake="", CRIU_CONFIG_FILE=str(named))
    assert "ghost_limit=3145728" in done.out


def test_a_broken_configuration_file(criu, tmp_path: Path) -> None:
    broken = tmp_path / "broken.conf"
    broken.write_text("a b c d e\n")
    done = criu("check", "--config", str(broken), fake="")
    assert done.status == 1
    assert f"{broken}: line 1" in done.err
    assert criu("--version", CRIU_CONFIG_FILE=str(broken)).status == 0
    done = criu("check", "--config", str(tmp_path / "absent"), fake="")
    assert done.status == 0
    assert "absent` cannot be read" in done.err


def test_deprecated_by_environment(criu) -> None:
    assert "deprecated=True" in criu("dump", "-t", "1", fake="", CRIU_DEPRECATED="1").out


def test_without_privileges_it_says_so() -> None:
    # The modules are imported first: an interpreter in somebody's home cannot be started by nobody.
    drop = (
        "import os, sys; from torpor.cli.criu import main; os.setgroups([]); os.setgid(65534); "
        "os.setuid(65534); sys.exit(main(['check', '--no-default-config']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", drop], env={"PYTHONPATH": _sources()}, capture_output=True,
        text=True, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 1
    assert "CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is missing" in done.stderr


def test_without_root_it_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(UsageError, match="--unprivileged"):
        _check_capabilities(Options())
    _check_capabilities(Options(unprivileged=True))


def test_warnings_of_restore(criu) -> None:
    done = criu("restore", "-d", "-t", "1", "--network-lock", "skip", "-s", "-j", fake="exit 0")
    assert "--network-lock does nothing" in done.err
    assert "--tree does nothing" in done.err
    assert "hung up" in done.err
