"""Unix sockets through the whole engine: the programs look at their sockets themselves afterwards."""

from __future__ import annotations

import os
import socket
import stat
import struct
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit import Library, Target, Targets
from torpor.errors import TorporError, Unsupported
from torpor.linux import sock_diag

HEAD = """
import array, errno, fcntl, os, socket, stat, struct, sys
from socket import *
AF, STREAM, DGRAM, PACKET = AF_UNIX, SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
def cred(s): return struct.unpack("iII", s.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))
def drain(s, size=1 << 20):
    s.setblocking(False)
    found = []
    while True:
        try: data = s.recv(size)
        except BlockingIOError: return found
        if not data and s.type == STREAM: return found + [b"END"]
        found.append(data)
def state(s):
    skipped = (3, 4, 13, 17, 20, 21, 28, 31, 59, 77)
    return [s.getsockopt(SOL_SOCKET, o) for o in range(1, 84) if o not in skipped and get(s, o)]
def get(s, o):
    try: s.getsockopt(SOL_SOCKET, o); return True
    except OSError: return False
errors = []
def same(what, a, b):
    if a != b: errors.append(f"{what}: {a!r} is not {b!r}")
"""
TAIL = """
done(not errors, "; ".join(errors)[:2000])
"""


@pytest.fixture
def trip(start: Targets, library: Library, images: str) -> Callable[..., Target]:
    """Starts a program in two halves, snapshots it between them, and asks what it thinks."""

    def run(first: str, second: str, **options: object) -> Target:
        target = start.python(HEAD + first + "\nready()\nwait_told('go')\n" + second + TAIL)
        target.pids()
        library.dump(target.pid, images, **options)
        target.wait_gone()
        library.restore(images, **options)
        target.go()
        return target

    return run


def test_queues_keep_their_messages(trip) -> None:
    trip(
        """
pairs = {t: socketpair(AF, t) for t in (STREAM, DGRAM, PACKET)}
sent = [b"one", b"", b"x" * 70000, b"three", bytes(range(256)) * 300]
for t, (a, b) in pairs.items():
    for data in sent: a.sendall(data) if t == STREAM else a.send(data)
    b.sendall(b"back")
roomy = socketpair(AF, STREAM); roomy[0].setsockopt(SOL_SOCKET, 32, 4000000); roomy[0].setblocking(False)
much = roomy[0].send(bytes(2500000)); roomy[0].setsockopt(SOL_SOCKET, SO_SNDBUF, 5000)
""",
        """
for t, (a, b) in pairs.items():
    got = drain(b)
    same(t, b"".join(got) if t == STREAM else got, b"".join(sent) if t == STREAM else sent)
    same("back", drain(a), [b"back"])
    a.send(b"more"); same("more", drain(b), [b"more"])
same("much", (len(b"".join(drain(roomy[1]))), much), (2500000, 2500000))
""",
    )


