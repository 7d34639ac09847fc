"""torpor.guest in a program: in what order things happen, what is told to whom, and what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable

import pytest

import torpor
from kit import Library, Target, run_torpor, wait_until
from torpor.engine import guests

from .conftest import Copies, wait_ended

Program = Callable[..., Target]
Take = Callable[..., Copies]

ORDER = """
import json, random
from torpor import guest

seen = []
def note(name):
    def callback():
        seen.append(name)
    return callback

for name in ("a", "b"):
    guest.before_snapshot(note("before " + name))
    guest.after_restore(note("after " + name))
    guest.after_snapshot(note("resumed " + name))

@guest.after_restore
def reseeded():
    seen.append("new" if random.getstate() != state else "old")

state = random.getstate()
ready()
while True:
    how = guest.snapshot_point()
    seen.append(how)
    tell(how, json.dumps(seen))
    seen.clear()
    tell("draws", json.dumps({"argument": guest.argument().hex(), "environ": guest.apply_environ()
                              if guest.argument()[:1] == b"{" else {}, "home": os.environ.get("HOME_OF_COPY", ""),
                              "changed": [guest.generation.changed(), guest.generation.changed()]}))
"""


def test_order_and_outcomes(program: Program, copies: Take, images: str) -> None:
    target = program(ORDER)
    first = os.path.join(images, "first")
    os.mkdir(first)
    Library().dump(target.pid, first, leave_running=True)
    told = json.loads(target.wait_file("resumed"))
    assert told == ["before b", "before a", "resumed a", "resumed b", "resumed"]
    woken = copies(target)
    assert not os.path.exists(target.path("restored"))
    woken.draws()
    told = json.loads(target.wait_file("restored"))
    assert told == ["before b", "before a", "after a", "after b", "new", "restored"], "everything before the program"


def test_argument_environment_and_change(program: Program, copies: Take) -> None:
    woken = copies(program(ORDER))
    assert woken.draws(argument=b"\0\xffblob")["argument"] == b"\0\xffblob".hex()
    largest = woken.draws(argument=bytes(3072))
    assert largest["argument"] == bytes(3072).hex()
    assert woken.draws()["argument"] == "", "the argument of one copy was seen by another"
    given = woken.draws(argument=b'{"environ": {"HOME_OF_COPY": "here", "PATH": null}}')
    assert given["environ"] == {"HOME_OF_COPY": "here", "PATH": None}
    assert given["home"] == "here"
    assert given["changed"] == [True, False]


def test_an_argument_that_is_too_large_or_not_wanted(program: Program, copies: Take, images: str) -> None:
    woken = copies(program(ORDER))
    with pytest.raises(torpor.UsageError, match="3073 bytes: 3072 at most"):
        Library().restore(images, argument=bytes(3073))
    plain = os.path.join(images, "plain")
    os.mkdir(plain)
    woken.end()
    other = program("ready()\nwait_told('go')\ndone(True)")
    Library().dump(other.pid, plain)
    other.wait_gone()
    with pytest.raises(torpor.UsageError, match="there is an argument for the woken program, and none that takes one"):
        Library().restore(plain, argument=b"for nobody")
    assert not other.alive()


FAILS = """
from torpor import guest

@guest.before_snapshot
def runs_last():
    tell("never")

@guest.before_snapshot
def close_pool():
    raise ValueError("three connections are\\n\\x1b[31m in use")

@guest.after_snapshot
def again():
    tell("again", guest.outcome())

ready()
wait_told("go")
done(True)
"""


def test_a_callback_that_raises(program: Program, images: str) -> None:
    target = program(FAILS)
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    place = f"dump: task {target.pid}: guest: "
    words = "@before_snapshot callback close_pool: ValueError: three connections are ?[31m in use"
    assert str(caught.value) == place + words
    assert target.wait_file("again") == "abandoned"
    assert not target.read("never")
    assert not os.listdir(images)
    target.go()


FAMILY = """
from torpor import guest
guest.enable()
child = os.fork()
name = "parent" if child else "child"

@guest.before_snapshot
def stop():
    tell(name + " was asked")
    if not child and not told("fine"):
        raise RuntimeError("the child is busy")

guest.after_snapshot(lambda: tell(name + " goes on", guest.outcome()))
guest.after_restore(lambda: tell(name + " woke", str(guest.generation.counter)))
tell("ready" if child else "child-ready")
wait_told("go")
if child:
    wait_told("child-done")
    done(True)
else:
    tell("child-done")
    time.sleep(1000)
