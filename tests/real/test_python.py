"""Python programs as people write them: servers, pools of workers, databases."""

from __future__ import annotations

import os
import sqlite3

import pytest

from kit import Targets
from kit.clients import Clients, Connection, Refused, http_get, tcp
from kit.host import wait_until

from .conftest import Sleeps, need

PORT = 6500

ASYNCIO = """
import asyncio, itertools

async def serve(reader, writer):
    name = (await reader.readline()).decode().strip()
    writer.write(b"hello\\n")
    ticks = asyncio.create_task(tick(writer))
    total = 0
    while line := await reader.readline():
        total += int(line)
        writer.write(b"%d\\n" % total)
        await writer.drain()
    ticks.cancel()

async def tick(writer):
    for number in itertools.count():
        await asyncio.sleep(0.02)
        writer.write(b"tick %d\\n" % number)

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 6500)
    process = await asyncio.create_subprocess_exec("cat", stdin=-1, stdout=-1)
    ready()
    while not told("go"):
        await asyncio.sleep(0.01)
    process.stdin.write(b"echo")
    process.stdin.close()
    answer = await process.stdout.read()
    loop = asyncio.get_running_loop()
    resolved = await loop.run_in_executor(None, sum, range(100))
    done(answer == b"echo" and await process.wait() == 0 and resolved == 4950, f"{answer}")

asyncio.run(main())
"""


def add(connection: Connection, client: int, turn: int) -> None:
    """One number more; the server's sum is the answer. In between it ticks, and no tick is missing."""
    if turn == 0:
        connection.send(b"name\n")
        if connection.line() != b"hello":
            raise Refused("no greeting")
        connection.ticks = 0  # type: ignore[attr-defined]
    connection.send(b"%d\n" % turn)
    while (line := connection.line()).startswith(b"tick"):
        if line != b"tick %d" % connection.ticks:  # type: ignore[attr-defined]
            raise Refused(f"{line!r}: tick {connection.ticks} is missing")  # type: ignore[attr-defined]
        connection.ticks += 1  # type: ignore[attr-defined]
    if int(line) != turn * (turn + 1) // 2:
        raise Refused(f"the sum up to {turn} is not {line!r}")


def test_asyncio(start: Targets, sleeps: Sleeps, network: None) -> None:
    """Connections, timers, a child process and a thread pool of one event loop."""
    need("nft")
    target = start.python(ASYNCIO)
    with Clients(lambda: tcp(PORT), add, count=4) as clients:
        sleeps(target, tcp_established=True, awake=clients.make_progress)
    target.go()


HTTP_SERVER = """
import http.server, threading

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        body = f"{self.path} {threading.get_native_id()}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 50

server = Server(("127.0.0.1", 6500), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
ready()
wait_told("go")
done(threading.active_count() >= 2)
"""


@pytest.mark.parametrize("established", [True, False], ids=["established", "close"])
def test_a_threaded_http_server(start: Targets, sleeps: Sleeps, network: None, established: bool) -> None:
    """A thread for each connection, all waiting in recv(2)."""
    need("nft")
    target = start.python(HTTP_SERVER)
    threads: dict[int, int] = {}

    def ask(connection: Connection, client: int, turn: int) -> None:
        path, thread = http_get(connection, f"/{client}/{turn}").decode().split()
        if path != f"/{client}/{turn}":
            raise Refused(f"{path} is the answer to somebody else")
        if established and threads.setdefault(client, int(thread)) != int(thread):
            raise Refused("another thread has answered")

    again = None if established else (lambda _, client, turn: turn)
    with Clients(lambda: tcp(PORT), ask, count=8, reconnect=again) as clients:
        sleeps(target, tcp_established=established, tcp_close=not established, awake=clients.make_progress)
    target.go()


