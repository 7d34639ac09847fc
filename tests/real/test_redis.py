"""Redis under load: what it has acknowledged is there, whatever happens to it and to the connections."""

from __future__ import annotations

import subprocess

import pytest

from kit import Target, Targets
from kit.clients import Clients, Connection, Refused, tcp, unix
from kit.host import wait_until

from .conftest import Sleeps, need

PORT = 6400
CLIENTS = 4


@pytest.fixture(autouse=True)
def redis(network: None) -> None:
    need("redis-server", "redis-cli", "nft")


def server(start: Targets, *options: str) -> Target:
    """A redis server on PORT and on ``redis.sock`` in its folder."""
    common = ["--port", str(PORT), "--bind", "127.0.0.1", "--unixsocket", "redis.sock", "--save", ""]
    target = start.command("redis-server", *common, *options)
    wait_until("redis answers", lambda: cli("PING") == "PONG", timeout=20)
    return target


def cli(*words: str) -> str:
    """What redis-cli prints."""
    command = ["redis-cli", "-p", str(PORT), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30).stdout.strip()


def call(connection: Connection, *words: str) -> str | list[str]:
    """One command in redis' protocol, and its answer."""
    parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
    connection.send("".join(parts).encode())
    return answer(connection)


def answer(connection: Connection) -> str | list[str]:
    line = connection.line().decode()
    kind, rest = line[0], line[1:]
    if kind == "$":
        if rest == "-1":
            return ""
        body = connection.exactly(int(rest)).decode()
        connection.line()
        return body
    if kind == "*":
        return [str(answer(connection)) for _ in range(int(rest))]
    if kind in "+:":
        return rest
    raise Refused(line)


def append(connection: Connection, client: int, turn: int) -> None:
    """The client's next write: ``turn`` goes to the end of its list, whose length is the answer."""
    length = call(connection, "RPUSH", f"list:{client}", f"{turn}:{'x' * (turn % 200)}")
    if length != str(turn + 1):
        raise Refused(f"write {turn} was acknowledged as number {length}")


def resume(connection: Connection, client: int, turn: int) -> int:
    """The write that was under way may have been done or not; the ones before it must have been."""
    length = int(str(call(connection, "LLEN", f"list:{client}")))
    if length not in (turn, turn + 1):
        raise Refused(f"{turn} writes were acknowledged, {length} are there")
    return length


def check(clients: Clients) -> None:
    """Every acknowledged write is there, once and in order, by a connection of our own and redis' own client."""
    with tcp(PORT) as connection:
        for client, turns in enumerate(clients.turns):
            found = call(connection, "LRANGE", f"list:{client}", "0", "-1")
            assert found == [f"{turn}:{'x' * (turn % 200)}" for turn in range(turns)]
            assert cli("LLEN", f"list:{client}") == str(turns)


def test_connections_live_through_it(start: Targets, sleeps: Sleeps) -> None:
    target = server(start)
    with Clients(lambda: tcp(PORT), append, count=CLIENTS) as clients:
        sleeps(target, tcp_established=True, awake=clients.make_progress)
    check(clients)


def test_connections_are_closed(start: Targets, sleeps: Sleeps) -> None:
    target = server(start)
    with Clients(lambda: tcp(PORT), append, count=CLIENTS, reconnect=resume) as clients:
        sleeps(target, tcp_close=True, awake=clients.make_progress)
    check(clients)


def test_a_pipeline_of_requests(start: Targets, sleeps: Sleeps) -> None:
    """Hundreds of requests and answers are in the sockets at every moment."""

    def work(connection: Connection, client: int, turn: int) -> None:
        batch = 100
        for number in range(turn * batch, (turn + 1) * batch):
            connection.send(f"*2\r\n$4\r\nINCR\r\n$1\r\n{client}\r\n*2\r\n$4\r\nECHO\r\n$8\r\n{number:8}\r\n".encode())
        for number in range(turn * batch, (turn + 1) * batch):
            if (answer(connection), answer(connection)) != (str(number + 1), f"{number:8}"):
                raise Refused(f"number {number} is out of order")

    target = server(start, "--io-threads", "2", "--io-threads-do-reads", "yes")
    with Clients(lambda: tcp(PORT), work, count=2) as clients:
        sleeps(target, tcp_established=True, awake=clients.make_progress)


