"""Clients of a server that is frozen meanwhile: each on a connection of its own, in a thread of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from .host import wait_until

#: Seconds that a client waits for an answer: a dump and a restore of a loaded machine lie in between.
PATIENCE_S = 30.0


class Connection:
    """A connected socket that is read by lines and by counts. Raises OSError when the peer has gone."""

    def __init__(self, family: int, address: object) -> None:
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE_S)
        try:
            self.socket.connect(address)  # type: ignore[arg-type]
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def line(self) -> bytes:
        """A line without its end."""
        found = self.file.readline()
        if not found.endswith(b"\n"):
            raise ConnectionResetError(f"the peer closed after {found!r}")
        return found.rstrip(b"\r\n")

    def exactly(self, count: int) -> bytes:
        found = self.file.read(count)
        if len(found) != count:
            raise ConnectionResetError(f"the peer closed after {len(found)} bytes of {count}")
        return found

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.socket.close()


def tcp(port: int) -> Connection:
    """A connection to 127.0.0.1."""
    return Connection(socket.AF_INET, ("127.0.0.1", port))


def unix(path: str) -> Connection:
    return Connection(socket.AF_UNIX, path)


class Refused(Exception):
    """An answer that no correct server gives."""


def http_get(connection: Connection, path: str) -> bytes:
    """GET on a connection that stays open (HTTP/1.1); the body, whole or in chunks."""
    connection.send(f"GET {path} HTTP/1.1\r\nHost: here\r\n\r\n".encode())
    status = connection.line()
    headers = {}
    while line := connection.line():
        name, _, value = line.decode().partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding") == "chunked":
        body = b""
        while size := int(connection.line(), 16):
            body += connection.exactly(size)
            connection.line()
        connection.line()
    else:
        body = connection.exactly(int(headers["content-length"]))
    if not status.startswith(b"HTTP/1.1 200"):
        raise Refused(f"{path}: {status!r} {body!r}")
    return body


class Clients:
    """Some clients that repeat ``work(connection, client, turn)`` until they are told to stop.

    ``reconnect``: a lost connection is counted in ``lost`` and made again, and ``recover(client, turn)`` says with
    which turn to go on; without it the loss of a connection is a failure.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        work: Callable[[Connection, int, int], object],
        *,
        count: int = 4,
        reconnect: Callable[[Connection, int, int], int] | None = None,
    ) -> None:
        self.connect, self.work, self.reconnect = connect, work, reconnect
        self.turns = [0] * count
        self.lost = [0] * count
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(client,), daemon=True) for client in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        self.make_progress()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S if kind is None else 0.1)
        if kind is None:
            assert not self.failures, "\n".join(self.failures)
            assert not any(thread.is_alive() for thread in self._threads), "a client waits for its answer"

    def make_progress(self, turns: int = 3) -> None:
        """Wait until every client has had some more answers."""
        before = list(self.turns)

        def moved() -> bool:
            assert not self.failures, "\n".join(self.failures)
            return all(now >= then + turns for now, then in zip(self.turns, before, strict=True))

        wait_until("all clients get answers", moved, timeout=PATIENCE_S)

    def _run(self, client: int) -> None:
        connection = None
        try:
            connection = self.connect()
            while not self._stop.is_set():
                try:
                    self.work(connection, client, self.turns[client])
                    self.turns[client] += 1
                except OSError:
                    if self.reconnect is None:
                        raise
                    self.lost[client] += 1
                    connection.close()
                    connection = self._connect_again()
                    self.turns[client] = self.reconnect(connection, client, self.turns[client])
        except Exception as error:
            self.failures.append(f"client {client}, turn {self.turns[client]}: {error!r}")
        finally:
            if connection is not None:
                connection.close()

    def _connect_again(self) -> Connection:
        for _ in range(int(PATIENCE_S / 0.01)):
            try:
                return self.connect()
            except OSError:
                self._stop.wait(0.01)
        return self.connect()
