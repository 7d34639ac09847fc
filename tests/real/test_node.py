"""Node as an application server: warmed up once, then woken as many copies that serve side by side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import torpor
from kit import Target, Targets, end_descendants, run_torpor, wait_until
from kit.clients import http_get, tcp
from kit.host import descendants
from kit.network import own_network
from kit.verbs import ROOT, SOURCES

from .conftest import need

EXAMPLES = os.path.join(ROOT, "examples")
PRELOADED = ["--require", f"{EXAMPLES}/fresh.cjs", "--import", f"{EXAMPLES}/guest.mjs"]
AS_GUEST = [sys.executable, "-m", "torpor", "guest", "node", *PRELOADED]
WARM, WORKERS = 200, 2

#: A server with sessions, a worker thread that counts in shared memory, and everything that is random in Node.
SERVER = """
const http = require('http'), crypto = require('crypto'), fs = require('fs'), { Worker } = require('worker_threads');
const port = Number(process.argv[1]), sessions = new Map(), shared = new Int32Array(new SharedArrayBuffer(8));
const worker = new Worker(`const { parentPort, workerData } = require('worker_threads'), crypto = require('crypto');
    parentPort.on('message', n => { Atomics.add(workerData, 0, 1);
        parentPort.postMessage([n, crypto.randomUUID(), crypto.randomBytes(8).toString('hex'), Math.random()]); });`,
    { eval: true, workerData: shared });