def test_a_listening_socket_its_connections_and_who_waits(trip) -> None:
    target = trip(
        """
os.mkdir("d"); os.chmod(".", 0o777)
listener = socket(AF, STREAM); listener.bind("d/sock"); os.chmod("d/sock", 0o646); os.chown("d/sock", 5, 6)
listener.listen(7)
hidden = socket(AF, PACKET); hidden.bind(b"\\0torpor-\\0test-%d" % os.getpid()); hidden.listen(3)
pid = os.fork()
if pid == 0:
    os.setgroups([7, 8]); os.setresgid(33, 44, 33); os.setresuid(0, 55, 0)
    name = listener.getsockname()
    client = socket(AF, STREAM); client.connect(name); client.send(b"hello")
    waiting = [socket(AF, STREAM) for _ in range(3)]
    for i, s in enumerate(waiting): s.bind(b"\\0torpor-%d-%d" % (os.getppid(), i)); s.connect(name)
    other = socket(AF, PACKET); other.connect(hidden.getsockname())
    mine = cred(client)
    open("child", "w").close()
    wait_told("go")
    same("child: cred", cred(client), mine)
    same("child: peer", client.getpeername(), "d/sock")
    same("child: name", client.getsockname(), "")
    client.send(b"again")
    for i, s in enumerate(waiting): s.send(b"%d" % i)
    open("child-errors", "w").write("; ".join(errors)); os.rename("child-errors", "child-done")
    import time; time.sleep(1000)
import time
while not os.path.exists("child"): time.sleep(.01)
server, _ = listener.accept()
packet, _ = hidden.accept()
before = cred(server), server.getsockopt(SOL_SOCKET, 59, 1024), cred(packet), cred(listener)
""",
        """
while not os.path.exists("child-done"): time.sleep(.01)
same("child", open("child-done").read(), "")
same("cred", (cred(server), server.getsockopt(SOL_SOCKET, 59, 1024), cred(packet), cred(listener)), before)
same("pid", before[0], (pid, 55, 44))
same("name", server.getsockname(), "d/sock")
same("hidden", packet.getsockname(), hidden.getsockname())
same("data", drain(server), [b"helloagain"])
for i in range(3):
    one, who = listener.accept()
    same("who", who, b"\\0torpor-%d-%d" % (os.getpid(), i))
    same("waited", one.recv(9), b"%d" % i)
    same("cred of the accepted", cred(one), (pid, 55, 44))
    same("groups of the accepted", struct.unpack("II", one.getsockopt(SOL_SOCKET, 59, 64)), (7, 8))
info = os.stat("d/sock")
same("file", (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid), (0o646, 5, 6))
late = socket(AF, STREAM); late.connect("d/sock")
listener.setblocking(False); listener.accept()
""",
    )
    assert stat.S_ISSOCK(os.stat(target.path("d/sock")).st_mode)


def test_names_that_are_gone_moved_or_used_again(trip) -> None:
    trip(
        """
os.mkdir("gone"); os.mkdir("e")
def bound(name, t=DGRAM):
    s = socket(AF, t); s.bind(name); return s
here = os.getcwd()
first = bound("same"); os.unlink("same")
second = bound(here + "/same"); os.unlink("same")
third = bound("same"); os.chmod("same", 0o600)
lost = bound("gone/sock"); os.unlink("gone/sock"); os.rmdir("gone")
moved = bound("e/new"); os.rename("e/new", "e/final")
dotted = bound("e/../dotted")
over = bound("over"); os.unlink("over"); open("over", "w").write("a file")
auto = socket(AF, DGRAM); auto.bind("")
all_of = [first, second, third, lost, moved, dotted, over, auto]
names = [s.getsockname() for s in all_of]
to_first = socket(AF, DGRAM)
fds = [fcntl.ioctl(s.fileno(), 0x89e0) for s in all_of[:-1]]
links = [os.readlink(f"/proc/self/fd/{fd}").split(" (")[-1] for fd in fds]
to_first.connect(f"/proc/self/fd/{fds[0]}")
for fd in fds: os.close(fd)
""",
        """
same("names", [s.getsockname() for s in all_of], names)
fds = [fcntl.ioctl(s.fileno(), 0x89e0) for s in all_of[:-1]]
gone = [os.readlink(f"/proc/self/fd/{fd}").endswith("(deleted)") for fd in fds]
same("gone", gone, [True, True, False, True, False, False, True])
to_first.send(b"to first"); same("first", drain(first), [b"to first"])
s = socket(AF, DGRAM)
s.sendto(b"3", "same"); same("third", drain(third), [b"3"])
s.sendto(b"m", "e/final"); same("moved", drain(moved), [b"m"])
s.sendto(b"d", here + "/dotted"); same("dotted", drain(dotted), [b"d"])
same("mode", stat.S_IMODE(os.stat("same").st_mode), 0o600)
same("file", open("over").read(), "a file")
left = sorted(os.listdir(".") + os.listdir("e"))
same("left", left, sorted(["e", "same", "over", "dotted", "final", "ready", "go", "stdout"]))
""",
    )


