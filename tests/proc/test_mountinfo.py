from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torpor.linux.call import call
from torpor.proc import mountinfo, read

RECORDED = rb"""22 27 0:21 / /proc rw,nosuid,relatime shared:5 - proc proc rw
36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 propagate_from:7 - ext3 /dev/ro\043ot rw,errors=a b
37 27 254:1048575 /gone//deleted / ro unbindable future:3 - tmpfs  rw,size=4k
38 27 0:4 net:[4026532000] /run/netns/a rw shared:1 master:2 - nsfs nsfs rw
"""


def test_recorded() -> None:
    proc, odd, gone, ns = mountinfo.parse(RECORDED)
    assert (proc.mnt_id, proc.parent_id, proc.dev) == (22, 27, (0, 21))
    assert (proc.root, proc.mountpoint, proc.deleted) == (b"/", b"/proc", False)
    assert proc.options == (b"rw", b"nosuid", b"relatime")
    assert (proc.shared, proc.master, proc.propagate_from, proc.unbindable) == (5, 0, 0, False)
    assert (proc.fstype, proc.source, proc.super_options) == (b"proc", b"proc", b"rw")
    assert (odd.root, odd.mountpoint, odd.source) == (b"/mnt1", b"/mnt 2", b"/dev/ro#ot")
    assert (odd.master, odd.propagate_from) == (1, 7)
    assert odd.super_options == b"rw,errors=a b"
    assert (gone.root, gone.deleted, gone.unbindable) == (b"/gone", True, True)
    assert (gone.dev, gone.source) == ((254, 1048575), b"")
    assert (ns.root, ns.shared, ns.master) == (b"net:[4026532000]", 1, 2)


NUMBERS = st.integers(0, 2**31 - 1)
NAMES = st.binary(min_size=1, max_size=30).filter(lambda name: b"\0" not in name)
PATHS = NAMES.map(lambda name: b"/" + name).filter(lambda path: not path.endswith(b"//deleted"))
# An empty source shows as nothing; `-` must not be taken for the separator.
SOURCES = st.sampled_from([b"", b"-", b"a - b"]) | NAMES
OPTIONS = st.lists(st.binary(min_size=1).map(lambda text: text.hex().encode()), min_size=1)
MOUNTS = st.builds(
    mountinfo.Mount,
    NUMBERS,
    NUMBERS,
    st.tuples(st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    PATHS,
    st.booleans(),
    PATHS,
    OPTIONS.map(tuple),
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.booleans(),
    NAMES,
    SOURCES,
    OPTIONS.map(b",".join),
)


def escape(name: bytes) -> bytes:
    return b"".join(b"\\%03o" % byte if byte in b" \t\n\\" else b"%c" % byte for byte in name)


def show(mount: mountinfo.Mount) -> bytes:
    fields = [
        b"%d %d %d:%d" % (mount.mnt_id, mount.parent_id, *mount.dev),
        escape(mount.root) + (b"//deleted" if mount.deleted else b""),
        escape(mount.mountpoint),
        b",".join(mount.options),
        *([b"shared:%d" % mount.shared] if mount.shared else []),
        *([b"master:%d" % mount.master] if mount.master else []),
        *([b"propagate_from:%d" % mount.propagate_from] if mount.propagate_from else []),
        *([b"unbindable"] if mount.unbindable else []),
        b"-",
        escape(mount.fstype),
        escape(mount.source).replace(b"#", b"\\043"),
        mount.super_options,
    ]
    return b" ".join(fields) + b"\n"


@given(st.lists(MOUNTS, max_size=5))
def test_what_is_printed_is_parsed(expected: list[mountinfo.Mount]) -> None:
    assert mountinfo.parse(b"".join(map(show, expected))) == expected


@given(st.binary())
def test_escapes_are_undone(name: bytes) -> None:
    assert mountinfo.unescape(escape(name)) == name
    assert mountinfo.unescape(name.replace(b"\\", b"")) == name.replace(b"\\", b"")


@pytest.mark.parametrize("text", [b"\\", b"\\08", b"\\12", b"\\400", b"a\\9", b"\\\\"])
def test_what_is_no_escape_stays(text: bytes) -> None:
    assert mountinfo.unescape(text) == text


@pytest.mark.parametrize(
    "text",
    [
        b"22 27 0:21 / /proc rw proc proc rw\n",
        b"22 27 0:21 / - proc proc rw\n",
        b"22 27 0 / /proc rw - proc proc rw\n",
        b"22 27 0:21 / /proc rw - proc rw\n",
        b"22 27 0:21 / /proc rw shared:x - proc proc rw\n",
        b"a 27 0:21 / /proc rw - proc proc rw\n",
    ],
)
def test_anything_else_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="mountinfo"):
        mountinfo.parse(text)


CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE, MS_SHARED, MS_SLAVE, MS_UNBINDABLE = 1 << 14, 1 << 18, 1 << 20, 1 << 19, 1 << 17
MS_NOEXEC, MS_BIND = 8, 4096


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, data: bytes = b"") -> None:
    call("mount", source + b"\0", target + b"\0", kind + b"\0", flags, data + b"\0")


def test_live(tmp_path: os.PathLike[str], child: Callable[..., int]) -> None:
    top = os.path.join(os.fsencode(tmp_path), b"a b\\c\n#")
    bound = os.path.join(os.fsencode(tmp_path), b"bound")

    def setup() -> None:
        call("unshare", CLONE_NEWNS)
        _mount(b"", b"/", b"", MS_REC | MS_PRIVATE)
        os.mkdir(top)
        os.mkdir(bound)
        _mount(b"so#u rce", top, b"tmpfs", MS_NOEXEC, b"size=16k,mode=700")
        _mount(b"", top, b"", MS_SHARED)
        os.mkdir(os.path.join(top, b"in\tside"))
        _mount(os.path.join(top, b"in\tside"), bound, b"", MS_BIND)
        _mount(b"", bound, b"", MS_SLAVE)
        os.rmdir(os.path.join(top, b"in\tside"))
        _mount(b"x", b"/proc", b"tmpfs", 0)
        _mount(b"", b"/proc", b"", MS_UNBINDABLE)

    pid = child(setup)
    mounts = {mount.mountpoint: mount for mount in mountinfo.parse(read.read(pid, "mountinfo"))}
    one, other, last = mounts[top], mounts[bound], mounts[b"/proc"]
    assert (one.fstype, one.source, one.root) == (b"tmpfs", b"so#u rce", b"/")
    assert b"noexec" in one.options
    assert b"size=16k" in one.super_options.split(b",")
    assert one.shared > 0 == one.master
    assert (other.dev, other.root, other.deleted) == (one.dev, b"/in\tside", True)
    assert (other.shared, other.master) == (0, one.shared)
    assert (last.unbindable, last.shared) == (True, 0)
    device = os.stat(b"/proc/%d/root%s" % (pid, top)).st_dev
    assert one.dev == (os.major(device), os.minor(device))
