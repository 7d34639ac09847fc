"""Attributes of processes and threads: prctl(2), personality, scheduling, limits, /proc."""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import threading
from types import SimpleNamespace

import pytest
from forked import build_context, child, dump, prctl, proc_status, proc_text, restore, syscall
from hypothesis import given, settings
from hypothesis import strategies as st

from torpor import log
from torpor.errors import ImageError, Unsupported
from torpor.images import schema as pb
from torpor.remote.program import Program
from torpor.resources.task import (
    loginuid,
    mdwe,
    personality,
    proc_files,
    process_prctls,
    rlimits,
    sched,
    syscall_dispatch,
    thp,
    thread_prctls,
)

slow = settings(max_examples=15)
REGISTER = {2: "global", 4: "private", 6: "sync core", 8: "rseq"}  # bits of membarrier commands


@given(st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name))
@slow
def test_a_name_of_any_bytes(name: bytes) -> None:
    with child(lambda: prctl(15, name + b"\0")) as pid:
        first = dump(pid, thread_prctls.RESOURCE).core
    with child(lambda: restore(first, thread_prctls.RESOURCE)) as pid:
        with open(f"/proc/{pid}/comm", "rb") as file:
            assert file.read() == name + b"\n"
        assert dump(pid, thread_prctls.RESOURCE).core == first


@given(
    st.sampled_from([1, 50_000, 123_456_789, 10**12]),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([1, 2]),
)
@slow
def test_thread_attributes(slack: int, mce: int, tsc: int) -> None:
    def setup() -> None:
        prctl(29, slack)
        prctl(33, 1, mce)
        prctl(26, tsc)

    with child(setup) as pid:
        first = dump(pid, thread_prctls.RESOURCE).core
    own = first.thread_core
    assert (own.timerslack_ns, own.tsc_mode) == (slack, 0 if tsc == 1 else tsc)
    assert own.HasField("mce_kill") == (mce != 2)

    def observe() -> None:
        restore(first, thread_prctls.RESOURCE)
        out = ctypes.c_int()
        prctl(25, ctypes.byref(out))
        assert (prctl(30), prctl(34), out.value) == (slack, mce, tsc)

    with child(observe) as pid:
        assert int(proc_text(pid, "timerslack_ns")) == slack


PRCTL, ENABLE, DISABLE, FORCE_DISABLE = 1, 2, 4, 8  # PR_SPEC_*


def test_what_a_thread_has_chosen_of_speculation_and_cpuid() -> None:
    """Few machines let a thread choose: the answers of one that does are made up here."""
    program, core = Program(), pb.core_entry()
    asked = thread_prctls.RESOURCE.ask(program, None)
    answers = {id(asked.cpuid): 0, id(asked.speculation[0]): PRCTL | FORCE_DISABLE, id(asked.speculation[1]): PRCTL | DISABLE}
    run = SimpleNamespace(
        result=lambda ref: answers.get(id(ref), FORCE_DISABLE if ref is asked.speculation[2] else 2),
        bytes=lambda data: struct.pack("<i", 1),
    )
    status = SimpleNamespace(Name=b"name")
    thread = SimpleNamespace(tid=1, task=SimpleNamespace(pid=1), status=status, stat=SimpleNamespace(flags=0))
    thread_prctls.RESOURCE.dump(thread, run, asked, core, None)
    assert core.thread_core.cpuid_faults
    assert list(core.thread_core.speculation) == [PRCTL | FORCE_DISABLE, PRCTL | DISABLE, 0]
    program = Program()
    thread_prctls.RESOURCE.restore(thread, core, program, None)
    (faults,) = (record.args for record in program.records if record.name == "arch_prctl")
    assert faults == (0x1012, 0)
    chosen = [record.args[1:3] for record in program.records if record.args[0] == 53]
    assert chosen == [(0, FORCE_DISABLE), (1, DISABLE)]


def test_an_io_flusher_is_refused_without_the_capability() -> None:
    core = pb.core_entry()
    core.thread_core.io_flusher = True
    with pytest.raises(Unsupported, match="CAP_SYS_RESOURCE"):
        thread_prctls.RESOURCE.check(core, build_context())


