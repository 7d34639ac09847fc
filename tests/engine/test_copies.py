"""One snapshot, many copies: restores into pid namespaces of their own, and copies of a template."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

import torpor
from kit import Target, Targets, diff, host_state, wait_until
from kit.campaign import spare
from kit.host import stat_fields
from kit.talk import ANSWERS, Talk, snapshot_of
from torpor.engine.programs import Writer

from .conftest import copies_end_well

# Answers each line of its standard input with one line: what it sees of itself.
SERVER = """
import mmap, socket, sys, threading, time
shared = mmap.mmap(-1, 4096)
private = bytearray(b"original")
memory = os.memfd_create("test")
os.write(memory, b"memfd")
ends = os.pipe()
os.write(ends[1], b"in the pipe")
log = os.open(DIR + "/data", os.O_CREAT | os.O_RDWR)
os.write(log, b"0123456789")
os.lseek(log, 2, 0)
shared[:8] = b"original"

def answer(line):
    words = line.split()
    if words[0] == "see":
        return [bytes(private), shared[:8], os.pread(memory, 8, 0), os.lseek(log, 0, 1)]
    if words[0] == "change":
        private[:] = shared[:8] = words[1].encode()
        os.pwrite(memory, words[1].encode(), 0)
        return [os.read(log, 1), os.read(ends[0], 100)]
    if words[0] == "who":
        return [os.getpid(), threading.get_native_id(), os.getppid(), os.getsid(0), os.getpgrp()]
    if words[0] == "proc":
        return [os.readlink("/proc/self"), sorted(n for n in os.listdir("/proc") if n.isdigit())]
    if words[0] == "where":
        return [os.getcwd(), socket.gethostname()]
    if words[0] == "net":
        return [os.stat("/proc/self/ns/net").st_ino, [name for _, name in socket.if_nameindex()]]
    if words[0] == "fds":
        return sorted(int(n) for n in os.listdir("/proc/self/fd"))
    if words[0] == "read":
        return os.read(int(words[1]), 100)
    if words[0] == "groups":
        return open("/proc/self/cgroup").read()
    if words[0] == "exit":
        sys.exit(int(words[1]))

"""


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    """The server's snapshot is in ``images``; everything that is woken from it is ended."""
    target = start.python(SERVER + ANSWERS)
    with snapshot_of(target, images):
        yield target


def test_one_snapshot_is_restored_three_times_at_once(start: Targets, images: str) -> None:
    target = start.c('int main(void) { pid_t me = getpid(); ready(); wait_told("go"); exit(getpid() == me ? 42 : 1); }')
    torpor.dump(target.pid, images)
    target.wait_gone()
    copies = [torpor.restore(images, own_pids=True) for _ in range(3)]
    assert len({copy.pid for copy in copies}) == 3
    for copy in copies:
        with open(f"/proc/{copy.pid}/status") as file:
            numbers = next(line for line in file if line.startswith("NSpid")).split()[1:]
        assert numbers == [str(copy.pid), str(target.pid)]
    target.tell("go")
    assert [os.waitpid(copy.waits_for, 0)[1] >> 8 for copy in copies] == [42] * 3


def test_the_init_ends_as_the_root_does(start: Targets, images: str) -> None:
    for how, expected in (("exit(7)", 7), ("kill(getpid(), SIGKILL)", 128 + 9)):
        target = start.c(f'int main(void) {{ ready(); wait_told("go"); {how}; }}')
        os.makedirs(f"{images}/{expected}")
        torpor.dump(target.pid, f"{images}/{expected}")
        target.wait_gone()
        result = torpor.restore(f"{images}/{expected}", own_pids=True)
        target.tell("go")
        _, status = os.waitpid(result.waits_for, 0)
        assert os.waitstatus_to_exitcode(status) == expected


def test_the_command_waits_and_ends_as_the_root_does(start: Targets, images: str) -> None:
    target = start.c('int main(void) { ready(); wait_told("go"); exit(5); }')
    torpor.dump(target.pid, images)
    target.wait_gone()
    argv = [sys.executable, "-m", "torpor", "restore", images, "--own-pids"]
    commands = [subprocess.Popen(argv) for _ in range(2)]
    target.tell("go")
    assert [command.wait(30) for command in commands] == [5, 5]