def test_descriptors_in_flight(trip) -> None:
    trip(
        """
def give(s, data, *fds): s.sendmsg([data], [(SOL_SOCKET, SCM_RIGHTS, array.array("i", fds))])
a, b = socketpair(AF, STREAM)
a.send(b"plain")
r, w = os.pipe(); os.write(w, b"in the pipe")
file = os.open("file", os.O_CREAT | os.O_RDWR); os.write(file, b"0123456789"); os.lseek(file, 4, 0)
give(a, b"fds", r, file)
c, d = socketpair(AF, DGRAM)
inner, outer = socketpair(AF, PACKET)
inner.send(b"deep")
give(inner, b"one more", w, inner.fileno())
give(c, b"a socket", outer.fileno())
a.send(b"after")
for fd in (r, w, file): os.close(fd)
inner.close(); outer.close()
""",
        """
def take(s, size=100):
    data, control, flags, _ = s.recvmsg(size, 4096)
    fds = array.array("i")
    for _, kind, content in control: fds.frombytes(content)
    return data, list(fds)
same("ahead", take(b, 5), (b"plain", []))
data, (r, file) = take(b, 3)
same("data", data, b"fds"); same("position", os.lseek(file, 0, 1), 4); same("file", os.read(file, 9), b"456789")
same("after", take(b), (b"after", []))
data, (outer,) = take(d)
outer = socket(fileno=outer)
same("deep", take(outer), (b"deep", []))
data, (w, inner) = take(outer)
os.write(w, b"+"); same("pipe", os.read(r, 99), b"in the pipe+")
socket(fileno=inner).send(b"round"); same("round", take(outer)[0], b"round")
""",
    )


def test_closed_and_half_closed(trip) -> None:
    trip(
        """
a, b = socketpair(AF, STREAM); a.send(b"last"); a.shutdown(SHUT_WR)
c, d = socketpair(AF, STREAM); c.send(b"left"); c.close()
e, f = socketpair(AF, PACKET); f.send(b"unread by e"); e.send(b"kept"); e.close()
g, h = socketpair(AF, STREAM); g.send(b"unread by h"); h.send(b"to g"); h.close()
i, j = socketpair(AF, DGRAM); j.close()
k = socket(AF, DGRAM); k.shutdown(SHUT_RDWR)
m, n = socketpair(AF, DGRAM); m.send(b"bye"); m.close()
""",
        """
same("a", drain(b), [b"last", b"END"]); b.send(b"x"); same("b", a.recv(9), b"x")
try: a.send(b"x"); errors.append("a sends")
except BrokenPipeError: pass
same("d", drain(d), [b"left", b"END"])
same("f", f.getsockopt(SOL_SOCKET, SO_ERROR), errno.ECONNRESET); same("f", [f.recv(9), f.recv(9)], [b"kept", b""])
same("g", g.getsockopt(SOL_SOCKET, SO_ERROR), errno.ECONNRESET); same("g", drain(g), [b"to g", b"END"])
same("no error", d.getsockopt(SOL_SOCKET, SO_ERROR), 0)
try: i.send(b"x"); errors.append("i sends")
except ConnectionRefusedError: pass
same("k", k.recv(9), b"")
same("n", drain(n), [b"bye"])
""",
    )


