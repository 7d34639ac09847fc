"""Credentials: every combination that a task can have comes back, or is refused beforehand."""

from __future__ import annotations

import os
import struct
from types import SimpleNamespace

import pytest
from forked import build_context, child, dump, prctl, proc_status, restore, syscall
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor import log
from torpor.errors import Unsupported
from torpor.images import schema as pb
from torpor.resources.task import creds, dumpable, pdeath_signal, seccomp

slow = settings(max_examples=25)
LINES = "Uid Gid Groups CapInh CapPrm CapEff CapBnd CapAmb NoNewPrivs".split()
OURS = int(proc_status(os.getpid(), "CapPrm"), 16)
SETPCAP = 1 << 8
NO_FIXUP = 1 << 2


def lines(pid: int) -> list[str]:
    return [proc_status(pid, name) for name in LINES]


def capset(effective: int, permitted: int, inheritable: int) -> None:
    low = [word & 0xFFFFFFFF for word in (effective, permitted, inheritable)]
    high = [word >> 32 for word in (effective, permitted, inheritable)]
    syscall(126, struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *low, *high))


ids = st.integers(0, 2**32 - 2)
sets = st.integers(0, OURS).map(lambda bits: bits & OURS)


@st.composite
def credentials(draw: st.DrawFn) -> SimpleNamespace:
    permitted, inheritable = draw(sets), draw(sets)
    return SimpleNamespace(
        users=draw(st.tuples(ids, ids, ids, ids)),
        groups=draw(st.tuples(ids, ids, ids, ids)),
        more=draw(st.lists(ids, max_size=40)),
        permitted=permitted,
        effective=draw(sets) & permitted,
        inheritable=inheritable,
        ambient=draw(sets) & permitted & inheritable,
        bounding=draw(st.one_of(st.just(OURS), sets)),
        # NOROOT, NO_SETUID_FIXUP, KEEP_CAPS, NO_CAP_AMBIENT_RAISE, each with its lock
        secbits=draw(st.integers(0, 255)),
        no_new_privs=draw(st.booleans()),
    )


def take_on(wanted: SimpleNamespace) -> None:
    """Become that, in an order of our own: all users first, with capabilities kept."""
    prctl(28, NO_FIXUP)
    os.setgroups(wanted.more)
    os.setresgid(*wanted.groups[:3])
    syscall(123, wanted.groups[3])
    os.setresuid(*wanted.users[:3])
    syscall(122, wanted.users[3])
    capset(OURS, OURS, wanted.inheritable)
    for number in range(41):
        if not wanted.bounding >> number & 1:
            prctl(24, number)
    capset(wanted.permitted | SETPCAP, wanted.permitted | SETPCAP, wanted.inheritable)
    for number in range(41):
        if wanted.ambient >> number & 1:
            prctl(47, 2, number)
    prctl(28, wanted.secbits)
    capset(wanted.effective, wanted.permitted, wanted.inheritable)
    if wanted.no_new_privs:
        prctl(38, 1)


@given(credentials())
@slow
def test_round_trip(wanted: SimpleNamespace) -> None:
    with child(lambda: take_on(wanted)) as pid:
        before = lines(pid)
        first = dump(pid, creds.RESOURCE).core
    entry = first.thread_core.creds
    assert before[0].split() == [str(user) for user in wanted.users]
    assert (entry.uid, entry.euid, entry.suid, entry.fsuid) == wanted.users
    assert (entry.gid, entry.egid, entry.sgid, entry.fsgid) == wanted.groups
    assert sorted(entry.groups) == sorted(wanted.more)
    assert entry.secbits == wanted.secbits
    assert entry.no_new_privs == wanted.no_new_privs
    with child(lambda: restore(first, seccomp.RESOURCE, creds.RESOURCE)) as pid:
        assert lines(pid) == before
        assert dump(pid, creds.RESOURCE).core == first


