"""Terminals: each test runs in a child with a devpts of its own: all pty numbers are free."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.file_bench import Bench, alone_after, run_here, seen
from torpor.errors import Unsupported
from torpor.linux.call import call
from torpor.remote.program import Program
from torpor.resources import _tty_ioctl
from torpor.resources.files import _tty_build, _tty_data, tty

CLONE_NEWNS, MS_BIND, MS_REC_PRIVATE = 0x20000, 0x1000, 0x44000
GET_SESSION, GET_GROUP, PACKET, IS_PACKET = 0x5429, 0x540F, 0x5420, 0x80045438
EXCLUSIVE, IS_EXCLUSIVE, SET_LOCK, IS_LOCKED = 0x540C, 0x80045440, 0x40045431, 0x80045439
OPEN_PEER = 0x5441
RDWR = os.O_RDWR | os.O_NOCTTY


def own_devpts() -> None:
    call("unshare", CLONE_NEWNS)
    call("mount", b"none\0", b"/\0", None, MS_REC_PRIVATE, None)
    call("mount", b"devpts\0", b"/dev/pts\0", b"devpts\0", 0, b"newinstance,ptmxmode=0666,mode=620\0")
    call("mount", b"/dev/pts/ptmx\0", b"/dev/ptmx\0", None, MS_BIND, None)


def lead_a_session() -> None:
    """Of its own, with a devpts of its own."""
    signal.alarm(10)
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    own_devpts()


alone = alone_after(lead_a_session)


def ask(fd: int, request: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def pair(*, raw: bool = False) -> tuple[int, int]:
    """Master and slave of a new pty; without echo, and without lines either where ``raw``."""
    master = os.open("/dev/ptmx", RDWR)
    fcntl.ioctl(master, SET_LOCK, bytes(4))
    slave = os.open(f"/dev/pts/{ask(master, 0x80045430)}", RDWR)
    now = termios.tcgetattr(slave)
    now[3] &= ~termios.ECHO & (~termios.ICANON if raw else -1)
    termios.tcsetattr(slave, termios.TCSANOW, now)
    return master, slave


def ready(fd: int, what: int = select.POLLIN, wait_ms: int = 2000) -> bool:
    poll = select.poll()
    poll.register(fd, what)
    return any(got & what for _, got in poll.poll(wait_ms))


def quiet(fd: int) -> bool:
    return not ready(fd, wait_ms=20)


def typed(master: int, data: bytes) -> None:
    os.write(master, data)


def task(pid: int | None = None, **more: Any) -> Any:
    pid = pid or os.getpid()
    stat = SimpleNamespace(session=os.getsid(pid), pgrp=os.getpgid(pid), tty_nr=0, tpgid=-1)
    return SimpleNamespace(pid=pid, vpid=pid, group=stat.pgrp, zombie=False, stat=stat, **more)


def moved(*fds: int, before: Callable[[Bench], None] = lambda _: None, **options: Any) -> list[int]:
    """Dump these descriptors, close them, and give those that they become."""
    bench = Bench(**options)  # not closed: the child ends
    before(bench)
    numbers = [bench.dump(fd) for fd in fds]
    unread = tty.finish(bench.dumping)
    bench.dumping.close()
    for fd in fds:
        os.close(fd)
    unread.forget()
    bench.commit()
    made = [bench.build(number) for number in numbers]
    last[:] = [bench]
    return made


last: list[Bench] = []


@alone
def test_both_ends_with_settings_and_size() -> None:
    for _ in range(3):
        pair()
    master, slave = pair()
    other = os.open("/dev/pts/3", RDWR | os.O_NONBLOCK)
    now = termios.tcgetattr(slave)
    now[0] ^= termios.ICRNL | termios.IXANY
    now[1] ^= termios.OPOST
    now[3] ^= termios.ECHOK
    now[6][termios.VINTR] = b"\x07"
    now[4] = now[5] = termios.B9600
    termios.tcsetattr(slave, termios.TCSANOW, now)
    now = termios.tcgetattr(slave)  # the speed is also in c_cflag
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 33, 111, 5, 6))
    locks = bytearray(36)
    locks[12] = 0x02
    fcntl.ioctl(slave, _tty_ioctl.TIOCSLCKTRMIOS, bytes(locks))
    os.fchown(slave, 123, 456)
    os.fchmod(slave, 0o640)
    fcntl.ioctl(slave, EXCLUSIVE)
    fcntl.ioctl(master, PACKET, struct.pack("i", 1))
    fcntl.ioctl(master, SET_LOCK, struct.pack("i", 1))
    kept = [seen(fd) for fd in (master, slave, other)]
    master, slave, other = moved(master, slave, other)
    assert [seen(fd) for fd in (master, slave, other)] == kept
    assert termios.tcgetattr(slave) == now
    assert fcntl.ioctl(slave, termios.TIOCGWINSZ, bytes(8)) == struct.pack("4H", 33, 111, 5, 6)
    assert fcntl.ioctl(slave, _tty_ioctl.TIOCGLCKTRMIOS, bytes(36)) == bytes(locks)
    assert ask(slave, IS_EXCLUSIVE) == 1 and ask(master, IS_EXCLUSIVE) == 0
    assert ask(master, IS_PACKET) == 1 and ask(master, IS_LOCKED) == 1
    os.write(slave, b"to the master")
    assert os.read(master, 100) in (b"\0to the master", b"\x20")
    os.write(master, b"to the slave\n")
    assert os.read(slave, 100) == b"to the slave\n"


@alone
def test_a_master_that_is_for_one_alone() -> None:
    master, slave = pair()
    fcntl.ioctl(master, EXCLUSIVE)
    master, slave = moved(master, slave)
    assert ask(master, IS_EXCLUSIVE) == 1 and ask(slave, IS_EXCLUSIVE) == 0


@alone
def test_what_is_not_set_stays_unset() -> None:
    master, slave = moved(*pair())
    assert ask(slave, IS_EXCLUSIVE) == 0 and ask(master, IS_PACKET) == 0
    assert ask(master, IS_LOCKED) == 0
    assert os.getsid(0) == os.getpid()
    with pytest.raises(OSError, match="No such device or address"):  # the builder got no terminal
        os.open("/dev/tty", os.O_RDWR)


@alone
def test_lines_are_read_one_by_one_and_a_part_can_be_finished() -> None:
    master, slave = pair()
    typed(master, b"one\ntwo\nno newline\x04\x04quoted\x16\x04\x16\x16 end\nthr")
    assert ready(slave)
    time.sleep(0.05)
    master, slave = moved(master, slave)
    lines = [os.read(slave, 100) for _ in range(5)]
    assert lines == [b"one\n", b"two\n", b"no newline", b"", b"quoted\x04\x16 end\n"]
    assert quiet(slave) and quiet(master)
    typed(master, b"ee\n")
    assert os.read(slave, 100) == b"three\n"


@alone
def test_raw_bytes_both_ways() -> None:
    master, slave = pair(raw=True)
    every = bytes(range(256))
    now = termios.tcgetattr(slave)
    now[0] = now[1] = 0
    termios.tcsetattr(slave, termios.TCSANOW, now)
    os.write(slave, every)
    now[3] |= termios.ISIG | termios.ECHO | termios.IEXTEN  # would change them if they were typed
    typed(master, every.replace(b"\x03", b"").replace(b"\x1c", b"").replace(b"\x1a", b""))
    time.sleep(0.05)
    now[0] |= termios.ICRNL
    now[1] |= termios.OPOST
    termios.tcsetattr(slave, termios.TCSANOW, now)
    expected = every.replace(b"\x03", b"").replace(b"\x1c", b"").replace(b"\x1a", b"")
    master, slave = moved(master, slave)
    assert termios.tcgetattr(slave) == now
    assert os.read(slave, 1000) == expected
    assert os.read(master, 1000) == every
    assert quiet(slave) and quiet(master)


def test_typing_a_line_gives_the_line() -> None:
    seed = termios_of(cc={4: 4, 15: 22, 11: ord("#"), 16: 0})

    @settings(max_examples=200)
    @given(st.binary(min_size=1, max_size=60))
    def check(line: bytes) -> None:
        keys = _tty_data.typed(line, seed)
        assert tokens(keys) == line

    check()


def termios_of(cc: dict[int, int]) -> _tty_ioctl.Termios:
    characters = bytes(cc.get(index, 0) for index in range(19))
    return _tty_ioctl.Termios(0, 0, 0, _tty_ioctl.ICANON | _tty_ioctl.IEXTEN, 0, characters)


def tokens(keys: bytes) -> bytes:
    """What n_tty would hand out for these keys: asserts that the only end is the last one."""
    found, at = bytearray(), 0
    while at < len(keys):
        byte = keys[at]
        if byte == 22:
            at += 1
            found.append(keys[at])
        elif byte == 4:
            assert at == len(keys) - 1
        else:
            assert byte not in b"\n#" or at == len(keys) - 1
            found.append(byte)
        at += 1
    return bytes(found)


@alone
def test_put_back_where_the_tasks_go_on() -> None:
    master, slave = pair()
    fcntl.ioctl(master, PACKET, struct.pack("i", 1))
    typed(master, b"line\npar")
    os.write(slave, b"out")
    before = termios.tcgetattr(slave)
    with Bench(leave_running=True) as bench:
        for fd in (master, slave):
            bench.dump(fd)
        unread = tty.finish(bench.dumping)
        assert quiet(slave)
        unread.put_back()
    assert termios.tcgetattr(slave) == before
    assert os.read(slave, 100) == b"line\n" and quiet(slave)
    typed(master, b"t\n")
    assert os.read(slave, 100) == b"part\n"
    assert os.read(master, 100) == b"\0out"


@alone
def test_a_killed_dump_loses_nothing() -> None:
    master, slave = pair()
    typed(master, b"line\npar")
    assert ready(slave)
    bench = Bench(leave_running=True)  # the child's; its folder is ours
    pid = os.fork()
    if pid == 0:
        for fd in (master, slave):
            bench.dump(fd)
        tty.finish(bench.dumping)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ready(slave)
    assert os.read(slave, 100) == b"line\n"
    typed(master, b"t\n")
    assert os.read(slave, 100) == b"part\n"


@alone
def test_a_number_that_is_in_use() -> None:
    master, slave = pair()
    bench = Bench()
    numbers = [bench.dump(fd) for fd in (master, slave)]
    tty.finish(bench.dumping).forget()
    bench.commit()
    with pytest.raises(Unsupported, match="pty 0: there is another terminal with the number 0"):
        bench.build(numbers[0])


@alone
def test_hung_up_slave_and_new_pty_with_its_number() -> None:
    master, dead = pair()
    os.close(master)
    master, slave = pair()
    kept = os.readlink(f"/proc/self/fd/{dead}")
    master, slave, dead = moved(master, slave, dead)
    with pytest.raises(OSError) as caught:
        fcntl.ioctl(dead, termios.FIONREAD, bytes(4))
    assert caught.value.errno == errno.EIO and os.read(dead, 10) == b""
    assert "(deleted)" in os.readlink(f"/proc/self/fd/{dead}") and "(deleted)" in kept
    typed(master, b"alive\n")
    assert os.read(slave, 100) == b"alive\n"


@alone
def test_a_slave_that_was_closed_and_one_that_was_never_open() -> None:
    closed, slave = pair()
    typed(closed, b"early\n")
    os.close(slave)
    never = os.open("/dev/ptmx", RDWR)
    closed, never = moved(closed, never)
    assert ready(closed, select.POLLHUP) and not ready(never, select.POLLHUP, 20)
    assert ask(never, IS_LOCKED) == 1
    slave = os.open("/dev/pts/0", RDWR)
    assert os.read(slave, 10) == b"early\n"


@alone
def test_only_the_slave_is_refused_unless_it_is_a_job() -> None:
    _master, slave = pair()
    with Bench() as bench:
        bench.check(slave)
        [error] = tty.unpaired(bench.dumping)
        assert "/dev/pts/0" in str(error) and "--shell-job" in error.hint
        bench.dump(slave)
        with pytest.raises(Unsupported, match="outside of the tree"):
            tty.finish(bench.dumping)
    with Bench(shell_job=True) as bench:
        number = bench.dump(slave)
        tty.finish(bench.dumping).forget()
        bench.commit()
        _other, mine = pair(raw=True)
        os.dup2(mine, 0)
        made = bench.build(number)
        assert os.ttyname(made) == os.ttyname(mine) != os.ttyname(slave)
        assert termios.tcgetattr(made) == termios.tcgetattr(slave)
        bench.building.undo.roll_back()
        assert termios.tcgetattr(made) == termios.tcgetattr(slave), "the tasks run, with the settings that they made"
        bench.building.on_failure.roll_back()
        assert not termios.tcgetattr(mine)[3] & termios.ICANON


@alone
def test_external_terminal_is_inherited() -> None:
    _master, slave = pair()
    status = os.stat("/dev/pts/0")
    key = f"tty[{status.st_rdev:x}:{status.st_dev:x}]"
    with Bench(external=(key,)) as bench:
        number = bench.dump(slave)
        tty.finish(bench.dumping).forget()
        bench.commit()
        with pytest.raises(Unsupported, match="outside of the tree") as caught:
            bench.build(number)
        assert key in caught.value.hint
        other, mine = pair()
        bench.building.inherited[key] = mine
        made = bench.build(number)
        os.write(made, b"x")
        assert os.read(other, 1) == b"x"


@alone
def test_external_terminals_in_images_as_criu_reads_and_writes_them() -> None:
    slaves = [pair()[1] for _ in range(3)]
    keys = [f"tty[{os.fstat(slave).st_rdev:x}:{os.fstat(slave).st_dev:x}]" for slave in slaves]
    with Bench(external=keys) as bench:
        for slave in slaves:
            bench.dump(slave)
        infos = list(bench.commit().images.read_all("tty-info"))
    # It takes no more than 1024 terminals, two numbers each, and wants the settings of every one.
    assert [info.id for info in infos] == [2024, 2026, 2028]
    assert all(info.HasField(field) for info in infos for field in ("termios", "termios_locked", "winsize"))
    infos[0].termios.c_cc[:] = [0x1F2F3F4F] * 19  # as CRIU 4.2 stores them
    _tty_build.Terminals._check(2024, infos[0])


@alone
def test_orphan_master_goes_to_the_caller() -> None:
    master, slave = pair()
    with Bench(orphan_pts_master=True, notify=print) as bench:
        number = bench.dump(slave)
        tty.finish(bench.dumping).forget()
        os.close(slave)
        os.close(master)
        bench.commit()
        made = bench.build(number)
        [master] = bench.building.memo["orphan pts masters"]
        assert os.ttyname(made) == "/dev/pts/0"
        os.write(made, b"console")
        assert os.read(master, 100) == b"console"


@alone
def test_controlling_terminal_and_foreground() -> None:
    """The leader and a member of another group; /dev/tty; nobody but the program takes it."""
    master, slave = pair()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    ours = os.open("/dev/tty", os.O_RDWR)
    member = os.fork()
    if member == 0:
        os.setpgid(0, 0)
        call("prctl", 1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        os.closerange(3, 200)
        signal.pause()
    os.setpgid(member, member)
    while os.path.lexists(f"/proc/{member}/fd/{ours}"):
        time.sleep(0.001)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    fcntl.ioctl(slave, termios.TIOCSPGRP, struct.pack("i", member))
    tasks = {os.getpid(): task(), member: task(member)}
    for one in tasks.values():
        one.stat.tty_nr, one.stat.tpgid = os.stat("/dev/pts/0").st_rdev, member
    shown = seen(ours)
    bench = Bench()
    bench.dumping.tasks = tasks
    numbers = [bench.dump(fd) for fd in (master, slave, ours)]
    tty.finish(bench.dumping).forget()
    bench.dumping.close()
    fcntl.ioctl(slave, termios.TIOCNOTTY)
    for fd in (master, slave, ours):
        os.close(fd)
    bench.commit()
    master, slave, ours = (bench.build(number) for number in numbers)
    with pytest.raises(OSError, match="No such device"):
        os.open("/dev/tty", os.O_RDWR)
    assert seen(ours) == shown
    program = Program()
    tty.emit_session(member, program, bench.building)
    tty.emit_foreground(member, program, bench.building)
    assert not len(program)
    tty.emit_session(os.getpid(), program, bench.building)
    run_here(program)
    assert ask(slave, GET_SESSION) == os.getpid() and ask(slave, GET_GROUP) == os.getpgrp()
    program = Program()
    tty.emit_foreground(os.getpid(), program, bench.building)
    run_here(program)
    assert ask(slave, GET_GROUP) == member
    fcntl.ioctl(slave, termios.TIOCSPGRP, struct.pack("i", os.getpgrp()))
    typed(master, b"to tty\n")
    assert os.read(ours, 100) == b"to tty\n"
    os.close(os.open("/dev/tty", os.O_RDWR))
    os.kill(member, signal.SIGKILL)
    os.waitpid(member, 0)


@alone
def test_master_alone_holds_the_controlling_terminal() -> None:
    master, slave = pair()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    os.close(slave)

    def tasks(bench: Bench) -> None:
        bench.dumping.tasks = {os.getpid(): task()}

    [master] = moved(master, before=tasks)
    program = Program()
    tty.emit_session(os.getpid(), program, last[0].building)
    run_here(program)
    slave = os.open("/dev/tty", os.O_RDWR)
    typed(master, b"hello\n")
    assert os.read(slave, 100) == b"hello\n"


@alone
def test_a_session_from_outside_is_refused() -> None:
    master, slave = pair()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
    with Bench() as bench, pytest.raises(Unsupported, match=f"session {os.getpid()}, whose leader"):
        bench.dump(master)


@alone
def test_a_line_discipline_of_its_own_is_refused() -> None:
    _, slave = pair()
    for number in (3, 1, 27):  # N_PPP, N_SLIP, N_NULL: whichever this kernel has
        try:
            fcntl.ioctl(slave, 0x5423, struct.pack("i", number))  # TIOCSETD
            break
        except OSError:
            continue
    else:
        return
    with Bench() as bench, pytest.raises(Unsupported, match="line discipline"):
        bench.check(slave)


@alone
def test_a_console_is_opened_by_its_path() -> None:
    call("mknodat", -100, b"/dev/shm/console-of-test\0", 0o20600, os.makedev(5, 1))
    fd = os.open("/dev/shm/console-of-test", os.O_RDONLY | os.O_NOCTTY)
    try:
        kept = seen(fd)
        [fd] = moved(fd)
        assert seen(fd) == kept
    finally:
        os.unlink("/dev/shm/console-of-test")


def test_numbers_of_devices() -> None:
    assert tty.device_type(os.makedev(136, 70000)) == tty.PTY
    assert tty.device_type(os.makedev(5, 2)) == tty.PTY
    assert tty.device_type(os.makedev(4, 63)) == tty.VT
    assert tty.device_type(os.makedev(4, 64)) == tty.SERIAL
    assert tty.device_type(os.makedev(5, 0)) == tty.CTTY
    assert tty.device_type(os.makedev(1, 3)) == 0
    assert _tty_build.key_of(0x8800, 26) == "tty[8800:1a]"