const asked = [];
worker.on('message', answer => asked.shift()(answer));
const inWorker = n => new Promise(resolve => { asked.push(resolve); worker.postMessage(n); });
let restored = null;
process.on('restored', (generation, argument) => { restored = [generation, String(argument)]; });
const routes = {
    who: () => [process.pid, sessions.size, Atomics.load(shared, 0), restored],
    warm: async n => { sessions.set(n, crypto.createHash('sha256').update(n).digest('hex')); return inWorker(n); },
    get: n => sessions.get(n) ?? null,
    end: n => sessions.delete(n),
    random: async () => ({
        uuid: crypto.randomUUID(), bytes: crypto.randomBytes(16).toString('hex'), math: Math.random(),
        int: crypto.randomInt(2 ** 40), filled: crypto.randomFillSync(Buffer.alloc(16)).toString('hex'),
        web: Buffer.from(crypto.webcrypto.getRandomValues(new Uint8Array(16))).toString('hex'),
        later: await new Promise(r => crypto.randomBytes(16, (_, found) => r(found.toString('hex')))),
        worker: (await inWorker(0)).slice(1).join() }),
};
http.createServer(async (request, response) => {
    const [, route, word] = request.url.split('/');
    response.end(JSON.stringify(await routes[route](word)));
}).listen(port, '127.0.0.1', () => fs.writeFileSync('ready', ''));
"""

#: The primary keeps the sessions and hands connections to its workers, or all listen by themselves.
CLUSTER = """
const cluster = require('cluster'), http = require('http'), fs = require('fs'), port = Number(process.argv[1]);
cluster.schedulingPolicy = process.argv[2] == 'primary' ? cluster.SCHED_RR : cluster.SCHED_NONE;
if (cluster.isPrimary) {
    const sessions = {};
    let listening = 0;
    cluster.on('message', (worker, [turn, word]) => {
        sessions[word] = (sessions[word] ?? 0) + 1;
        worker.send([turn, process.pid, sessions[word], Object.keys(sessions).length]); });
    cluster.on('listening', () => { if (++listening == 2) fs.writeFileSync('ready', ''); });
    cluster.on('exit', () => cluster.fork());
    cluster.fork(); cluster.fork();
} else {
    const waiting = new Map();
    let turn = 0;
    process.on('message', ([turn, ...answer]) => { waiting.get(turn)(answer); waiting.delete(turn); });
    http.createServer((request, response) => {
        if (request.url == '/random')
            return response.end(JSON.stringify([require('crypto').randomUUID(), Math.random(), process.pid]));
        waiting.set(++turn, answer => response.end(JSON.stringify([process.pid, ...answer])));
        process.send([turn, request.url]);
    }).listen(port, '127.0.0.1');
}
"""


@pytest.fixture(autouse=True)
def programs_and_network(network: None) -> Iterator[None]:
    need("node", "curl", "nft")
    keep = set(descendants(os.getpid()))
    yield
    end_descendants(keep)


def ask(port: int, path: str) -> Any:
    with tcp(port) as connection:
        return json.loads(http_get(connection, path))


def curl(pid: int, port: int, path: str) -> Any:
    """The answer of a server in the network namespace of ``pid``."""
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "curl", "-sS", "--max-time", "30", f"http://127.0.0.1:{port}{path}"]
    return json.loads(subprocess.check_output(argv, text=True))


def reached(target: Target, port: int) -> Target:
    target.wait_file("ready", timeout=60)
    for number in range(WARM):
        ask(port, f"/warm/{number}")
    target.pids()
    return target


def dump(target: Target, images: str, **options: object) -> None:
    target.pids()
    torpor.dump(target.pid, images, **options)
    target.wait_gone()


@pytest.fixture
def server(start: Targets, images: str) -> Callable[..., Target]:
    """A warm server, dumped into ``images``."""

    def make(port: int, *, guest: bool = False) -> Target:
        target = start.command(*(AS_GUEST if guest else ["node"]), "-e", SERVER, str(port), env={"PYTHONPATH": SOURCES})
        dump(reached(target, port), images)
        return target

    return make


def hash_of(number: int) -> str:
    import hashlib

    return hashlib.sha256(str(number).encode()).hexdigest()


def test_copies_of_a_template_in_networks_of_their_own(server: Callable[..., Target], images: str) -> None:
    target = server(6710)
    with torpor.template(images) as template:
        copies = [template.clone(net="new") for _ in range(3)]
        for number, copy in enumerate(copies):
            assert curl(copy.pid, 6710, "/who") == [target.pid, WARM, WARM, None]
            assert curl(copy.pid, 6710, f"/get/{number}") == hash_of(number)
            assert curl(copy.pid, 6710, f"/end/{number}") is True
        for number, copy in enumerate(copies):
            gone = [curl(copy.pid, 6710, f"/get/{word}") is None for word in range(3)]
            assert gone == [word == number for word in range(3)], "it sees what was done in another copy"
            assert curl(copy.pid, 6710, "/warm/new")[0] == "new"
            assert curl(copy.pid, 6710, "/who") == [target.pid, WARM, WARM + 1, None]
        for copy in copies:
            copy.kill()
            assert copy.wait() == 137


def test_restores_with_their_own_pids_in_networks_of_their_own(server: Callable[..., Target], images: str) -> None:
    target = server(6711)
    awake = []
    for _ in range(2):
        with own_network():
            awake.append(torpor.restore(images, own_pids=True))
    for number, one in enumerate(awake):
        assert curl(one.pid, 6711, f"/end/{number}") is True
    for number, one in enumerate(awake):
        assert curl(one.pid, 6711, "/who") == [target.pid, WARM - 1, WARM, None]
        assert curl(one.pid, 6711, f"/get/{number}") is None
        assert curl(one.pid, 6711, f"/get/{1 - number}") == hash_of(1 - number)


def test_copies_on_ports_of_their_own(server: Callable[..., Target], images: str) -> None:
    """Restores and a template's copy, all in one network."""
    target = server(6712)
    for port in (6713, 6714):
        torpor.restore(images, own_pids=True, remap_address=[f"127.0.0.1:6712=127.0.0.1:{port}"])
    with torpor.template(images, remap_address=["127.0.0.1:6712=:6715"]) as template:
        template.clone()
        with pytest.raises(torpor.TorporError, match="6715"):
            template.clone()
    torpor.restore(images, own_pids=True)
    for port in (6712, 6713, 6714, 6715):
        assert ask(port, "/end/0") is True
    for port in (6712, 6713, 6714, 6715):
        assert ask(port, "/who") == [target.pid, WARM - 1, WARM, None]