"""


def test_one_of_two_refuses(program: Program, copies: Take, images: str) -> None:
    target = program(FAMILY)
    target.wait_file("child-ready")
    child = target.pids()[1]
    with pytest.raises(torpor.Unsupported) as caught:
        torpor.dump(target.pid, images)
    assert str(caught.value) == (
        f"dump: task {child}: guest: @before_snapshot callback stop: RuntimeError: the child is busy"
    )
    for name in ("parent", "child"):
        assert target.wait_file(f"{name} goes on") == "abandoned"
    target.tell("fine")
    woken = copies(target)
    woken.wake()
    for name in ("parent", "child"):
        assert target.wait_file(f"{name} woke") == "2"
    target.go()


def test_where_it_waits_is_seen_from_outside(program: Program) -> None:
    target = program(ORDER, wait=True)
    wait_until("it is at its snapshot point", lambda: guests.at_point(target.pid))
    other = program("from torpor import guest\nguest.enable()\nready()\ntime.sleep(1000)")
    assert not guests.at_point(other.pid)


HANGS = """
from torpor import guest
@guest.before_snapshot
def drain():
    wait_told("drained")
@guest.after_snapshot
def again():
    tell("again", guest.outcome())
ready()
wait_told("go")
done(True)
"""


def test_a_callback_that_hangs(program: Program, images: str) -> None:
    target = program(HANGS)
    began = time.monotonic()
    with pytest.raises(torpor.Unsupported, match="not ready within 1 s: in @before_snapshot callback drain") as caught:
        torpor.dump(target.pid, images, guest_timeout=1)
    assert 0.9 < time.monotonic() - began < 8
    assert "--guest-timeout" in caught.value.hint
    assert not os.listdir(images)
    assert not target.read("again"), "the callback under way is not disturbed"
    target.tell("drained")
    assert target.wait_file("again") == "abandoned"
    target.go()


def test_a_guest_that_is_not_asked(program: Program, copies: Take, images: str) -> None:
    target = program(FAILS)
    woken = copies(target, guest=False)
    assert not target.read("again")
    woken.wake()
    target.go()


def test_the_criu_command_does_not_ask(program: Program, images: str) -> None:
    target = program(FAILS)
    run_torpor("criu", "--no-default-config", "dump", "-t", target.pid, "-D", images).must()
    target.wait_gone()
    refused = program(FAILS)
    done = run_torpor("criu", "--no-default-config", "dump", "-t", refused.pid, "-D", images, "--guest")
    assert done.status == 1
    assert "callback close_pool: ValueError" in done.output
    refused.go()


def test_a_dump_that_fails_later(program: Program, images: str) -> None:
    """After the guest has got ready; it goes on, and is told that there is no snapshot."""
    target = program(
        "from torpor import guest\n"
        "guest.after_snapshot(lambda: tell('again', guest.outcome()))\n"
        "guest.before_snapshot(lambda: globals().update(fd=os.open('/dev/fuse', os.O_RDWR)))\n"
        "ready()\nwait_told('go')\ndone(True)"
    )
    if not os.path.exists("/dev/fuse"):
        pytest.skip("needs a device that cannot be dumped: /dev/fuse")
    with pytest.raises(torpor.TorporError, match="fuse"):
        torpor.dump(target.pid, images)
    assert target.wait_file("again") == "abandoned"
    target.go()


def test_something_in_the_way_that_the_guest_takes_out_of_it(program: Program, copies: Take) -> None:
    target = program(
        "import socket\n"
        "from torpor import guest\n"
        "listener = socket.create_server(('127.0.0.1', 0))\n"
        "one = socket.create_connection(listener.getsockname())\n"
        "two, _ = listener.accept()\n"
        "@guest.before_snapshot\n"
        "def hang_up():\n"
        "    for end in (one, two, listener): end.close()\n"
        "ready()\nwait_told('go')\ntell('draws', '{}')\ntime.sleep(1000)"
    )
    assert any("tcp" in str(problem) for problem in torpor.check(target.pid))
    copies(target).draws()


def test_torpor_is_killed_while_the_guest_waits(program: Program, images: str) -> None:
    target = program(HANGS + "\n")
    child = os.fork()
    if child == 0:
        try:
            torpor.dump(target.pid, images, guest_timeout=0)
        finally:
            os._exit(0)
    wait_until("the callback has begun", lambda: b"in @before_snapshot" in page_of(target.pid))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    target.tell("drained")
    assert target.wait_file("again") == "abandoned"
    target.go()


TICKS = """
from torpor import guest
guest.enable()
ready()
for tick in range(10**6):
    tell("tick", str(tick))
    if told("go"):
        done(guest.outcome() in ("", "resumed", "abandoned"), guest.outcome())
        break
    time.sleep(0.001)
