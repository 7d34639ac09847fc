"""nginx, a master with two workers, while clients keep their connections and downloads go on."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess

import pytest

from kit import Target, Targets
from kit.clients import Clients, Connection, Refused, http_get, tcp
from kit.host import wait_until

from .conftest import Sleeps, need

PORT = 6480
#: {folder} is the target's; what is sent is small enough to be slow
CONFIG = """
daemon off;
user root;
worker_processes 2;
pid nginx.pid;
error_log error.log;
events { worker_connections 64; }
http {
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {
        listen 127.0.0.1:6480;
        keepalive_requests 1000000;
        location /pid/ { add_header Content-Type text/plain; return 200 "$request_uri $pid"; }
        location / { root files; limit_rate 1m; }
    }
}
"""
BODY = os.urandom(1 << 20)


@pytest.fixture(autouse=True)
def network_and_programs(network: None) -> None:
    need("nginx", "nft")


def server(start: Targets) -> Target:
    folder = os.path.join(start.folder, "site")
    os.makedirs(os.path.join(folder, "files"))
    with open(os.path.join(folder, "nginx.conf"), "w") as file:
        file.write(CONFIG)
    with open(os.path.join(folder, "files", "big"), "wb") as file:
        file.write(BODY)
    target = start.command("nginx", "-p", folder, "-c", "nginx.conf", "-e", "error.log")
    wait_until("nginx listens", lambda: reached(target))
    return target


def reached(target: Target) -> bool:
    assert target.alive(), target.read("stdout")
    try:
        with tcp(PORT) as connection:
            http_get(connection, "/pid/0")
    except OSError:
        return False
    return len(target.pids()) == 3


def ask(connection: Connection, client: int, turn: int) -> int:
    """One request; the pid of the worker that answered."""
    path = f"/pid/{client}/{turn}"
    what, worker = http_get(connection, path).decode().split()
    if what != path:
        raise Refused(f"{what} is no answer to {path}")
    return int(worker)


def test_connections_live_through_it(start: Targets, sleeps: Sleeps) -> None:
    target = server(start)
    with Clients(lambda: tcp(PORT), ask, count=4) as clients:
        sleeps(target, tcp_established=True, awake=clients.make_progress)


def test_connections_are_closed(start: Targets, sleeps: Sleeps) -> None:
    target = server(start)
    with Clients(lambda: tcp(PORT), ask, count=4, reconnect=lambda _, client, turn: turn) as clients:
        sleeps(target, tcp_close=True, awake=clients.make_progress)


def test_a_download_goes_on(start: Targets, sleeps: Sleeps) -> None:
    """A response that is half sent, from a file by sendfile(2), with a timer that slows it down."""
    target = server(start)
    with tcp(PORT) as connection:
        connection.send(b"GET /big HTTP/1.1\r\nHost: here\r\n\r\n")
        while connection.line():
            pass
        content = connection.exactly(100_000)
        sleeps(target, tcp_established=True)
        content += connection.exactly(len(BODY) - len(content))
        assert hashlib.sha256(content).digest() == hashlib.sha256(BODY).digest()
        ask(connection, 0, 0)  # and it is kept


def test_the_master_rules_its_workers(start: Targets, sleeps: Sleeps) -> None:
    """A reload over nginx' own command: new workers come, the old ones finish and go."""
    target = server(start)
    old = set(target.pids()[1:])
    sleeps(target, tcp_close=True)
    assert set(target.pids()[1:]) == old
    with tcp(PORT) as connection:
        assert ask(connection, 0, 0) in old
        folder = os.path.join(start.folder, "site")
        subprocess.run(["nginx", "-p", folder, "-c", "nginx.conf", "-e", "error.log", "-s", "reload"], check=True)
        wait_until("there are new workers", lambda: len(set(target.pids()[1:]) - old) == 2)
    wait_until("the old ones are gone", lambda: not old & set(target.pids()))
    with tcp(PORT) as connection:
        assert ask(connection, 0, 1) not in old
    os.kill(target.pid, signal.SIGQUIT)
    target.wait_gone()