@given(st.booleans(), st.sets(st.sampled_from(sorted(REGISTER))))
@slow
def test_process_attributes(subreaper: bool, registered: set[int]) -> None:
    def setup() -> None:
        prctl(36, int(subreaper))
        for bit in registered:
            syscall(324, 1 << bit, 0, 0)

    with child(setup) as pid:
        first = dump(pid, process_prctls.RESOURCE).core
    assert first.tc.child_subreaper == subreaper
    mask = sum(1 << bit for bit in registered)
    assert first.tc.membarrier_registration_mask & mask == mask

    def observe() -> None:
        prctl(36, 1)
        restore(first, process_prctls.RESOURCE)
        assert syscall(324, 1 << 9, 0, 0) == first.tc.membarrier_registration_mask

    with child(observe) as pid:
        assert dump(pid, process_prctls.RESOURCE).core == first


@pytest.mark.parametrize("merged", [0, 1])
def test_merging_of_equal_pages(merged: int) -> None:
    def setup() -> None:
        try:
            prctl(67, merged)
        except OSError:
            pytest.skip("a kernel without KSM")

    with child(setup) as pid:
        first = dump(pid, process_prctls.RESOURCE).core
    assert first.tc.memory_merge == bool(merged)

    def observe() -> None:
        restore(first, process_prctls.RESOURCE)
        assert prctl(68) == merged

    with child(observe):
        pass


@pytest.mark.parametrize("registered", [set(), {4}, {6}, {8}, {4, 8}])
def test_registrations_of_private_barriers_show_where_the_kernel_does_not_tell(
    registered: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_prctls, "MEMBARRIER_CMD_GET_REGISTRATIONS", 1 << 20)

    def setup() -> None:
        for bit in registered:
            syscall(324, 1 << bit, 0, 0)

    with child(setup) as pid:
        first = dump(pid, process_prctls.RESOURCE).core
    assert first.tc.membarrier_registration_mask == sum(1 << bit for bit in registered)


@pytest.mark.parametrize("value", [0, 1, 3])
def test_mdwe(value: int) -> None:
    with child(lambda: prctl(65, value) if value else None) as pid:
        first = dump(pid, mdwe.RESOURCE).core
    assert first.tc.mdwe == value

    def observe() -> None:
        restore(first, mdwe.RESOURCE)
        assert prctl(66) == value

    with child(observe):
        pass


@pytest.mark.parametrize(("disabled", "flags"), [(0, 0), (1, 0), (1, 2)])
def test_huge_pages(disabled: int, flags: int) -> None:
    with child(lambda: prctl(41, disabled, flags)) as pid:
        first = dump(pid, thp.RESOURCE)
    assert first.task.answers["thp_disabled"] is bool(disabled)

    def observe() -> None:
        prctl(41, 1 - disabled, 0)  # as it might have been inherited
        restore(first.core, thp.RESOURCE, mm=pb.mm_entry(thp_disabled=bool(disabled)))
        assert prctl(42) == disabled | flags

    with child(observe):
        pass


@pytest.mark.parametrize("value", [0, 0x0040000, 0x0400000 | 0x8000000])
def test_personality(value: int) -> None:
    with child(lambda: syscall(135, value)) as pid:
        first = dump(pid, personality.RESOURCE).core
    with child(lambda: restore(first, personality.RESOURCE)) as pid:
        assert int(proc_text(pid, "personality"), 16) == value


def test_personality_of_a_thread() -> None:
    def setup() -> None:
        def other() -> None:
            syscall(135, 0x0040000)
            ready.set()
            threading.Event().wait()

        ready = threading.Event()
        threading.Thread(target=other, daemon=True).start()
        ready.wait()

    with child(setup) as pid:
        dumped = dump(pid, personality.RESOURCE)
    (other,) = (core for tid, core in dumped.cores.items() if tid != pid)
    assert dumped.core.tc.personality == 0
    assert other.thread_core.personality == 0x0040000
    assert not dumped.core.thread_core.HasField("personality")
    with child(lambda: restore(other, personality.RESOURCE)) as pid:
        assert int(proc_text(pid, "personality"), 16) == 0x0040000


def test_syscall_user_dispatch_is_refused() -> None:
    selector = bytes(8)

    def setup() -> None:
        keep.append(ctypes.create_string_buffer(selector))  # 0: nothing is dispatched
        prctl(59, 1, 0, 0, ctypes.addressof(keep[0]))

    keep: list[object] = []
    with child(setup) as pid, pytest.raises(Unsupported, match="syscall user dispatch"):
        dump(pid, syscall_dispatch.RESOURCE)


