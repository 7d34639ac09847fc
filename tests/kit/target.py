"""Programs to be snapshotted: in a session of their own, spoken to over files, always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence

from .files import appear, slurp_text
from .host import descendants, end_descendants, reap, stat_fields, wait_until
from .programs import HERE, compile_c


class Target:
    """A running program. Its folder holds ``ready``, ``go``, ``result`` and ``stdout`` (stderr too)."""

    def __init__(
        self, folder: str, argv: Sequence[str], *, env: dict[str, str] | None = None,
        session: bool = True, setup: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        """Start ``argv`` in ``folder``; ``setup`` runs in the child just before the program does."""
        self.folder = folder
        self.argv = [os.fspath(argument) for argument in argv]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "KIT_DIR": folder, **(env or {})}
        self.pid = os.fork()
        if self.pid == 0:
            try:
                self._become(environment, session, setup)
            finally:
                os._exit(127)
        self.seen = {self.pid}

    def _become(self, env: dict[str, str], session: bool, setup: Callable[[], object] | None) -> None:
        if session:
            os.setsid()
        os.chdir(self.folder)
        for number in range(1, 32):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(os.open("stdout", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 1)
        os.dup2(1, 2)
        os.closerange(3, 4096)
        if setup is not None:
            setup()
        os.execvpe(self.argv[0], self.argv, env)

    def __repr__(self) -> str:
        return f"<target {self.pid} in {self.folder}>"

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def read(self, name: str) -> str:
        """A file's text; empty if there is no such file."""
        try:
            return slurp_text(self.path(name))
        except FileNotFoundError:
            return ""

    def tell(self, name: str, text: str = "") -> None:
        """Make a file appear with its whole content at once."""
        appear(self.path(name), text)

    def state(self) -> str | None:
        """The state letter of the main thread; None if there is no such task."""
        fields = stat_fields(self.pid)
        return fields[2] if fields else None

    def alive(self) -> bool:
        return self.state() not in (None, "Z", "X")

    def pids(self) -> list[int]:
        """The whole tree, the root first; remembers every number that it has seen."""
        below = descendants(self.pid)
        self.seen.update(below)
        return [self.pid, *below]

    def wait_file(self, name: str, *, timeout: float = 15) -> str:
        """Wait for a file and give its text; fails when the program ends without it."""

        def there() -> bool:
            if os.path.exists(self.path(name)):
                return True
            if not self.alive() and not os.path.exists(self.path(name)):
                raise AssertionError(f"{self} ended without `{name}`: {self.read('result')} {self.read('stdout')}")
            return False

        wait_until(f"{self} makes `{name}`; result: {self.read('result')!r}", there, timeout=timeout)
        return self.read(name)

    def wait_ready(self) -> Target:
        """Wait until the program says that it is set up and then sleeps."""
        self.wait_file("ready")
        self.pids()
        assert not self.read("result"), self.read("result")
        return self

    def wait_gone(self, *, timeout: float = 10) -> None:
        """Wait until every task that was seen of the tree is dead and reaped."""

        def gone() -> bool:
            reap(list(self.seen))
            return not any(stat_fields(pid) for pid in self.seen)

        wait_until(f"{self}: the tree is gone", gone, timeout=timeout)

    def go(self, *, timeout: float = 20) -> None:
        """Tell the program to look at itself and require that it is content."""
        self.tell("go")
        verdict = self.wait_file("result", timeout=timeout)
        assert verdict == "pass\n", f"{verdict}{self.read('stdout')}"

    def end(self) -> None:
        """Kill the tree, whatever it became."""
        for pid in {self.pid, *self.seen, *descendants(self.pid)}:
            with contextlib.suppress(ProcessLookupError):
                if pid in descendants(os.getpid()):
                    os.kill(pid, signal.SIGKILL)
        reap(list(self.seen))


class Targets:
    """Starts targets, each in a folder of its own; the fixture ``start`` is one of these."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.count = 0
        self.keep = set(descendants(os.getpid()))

    def _folder(self) -> str:
        self.count += 1
        path = os.path.join(self.folder, f"target{self.count}")
        os.mkdir(path)
        return path

    def command(
        self, *argv: str, wait: bool = False, env: dict[str, str] | None = None,
        session: bool = True, setup: Callable[[], object] | None = None,
    ) -> Target:  # fmt: skip
        """Start any program; it is not waited for unless it knows how to say that it is ready."""
        target = Target(self._folder(), argv, env=env, session=session, setup=setup)
        return target.wait_ready() if wait else target

    def c(
        self, source: str, *args: str, flags: Sequence[str] = (), wait: bool = True,
        env: dict[str, str] | None = None, setup: Callable[[], object] | None = None,
    ) -> Target:  # fmt: skip
        """Compile and start a C program (see ``kit.h``), and wait until it is ready."""
        return self.command(compile_c(source, *flags), *args, wait=wait, env=env, setup=setup)

    def python(self, source: str, *args: str, wait: bool = True, env: dict[str, str] | None = None) -> Target:
        """Start a Python program (see ``kit_inside``), and wait until it is ready."""
        environment = {"PYTHONPATH": os.path.join(HERE, "inside"), **(env or {})}
        preamble = "from kit_inside import *\n"
        return self.command(sys.executable, "-c", preamble + source, *args, wait=wait, env=environment)

    def end(self) -> None:
        """End everything below this process that was not there when this object was made."""
        end_descendants(self.keep)
