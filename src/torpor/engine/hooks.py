"""Action scripts and callbacks: what the caller wants done at certain moments of a dump or restore.

The names and the moments are CRIU's. Scripts get them in their environment: CRTOOLS_SCRIPT_ACTION (the name),
CRTOOLS_IMAGE_DIR (a path of the images directory that leads there from everywhere), CRTOOLS_INIT_PID (the root task as
we see it, from when there is one; at "setup-namespaces" and "post-setup-namespaces" the first process in the
namespaces, which may be the init of the root). What they print goes to the log. Callbacks get an :class:`Action`, and
are asked before the scripts. All scripts are run, the one named last first, even when another has failed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal

from .. import log
from ..errors import ActionFailed, TorporError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..options import Options

NAMES = (
    "pre-stream", "pre-dump", "post-dump", "pre-restore", "post-restore", "network-lock", "network-unlock",
    "setup-namespaces", "post-setup-namespaces", "pre-resume", "post-resume", "orphan-pts-master", "status-ready",
    "query-ext-files",
)  # fmt: skip
#: Too late to give up: a failure is only logged.
MERELY_LOGGED = frozenset(("network-unlock", "pre-resume", "post-resume"))
#: They hand something over or want an answer, which scripts cannot deal with.
CALLBACKS_ONLY = frozenset(("orphan-pts-master", "query-ext-files"))
INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: How the command ends if post-dump fails: the images are whole and stay, but the tasks run on, and callers know it by
#: this status.
POST_DUMP_STATUS = 255


class Action:
    """One moment, as a callback gets it.

    ``name`` is one of NAMES, ``pid`` the root task (0: there is none yet), ``images_dir`` the directory, ``fd`` what is
    handed over ("orphan-pts-master": the master of a pty, closed by the caller after the callback; else -1).
    """

    __slots__ = ("fd", "images_dir", "name", "pid")

    def __init__(self, name: str, pid: int, images_dir: str, fd: int) -> None:
        self.name = name
        self.pid = pid
        self.images_dir = images_dir
        self.fd = fd

    def __repr__(self) -> str:
        return f"<action {self.name} of {self.pid}>"


class Hooks:
    """Who is to be told of the moments of one operation."""

    def __init__(self, options: Options, images_fd: int) -> None:
        """``images_fd`` must stay open as long as this is used. Raises UsageError for a script that cannot be run."""
        self._notify = options.notify
        self._images_dir = options.images_dir
        self._images = f"/proc/{os.getpid()}/fd/{images_fd}"
        self._scripts = [_found(script) for script in reversed(options.action_script)]

    def __bool__(self) -> bool:
        """Is there anybody to be told?"""
        return self._notify is not None or bool(self._scripts)

    def run(self, name: str, pid: int = 0, *, fd: int = -1) -> object:
        """It is the moment ``name``; ``pid`` is the root task, if there is one. Gives what the callback returned.

        Raises ActionFailed when a callback raises an error or a script fails, unless it is too late for that.
        """
        assert name in NAMES, name
        answer = None
        try:
            if self._notify is not None:
                answer = self._call(Action(name, pid, self._images_dir, fd))
            if self._scripts and name not in CALLBACKS_ONLY:
                self._run_scripts(name, pid)
        except TorporError as error:
            if name not in MERELY_LOGGED:
                raise
            log.error(str(error))
        return answer

    def _call(self, action: Action) -> object:
        assert self._notify is not None
        try:
            return self._notify(action)
        except Exception as error:
            why = str(error) or type(error).__name__
            raise ActionFailed(action.name, f"the callback failed: {why}", _status(action.name)) from error

    def _run_scripts(self, name: str, pid: int) -> None:
        failed = ""
        for script in self._scripts:
            log.debug(f"{name}: {script}")
            ending = _run(script, self._environment(name, pid))
            if ending:
                log.error(f"{name}: {script}: {ending}")
                failed = failed or f"`{script}`: {ending}"
        if failed:
            raise ActionFailed(name, failed, _status(name))

    def _environment(self, name: str, pid: int) -> dict[str, str]:
        env = {**os.environ, "CRTOOLS_SCRIPT_ACTION": name, "CRTOOLS_IMAGE_DIR": self._images}
        env.pop("CRTOOLS_INIT_PID", None)
        if pid:
            env["CRTOOLS_INIT_PID"] = str(pid)
        return env


def _status(name: str) -> int:
    return POST_DUMP_STATUS if name == "post-dump" else 1


def _found(script: str) -> str:
    """The path of a script, looked for in PATH where it has no slash. Raises UsageError."""
    import shutil

    found = shutil.which(script)
    if found is None:
        there = os.path.exists(script)
        raise UsageError(f"action script `{script}`: {'it is not executable' if there else 'there is none'}")
    return found


def _run(script: str, env: dict[str, str]) -> str:
    """Run a script and wait for it; what went wrong, in words, or "". It is killed if we are interrupted."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTIONS)  # none may come before we know whom to kill
    pid = pidfd = -1
    try:
        pid = os.fork()
        if pid == 0:
            _become(script, env)
        pidfd = os.pidfd_open(pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        _, status = os.waitpid(pid, 0)
    except BaseException:
        if pidfd >= 0:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.waitpid(pid, 0)
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if pidfd >= 0:
            os.close(pidfd)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"it died of signal {-code}"
    return f"exit status {code}" if code else ""


def _become(script: str, env: dict[str, str]) -> None:
    """In the child: be the script, with nothing of ours but the log; does not return."""
    try:
        nothing = os.open("/dev/null", os.O_RDWR)
        sink = log.descriptor()
        os.dup2(nothing, 0)
        for number in (1, 2):
            os.dup2(nothing if sink < 0 else sink, number)
        os.closerange(3, 0x7FFFFFFF)
        for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
            signal.signal(ignored, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        try:
            os.execve(script, [script], env)
        except OSError as error:
            if error.errno == errno.ENOEXEC:  # as execvp(3) does it
                os.execve("/bin/sh", ["sh", script], env)
            raise
    except OSError as error:
        os.write(2, f"{script}: {error.strerror}\n".encode())
    finally:
        os._exit(127)
