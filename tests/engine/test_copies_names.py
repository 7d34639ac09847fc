"""Names that there is one of: copies have them side by side where each has the namespace, or the files, for itself."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets
from kit.network import own_network
from kit.talk import ANSWERS, Talk, snapshot_of
from torpor.engine.copies import CopyOptions

# Listens at an abstract name and at a path, or has a tunnel with an address.
SERVER = """
import fcntl, socket, struct, subprocess
what = WHAT
listener = socket.socket(socket.AF_UNIX)
if what == "tunnel":
    tunnel = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tunnel, 0x400454ca, struct.pack("16sH22x", b"kit0", 0x1001))
    subprocess.run("ip addr add 10.9.8.7/24 dev kit0 && ip link set kit0 up", shell=True, check=True)
else:
    os.mkdir(DIR + "/run")
    listener.bind({"abstract": "\\0torpor-test-names", "path": DIR + "/run/socket"}[what])
    listener.listen()

def answer(line):
    if what == "tunnel":
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind(("10.9.8.7", 0))
            sender.sendto(line.encode(), ("10.9.8.1", 9))
        while True:
            packet = os.read(tunnel, 4096)
            if packet[0] >> 4 == 4:
                return packet[28:]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(listener.getsockname())
        end, _ = listener.accept()
        with end:
            end.send(line.encode())
        return client.recv(100)

"""


@pytest.fixture
def snapshot(start: Targets, images: str, request: pytest.FixtureRequest) -> Iterator[Target]:
    """A server that has what the parameter says is in ``images``; we are in a network of our own."""
    if request.param == "tunnel" and not os.path.exists("/dev/net/tun"):
        pytest.skip("no /dev/net/tun")
    with own_network():
        target = start.python(SERVER.replace("WHAT", repr(request.param)) + ANSWERS)
        target.what = request.param
        with snapshot_of(target, images):
            yield target


@pytest.mark.parametrize("snapshot", ["abstract", "path", "tunnel"], indirect=True)
def test_copies_have_the_same_name_side_by_side(snapshot: Target, images: str) -> None:
    wishes = {"overlay": [snapshot.path("run")]} if snapshot.what == "path" else {"net": "new"}
    with torpor.template(images) as template:
        copies = [Talk(template, **wishes) for _ in range(3)]
        for number, copy in enumerate(copies):
            assert copy.ask(f"hello-{number}") == b"hello-%d" % number
        if snapshot.what == "tunnel":
            for copy in copies:
                argv = ["nsenter", "-t", str(copy.copy.pid), "-n", "ip", "-o", "-4", "address", "show", "kit0"]
                assert "10.9.8.7/24" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        assert [copy.end() for copy in copies] == [0] * 3


@pytest.mark.parametrize("snapshot", ["abstract", "path"], indirect=True)
def test_each_copy_is_reached_by_a_name_of_its_own(snapshot: Target, images: str) -> None:
    old = "@torpor-test-names" if snapshot.what == "abstract" else snapshot.path("run/socket")
    with torpor.template(images) as template:
        copies = [Talk(template, remap_address=[f"{old}={old}-{number}"]) for number in range(3)]
        copies.append(Talk(template))
        names = [*(f"{old}-{number}" for number in range(3)), old]
        for copy, name in zip(copies, names, strict=True):
            assert copy.ask("hello") == b"hello"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name.replace("@", "\0"))
        copies[0].end()
        with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
            client.connect(names[0].replace("@", "\0"))
        assert [copy.end() for copy in copies[1:]] == [0] * 3


# A datagram socket that has got a message from another one of the tree, and one from a socket that is gone.
DATAGRAMS = """
import socket
where = DIR + "/a"
one, two, gone = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3))
one.bind(where)
two.bind("\\0torpor-test")
gone.bind(DIR + "/gone")
two.sendto(b"from two", where)
gone.sendto(b"from gone", where)
gone.close()

def answer(line):
    return [one.getsockname(), two.getsockname(), one.recvfrom(100), one.recvfrom(100)]

"""


def test_who_has_sent_a_message_has_its_new_name_too(start: Targets, images: str, ends_all: None) -> None:
    """Names may change twice, for the template and for the copy; one that is nobody's any more stays."""
    with own_network():
        target = start.python(DATAGRAMS + ANSWERS)
        torpor.dump(target.pid, images)
        target.wait_gone()
        target.tell("go")
        old, new, gone = (target.path(name) for name in ("a", "b", "gone"))
        with torpor.template(images, remap_address=[f"{old}={new}", "@torpor-test=@torpor-once"]) as template:
            for word in ("this", "that"):
                rules = [f"@torpor-once=@torpor-{word}", f"{new}={new}-{word}"]
                abstract = b"\0torpor-" + word.encode()
                seen = Talk(template, remap_address=rules).ask("look")
                assert seen == [f"{new}-{word}", abstract, (b"from two", abstract), (b"from gone", gone)]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ("/a=@b", "a path becomes a path"),
        ("@a=:80", "a path becomes a path"),
        ("/a", "not of the form"),
        ("/=/b", "make a name"),
        (f"/a=/{'b' * 107}", "make a name"),
    ],
)
def test_rules_that_make_no_sense(images: str, rule: str, words: str) -> None:
    with pytest.raises(torpor.UsageError, match=words):
        CopyOptions(remap_address=[rule])


@pytest.mark.parametrize(
    ("snapshot", "hint"),
    [("abstract", "--net new"), ("path", "--overlay .*/run"), ("tunnel", "--net new")],
    indirect=["snapshot"],
)
def test_a_second_copy_in_the_same_place_is_refused_with_a_way_out(snapshot: Target, images: str, hint: str) -> None:
    with torpor.template(images) as template:
        first = Talk(template)
        with pytest.raises(torpor.Unsupported, match=hint):
            Talk(template)
        assert first.ask("hello") == b"hello"
        assert first.end() == 0