def test_subscribers(start: Targets, sleeps: Sleeps) -> None:
    """Connections on which the server speaks first."""
    target = server(start)
    with tcp(PORT) as subscriber, tcp(PORT) as waiting:
        assert call(subscriber, "SUBSCRIBE", "news") == ["subscribe", "news", "1"]
        waiting.send(b"*3\r\n$5\r\nBLPOP\r\n$5\r\nqueue\r\n$1\r\n0\r\n")

        def awake() -> None:
            assert cli("PUBLISH", "news", "hello") == "1"
            assert answer(subscriber) == ["message", "news", "hello"]

        sleeps(target, tcp_established=True, awake=awake)
        cli("RPUSH", "queue", "thing")
        assert answer(waiting) == ["queue", "thing"]


def test_the_append_only_file(start: Targets, sleeps: Sleeps) -> None:
    """The log on disk is complete, and redis' own checker and a new server agree."""
    target = server(start, "--appendonly", "yes", "--appendfsync", "everysec")
    with Clients(lambda: tcp(PORT), append, count=2, reconnect=resume) as clients:
        sleeps(target, tcp_close=True, awake=clients.make_progress)
    check(clients)
    cli("SHUTDOWN")
    target.wait_gone()
    log = target.path("appendonlydir/appendonly.aof.1.incr.aof")
    checked = subprocess.run(["redis-check-aof", log], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    start.command("redis-server", "--port", str(PORT), "--appendonly", "yes", "--dir", target.folder)
    wait_until("redis answers", lambda: cli("PING") == "PONG", timeout=20)
    check(clients)


def test_a_snapshot_of_its_own_is_under_way(start: Targets, sleeps: Sleeps) -> None:
    """BGSAVE: a child with a copy of all memory, and a pipe to its parent."""
    target = server(
        start, "--enable-debug-command", "yes", "--rdb-key-save-delay", "100000", "--dbfilename", "saved.rdb"
    )
    cli("DEBUG", "POPULATE", "40")  # a tenth of a second each
    before = cli("DEBUG", "DIGEST")
    assert "started" in cli("BGSAVE")

    def awake() -> None:
        assert "rdb_bgsave_in_progress:1" in cli("INFO", "persistence").split()

    sleeps(target, tcp_close=True, awake=awake)
    wait_until("the snapshot is complete", lambda: "rdb_bgsave_in_progress:0" in cli("INFO", "persistence"), timeout=20)
    assert "rdb_last_bgsave_status:ok" in cli("INFO", "persistence").split()
    assert cli("DEBUG", "RELOAD", "NOSAVE") == "OK"
    assert cli("DEBUG", "DIGEST") == before


BENCHMARK = """
redis-server --port 6400 --unixsocket redis.sock --save '' > log &
server=$!
until redis-cli -s redis.sock PING; do sleep 0.01; done
redis-benchmark %s -c 20 -n 60000 -r 1000 -P 4 -t incr,lpush --csv > figures &
benchmark=$!
until [ "$(redis-cli -s redis.sock DBSIZE)" -gt 100 ]; do :; done
echo > ready
wait $benchmark && status=0 || status=$?
redis-cli -s redis.sock LLEN mylist > length
echo "$status" > ended.new; mv ended.new ended
wait
"""


@pytest.mark.parametrize("way", ["-s redis.sock", "-p 6400"])
def test_server_and_benchmark_in_one_tree(start: Targets, sleeps: Sleeps, way: str) -> None:
    """Both ends of every connection are frozen: nothing is lost, and nobody notices."""
    need("redis-benchmark")
    target = start.command("bash", "-c", BENCHMARK % way, wait=True)
    established = {"tcp_established": True} if way.startswith("-p") else {}
    sleeps(target, **established)
    assert target.wait_file("ended", timeout=50) == "0\n", target.read("stdout")
    wait_until("it is written", lambda: target.read("length").endswith("\n"))
    assert target.read("length") == "60000\n"
    assert target.read("figures").count('"') >= 4


def test_its_socket_in_the_file_system(start: Targets, sleeps: Sleeps) -> None:
    """The name is there again, and leads to the server."""
    target = server(start)
    with unix(target.path("redis.sock")) as connection:
        assert call(connection, "SET", "key", "value") == "OK"
    sleeps(target, tcp_close=True)
    with unix(target.path("redis.sock")) as connection:
        assert call(connection, "GET", "key") == "value"