# ---------------------------------------------------------------------------------- scheduling


@pytest.mark.parametrize(
    ("policy", "priority", "nice", "reset"),
    [
        (os.SCHED_OTHER, 0, 0, False),
        (os.SCHED_OTHER, 0, -20, False),
        (os.SCHED_OTHER, 0, 19, True),
        (os.SCHED_BATCH, 0, 5, False),
        (os.SCHED_IDLE, 0, 3, True),
        (os.SCHED_FIFO, 1, -7, False),
        (os.SCHED_RR, 50, 4, True),
    ],
)
def test_policy_and_nice(policy: int, priority: int, nice: int, reset: bool) -> None:
    wanted = policy | (os.SCHED_RESET_ON_FORK if reset else 0)

    def setup() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        os.sched_setscheduler(0, wanted, os.sched_param(priority))

    with child(setup) as pid:
        first = dump(pid, sched.RESOURCE).core
    assert first.thread_core.sched_policy == wanted
    assert first.thread_core.sched_nice == nice
    with child(lambda: restore(first, sched.RESOURCE)) as pid:
        assert os.sched_getscheduler(pid) == wanted
        assert os.sched_getparam(pid).sched_priority == priority
        assert os.getpriority(os.PRIO_PROCESS, pid) == nice
        assert dump(pid, sched.RESOURCE).core == first


@pytest.mark.parametrize("flags", [1, 7], ids=["plain", "reclaim and overrun"])  # SCHED_FLAG_*
def test_deadline(flags: int) -> None:
    attr = struct.pack("<IIQiIQQQ", 48, 6, flags, 0, 0, 1_000_000, 50_000_000, 100_000_000)
    with child(lambda: syscall(314, 0, attr, 0)) as pid:
        first = dump(pid, sched.RESOURCE).core
    assert first.thread_core.sched_attr.deadline == 50_000_000
    with child(lambda: restore(first, sched.RESOURCE)) as pid:
        assert os.sched_getscheduler(pid) & ~os.SCHED_RESET_ON_FORK == 6
        found = ctypes.create_string_buffer(48)
        syscall(315, pid, found, 48, 0)
        assert found.raw == attr
        assert dump(pid, sched.RESOURCE).core == first
    first.thread_core.ClearField("sched_attr")
    with child(lambda: restore(first, sched.RESOURCE)) as pid:
        assert os.sched_getscheduler(pid) == os.SCHED_OTHER


@pytest.mark.parametrize("allowed", [{0}, {1}, {0, 1}])
def test_affinity(allowed: set[int]) -> None:
    with child(lambda: os.sched_setaffinity(0, allowed)) as pid:
        first = dump(pid, sched.RESOURCE).core
    assert first.thread_core.HasField("affinity") == (len(allowed) < os.cpu_count())
    with child(lambda: restore(first, sched.RESOURCE)) as pid:
        assert os.sched_getaffinity(pid) == allowed


def test_processors_that_are_not_here() -> None:
    core = pb.core_entry()
    core.thread_core.affinity = b"\0\0\0\0\0\0\0\x80"
    with child(lambda: restore(core, sched.RESOURCE)) as pid:
        assert len(os.sched_getaffinity(pid)) == os.cpu_count()


@pytest.mark.parametrize("io", [0, 1 << 13 | 4, 2 << 13 | 7, 3 << 13])
def test_io_priority(io: int) -> None:
    with child(lambda: syscall(251, 1, 0, io)) as pid:
        first = dump(pid, sched.RESOURCE).core
    with child(lambda: restore(first, sched.RESOURCE)) as pid:
        assert syscall(252, 1, pid) == io


# -------------------------------------------------------------------------------------- limits

HARD = [resource.prlimit(0, number)[1] for number in range(16)]