def test_datagrams_know_their_senders(trip) -> None:
    trip(
        """
os.mkdir("d")
def bound(name): s = socket(AF, DGRAM); s.bind(name); return s
sink = bound("d/sink"); alive = bound("d/alive"); dead = bound("d/dead")
hidden = bound(b"\\0torpor-hidden-%d" % os.getpid())
credulous = bound("d/cred"); credulous.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
os.chmod("d/cred", 0o777)
for s in (alive, dead, hidden): s.sendto(b"from", "d/sink")
socket(AF, DGRAM).sendto(b"nobody", "d/sink")
dead.close(); os.unlink("d/dead")
alive.connect("d/sink")
pid = os.fork()
if pid == 0:
    os.setresgid(8, 9, 0); os.setresuid(6, 7, 0)
    socket(AF, DGRAM).sendto(b"of a child", "d/cred"); os._exit(0)
os.waitpid(pid, 0)
peer = bound("d/peer"); mutual = bound("d/mutual"); peer.connect("d/mutual"); mutual.connect("d/peer")
for n in range(20): peer.send(b"%d" % n)
itself = bound("d/itself"); itself.connect("d/itself"); itself.send(b"me")
""",
        """
sink.setblocking(False)
hid = hidden.getsockname()
who = [(b"from", "d/alive"), (b"from", "d/dead"), (b"from", hid), (b"nobody", None)]
same("senders", [sink.recvfrom(99) for _ in range(4)], who)
data, control, _, _ = credulous.recvmsg(99, 999)
same("cred", [(data, struct.unpack("iII", c)) for _, _, c in control], [(b"of a child", (pid, 6, 8))])
same("mutual", drain(mutual), [b"%d" % n for n in range(20)])
same("peer", mutual.getpeername(), "d/peer")
same("itself", drain(itself), [b"me"]); itself.send(b"again"); same("itself", drain(itself), [b"again"])
alive.send(b"x"); same("connected", sink.recvfrom(9), (b"x", "d/alive"))
try: socket(AF, DGRAM).sendto(b"x", "d/mutual"); errors.append("mutual takes from others")
except PermissionError: pass
same("dead", os.path.exists("d/dead"), False)
""",
    )


def test_options(trip) -> None:
    trip(
        """
a, b = socketpair(AF, STREAM)
for option, value in (
    (SO_SNDBUF, 5000), (SO_RCVBUF, 300000), (SO_PRIORITY, 3), (SO_RCVLOWAT, 7), (SO_PASSCRED, 1),
    (SO_BROADCAST, 1), (SO_OOBINLINE, 1), (SO_KEEPALIVE, 1), (SO_MARK, 99), (SO_REUSEADDR, 1),
    (29, 1), (42, 3), (5, 1)):
    a.setsockopt(SOL_SOCKET, option, value)
a.setsockopt(SOL_SOCKET, SO_RCVTIMEO, struct.pack("ll", 5, 250000))
a.setsockopt(SOL_SOCKET, SO_SNDTIMEO, struct.pack("ll", 0, 500000))
a.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 77))
code = struct.pack("HBBI", 6, 0, 0, 0xFFFF) * 2
program = array.array("B", code)
a.setsockopt(SOL_SOCKET, 26, struct.pack("HP", 2, program.buffer_info()[0]))
os.set_blocking(b.fileno(), False)
fcntl.fcntl(b, 8, os.getpid()); fcntl.fcntl(b, 10, 40)
def times(s): return [s.getsockopt(SOL_SOCKET, o, 16) for o in (SO_RCVTIMEO, SO_SNDTIMEO, SO_LINGER)]
before = state(a), state(b), times(a)
""",
        """
same("options", (state(a), state(b), times(a)), before)
same("flags", os.get_blocking(b.fileno()), False)
same("owner", (fcntl.fcntl(b, 9), fcntl.fcntl(b, 11)), (os.getpid(), 40))
""",
    )


