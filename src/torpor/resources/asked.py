"""Sockets that answer alike: what has been made of the options of one is good for all others.

Whatever reads options decides by the answers alone. So where a socket gives the same answers to the questions that
another was asked, the same questions would have been asked, and the same would have come of them. Servers have
thousands of connections with the same hundred options.
"""

from __future__ import annotations

from ..linux.sockets import Plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Any, TypeAlias

    #: (level, option, size, the answer or the errno)
    Trace: TypeAlias = list[tuple[int, int, int, bytes | int | None]]

#: So many different sets of answers are remembered; more would take longer to compare than to read.
_KINDS_MAX = 8


class Asked:
    """Reads a socket's options as Python's own does, and notes questions and answers."""

    def __init__(self, sock: _socket.socket) -> None:
        self._sock = sock
        self.trace: Trace = []

    def getsockopt(self, level: int, option: int, size: int = 0) -> Any:
        """The answer, as bytes where a ``size`` is given. Raises OSError."""
        answer, error = _ask(self._sock, level, option, size)
        self.trace.append((level, option, size, error.errno if error else answer))
        if error:
            raise error
        return answer


def _ask(sock: _socket.socket, level: int, option: int, size: int) -> tuple[Any, OSError | None]:
    try:
        return sock.getsockopt(level, option, size) if size else sock.getsockopt(level, option), None
    except OSError as error:
        return None, error


class Alike:
    """Remembers what was made of answers."""

    def __init__(self) -> None:
        self._known: dict[object, list[tuple[Trace, Any]]] = {}

    def of(self, fd: int, key: object, make: Callable[[Any], Any]) -> Any:
        """What ``make`` makes of the options of a socket, which it reads by the getsockopt() of its argument alone.

        ``key``: what else it depends on. The same is given for sockets that answer alike: it is not to be changed.
        """
        known = self._known.setdefault(key, [])
        with Plain(fd) as sock:
            for trace, made in known:
                if _answers(sock, trace):
                    return made
            asked = Asked(sock)
            made = make(asked)
        if len(known) < _KINDS_MAX:
            known.append((asked.trace, made))
        return made


def _answers(sock: _socket.socket, trace: Trace) -> bool:
    """Does it give these answers?"""
    get = sock.getsockopt
    for level, option, size, expected in trace:
        try:
            if (get(level, option, size) if size else get(level, option)) != expected:
                return False
        except OSError as error:
            if error.errno != expected:
                return False
    return True
