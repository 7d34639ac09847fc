"""A process that holds a template for others: it makes copies for whoever asks at its socket.

The socket is ``NAME`` in RUN_DIR (SOCK_SEQPACKET); every message is one JSON object. Requests::

    {"verb": "info"}                                  → {"name": …, "images_dir": …, "pid": …, "copies": …, …}
    {"verb": "clone", "count": N, "wait": bool,       → {"pid": P} for each copy as it runs, then {"done": N}, and
     "options": {…}, "fds": ["stdin", "9", …]}          with "wait" {"pid": P, "status": S} as each of them ends
    {"verb": "stop"}                                  → {"stopped": true}

``options`` are those of CopyOptions that are text; ``fds`` names the descriptors that come with the message. A request
that fails is answered with {"error": …, "hint": …}. Only root reaches the folder.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import time

from .. import log
from ..errors import TorporError, Unsupported, UsageError, doing
from .copies import CopyOptions
from .template import Copy, Template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..options import Options

RUN_DIR = "/run/torpor/templates"
MESSAGE_BYTES_MAX = 1 << 16
FDS_MAX = 253  # SCM_MAX_FD
TEXT_OPTIONS = (
    "argument", "cwd", "hostname", "net", "cgroup", "fresh_pid", "overlay", "overlay_upper", "overlay_size",
    "overlay_keep", "remap_address",
)  # fmt: skip


def socket_path(name: str) -> str:
    """Where the holder of a template is reached. Raises UsageError for what cannot be a name."""
    if not name or name.startswith(".") or "/" in name or "\0" in name or len(os.fsencode(name)) > 64:
        raise UsageError(f"{name!r} cannot be the name of a template")
    return os.path.join(RUN_DIR, name)


def names() -> list[str]:
    """The templates that there are, or were when their holders were killed."""
    try:
        return sorted(os.listdir(RUN_DIR))
    except FileNotFoundError:
        return []


# ------------------------------------------------------------------------------------- the holder


class Holder:
    """The template, the socket, and the copies that run."""

    def __init__(self, name: str, options: Options) -> None:
        """Make the socket and the template. Raises TorporError; then nothing is left."""
        self.name = name
        self.path = socket_path(name)
        self.started = time.time()
        self.listener = _listen(self.path)
        try:
            self.template = Template(options)
        except BaseException:
            self._unlink()
            raise
        #: The child that ends with a copy → the copy, and who wants to know
        self.running: dict[int, tuple[Copy, socket.socket | None]] = {}
        self.clients: dict[int, socket.socket] = {}
        self._ending = False

    def _unlink(self) -> None:
        self.listener.close()
        os.unlink(self.path)

    def serve(self) -> None:
        """Answer requests until one of them, or a signal, says to stop."""
        wake_read, wake_write = socket.socketpair()
        for end in (wake_read, wake_write):
            end.setblocking(False)
        before = signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._noted)
        poller = select.poll()
        poller.register(self.listener, select.POLLIN)
        poller.register(wake_read, select.POLLIN)
        try:
            while not self._ending:
                for fd, _ in poller.poll():
                    if fd == self.listener.fileno():
                        client, _ = self.listener.accept()
                        self.clients[client.fileno()] = client
                        poller.register(client, select.POLLIN)
                    elif fd == wake_read.fileno():
                        wake_read.recv(4096)
                        self._reap()
                    elif fd in self.clients and not self._serve(self.clients[fd]):
                        poller.unregister(fd)
                        self._forget(self.clients.pop(fd))
        finally:
            signal.set_wakeup_fd(before)
            self._unlink()
            self.template.close()

    def _noted(self, number: int, frame: object) -> None:
        if number != signal.SIGCHLD:
            self._ending = True

    def _forget(self, client: socket.socket) -> None:
        for pid, (copy, watcher) in self.running.items():
            if watcher is client:
                self.running[pid] = copy, None
        client.close()

    def _reap(self) -> None:
        """Take the ends of copies, and tell who waits for them.

        One by one: to wait for any child would take the stops of the held process, and a descriptor for each would
        make every copy slower than the one before, which inherits and closes them.
        """
        for pid, (copy, watcher) in list(self.running.items()):
            status = copy.poll()
            if status is None:
                continue
            del self.running[pid]
            if watcher is not None:
                _send(watcher, {"pid": copy.pid, "status": status})
        if not self.template.alive():
            log.error(f"the held process of template {self.name} has ended")
            self._ending = True

    def _serve(self, client: socket.socket) -> bool:
        """Answer one request; is the connection to be kept?"""
        try:
            request, fds = _receive(client)
        except (OSError, ValueError) as error:
            log.warning(f"template {self.name}: a request could not be read: {error}")
            return False
        if request is None:
            return False
        try:
            return self._answer(client, request, fds)
        except TorporError as error:
            return _send(client, {"error": ": ".join([*error.context, error.what]), "hint": error.hint})
        finally:
            for fd in fds:
                os.close(fd)

    def _answer(self, client: socket.socket, request: dict[str, Any], fds: list[int]) -> bool:
        verb = request.get("verb")
        if verb == "info":
            return _send(client, self.info())
        if verb == "stop":
            self._ending = True
            return _send(client, {"stopped": True})
        if verb == "clone":
            return self._clone(client, request, fds)
        raise UsageError(f"there is no request {verb!r}")

    def info(self) -> dict[str, object]:
        """What there is to say of the template."""
        return {
            "name": self.name, "images_dir": self.template.options.images_dir, "holder": os.getpid(),
            "pid": self.template.pid, "copies": self.template.copies, "running": len(self.running),
            "since": self.started,
        }  # fmt: skip

    def _clone(self, client: socket.socket, request: dict[str, Any], fds: list[int]) -> bool:
        options = _copy_options(request, fds)
        watcher = client if request.get("wait") else None
        count = request.get("count", 1)
        if type(count) is not int or count < 1:
            raise UsageError(f"{count!r} copies cannot be made")
        for _ in range(count):
            copy = self.template.clone(options)
            self.running[copy.waits_for] = copy, watcher
            if not _send(client, {"pid": copy.pid, **({"written_to": copy.written_to} if copy.written_to else {})}):
                return False
        return _send(client, {"done": count})


def _copy_options(request: dict[str, Any], fds: list[int]) -> CopyOptions | None:
    texts, names_of_fds = request.get("options") or {}, request.get("fds") or []
    if len(names_of_fds) != len(fds) or any(name not in TEXT_OPTIONS for name in texts):
        raise UsageError("the request and what came with it do not fit together")
    if not texts and not fds:
        return None
    values: dict[str, Any] = dict(texts)
    files: dict[int, int] = {}
    for name, fd in zip(names_of_fds, fds, strict=True):
        if str(name).isdigit():
            files[int(name)] = fd
        elif name in ("stdin", "stdout", "stderr"):
            values[name] = fd
        else:
            raise UsageError(f"{name!r} is no descriptor of a copy")
    values["cgroup"] = tuple(values.get("cgroup", ()))
    values["argument"] = os.fsencode(str(values.get("argument", "")))
    return CopyOptions(files=files, **values)


def _listen(path: str) -> socket.socket:
    os.makedirs(RUN_DIR, mode=0o700, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        with doing(f"template `{os.path.basename(path)}`"):
            if os.path.lexists(path):
                if _is_held(path):
                    raise UsageError("there is one of that name", hint="torpor template stop NAME, or another name")
                os.unlink(path)  # left over from a holder that was killed
            listener.bind(path)
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_held(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def _send(client: socket.socket, message: dict[str, object]) -> bool:
    """Send one message; False when nobody is there any more."""
    try:
        client.send(json.dumps(message).encode(), socket.MSG_NOSIGNAL)
    except OSError:
        return False
    return True


def _receive(client: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """One message and its descriptors; (None, []) at the end."""
    data, fds, flags, _ = socket.recv_fds(client, MESSAGE_BYTES_MAX, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None, fds
    try:
        message = None if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) else json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("it is cut short, or no object")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds


# ------------------------------------------------------------------------------------- its clients


class Client:
    """A connection to the holder of a template. Use it as a context manager."""

    def __init__(self, name: str) -> None:
        """Raises UsageError when there is no such template."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(socket_path(name))
        except OSError as error:
            self._socket.close()
            known = ", ".join(names()) or "there is none"
            raise UsageError(f"template `{name}`: {error.strerror}", hint=f"torpor template list: {known}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.close()

    def ask(self, request: dict[str, object], fds: list[int] | None = None) -> dict[str, Any]:
        """Send a request and give the first answer. Raises Unsupported with the holder's words for an error."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], fds or [])
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        message, _ = _receive(self._socket)
        if message is None:
            raise Unsupported("the holder of the template has ended")
        if "error" in message:
            raise Unsupported(str(message["error"]), hint=str(message.get("hint", "")))
        return message
