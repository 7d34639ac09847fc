"""Interpreters other than Python."""

from __future__ import annotations

import pytest

from kit import Targets
from kit.clients import Clients, Connection, Refused, http_get, tcp

from .conftest import Sleeps, need

PORT = 6700

NODE = """
const http = require('http'), fs = require('fs'), zlib = require('zlib'), { Worker } = require('worker_threads');
const { spawn } = require('child_process');
let ticks = 0, hot = 0;
setInterval(() => { ticks++; }, 5);
const worker = new Worker(`const { parentPort } = require('worker_threads'); let n = 0;
    parentPort.on('message', m => parentPort.postMessage([m, ++n]));`, { eval: true });
const replies = new Map();
worker.on('message', ([id, n]) => { replies.get(id)(n); replies.delete(id); });
const cat = spawn('cat');
let echoed = '';
cat.stdout.on('data', data => { echoed += data; });
function work(n) { let s = 0; for (let i = 0; i < n; i++) s = (s + i * i) % 1000003; return s; }  // compiled when hot
let id = 0;
const server = http.createServer((request, response) => {
    hot += work(2000) == work(2000) ? 1 : 0;
    const key = id++;
    replies.set(key, n => zlib.deflate('x'.repeat(1000), (error, packed) => {  // the pool of threads
        zlib.inflate(packed, (error, text) => setTimeout(() => response.end(request.url + ' ' + text.length), 1)); }));
    worker.postMessage(key);
});
server.keepAliveTimeout = 60000;
server.listen(6700, '127.0.0.1', () => fs.writeFileSync('ready', ''));
const watch = setInterval(() => {
    if (!fs.existsSync('go')) return;
    clearInterval(watch);
    const before = ticks;
    cat.stdin.end('echo');
    cat.on('close', code => setTimeout(() => {
        const ok = ticks > before && echoed == 'echo' && code == 0 && hot == id && id > 0;
        fs.writeFileSync('result.new', ok ? 'pass\\n' : `fail: ${ticks} ${before} ${echoed} ${code} ${hot} ${id}\\n`);
        fs.renameSync('result.new', 'result');
    }, 100));
}, 10);
"""


def ask(connection: Connection, client: int, turn: int) -> None:
    path = f"/{client}/{turn}"
    if (answer := http_get(connection, path)) != f"{path} 1000".encode():
        raise Refused(f"{answer!r} is no answer to {path}")


@pytest.mark.parametrize("established", [True, False], ids=["established", "close"])
def test_node(start: Targets, sleeps: Sleeps, network: None, established: bool) -> None:
    """Timers, compiled code, a worker, a pool of threads and a child process behind a server."""
    need("node", "nft")
    target = start.command("node", "-e", NODE, wait=True)
    again = None if established else (lambda _, client, turn: turn)
    with Clients(lambda: tcp(PORT), ask, count=4, reconnect=again) as clients:
        sleeps(target, tcp_established=established, tcp_close=not established, awake=clients.make_progress)
    target.go()


PERL = r"""
use strict; use warnings; use Time::HiRes qw(sleep setitimer ITIMER_REAL);
my ($ticks, %seen) = (0);
$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.005, 0.005);
pipe(my $out, my $in); my $pid = open(my $child, '-|', 'while read x; do echo "$x$x"; done < /dev/null; cat') or die;
$seen{$_} = $_ ** 2 for 1 .. 5000;
open(my $log, '>', 'log'); select((select($log), $| = 0)[0]); print $log "buffered";
my $next = do { my $n = 0; sub { return ++$n } }; $next->() for 1 .. 10;
open(my $f, '>', 'ready'); close $f;
1 while !-e 'go' && sleep 0.002;
my $before = $ticks; sleep 0.05 for 1 .. 4;
close $log; open($log, '<', 'log'); my $text = <$log>;
my $ok = $ticks > $before && $next->() == 11 && $seen{77} == 5929 && keys %seen == 5000 && $text eq 'buffered';
open($f, '>', 'result.new'); print $f $ok ? "pass\n" : "fail: $ticks $before $text\n"; close $f;
rename 'result.new', 'result';
"""


def test_perl(start: Targets, sleeps: Sleeps) -> None:
    """An interval timer that interrupts it all the time, closures, and what is not written yet."""
    need("perl")
    target = start.command("perl", "-e", PERL, wait=True)
    sleeps(target)
    target.go()