"""


@pytest.mark.campaign
@pytest.mark.timeout(300)
def test_torpor_is_killed_at_any_moment(program: Program, images: str) -> None:
    """The guest goes on by itself soon after, whether it was asked, waited, or stood still."""
    target = program(TICKS)
    for round_ in range(int(os.environ.get("TORPOR_CAMPAIGN", 12))):
        child = os.fork()
        if child == 0:
            try:
                torpor.dump(target.pid, images, leave_running=True)
            finally:
                os._exit(0)
        time.sleep(0.004 * (round_ % 40) * random.random())
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = target.read("tick")
        wait_until("it goes on", lambda before=before: target.read("tick") != before, timeout=10)  # type: ignore[misc]
    target.go()


def page_of(pid: int) -> bytes:
    """The guest page of a running program, seen by its descriptor."""
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if "torpor-guest" in os.readlink(f"/proc/{pid}/fd/{fd}"):
            with open(f"/proc/{pid}/fd/{fd}", "rb") as page:
                return page.read()
    return b""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise OSError('no database')", "@after_restore callback come_back failed"),
        ("time.sleep(1000)", "@after_restore callbacks took more than 0.5 s"),
    ],
)
def test_a_copy_whose_callback_fails_is_ended(program: Program, copies: Take, body: str, said: str) -> None:
    target = program(
        "from torpor import guest\n"
        "guest.enable(after_limit=0.5)\n"
        f"@guest.after_restore\ndef come_back():\n    {body}\n"
        "guest.after_restore(lambda: tell('others'))\n"
        "ready()\n"
        "try:\n    wait_told('go')\n    tell('draws', '{}')\nfinally:\n    tell('finally')\n"
    )
    woken = copies(target)
    pid = woken.wake()
    woken.awake = False
    assert wait_ended(pid) == 70
    assert said in target.read("stdout")
    assert "a woken copy, is ended" in target.read("stdout")
    assert os.path.exists(target.path("others")) == body.startswith("raise"), "the others run all the same"
    assert not os.path.exists(target.path("finally")), "nothing of the program runs in it"


ASYNCIO = """
import asyncio, json, threading
from torpor import guest

ticks = [0, 0]

def count():
    while True:
        ticks[1] += 1
        time.sleep(0.002)

async def tick():
    while True:
        ticks[0] += 1
        await asyncio.sleep(0.002)

async def main():
    woken = asyncio.Event()
    asyncio.get_running_loop().add_reader(guest.generation.fileno(), lambda: guest.generation.clear() and woken.set())
    threading.Thread(target=count, daemon=True).start()
    ready()
    ticking = asyncio.ensure_future(tick())
    await woken.wait()
    before = list(ticks)
    await asyncio.sleep(0.1)
    tell("draws", json.dumps({"went on": all(a > b for a, b in zip(ticks, before)), "counter": guest.generation.counter}))
    await asyncio.sleep(1000)

asyncio.run(main())
"""


def test_asyncio_and_threads(program: Program, copies: Take, images: str) -> None:
    target = program(ASYNCIO)
    first = os.path.join(images, "first")
    os.mkdir(first)
    Library().dump(target.pid, first, leave_running=True)
    time.sleep(0.1)
    assert not target.read("draws"), "its eventfd is not for the original"
    woken = copies(target)
    for _ in range(2):
        assert woken.draws() == {"went on": True, "counter": 2}


def test_a_thread_waits_at_the_snapshot_point(program: Program, copies: Take) -> None:
    target = program(
        "import threading\nfrom torpor import guest\nguest.enable()\n"
        "def wait():\n    how = guest.snapshot_point()\n    tell('draws', '{\"how\": \"%s\"}' % how)\n"
        "thread = threading.Thread(target=wait)\nthread.start()\nready()\nthread.join()\ntime.sleep(1000)"
    )
    assert copies(target).draws() == {"how": "restored"}


def test_where_it_cannot_be_enabled(program: Program) -> None:
    target = program(
        """
import signal, threading
from torpor import guest
said = []
def attempt(**how):
    try:
        guest.enable(**how)
        said.append("enabled")
    except RuntimeError as error:
        said.append(str(error))
thread = threading.Thread(target=attempt); thread.start(); thread.join()
signal.signal(signal.SIGUSR2, lambda *_: None)
attempt(signal=signal.SIGUSR2)
attempt()
ready()
wait_told("go")
done("main thread" in said[0] and "in use" in said[1] and said[2] == "enabled" and guest.enabled(), repr(said))
"""
    )
    target.go()


def test_importing_it_is_cheap() -> None:
    import subprocess
    import sys

    from kit.verbs import SOURCES

    code = f"import sys; sys.path.insert(0, {SOURCES!r}); import torpor.guest; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "torpor.guest" in loaded
    assert not {"random", "signal", "threading", "mmap", "ctypes", "ssl", "typing"} & loaded
    assert not any(name.startswith(("torpor.engine", "torpor.resources", "torpor.linux")) for name in loaded)