def test_our_own_credentials_take_no_call() -> None:
    from torpor.remote.program import Program

    with child() as pid:
        first = dump(pid, creds.RESOURCE).core
    program = Program()
    creds.RESOURCE.restore(None, first, program, build_context())
    assert len(program) == 0
    ctx = build_context()
    ctx.memo["user namespace", "own"] = True
    creds.RESOURCE.restore(None, first, program, ctx)
    assert len(program) > 5


def test_a_capability_that_we_lack_is_refused_by_name() -> None:
    with child() as pid:
        first = dump(pid, creds.RESOURCE).core
    first.thread_core.creds.cap_prm[:] = [0xFFFFFFFF, 0xFFFFFFFF]
    with pytest.raises(Unsupported, match=r"CAP_SYS_RESOURCE.*capability 63"):
        creds.RESOURCE.check(first, build_context())
    first.thread_core.creds.cap_prm[:] = [0, 0]
    creds.RESOURCE.check(first, build_context())
    first.thread_core.creds.lsm_profile = "docker-default"
    with pytest.raises(Unsupported, match="docker-default"):
        creds.RESOURCE.check(first, build_context())
    first.thread_core.creds.lsm_profile = "unconfined"
    creds.RESOURCE.check(first, build_context())


@pytest.mark.parametrize(
    ("its", "ours", "warns"),
    [("", "", False), ("unconfined", "", False), ("container (enforce)", "unconfined", True), ("same", "same", False)],
)
def test_a_profile_that_is_not_kept_is_named(its: str, ours: str, warns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    monkeypatch.setattr(creds, "_profile", lambda pid: ours if pid == os.getpid() else its)
    with child() as pid:
        dump(pid, creds.RESOURCE)
    assert [its in line for line in said] == [True] * warns


def test_identities_are_those_of_the_user_namespace() -> None:
    def setup() -> None:
        syscall(272, 0x10000000)  # unshare(CLONE_NEWUSER)
        for name, text in (("uid_map", "5 0 1"), ("setgroups", "deny"), ("gid_map", "7 0 1")):
            fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(fd, text.encode())
            os.close(fd)

    with child(setup) as pid:
        assert proc_status(pid, "Uid").split() == ["0"] * 4
        entry = dump(pid, creds.RESOURCE).core.thread_core.creds
    assert {entry.uid, entry.euid, entry.suid, entry.fsuid} == {5}
    assert {entry.gid, entry.egid, entry.sgid, entry.fsgid} == {7}


@pytest.mark.parametrize("number", [0, 15])
@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("value", [0, 1])
def test_dumpable_and_death_signal_outlive_a_change_of_user(
    number: int, user: int, value: int
) -> None:
    def setup() -> None:
        os.setresuid(user, user, user)
        prctl(4, value)
        prctl(1, number)

    kinds = (creds.RESOURCE, dumpable.RESOURCE, pdeath_signal.RESOURCE)
    with child(setup) as pid:
        first = dump(pid, *kinds)
    assert first.task.answers["dumpable"] == value
    assert first.core.thread_core.HasField("pdeath_sig") == bool(number)
    mm = pb.mm_entry(dumpable=value)
    with child(lambda: restore(first.core, *kinds, mm=mm)) as pid:
        assert proc_status(pid, "Uid").split() == [str(user)] * 4
        # A task that is not dumpable has its files in /proc owned by root.
        assert os.stat(f"/proc/{pid}/maps").st_uid == (user if value else 0)
        again = dump(pid, *kinds)
    assert again.task.answers["dumpable"] == value
    assert again.core == first.core


def test_dumpable_that_only_the_kernel_sets() -> None:
    with child() as pid:
        first = dump(pid, creds.RESOURCE, dumpable.RESOURCE)
    mm = pb.mm_entry(dumpable=2)
    with child(lambda: restore(first.core, dumpable.RESOURCE, mm=mm)) as pid:
        assert dump(pid, dumpable.RESOURCE).task.answers["dumpable"] == 0
