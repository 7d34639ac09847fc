"""Files of a copy's own: directories that it sees through an overlay, made with it and gone with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets, diff, host_state, wait_until
from kit.files import slurp_text
from kit.host import descendants, stat_fields
from kit.talk import ANSWERS, Talk, snapshot_of

# Has everything in the folder "own" that can be had in a folder, and answers each line with what it sees of it.
SERVER = """
import mmap, os, socket, struct, ctypes
own = DIR + "/own"
os.makedirs(own + "/sub")
def put(name, text, where=own):
    with open(where + "/" + name, "w") as file:
        file.write(text)
put("read", "as it was"); put("written", "as it was"); put("mapped", "m" * 4096); put("seen", "s" * 4096)
put("private", "p" * 8192); put("gone", "deleted"); put("outside", "as it was", DIR)
reader, late = open(own + "/written", "rb", buffering=0), open(own + "/read", "rb", buffering=0)
writer = open(own + "/written", "r+b", buffering=0)
outside = open(DIR + "/outside", "r+b", buffering=0)
gone = open(own + "/gone", "r+b", buffering=0)
os.unlink(own + "/gone")
mapped = mmap.mmap(os.open(own + "/mapped", os.O_RDWR), 4096)
seen = mmap.mmap(os.open(own + "/seen", os.O_RDONLY), 4096, prot=mmap.PROT_READ)
private_file = os.open(own + "/private", os.O_RDWR)
private = mmap.mmap(private_file, 8192, flags=mmap.MAP_PRIVATE)
again = mmap.mmap(os.open(own + "/private", os.O_RDONLY), 8192, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
beside = mmap.mmap(os.open(own + "/mapped", os.O_RDONLY), 4096, flags=mmap.MAP_PRIVATE)
private[:5] = b"dirty"
listener = socket.socket(socket.AF_UNIX)
listener.bind(own + "/socket")
listener.listen()
libc = ctypes.CDLL(None)
watch = libc.inotify_init1(os.O_NONBLOCK)
libc.inotify_add_watch(watch, own.encode(), 0x100)
os.chdir(own + "/sub")

def answer(line):
    words = line.split()
    if words[0] == "see":
        return [reader.read(100), late.read(100), bytes(mapped[:4]), bytes(seen[:4]), bytes(private[:6]), gone.read(20)]
    if words[0] == "write":
        text = words[1].encode()
        for file in (writer, outside, gone):
            file.seek(0)
            file.write(text)
        mapped[:len(text)] = text
        os.pwrite(private_file, text, 4096)
        put("new", words[1])
        put("here", words[1], ".")
        os.rename(own + "/read", own + "/moved")
        return [os.pread(reader.fileno(), 100, 0), sorted(os.listdir(own))]
    if words[0] == "private":
        return [bytes(one[:8]) for one in (private, again, beside)] + [bytes(one[4096:4104]) for one in (private, again)]
    if words[0] == "where":
        links = [os.readlink("/proc/self/fd/%d" % f.fileno()) for f in (reader, writer, gone)]
        mounts = {line.split()[0] for line in open("/proc/self/mountinfo")}
        ids = {open("/proc/self/fdinfo/%d" % f.fileno()).read().split("mnt_id:")[1].split()[0] for f in (reader, writer)}
        return [os.getcwd(), links, ids <= mounts, os.readlink("/proc/self")]
    if words[0] == "connect":
        client = socket.socket(socket.AF_UNIX)
        client.connect(own + "/socket")
        listener.accept()[0].send(words[1].encode())
        return client.recv(100)
    if words[0] == "watched":
        put("event", "x")
        return os.read(watch, 4096)[16:].rstrip(bytes(1))
    if words[0] == "fill":
        try:
            put("large", "x" * int(words[1]))
        except OSError as error:
            return error.errno
    if words[0] == "fork":
        return os.fork() and os.getpid()

"""
AS_IT_WAS = [b"as it was", b"as it was", b"mmmm", b"ssss", b"dirtyp", b"deleted"]


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    target = start.python(SERVER + ANSWERS)
    with snapshot_of(target, images):
        yield target


def tree(folder: str) -> dict[str, str]:
    """name → content of every file in a folder."""
    found = {}
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, name) for name in names):
            found[path] = slurp_text(path) if os.path.isfile(path) else "no file"
    return found


def torpor_folders(place: str) -> list[str]:
    return [name for name in os.listdir(place) if name.startswith("torpor-")]


def sweepers() -> list[int]:
    return [pid for pid in descendants(os.getpid()) if (stat_fields(pid) or ["", ""])[1] == "torpor-sweeper"]


def test_what_a_copy_writes_is_its_own(snapshot: Target, images: str) -> None:
    own = snapshot.path("own")
    before = tree(own)
    with torpor.template(images) as template:
        copies = [Talk(template, overlay=[own]) for _ in range(4)]
        for number, copy in enumerate(copies):
            assert copy.ask("see") == AS_IT_WAS
            text = f"copy-{number:03}"
            read, names = copy.ask(f"write {text}")
            assert read.startswith(text.encode())
            assert names == ["mapped", "moved", "new", "private", "seen", "socket", "sub", "written"]
        assert tree(own) == before
        assert slurp_text(snapshot.path("outside")) == "copy-003s"
        for number, copy in enumerate(copies):
            text = f"copy-{number:03}"
            assert copy.ask("see")[2] == text.encode()[:4]
            place = f"/proc/{copy.copy.pid}/root{own}"
            for name in ("written", "mapped", "new", "sub/here"):
                assert slurp_text(f"{place}/{name}").startswith(text), name
            cwd, links, visible, me = copy.ask("where")
            assert cwd == f"{own}/sub" and visible and me == str(snapshot.pid)
            assert links == [f"{own}/written", f"{own}/written", f"{own}/gone (deleted)"]
        assert [copy.end() for copy in copies] == [0] * 4
        plain = Talk(template)
        assert plain.ask("see") == AS_IT_WAS
        assert plain.end() == 0
    assert tree(own) == before


def test_private_memory_is_of_the_file_that_the_copy_has(snapshot: Target, images: str) -> None:
    """What it has not written to itself changes with the file, as it does without an overlay."""
    with torpor.template(images) as template:
        copies = [Talk(template, overlay=[snapshot.path("own")]) for _ in range(3)]
        for number, copy in enumerate(copies):
            assert copy.ask("private") == [b"dirtyppp", b"pppppppp", b"mmmmmmmm", b"pppppppp", b"pppppppp"]
            text = b"copy-%03d" % number
            copy.ask(f"write {text.decode()}")
            assert copy.ask("private") == [b"dirtyppp", b"pppppppp", text, text, text]
        assert [copy.end() for copy in copies] == [0] * 3
        plain = Talk(template)
        assert plain.ask("private") == [b"dirtyppp", b"pppppppp", b"mmmmmmmm", b"pppppppp", b"pppppppp"]


def test_names_in_the_overlay_serve_as_any(snapshot: Target, images: str) -> None:
    """A socket's name and a watched directory are each copy's, and nobody notices the others."""
    with torpor.template(images) as template:
        copies = [Talk(template, overlay=[snapshot.path("own")]) for _ in range(3)]
        for number, copy in enumerate(copies):
            assert copy.ask(f"connect hello-{number}") == b"hello-%d" % number
            assert copy.ask("watched") == b"event"
        assert [copy.end() for copy in copies] == [0] * 3


def test_a_restore_has_overlays_too(snapshot: Target, images: str) -> None:
    own = snapshot.path("own")
    before = tree(own)
    with pytest.raises(torpor.UsageError, match="namespaces of its own"):
        torpor.restore(images, overlay=[own])
    read, write = os.pipe()
    answer, out = os.pipe()
    one = torpor.restore(images, own_pids=True, overlay=[own], inherit_fd=[
        (read, "dev/null"), (out, snapshot.path("stdout").removeprefix("/")),
    ])  # fmt: skip
    os.close(read)
    os.close(out)
    os.write(write, b"see\nwrite hello\nwhere\n")
    text = b""
    while text.count(b"\n") < 3:
        text += os.read(answer, 4096)
    seen, wrote, where = (eval(line) for line in text.splitlines())
    assert seen == AS_IT_WAS and wrote[0].startswith(b"hello") and where[0] == f"{own}/sub" and where[2]
    os.close(write)
    assert os.waitpid(one.waits_for, 0)[1] == 0
    os.close(answer)
    assert tree(own) == before


def test_what_is_ours_stays_as_it_is(snapshot: Target, images: str) -> None:
    """The making of a copy must not show in the process that makes it."""
    def ours() -> list[object]:
        names = ("mnt", "net", "pid")
        return [os.getcwd(), *(os.stat(f"/proc/self/ns/{name}").st_ino for name in names), os.listdir("/proc/self/task")]

    before = ours()
    os.umask(os.umask(0o22))
    with torpor.template(images) as template:
        copy = Talk(template, overlay=[snapshot.path("own")], net="new", hostname="fred")
        assert ours() == before
        assert copy.ask("where")[0] == snapshot.path("own/sub")
        assert copy.end() == 0
    assert slurp_text("/proc/self/mountinfo").count(snapshot.path("own")) == 0


def test_an_overlay_without_a_pid_namespace(snapshot: Target, images: str) -> None:
    own = snapshot.path("own")
    before = tree(own)
    with torpor.template(images) as template:
        copy = Talk(template, overlay=[own], fresh_pid=True)
        assert copy.ask("see") == AS_IT_WAS
        assert copy.ask("write hello")[0].startswith(b"hello")
        cwd, _, visible, me = copy.ask("where")
        assert cwd == f"{own}/sub" and visible and me == str(copy.copy.pid)
        assert copy.end() == 0
    assert tree(own) == before


def test_a_full_tmpfs_is_the_copys_affair(snapshot: Target, images: str) -> None:
    own = snapshot.path("own")
    with torpor.template(images) as template:
        small, other = Talk(template, overlay=[own], overlay_size=256 << 10), Talk(template, overlay=[own])
        assert small.ask(f"fill {1 << 20}") == 28  # ENOSPC
        assert other.ask(f"fill {1 << 20}") is None
        assert small.ask("see") == other.ask("see") == AS_IT_WAS
        assert [small.end(), other.end()] == [0, 0]


def test_no_room_for_what_is_open_for_writing(start: Targets, images: str, ends_all: None) -> None:
    target = start.c(
        'int main(void) { int fd; MUST(mkdir("d", 0755)); fd = MUST(open("d/data", O_RDWR | O_CREAT, 0600)); '
        'for (int i = 0; i < 256; i++) MUST(pwrite(fd, "0", 1, i << 12)); '
        'ready(); wait_told("go"); MUST(write(fd, "x", 1)); exit(42); }'
    )
    torpor.dump(target.pid, images)
    target.wait_gone()
    own = target.path("d")
    with torpor.template(images) as template:
        sibling = template.clone(overlay=[own])
        state = host_state(images, target.folder)
        with pytest.raises(torpor.KernelError, match=r"d/data.*No space left.*--overlay-size") as caught:
            template.clone(overlay=[own], overlay_size=64 << 10)
        assert caught.value.errno == 28
        after = host_state(images, target.folder)
        for one in (state, after):
            one.pop("processes")  # the init that is kept ready is another one
        assert not diff(state, after)
        target.tell("go")
        assert sibling.wait() == 42
        assert template.clone(overlay=[own], overlay_size=4 << 20).wait() == 42
    assert slurp_text(f"{own}/data")[:1] == "0"


def test_an_upper_layer_at_a_place(snapshot: Target, images: str) -> None:
    """It is found there as long as the copy runs; then it is removed, or kept."""
    own, place = snapshot.path("own"), snapshot.path("upper")
    os.mkdir(place)
    os.chmod(own, 0o751)
    with torpor.template(images) as template:
        gone = Talk(template, overlay=[own], overlay_upper=place)
        kept = Talk(template, overlay=[own], overlay_upper=place, overlay_keep=True)
        assert len(torpor_folders(place)) == 2 and len(sweepers()) == 1
        for copy in (gone, kept):
            copy.ask("write hello")
            upper = f"{copy.copy.written_to}/1/upper"
            assert slurp_text(f"{upper}/new") == "hello" and os.stat(upper).st_mode & 0o777 == 0o751
            assert os.readlink(f"{copy.copy.written_to}/1/lower") == own
            assert copy.end() == 0
        wait_until("the one is removed", lambda: torpor_folders(place) == [os.path.basename(kept.copy.written_to)])
        assert slurp_text(f"{kept.copy.written_to}/1/upper/new") == "hello"
        wait_until("the sweeper has ended", lambda: reaped(sweepers()))


def reaped(pids: list[int]) -> bool:
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG | 0x40000000)
    return not sweepers()


def test_a_killed_copy_leaves_no_upper_layer(snapshot: Target, images: str) -> None:
    place = snapshot.path("upper")
    os.mkdir(place)
    with torpor.template(images) as template:
        copies = [Talk(template, overlay=[snapshot.path("own")], overlay_upper=place) for _ in range(3)]
        for copy, victim in zip(copies, (copies[0].copy.pid, copies[1].copy.waits_for, copies[2].copy.pid), strict=True):
            copy.ask("write hello")
            os.kill(victim, signal.SIGKILL)
            assert copy.end() == 137
    wait_until("nothing is left", lambda: not torpor_folders(place) and reaped(sweepers()))


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torpor", *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.fixture
def waiting(start: Targets, images: str, ends_all: None) -> Target:
    """The snapshot in ``images`` is of a program that waits in its folder, which has a folder "own"."""
    target = start.c('int main(void) { MUST(mkdir("own", 0755)); ready(); wait_told("own/go"); exit(42); }')
    torpor.dump(target.pid, images)
    target.wait_gone()
    os.mkdir(target.path("upper"))
    return target


def test_the_holder_is_killed_and_then_the_copy(waiting: Target, images: str) -> None:
    own, place, name = waiting.path("own"), waiting.path("upper"), f"test-{os.getpid()}"
    assert run("template", "start", images, "--name", name).returncode == 0
    holder = next(one["holder"] for one in json.loads(run("template", "list", "--json").stdout) if one["name"] == name)
    try:
        made = run("clone", name, "--json", "--overlay", own, "--overlay-upper", place)
        answer = json.loads(made.stdout)
        assert [os.path.basename(answer["written_to"])] == torpor_folders(place)
        wrong = run("clone", name, "--overlay", f"{own}/none")
        assert wrong.returncode == 1 and f"overlay on `{own}/none`: No such file" in wrong.stderr
        wrong = run("clone", name, "--overlay", own, "--overlay-size", "much")
        assert wrong.returncode == 1 and "--overlay-size: `much` is not a number" in wrong.stderr
    finally:
        os.kill(holder, signal.SIGKILL)
        run("template", "stop", name)
    wait_until("it goes on", lambda: stat_fields(answer["pid"])[2] == "S")
    assert torpor_folders(place)
    os.kill(answer["pid"], signal.SIGKILL)
    wait_until("nothing is left", lambda: not torpor_folders(place))


def test_the_command_to_restore_with_overlays(waiting: Target, images: str) -> None:
    own, place = waiting.path("own"), waiting.path("upper")
    shown = run("restore", images, "--own-pids", "--explain", "--overlay", own, "--overlay-upper", place)
    assert shown.returncode == 0 and f"{own}: under an overlay" in shown.stdout and not torpor_folders(place)
    made = run(
        "restore", images, "--own-pids", "-d", "--json", "--overlay", "own", "--overlay-upper", "upper",
        cwd=waiting.folder,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert f" {own} " in slurp_text(f"/proc/{answer['pid']}/mountinfo")
    assert torpor_folders(place) == [os.path.basename(answer["written_to"])]
    with open(f"/proc/{answer['pid']}/root{own}/go", "w"):
        pass
    wait_until("nothing is left", lambda: not torpor_folders(place))
    assert os.listdir(own) == []


def test_a_template_gives_all_its_copies_overlays(snapshot: Target, images: str) -> None:
    own = snapshot.path("own")
    before = tree(own)
    with torpor.template(images, overlay=[own]) as template:
        copies = [Talk(template), Talk(template, cwd="/usr"), Talk(template, fresh_pid=True)]
        for copy in copies:
            assert copy.ask("write hello")[0].startswith(b"hello")
        assert [copy.end() for copy in copies] == [0] * 3
        other = Talk(template, overlay=[snapshot.path("own/sub")])
        assert other.ask("write hello")[0].startswith(b"hello")
        assert other.end() == 0
    after = tree(own)
    assert after != before and "sub/here" not in str(after)


def test_what_cannot_be_an_overlay(snapshot: Target, images: str) -> None:
    own, file = snapshot.path("own"), snapshot.path("outside")
    with torpor.template(images) as template:
        before = host_state(images, snapshot.folder)
        for wishes, words in (
            ({"overlay": [f"{own}/none"]}, "none`: No such file"),
            ({"overlay": [file]}, "outside`: Not a directory"),
            ({"overlay": ["/"]}, "all names begin there"),
            ({"overlay": ["/proc"]}, r"overlay on `/proc`.*(not supported|Invalid argument|would be hidden)"),
            ({"overlay": ["/proc/self/task"]}, "layers of an overlay at all"),
            ({"overlay": ["/dev"]}, "would be hidden by it.*--overlay /dev/"),
            ({"overlay": [own], "overlay_upper": f"{own}/sub"}, "it lies in .*own, the lower layer"),
            ({"overlay": [own], "overlay_upper": "/nonexistent"}, "upper layer in `/nonexistent`.*No such file"),
            ({"overlay": [own], "overlay_upper": "/proc"}, "upper layer in `/proc`"),
            ({"overlay": [own], "overlay_size": 1, "overlay_upper": "/tmp"}, "--overlay-size is for a tmpfs"),
            ({"overlay": [own], "overlay_keep": True}, "a tmpfs ends with the copy"),
            ({"overlay_upper": "/tmp"}, "an upper layer of which directory"),
            ({"overlay": [own], "overlay_upper": "/tmp", "fresh_pid": True}, "nobody knows when"),
        ):  # fmt: skip
            with pytest.raises(torpor.TorporError, match=words):
                Talk(template, **wishes)
        after = host_state(images, snapshot.folder)
        for state in (before, after):
            state.pop("processes")
        assert not diff(before, after)
        assert Talk(template, overlay=[own]).end() == 0


MOUNT_BELOW = '''
import os, subprocess, sys, time, torpor
images, own = sys.argv[1:]
os.makedirs(own + "/sub")
subprocess.run(["mount", "-t", "tmpfs", "none", own + "/sub"], check=True)
program = f"""
import os, time
file = open("{own}/sub/data", "w+b", buffering=0)
file.write(b"as it was")
open("{own}/ready", "w").close()
while not os.path.exists("{own}/go"):
    time.sleep(0.01)
file.write(b", and more")
open("{own}/also", "w").write("text")
os._exit(42)
"""
null = subprocess.DEVNULL
target = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, stdin=null, stdout=null, stderr=null)
while not os.path.exists(own + "/ready"):
    time.sleep(0.01)
torpor.dump(target.pid, images)
target.wait()
open(own + "/go", "w").close()
with torpor.template(images) as template:
    try:
        template.clone(overlay=[own])
        sys.exit("it was not refused")
    except torpor.Unsupported as error:
        print(error)
    place = own + "-upper"
    os.mkdir(place)
    copy = template.clone(overlay=[own + "/sub", own, own + "/sub/"], overlay_upper=place, overlay_keep=True)
    assert copy.wait() == 42
    assert open(copy.written_to + "/1/upper/also").read() == "text"
    assert open(copy.written_to + "/2/upper/data").read() == "as it was, and more"
    assert open(own + "/sub/data").read() == "as it was" and not os.path.exists(own + "/also")
'''


def test_a_mount_below_has_an_overlay_of_its_own(start: Targets, images: str) -> None:
    folder = os.path.join(start.folder, "own: one, two")
    argv = ["unshare", "--mount", sys.executable, "-c", MOUNT_BELOW, images, folder]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"the mount on {folder}/sub would be hidden" in done.stdout