POOL = """
import multiprocessing, os, sys

def work(number):
    global calls
    calls = globals().get("calls", 0) + 1
    with lock:
        counter.value += 1
    time.sleep(0.002)
    return number, sum(range(number)), os.getpid(), calls

def initialize(a, b):
    global lock, counter
    lock, counter = a, b

def main():
    context = multiprocessing.get_context(sys.argv[1])
    lock, counter = context.Lock(), context.Value("i", 0)
    queue, event = context.Queue(), context.Event()
    with context.Pool(3, initialize, (lock, counter)) as pool:
        results = pool.imap_unordered(work, range(600), chunksize=2)
        first = [next(results) for _ in range(30)]
        queue.put("kept")
        ready()
        found = first + list(results)
        during = told("go") or told("slept")
        wait_told("go")
        again = pool.map(work, range(20))
        with lock:
            count = counter.value
        event.set()
        last_call = {}
        for _, _, pid, calls in found + again:
            last_call[pid] = max(calls, last_call.get(pid, 0))
        ok = (sorted(n for n, *_ in found) == list(range(600)) and all(s == n * (n - 1) // 2 for n, s, *_ in found)
              and len(last_call) == 3 and sum(last_call.values()) == 620 and count == 620 and queue.get(timeout=5) == "kept"
              and event.wait(5))
        done(ok, f"{len(found)} {last_call} {count}")
        pool.close()
        pool.join()
"""

#: spawn and forkserver import the main module anew: it must be a file
AS_MODULE = """
import importlib.util, os, sys
with open("pool_program.py", "w") as file:
    file.write("from kit_inside import *\\n" + PROGRAM + "\\nif __name__ == '__main__':\\n    main()\\n")
os.execv(sys.executable, [sys.executable, "pool_program.py", *sys.argv[1:]])
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_pool_of_processes_at_work(start: Targets, sleeps: Sleeps, method: str) -> None:
    """Pipes, named semaphores that are deleted, a resource tracker, helper threads: each task is done once."""
    target = start.python(f"PROGRAM = {POOL!r}\n{AS_MODULE}", method)
    sleeps(target)
    target.go(timeout=40)
    target.wait_gone()  # it removes its semaphores then


FUTURES = """
import concurrent.futures, threading

def square(number):
    time.sleep(0.002)
    return number * number

def main():
    with concurrent.futures.ProcessPoolExecutor(2) as processes, concurrent.futures.ThreadPoolExecutor(4) as threads:
        first = [processes.submit(square, n) for n in range(300)]
        second = [threads.submit(square, n) for n in range(300)]
        first[5].result()
        second[5].result()
        ready()
        ok = [f.result() for f in first] == [f.result() for f in second] == [n * n for n in range(300)]
        wait_told("go")
        ok = ok and processes.submit(square, 12).result() == 144 == threads.submit(square, 12).result()
    done(ok)
"""


def test_futures_in_processes_and_threads(start: Targets, sleeps: Sleeps) -> None:
    target = start.python(f"PROGRAM = {FUTURES!r}\n{AS_MODULE}")
    sleeps(target)
    target.go(timeout=40)
    target.wait_gone()


SQLITE = """
import sqlite3, sys
db = sqlite3.connect("data.db", isolation_level=None)
db.execute("pragma journal_mode = " + sys.argv[1])
db.execute("create table numbers (n integer primary key, text)")
db.executemany("insert into numbers values (?, ?)", ((n, str(n) * 50) for n in range(1000)))
db.execute("begin immediate")
db.execute("pragma cache_size = 5")  # more than that is written to the file before it is committed
db.execute("pragma cache_spill = 1")
db.executemany("insert into numbers values (?, ?)", ((n, "x" * 500) for n in range(1000, 2000)))
db.execute("update numbers set text = 'changed' where n < 10")
rows = db.execute("select n from numbers order by n")
head = [rows.fetchone()[0] for _ in range(100)]
ready()
wait_told("go")
rest = [n for n, in rows]
db.execute("insert into numbers values (5000, 'last')")
db.execute("commit")
done(head + rest == list(range(2000)), f"{len(rest)}")
"""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_in_a_transaction(start: Targets, sleeps: Sleeps, journal: str) -> None:
    """Its locks hold: nobody else may write meanwhile, and everything is there after the commit."""
    target = start.python(SQLITE, journal)

    def locked() -> None:
        other = sqlite3.connect(target.path("data.db"), timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("begin immediate")
        other.close()

    locked()
    sleeps(target, file_locks=True, awake=locked)
    target.go()
    other = sqlite3.connect(target.path("data.db"))
    assert other.execute("pragma integrity_check").fetchall() == [("ok",)]
    assert other.execute("select count(*), sum(text = 'changed') from numbers").fetchall() == [(2001, 10)]
    other.close()
    wait_until("its files are closed", lambda: not target.alive())
    assert not os.path.exists(target.path("data.db-journal"))