@given(st.data())
@slow
def test_limits(data: st.DataObject) -> None:
    wanted = {}
    for number in (0, 1, 4, 6, 7, 8, 11, 12, 13, 14):
        top = 2**63 - 1 if HARD[number] == -1 else HARD[number]
        low = 1000 if number in (0, 7) else 0
        hard = data.draw(st.one_of(st.just(HARD[number]), st.integers(min(low, top), top)))
        soft = data.draw(st.integers(min(low, top), top if hard == -1 else hard))
        wanted[number] = (soft, hard)

    def setup() -> None:
        for number, limit in wanted.items():
            resource.prlimit(0, number, limit)

    with child(setup) as pid:
        before = proc_text(pid, "limits")
        first = dump(pid, rlimits.RESOURCE).core
    assert len(first.tc.rlimits.rlimits) == 16
    for number, (soft, hard) in wanted.items():
        entry = first.tc.rlimits.rlimits[number]
        assert (entry.cur, entry.max) == (soft % 2**64, hard % 2**64)
    with child(lambda: restore(first, rlimits.RESOURCE)) as pid:
        assert proc_text(pid, "limits") == before


def test_a_hard_limit_above_ours_is_refused() -> None:
    with child() as pid:
        core = dump(pid, rlimits.RESOURCE).core
    ctx = build_context()
    rlimits.RESOURCE.check(core, ctx)
    own = dict(enumerate((entry.cur, entry.max) for entry in core.tc.rlimits.rlimits))
    ctx.memo["own", "limits"] = {**own, 7: (100, 100)}
    with pytest.raises(Unsupported, match=r"RLIMIT_NOFILE .* is above our own hard limit 100"):
        rlimits.RESOURCE.check(core, ctx)
    ctx.memo["own", "status"] = SimpleNamespace(CapEff=1 << 24)
    rlimits.RESOURCE.check(core, ctx)
    core.tc.rlimits.rlimits[3].max = core.tc.rlimits.rlimits[3].cur - 1
    with pytest.raises(ImageError, match="STACK: soft limit above"):
        rlimits.RESOURCE.check(core, ctx)


# --------------------------------------------------------------------------------- /proc files


def write(name: str, value: int) -> None:
    fd = os.open(f"/proc/self/{name}", os.O_WRONLY)
    try:
        os.write(fd, b"%d" % value)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("score", "core_filter"), [(0, 0x33), (700, 0x7F), (1000, 1)])
def test_files_written_from_outside(score: int, core_filter: int) -> None:
    def setup() -> None:
        write("oom_score_adj", score)
        write("coredump_filter", core_filter)

    with child(setup) as pid:
        first = dump(pid, proc_files.RESOURCE).core
    assert first.tc.oom_score_adj == score
    assert first.tc.HasField("coredump_filter") == (core_filter != 0x33)
    with child() as pid:
        task = SimpleNamespace(pid=1, live_pid=pid)
        proc_files.RESOURCE.outside(task, first, build_context())
        assert int(proc_text(pid, "oom_score_adj")) == score
        assert int(proc_text(pid, "coredump_filter"), 16) == core_filter
        assert dump(pid, proc_files.RESOURCE).core == first


def test_what_may_not_be_written_stays() -> None:
    core = pb.core_entry()
    core.tc.oom_score_adj = -1000  # takes CAP_SYS_RESOURCE
    with child() as pid:
        before = proc_text(pid, "oom_score_adj")
        proc_files.RESOURCE.outside(SimpleNamespace(live_pid=pid), core, build_context())
        assert proc_text(pid, "oom_score_adj") == before


@pytest.mark.skipif(not os.path.exists("/proc/self/loginuid"), reason="a kernel without CONFIG_AUDIT")
@pytest.mark.parametrize("present", [1234, 4321])
def test_a_login_uid_that_a_task_has_not_got_is_named(present: int, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    core = pb.core_entry()
    core.tc.loginuid = 4321
    with child(lambda: write("loginuid", present)) as pid:
        assert dump(pid, loginuid.RESOURCE).core.tc.loginuid == present
        loginuid.RESOURCE.outside(SimpleNamespace(live_pid=pid, parent=None), core, build_context())
    assert said == ([] if present == 4321 else [f"task {pid}: loginuid stays 1234, 4321 was wanted"])


def test_no_capability_in_a_namespace_counts_for_the_kernel_as_a_whole() -> None:
    # The premise of the refusals above, on this machine: our hard limits cannot be raised.
    if int(proc_status(os.getpid(), "CapEff"), 16) >> 24 & 1:
        return
    with child(), pytest.raises(PermissionError):
        write("oom_score_adj", -1000)