def test_copies_share_nothing(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        copies = [Talk(template) for _ in range(5)]
        for number, copy in enumerate(copies):
            assert copy.ask("see") == [b"original", b"original", b"memfd", 2]
            assert copy.ask(f"change copy-{number:03}") == [b"2", b"in the pipe"]
        for number, copy in enumerate(copies):
            name = f"copy-{number:03}".encode()
            assert copy.ask("see") == [name, name, name, 3]
            assert copy.ask("who") == [snapshot.pid, snapshot.pid, 1, snapshot.pid, snapshot.pid]
            assert copy.ask("proc") == [str(snapshot.pid), ["1", str(snapshot.pid)]]
        assert [copy.end() for copy in copies] == [0] * 5
        assert Talk(template).ask("see") == [b"original", b"original", b"memfd", 2]


def test_copies_outlive_their_template(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        copy = Talk(template)
        held = template.pid
    assert stat_fields(held) is None
    assert copy.ask("who")[0] == snapshot.pid
    os.write(copy.input, b"exit 3\n")
    assert copy.end() == 3


def test_another_thread_is_refused(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template, ThreadPoolExecutor(1) as pool:
        with pytest.raises(torpor.UsageError, match="thread"):
            pool.submit(template.clone).result()
        Talk(template).end()


def test_a_template_leaves_nothing_but_its_copies(snapshot: Target, images: str) -> None:
    before = host_state(images)
    with torpor.template(images) as template:
        for _ in range(3):
            Talk(template).end()
    assert host_state(images) == before


def test_what_a_copy_may_ask_for(snapshot: Target, images: str) -> None:
    ours = os.stat("/proc/self/ns/net").st_ino
    read_end, write_end = os.pipe()
    os.write(write_end, b"for the copy")
    with torpor.template(images) as template:
        copy = Talk(template, hostname="fred", cwd="/usr", net="new", files={9: read_end})
        assert copy.ask("where") == ["/usr", "fred"]
        net, interfaces = copy.ask("net")
        assert net != ours and interfaces == ["lo"]
        assert 9 in copy.ask("fds")
        assert copy.ask("read 9") == b"for the copy"
        other = Talk(template, net=f"/proc/{copy.copy.pid}/ns/net")
        assert other.ask("net")[0] == net
        plain = Talk(template)
        assert plain.ask("where") == [snapshot.folder, socket.gethostname()]
        assert plain.ask("net")[0] == ours
        assert 9 not in plain.ask("fds")
        assert os.stat("/proc/self/ns/net").st_ino == ours
    os.close(read_end)
    os.close(write_end)


def test_programs_serve_again_only_where_they_are_the_same(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        for number in range(4):
            cwd = "/usr" if number % 2 else "/"
            copy = Talk(template, cwd=cwd, hostname=f"host{number}")
            assert copy.ask("where") == [cwd, f"host{number}"]
        assert template.recorded, "no programs were kept"


def test_the_third_copy_has_the_programs_of_the_second(
    snapshot: Target, images: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled any more for copies that are alike."""
    written: list[object] = []
    whole = Writer.write

    def counted(self: Writer) -> None:
        written.append(self)
        whole(self)

    with torpor.template(images) as template:
        monkeypatch.setattr(Writer, "write", counted)
        for _ in range(5):
            copy = Talk(template)
            assert copy.end() == 0
    assert len(written) == 2


def test_control_group_of_a_copy(snapshot: Target, images: str) -> None:
    base = next((path for path in ("/sys/fs/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/pids")
                 if os.path.exists(f"{path}/cgroup.procs")), "")  # fmt: skip
    assert base, "no hierarchy of control groups is mounted"
    group = f"{base}/torpor-test-{os.getpid()}"
    os.mkdir(group)
    try:
        with torpor.template(images) as template:
            copy = Talk(template, cgroup=(group,))
            assert f"/torpor-test-{os.getpid()}\n" in copy.ask("groups")
            copy.end()
    finally:
        wait_until("it is empty", lambda: _removed(group))


def _removed(group: str) -> bool:
    with contextlib.suppress(OSError):
        os.rmdir(group)
    return not os.path.exists(group)


def test_wrong_wishes_are_refused_and_leave_nothing(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        Talk(template).end()
        before = host_state()
        for wishes, words in (
            ({"cwd": "/nonexistent"}, "working directory"),
            ({"net": "/dev/null"}, "network namespace"),
            ({"cgroup": ("/nonexistent",)}, "control group"),
            ({"files": {5000: 0}}, "descriptor 5000"),
            ({"hostname": "h" * 65}, "host name"),
        ):  # fmt: skip
            with pytest.raises(torpor.TorporError, match=words):
                Talk(template, **wishes)
        after = host_state()
        # What was kept ready may have been taken, and has ended then.
        assert set(after.pop("processes")) - set(spare(template)) <= set(before.pop("processes"))
        assert not diff(before, after)
        assert Talk(template).ask("who")[0] == snapshot.pid


def test_a_fresh_pid_is_as_after_a_fork(snapshot: Target, images: str) -> None:
    with torpor.template(images) as template:
        copies = [Talk(template, fresh_pid=True) for _ in range(3)]
        for copy in copies:
            pid = copy.copy.pid
            assert copy.ask("who") == [pid, pid, os.getpid(), pid, pid]
            assert copy.ask("see")[0] == b"original"
        os.write(copies[0].input, b"exit 4\n")
        assert [copy.end() for copy in copies] == [4, 0, 0]


def test_a_fresh_pid_is_refused_where_it_would_be_noticed(start: Targets, images: str) -> None:
    programs = {
        "thread ids": "static void *idle(void *a) { pause(); return a; }\n"
        "int main(void) { pthread_t t; pthread_create(&t, 0, idle, 0); usleep(20000); ready(); pause(); }",
        "processes": "int main(void) { if (!fork()) pause(); usleep(20000); ready(); pause(); }",
        "sends signals": "int main(void) { int p[2]; MUST(pipe(p)); MUST(fcntl(p[0], F_SETOWN, getpid())); ready(); pause(); }",
    }
    for words, source in programs.items():
        target = start.c(source)
        folder = f"{images}/{words.split()[0]}"
        os.mkdir(folder)
        torpor.dump(target.pid, folder)
        target.wait_gone()
        with torpor.template(folder) as template:
            with pytest.raises(torpor.Unsupported, match=words):
                template.clone(fresh_pid=True)
            copy = template.clone()
            copy.kill()
            assert copy.wait() == 137


TREE = """
static void *idle(void *arg) { wait_told("go"); *(int *)arg += 1; return 0; }

int main(void)
{
	int *map = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pthread_t id;
	int counter = 1, status;
	pid_t me = getpid(), child = fork();

	if (!child) {
		wait_told("go");
		CHECK(getppid() == me);
		__sync_fetch_and_add(map, 1);
		exit(3);
	}
	pthread_create(&id, NULL, idle, &counter);
	usleep(30000);
	ready();
	wait_told("go");
	pthread_join(id, NULL);
	CHECK(waitpid(child, &status, 0) == child && WEXITSTATUS(status) == 3);
	CHECK(*map == 1 && counter == 2 && getpid() == me);
	exit(42);
}
"""


def test_copies_of_a_tree_with_threads(start: Targets, images: str) -> None:
    copies_end_well(start.c(TREE), images)


EMPTY = """
int main(void)
{
	char *wiped = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *plain = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	MUST(madvise(wiped, 8192, MADV_WIPEONFORK));
	memset(wiped, 'x', 8192);
	memset(plain, 'x', 4096);
	ready();
	wait_told("go");
	exit(wiped[0] == 0 && wiped[8191] == 0 && plain[0] == 'x' ? 42 : 1);
}
"""


def test_memory_that_forks_wipe_comes_up_empty(start: Targets, images: str) -> None:
    target = start.c(EMPTY)
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    with torpor.template(images) as template:
        assert [template.clone().wait() for _ in range(3)] == [42] * 3


def test_an_established_connection_is_in_one_copy_only(start: Targets, images: str) -> None:
    target = start.python(
        """
import socket
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
listener.close()
ready()
time.sleep(1000)
"""
    )
    torpor.dump(target.pid, images, tcp_established=True)
    target.wait_gone()
    with torpor.template(images, tcp_established=True) as template:
        with pytest.raises(torpor.Unsupported, match="established TCP connection"):
            template.clone()
        copies = [template.clone(net="new") for _ in range(2)]
    with torpor.template(images, tcp_close=True) as template:
        copies += [template.clone() for _ in range(2)]
    for copy in copies:
        assert copy.poll() is None
        copy.kill()
        copy.wait()


HTTP = """
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"%d" % ANSWER)
    def log_message(self, *words): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
tell("port", str(server.server_port))
ready()
server.serve_forever()
"""


def test_copies_of_a_listening_server_in_namespaces_of_their_own(start: Targets, images: str) -> None:
    target = start.python(HTTP.replace("ANSWER", "os.getpid()"))
    port = int(target.read("port"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    ask = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{port}/', timeout=10).read().decode())"
    with torpor.template(images) as template:
        copies = [template.clone(net="new") for _ in range(3)]
        for copy in copies:
            argv = ["nsenter", f"--net=/proc/{copy.pid}/ns/net", sys.executable, "-c", ask]
            assert subprocess.check_output(argv, text=True) == f"{target.pid}\n"
        # In one namespace the second one finds the port taken.
        first = template.clone()
        with pytest.raises(torpor.TorporError, match=f"{port}"):
            template.clone()
        for copy in (first, *copies):
            copy.kill()
            assert copy.wait() == 128 + signal.SIGKILL


def test_each_copy_of_a_server_listens_where_it_is_told(start: Targets, images: str) -> None:
    """In one network namespace; connections within the tree are moved with their listener."""
    target = start.python(HTTP.replace("ANSWER", "self.server.socket.getsockname()[1]"))
    port = int(target.read("port"))
    torpor.dump(target.pid, images)
    target.wait_gone()
    ports = free_ports(3)
    with torpor.template(images) as template:
        copies = [template.clone(remap_address=[f":{port}=:{one}"]) for one in ports]
        plain = template.clone()
        for one in (port, *ports):
            with urllib.request.urlopen(f"http://127.0.0.1:{one}/", timeout=10) as answer:
                assert answer.read() == b"%d" % one
        for rules, words in (
            ([f":{port}=:{ports[0]}"], f"{ports[0]}.*(in use|EADDRINUSE)"),
            (["here=there"], "--remap-address here=there: `here` is not an IP address"),
            ([f"127.0.0.1:{port}=203.0.113.1:{port}"], "203.0.113.1"),
        ):
            with pytest.raises(torpor.TorporError, match=words):
                template.clone(remap_address=rules)
        for copy in (*copies, plain):
            assert copy.poll() is None
            copy.kill()
            copy.wait()
        again = template.clone()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            assert answer.read() == b"%d" % port
        again.kill()
        again.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
