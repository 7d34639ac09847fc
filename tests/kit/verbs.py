"""Running Torpor, as a library in this process and as a command in another."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from typing import Any

from .files import slurp_text
from .host import stat_fields, wait_until
from .observe import assert_same, observe_settled, observe_tree
from .target import Target

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SOURCES = os.path.join(ROOT, "src")


def tool(name: str) -> Any:
    """The module tools/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, os.path.join(ROOT, "tools", f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before  # tools put the sources there, for who has not installed them
    return module


class CommandResult:
    """How a command ended: ``status``, what it printed (``output``) and what it logged (``log``)."""

    def __init__(self, argv: list[str], status: int, output: str, log: str) -> None:
        self.argv, self.status, self.output, self.log = argv, status, output, log

    def __repr__(self) -> str:
        lines = self.log.splitlines()
        errors = [line for line in lines if "Error" in line or "Traceback" in line]
        shown = "\n".join([*errors, "…", *lines[-12:]])
        return f"{' '.join(self.argv)}: status {self.status}\n{self.output}\n{shown}"

    def must(self) -> CommandResult:
        assert self.status == 0, repr(self)
        return self


def run_torpor(*args: object, timeout: float = 60, cwd: str | None = None) -> CommandResult:
    """Run ``torpor ARGS…`` and wait for it."""
    return _run([sys.executable, "-m", "torpor", *map(str, args)], timeout, cwd)


def _run(argv: list[str], timeout: float, cwd: str | None = None) -> CommandResult:
    env = {**os.environ, "PYTHONPATH": SOURCES}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # compiled once, not for every command
    done = subprocess.run(
        argv, env=env, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    return CommandResult(argv[1:], done.returncode, done.stdout, "")


def run_criu(verb: str, images: object, *args: object, timeout: float = 60, program: str = "") -> CommandResult:
    """Run ``torpor criu VERB`` on an images folder, with its log at the highest level.

    ``program`` is another command that understands the same arguments.
    """
    log = f"{verb}.log"
    argv = [program] if program else [sys.executable, "-m", "torpor", "criu"]
    common = ["--no-default-config", "-D", str(images), "-o", log, "-v4"]
    result = _run([*argv, verb, *common, *map(str, args)], timeout)
    path = os.path.join(str(images), log)
    if os.path.exists(path):
        result.log = slurp_text(path)
    return result


def _flags(options: dict[str, object]) -> list[str]:
    """``leave_running=True`` is ``--leave-running``, ``ghost_limit=5`` is ``--ghost-limit 5``."""
    flags: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif isinstance(value, list | tuple):
            flags += [word for each in value for word in (flag, str(each))]
        elif value not in (False, None):
            flags += [flag, str(value)]
    return flags


class Verbs:
    """Dump and restore in one of the ways that users have; options have the names of the RPC."""

    name = ""
    #: Does whoever is outside see the restored tasks under the numbers that they had?
    same_pids = True

    def dump(self, pid: int, images: object, **options: object) -> None:
        raise NotImplementedError

    def restore(self, images: object, **options: object) -> int:
        """Restore and give the root's pid."""
        raise NotImplementedError


class Untouched(Verbs):
    """No dump and no restore: a test program must be content with itself when nothing happens."""

    name = "untouched"

    def dump(self, pid: int, images: object, **options: object) -> None:
        if options.get("leave_stopped"):
            os.kill(pid, signal.SIGSTOP)
            wait_until("it has stopped", lambda: (stat_fields(pid) or "???")[2] == "T")

    def restore(self, images: object, **options: object) -> int:
        return 0


class Library(Verbs):
    """In this process, as a caller that stays warm does it."""

    name = "library"

    def dump(self, pid: int, images: object, **options: object) -> None:
        import torpor

        torpor.dump(pid, str(images), **options)  # type: ignore[attr-defined]

    def restore(self, images: object, **options: object) -> int:
        import torpor

        return int(torpor.restore(str(images), **options).pid)  # type: ignore[attr-defined]


class OwnPids(Library):
    """Restored into a pid namespace of its own."""

    name = "own-pids"
    same_pids = False

    def restore(self, images: object, **options: object) -> int:
        return super().restore(images, own_pids=True, **options)


class Clone(Library):
    """Restored as a copy of a template, which ends before the copy is looked at."""

    name = "clone"
    same_pids = False

    def restore(self, images: object, **options: object) -> int:
        import torpor

        with torpor.template(str(images), **options) as template:
            return int(template.clone().pid)


class Again(Library):
    """A copy of a template, dumped like any other process, and its snapshot cloned in turn."""

    name = "again"
    same_pids = False

    def __init__(self) -> None:
        self.options: dict[str, object] = {}

    def dump(self, pid: int, images: object, **options: object) -> None:
        self.options = {name: value for name, value in options.items() if not name.startswith("leave_")}
        super().dump(pid, images, **options)

    def restore(self, images: object, **options: object) -> int:
        import torpor

        second = os.path.join(str(images), "again")
        os.mkdir(second)
        with torpor.template(str(images), **options) as template:
            copy = template.clone()
            torpor.dump(copy.pid, second, **self.options)
            copy.wait()
        with torpor.template(second, **options) as template:
            return int(template.clone().pid)


class Command(Verbs):
    """As `criu` is used: one process a verb, and it must end with status 0."""

    name = "command"
    program = ""

    def dump(self, pid: int, images: object, **options: object) -> None:
        run_criu("dump", images, "-t", pid, *_flags(options), program=self.program).must()

    def restore(self, images: object, **options: object) -> int:
        pidfile = os.path.join(str(images), "restored.pid")
        args = ["-d", "--pidfile", pidfile, *_flags(options)]
        run_criu("restore", images, *args, program=self.program).must()
        return int(slurp_text(pidfile))


class Peer(Command):
    """Another program with CRIU's command line, such as CRIU."""

    name = "criu"

    def __init__(self, program: str) -> None:
        self.program = program


def round_trip(
    verbs: Verbs, target: Target, images: object, *, ignore: tuple[str, ...] = (),
    dump: dict[str, object] | None = None, restore: dict[str, object] | None = None,
    compare: bool = True,
) -> None:  # fmt: skip
    """Dump the target, see that it is gone, restore it, and see that nothing about it has changed.

    ``dump`` and ``restore`` are the options of each; ``ignore`` holds patterns of what may differ.
    """
    target.pids()
    before = observe_settled(target.pid)
    if verbs.name == "untouched":
        assert_same(before, observe_tree(target.pid), ignore if compare else ("*",))
        return
    verbs.dump(target.pid, images, **(dump or {}))
    target.wait_gone()
    pid = verbs.restore(images, **(restore or {}))
    if verbs.same_pids:
        assert pid == target.pid
    target.pid = pid
    assert target.alive(), "restored, and dead"
    if compare and verbs.same_pids:
        assert_same(before, observe_tree(target.pid), ignore)