def test_the_command_makes_copies_with_arguments(server: Callable[..., Target], images: str) -> None:
    server(6716, guest=True)
    name = f"node-{os.getpid()}"
    run_torpor("template", "start", images, "--name", name).must()
    try:
        made = run_torpor("clone", name, "-n", "3", "--net", "new", "--argument", "copy %d", "--json").must()
        pids = [json.loads(line)["pid"] for line in made.output.splitlines()]
        for number, pid in enumerate(pids, 1):
            wait_until("it knows", lambda p=pid, n=number: curl(p, 6716, "/who")[3] == [2, f"copy {n}"])
    finally:
        run_torpor("template", "stop", name).must()


def drawn(images: str, port: int, count: int = 3) -> list[dict[str, object]]:
    with torpor.template(images) as template:
        copies = [template.clone(net="new") for _ in range(count)]
        found = [curl(copy.pid, port, "/random") for copy in copies]
        for copy in copies:
            copy.kill()
            copy.wait()
    return found


def test_a_guest_draws_random_numbers_of_its_own(server: Callable[..., Target], images: str) -> None:
    server(6717, guest=True)
    found = drawn(images, 6717)
    for name in found[0]:
        assert len({str(one[name]) for one in found}) == len(found), f"{name}: {found}"


def test_what_others_share_is_named(server: Callable[..., Target], images: str) -> None:
    server(6718)
    found = drawn(images, 6718)
    alike = {name for name in found[0] if len({str(one[name]) for one in found}) == 1}
    assert {"uuid", "bytes", "math", "worker"} <= alike, "nothing is shared: the test is blind"
    result = run_torpor("restore", images, "--own-pids", "--strict")
    assert result.status != 0
    assert "copies would share a secret that nobody renews: node" in result.output
    shown = run_torpor("audit", images).output
    assert "crypto.randomBytes()" in shown and "Math.random()" in shown


@pytest.mark.parametrize("who", ["primary", "workers"])
def test_copies_of_a_cluster(start: Targets, images: str, who: str) -> None:
    """Processes that talk over unix sockets; connections go as descriptors, or all accept from one listener."""
    target = start.command("node", "-e", CLUSTER, "6719", who)
    target.wait_file("ready", timeout=60)
    wait_until("both have answered", lambda: len({ask(6719, "/both")[0] for _ in range(4)}) == WORKERS, timeout=60)
    for _ in range(WARM):
        ask(6719, "/old")
    before = ask(6719, "/old")
    workers = set(target.pids()[1:])
    dump(target, images)
    with torpor.template(images) as template:
        copies = [template.clone(net="new") for _ in range(2)]
    with own_network():
        pids = [*(copy.pid for copy in copies), torpor.restore(images, own_pids=True).pid]
    for number, pid in enumerate(pids):
        answers = [curl(pid, 6719, "/old") for _ in range(6)]
        assert {worker for worker, *_ in answers} <= workers
        assert [rest for _, *rest in answers] == [[target.pid, before[2] + turn, 2] for turn in range(1, 7)]
        assert curl(pid, 6719, f"/new{number}")[2:] == [1, 3]


def test_workers_of_a_cluster_draw_random_numbers_of_their_own(start: Targets, images: str) -> None:
    target = start.command(*AS_GUEST, "-e", CLUSTER, "6720", "primary", env={"PYTHONPATH": SOURCES})
    target.wait_file("ready", timeout=60)
    while len({ask(6720, "/random")[2] for _ in range(4)}) < WORKERS:
        pass
    dump(target, images)
    found: list[tuple[str, float, int]] = []
    with torpor.template(images) as template:
        for copy in [template.clone(net="new") for _ in range(2)]:
            found += [curl(copy.pid, 6720, "/random") for _ in range(4)]
    uuids, numbers, pids = zip(*found, strict=True)
    assert len(set(uuids)) == len(set(numbers)) == len(found)
    assert len(set(pids)) == WORKERS, "the workers of both have the same pids"