def test_as_many_may_wait_as_before(trip) -> None:
    trip(
        """
def listener(kind, backlog):
    s = socket(AF, kind); s.bind(b"\\0torpor-backlog-%d-%d-%d" % (os.getpid(), kind, backlog)); s.listen(backlog); return s
def client(to):
    s = socket(AF, to.type); s.setblocking(False); s.connect(to.getsockname()); return s
few, none, packets, fewer = listener(STREAM, 3), listener(STREAM, 0), listener(PACKET, 2), listener(STREAM, 9)
waiting = [client(packets), *(client(fewer) for _ in range(5))]; fewer.listen(1)
""",
        """
def fits(to):
    found = []
    try:
        while True: found.append(client(to))
    except BlockingIOError: return len(found)
same("more than the backlog", [fits(one) for one in (few, none, packets, fewer)], [4, 1, 2, 0])
same("pending", [s.accept()[0].type for s in (few, none, packets, fewer)], [STREAM, STREAM, PACKET, STREAM])
for n in range(4): fewer.accept()
fewer.setblocking(False)
try: fewer.accept(); errors.append("a sixth waits")
except BlockingIOError: pass
""",
    )


def test_who_made_a_pair_is_seen_at_both_ends(trip) -> None:
    trip(
        """
def seen(): return [(cred(s), s.getsockopt(SOL_SOCKET, 59, 64)) for pair in pairs for s in pair]
os.setgroups([7, 8]); os.setegid(44); os.seteuid(55)
pairs = [socketpair(AF, t) for t in (STREAM, DGRAM, PACKET)]
os.seteuid(0); os.setegid(0); os.setgroups([])
pairs.append(socketpair(AF, STREAM))
before = seen()
same("cred", [one for one, _ in before], [(os.getpid(), 55, 44)] * 6 + [(os.getpid(), 0, 0)] * 2)
""",
        'same("seen", seen(), before)',
    )


def test_one_of_a_pair_has_found_another_peer(trip) -> None:
    trip(
        """
import ctypes
def refused(s):
    try: s.send(b"x"); return 0
    except OSError as error: return error.errno
stays, moved = socketpair(AF, DGRAM)
other = socket(AF, DGRAM); other.bind("other")
moved.connect("other"); moved.send(b"to the other")
left, alone = socketpair(AF, DGRAM)
same("disconnect", ctypes.CDLL(None).connect(alone.fileno(), struct.pack("H14x", 0), 16), 0)
left.send(b"one way")
before = refused(stays), refused(alone)
same("before", before, (errno.EPERM, errno.ENOTCONN))
""",
        """
same("kept", (drain(other), drain(moved), drain(alone)), ([b"to the other"], [], [b"one way"]))
same("refused", (refused(stays), refused(alone)), before)
moved.send(b"again"); left.send(b"more")
same("sent", (drain(other), drain(alone)), ([b"again"], [b"more"]))
same("peer", moved.getpeername(), "other")
""",
    )


def test_an_accepted_one_keeps_the_name_of_a_listener_that_is_closed(trip) -> None:
    trip(
        """
hidden = b"\\0torpor-closed-%d" % os.getpid()
ends = []
for name, kind in (("closed", STREAM), (hidden, STREAM), ("packets", PACKET)):
    listener = socket(AF, kind); listener.bind(name); listener.listen(2)
    client = socket(AF, kind); client.connect(name); server = listener.accept()[0]; listener.close()
    client.send(b"waits"); ends.append((client, server, name))
os.chmod("closed", 0o640); os.unlink("packets")
""",
        """
for client, server, name in ends:
    same("names", (client.getpeername(), server.getsockname(), client.getsockname(), server.getpeername()), (name, name, "", ""))
    same("data", server.recv(9), b"waits"); server.send(b"reply"); same("reply", client.recv(9), b"reply")
same("file", stat.S_ISSOCK(os.stat("closed").st_mode), True)
same("gone", os.path.exists("packets"), False)
for kind, name in ((STREAM, "closed"), (STREAM, hidden)):
    try: socket(AF, kind).connect(name); errors.append(f"{name} is listened to")
    except ConnectionRefusedError: pass
""",
    )


