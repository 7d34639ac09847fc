"""MariaDB, whose InnoDB reads and writes its pages by an io_uring: no acknowledged row is lost.

``mariadbd`` and ``mariadb`` are all that is needed of it (the packages with -core in their names), no service.
"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from kit import Target, Targets
from kit.clients import PATIENCE_S, Clients, Refused
from kit.files import slurp_text
from kit.host import open_links, wait_until

from .conftest import Sleeps, need

PORT = 6490
#: Pages are written behind all the time: the redo log is small, and no page may stay dirty for long.
OPTIONS = f"""
--no-defaults --user=root --datadir=data --socket=mariadb.sock --bind-address=127.0.0.1 --port={PORT} --skip-name-resolve
--innodb-use-native-aio=ON --innodb-flush-method=O_DIRECT --innodb-buffer-pool-size=8M --innodb-log-file-size=8M
--innodb-max-dirty-pages-pct=2 --innodb-max-dirty-pages-pct-lwm=1 --innodb-io-capacity=2000
""".split()
CLIENT = f"mariadb --no-defaults -uroot -h127.0.0.1 -P{PORT} --skip-column-names --batch --unbuffered --skip-reconnect"
TABLE = """
CREATE DATABASE kit;
CREATE TABLE kit.work (client INT, turn INT, body LONGBLOB, PRIMARY KEY (client, turn)) ENGINE=InnoDB
"""
#: What row ``turn`` of a client is to be, in SQL.
BODY = "REPEAT(CHAR(97 + {turn} % 26), {turn} % 7 * 9000 + 500)"


class Session:
    """A mariadb of its own: statements go in, a line comes out."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(CLIENT.split(), stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def ask(self, statements: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{statements};\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip("\n")

    def close(self) -> None:
        self.process.communicate(timeout=PATIENCE_S)


@pytest.fixture(autouse=True)
def network_and_programs(network: None) -> None:
    need("mariadbd", "mariadb-install-db", "mariadb", "nft")


def sql(statements: str) -> str:
    """The answer as the client prints it."""
    argv = [*CLIENT.split(), "--execute", statements]
    return subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=False).stdout.rstrip("\n")


def server(start: Targets, *options: str) -> Target:
    def answers() -> bool:
        assert target.alive(), target.read("stdout")
        return sql("SELECT 1") == "1"

    target = start.command("mariadbd", *OPTIONS, *options)
    wait_until("mariadbd answers", answers, timeout=40)
    return target


def new_server(start: Targets) -> Target:
    data = os.path.join(start.folder, "data")
    install = f"mariadb-install-db --no-defaults --auth-root-authentication-method=normal --user=root --datadir={data}"
    subprocess.run(install.split(), check=True, capture_output=True, timeout=PATIENCE_S)
    target = server(start, f"--datadir={data}")
    links = open_links(target.pid)
    if "anon_inode:[io_uring]" not in links:
        pytest.skip(f"mariadbd does without io_uring here: {target.read('stdout')}")
    assert sql(TABLE + "; SHOW TABLES FROM kit") == "work"
    return target


def work(session: Session, client: int, turn: int) -> None:
    """One row more, and all that was there before is to be there."""
    body = BODY.format(turn=turn)
    found = session.ask(
        f"INSERT INTO kit.work VALUES ({client}, {turn}, {body});"
        f"SELECT COUNT(*), SUM(LENGTH(body)) FROM kit.work WHERE client = {client}"
    )
    expected = f"{turn + 1}\t{sum(number % 7 * 9000 + 500 for number in range(turn + 1))}"
    if found != expected:
        raise Refused(f"turn {turn}: {found!r} instead of {expected!r}")


def check(clients: Clients) -> None:
    """Every acknowledged row is there once, with its content, and MariaDB finds nothing wrong with its files."""
    for client, turns in enumerate(clients.turns):
        right = BODY.format(turn="turn")
        found = sql(f"SELECT COUNT(*), SUM(body = {right}), MAX(turn) FROM kit.work WHERE client = {client}")
        assert found == f"{turns}\t{turns}\t{turns - 1}"
    assert sql("CHECK TABLE kit.work EXTENDED") == "kit.work\tcheck\tstatus\tOK"


@pytest.mark.timeout(180)
def test_rows_while_pages_are_written_behind(start: Targets, sleeps: Sleeps) -> None:
    target = new_server(start)
    with Clients(Session, work, count=3) as clients:  # type: ignore[arg-type]
        clients.make_progress(20)
        sleeps(target, awake=clients.make_progress, tcp_established=True, file_locks=True)
    check(clients)
    # What it says is in its files is there for another one, without a proper end in between.
    data = slurp_text(f"/proc/{target.pid}/cmdline").split("--datadir=")[-1].rstrip("\0")
    os.kill(target.pid, signal.SIGKILL)
    target.wait_gone(timeout=30)
    server(start, f"--datadir={data}")
    check(clients)
    sql("SHUTDOWN")