def test_options_that_a_dump_and_a_restore_need_themselves(start: Targets, library: Library, images: str, trip) -> None:
    """Where to look next (SO_PEEK_OFF), and whether the program has chosen the sizes of buffers (SO_BUF_LOCK)."""
    target = start.python(
        HEAD + "a, b = socketpair(AF, STREAM); a.send(b'0123456789'); b.setsockopt(SOL_SOCKET, 42, 4)\n"
        "ready(); wait_told('go')\nsame('next', b.recv(2, MSG_PEEK), b'45'); same('off', b.getsockopt(SOL_SOCKET, 42), 6)" + TAIL
    )
    library.dump(target.pid, images, leave_running=True)
    target.go()
    trip(
        """
a, b = socketpair(AF, STREAM)
a.setblocking(False)
try:
    while True: a.send(b"x" * 30000)
except BlockingIOError: pass
c, d = socketpair(AF, DGRAM); c.setsockopt(SOL_SOCKET, 72, 2); d.setsockopt(SOL_SOCKET, SO_SNDBUF, 100000)
d.setsockopt(SOL_SOCKET, 72, 0)
before = [state(s) for s in (a, b, c, d)]
""",
        'same("options", [state(s) for s in (a, b, c, d)], before)',
    )


# ---------------------------------------------------------------------- others than the tree


def test_a_peer_outside_is_refused_with_the_options_that_help(
    start: Targets, library: Library, images: str, tmp_path
) -> None:
    name = str(tmp_path / "service")
    service = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    service.bind(name)
    target = start.python(
        HEAD + "s = socket(AF, DGRAM); s.connect(sys.argv[1]); ready(); wait_told('go'); s.send(b'hi')" + TAIL, name
    )
    with pytest.raises(Unsupported) as caught:
        library.dump(target.pid, images)
    assert "--ext-unix-sk" in caught.value.hint and name in str(caught.value)
    library.dump(target.pid, images, ext_unix_sk=True)
    target.wait_gone()
    with pytest.raises(Unsupported, match="another process") as caught:
        library.restore(images)
    assert "--ext-unix-sk" in caught.value.hint
    library.restore(images, ext_unix_sk=True)
    target.go()
    assert service.recv(9) == b"hi"
    service.close()


def test_half_a_connection_is_given_at_restore(start: Targets, library: Library, images: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(b"\0torpor-given-%d" % os.getpid())
    listener.listen()
    running = start.python(
        HEAD + "s = socket(AF, STREAM); s.connect(b'\\0' + sys.argv[1].encode())\n"
        "tell('inode', str(os.fstat(s.fileno()).st_ino)); ready(); wait_told('go'); s.send(b'hi')" + TAIL,
        f"torpor-given-{os.getpid()}",
    )
    accepted, _ = listener.accept()
    inode = running.read("inode")
    with pytest.raises(Unsupported) as caught:
        library.dump(running.pid, images)
    assert f"--external unix[{inode}]" in caught.value.hint
    library.dump(running.pid, images, external=[f"unix[{inode}]"])
    running.wait_gone()
    assert accepted.recv(9) == b"", "the old connection ended"
    with pytest.raises(Unsupported) as caught:
        library.restore(images)
    assert f"--inherit-fd fd[N]:socket:[{inode}]" in caught.value.hint
    here, there = socket.socketpair()
    library.restore(images, inherit_fd=[(there.fileno(), f"socket:[{inode}]")])
    there.close()
    running.go()
    assert here.recv(9) == b"hi"
    for one in (listener, accepted, here):
        one.close()


def test_a_name_that_is_taken_stops_the_restore_and_nothing_is_left(
    start: Targets, library: Library, images: str
) -> None:
    target = start.python(
        HEAD + "a, b = [socket(AF, STREAM) for _ in range(2)]\n"
        "a.bind('first'); b.bind('second'); a.listen(); b.listen(); ready(); wait_told('go')" + TAIL
    )
    library.dump(target.pid, images)
    target.wait_gone()
    first, second = target.path("first"), target.path("second")
    os.chmod(first, 0o741)
    os.unlink(second)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(second)
        with pytest.raises(TorporError, match="another process has bound"):
            library.restore(images)
    assert stat.S_IMODE(os.stat(first).st_mode) == 0o741, "what was there is back"
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(first)
    os.unlink(second)
    with open(second, "w") as file:
        file.write("mine")
    with pytest.raises(TorporError, match="no socket"):
        library.restore(images)
    os.unlink(second)
    assert not target.alive()
    library.restore(images)
    target.go()


def test_names_that_somebody_gives_up_a_moment_later(start: Targets, library: Library, images: str) -> None:
    """As the kernel does with a socket that requests to an io_uring hold, after its process has ended."""
    target = start.python(
        HEAD + "a, b = [socket(AF, STREAM) for _ in range(2)]\n"
        "a.bind('path'); b.bind(f'\\0{os.getpid()}'); a.listen(); b.listen(); ready(); wait_told('go')" + TAIL
    )
    library.dump(target.pid, images)
    target.wait_gone()
    os.unlink(target.path("path"))
    others = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    others[0].bind(target.path("path"))
    others[1].bind(f"\0{target.pid}")
    timers = [threading.Timer(delay, other.close) for delay, other in zip((0.03, 0.1), others, strict=True)]
    for timer in timers:
        timer.start()
    library.restore(images)
    target.go()
    for timer in timers:
        timer.join()


def test_what_cannot_be_seen_without_taking_it_is_refused(start: Targets, library: Library, images: str) -> None:
    for body, why in (
        ("c.connect('l'); c.send(b'x')", "not accepted yet"),
        ("c.connect('l'); c.close()", "gone again before it was accepted"),
        ("a, b = socketpair(AF, STREAM); a.send(b'x', MSG_OOB)", "urgent data"),
    ):
        target = start.python(
            HEAD + f"l = socket(AF, STREAM); l.bind('l'); l.listen(); c = socket(AF, STREAM)\n{body}\n"
            "ready(); wait_told('go')" + TAIL
        )
        with pytest.raises(Unsupported, match=why):
            library.dump(target.pid, images)
        target.go()


# ---------------------------------------------------------------------- what the kernel tells


def test_the_kernel_table_agrees_with_the_sockets() -> None:
    name = b"\0torpor-diag-%d" % os.getpid()
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(name)
        listener.listen(5)
        client.connect(name)
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        a.send(b"12345")
        a.shutdown(socket.SHUT_WR)
        table = sock_diag.unix_sockets()
        inode = {one: os.fstat(one.fileno()).st_ino for one in (listener, client, a, b)}
        waiting = table[inode[listener]]
        assert (waiting.name, waiting.state, waiting.pending) == (name, sock_diag.LISTEN, (inode[client],))
        assert waiting.queue == (1, 5)
        assert table[inode[client]].peer == 0
        assert (table[inode[a]].peer, table[inode[b]].peer) == (inode[b], inode[a])
        assert (table[inode[a]].shutdown, table[inode[b]].shutdown) == (2, 1)
        assert table[inode[b]].queue[0] == 5
        a.close()
        b.close()


@given(
    st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**32 - 1),
    st.dictionaries(st.integers(8, 60), st.binary(max_size=20)), st.binary(max_size=110),
)  # fmt: skip
def test_replies_are_read_whatever_else_is_in_them(
    kind: int, state: int, inode: int, unknown: dict[int, bytes], name: bytes
) -> None:
    body = struct.pack("=BBBxI8s", 1, kind, state, inode, b"cookie..")
    for attribute, content in [*unknown.items(), (0, name), (6, b"\3")]:
        size = 4 + len(content)
        body += struct.pack("=HH", size, attribute) + content + bytes(-size % 4)
    found = sock_diag.parse_unix(body)
    assert (found.type, found.state, found.ino, found.name, found.shutdown) == (kind, state, inode, name, 3)
    assert found.peer is None
