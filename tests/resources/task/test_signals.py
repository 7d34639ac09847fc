"""Signal actions, pending signals, masks and the alternate stack."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

import pytest
from forked import child, dump, proc_status, restore, syscall
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torpor.errors import ImageError
from torpor.images import schema as pb
from torpor.resources.task import pending, sigactions, sigaltstack, sigmask

slow = settings(
    max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SA_RESTORER, SA_RESTART, SA_NODEFER, SA_SIGINFO, SA_ONSTACK = 1 << 26, 1 << 28, 1 << 30, 4, 1 << 27


def block_all() -> None:
    syscall(14, 2, bytes([255]) * 8, 0, 8)


def set_action(number: int, handler: int, flags: int, mask: int) -> None:
    syscall(13, number, struct.pack("<4Q", handler, flags | SA_RESTORER, 0x1000, mask), 0, 8)


actions = st.dictionaries(
    st.sampled_from(sigactions.SIGNALS),
    st.tuples(
        st.sampled_from([0, 1, 0x401000]),
        st.sets(st.sampled_from([SA_RESTART, SA_NODEFER, SA_SIGINFO, SA_ONSTACK])).map(sum),
        st.integers(0, (1 << 64) - 1),
    ),
)


@given(actions)
@slow
def test_every_action_comes_back(wanted: dict[int, tuple[int, int, int]]) -> None:
    def setup() -> None:
        for number, (handler, flags, mask) in wanted.items():
            set_action(number, handler, flags, mask)

    with child(setup) as pid:
        first = dump(pid, sigactions.RESOURCE, sigmask.RESOURCE)
        ignored, caught = proc_status(pid, "SigIgn"), proc_status(pid, "SigCgt")
    assert len(first.core.tc.sigactions) == 62
    by_number = dict(zip(sigactions.SIGNALS, first.core.tc.sigactions, strict=True))
    for number, (handler, flags, mask) in wanted.items():
        entry = by_number[number]
        assert (entry.sigaction, entry.flags) == (handler, flags | SA_RESTORER)
        assert entry.mask == mask & ~(1 << 8 | 1 << 18)  # SIGKILL and SIGSTOP are never in a mask
    with child(lambda: restore(first.core, sigactions.RESOURCE)) as pid:
        assert (proc_status(pid, "SigIgn"), proc_status(pid, "SigCgt")) == (ignored, caught)
        again = dump(pid, sigactions.RESOURCE, sigmask.RESOURCE)
    assert again.core == first.core


def test_a_sigchld_of_the_restore_is_dropped_and_one_of_the_task_stays() -> None:
    def setup() -> None:
        block_all()
        syscall(129, os.getpid(), signal.SIGCHLD, struct.pack("<iii", 17, 0, 1).ljust(128, b"\0"))

    with child(setup) as pid:
        first = dump(pid, sigactions.RESOURCE, pending.RESOURCE, sigmask.RESOURCE)

    def with_leftover() -> None:
        block_all()
        os.kill(os.getpid(), signal.SIGCHLD)
        restore(first.core, sigactions.RESOURCE, pending.RESOURCE)

    with child(with_leftover) as pid:
        again = dump(pid, pending.RESOURCE)
    assert again.core.tc.signals_s == first.core.tc.signals_s
    assert len(first.core.tc.signals_s.signals) == 1


queued = st.lists(
    st.tuples(
        st.booleans(),  # for the process
        st.sampled_from([1, 10, 12, 15, 17, 32, 33, 34, 40, 64]),
        # SI_QUEUE, SI_TIMER, SI_MESGQ, SI_USER, CLD_EXITED, SI_KERNEL, SI_TKILL
        st.sampled_from([-1, -2, -3, 0, 1, 0x80, -6]),
        st.integers(0, (1 << 64) - 1),
    ),
    max_size=12,
)


@given(queued)
@slow
def test_pending_signals_keep_order_and_values(wanted: list[tuple[bool, int, int, int]]) -> None:
    def setup() -> None:
        block_all()
        for shared, number, code, value in wanted:
            info = struct.pack("<iiiiiiQ", number, 0, code, 0, 77, 88, value).ljust(128, b"\0")
            if shared:
                syscall(129, os.getpid(), number, info)
            else:
                syscall(297, os.getpid(), os.getpid(), number, info)

    with child(setup) as pid:
        first = dump(pid, pending.RESOURCE, sigmask.RESOURCE)
        masks = [proc_status(pid, name) for name in ("SigPnd", "ShdPnd", "SigBlk")]
    values = {value for _, _, _, value in wanted}
    queues = (first.core.tc.signals_s.signals, first.core.thread_core.signals_p.signals)
    for entry in (*queues[0], *queues[1]):
        assert struct.unpack_from("<Q", entry.siginfo, 24)[0] in values
    real_time = [number for shared, number, _, _ in wanted if shared and number >= 32]
    found = [int.from_bytes(entry.siginfo[:4], "little") for entry in queues[0]]
    assert [number for number in found if number >= 32] == real_time
    with child(lambda: restore(first.core, pending.RESOURCE)) as pid:
        assert [proc_status(pid, n) for n in ("SigPnd", "ShdPnd", "SigBlk")] == masks
        again = dump(pid, pending.RESOURCE, sigmask.RESOURCE)
    assert again.core == first.core


def test_a_queue_without_signals_is_written_as_an_empty_one() -> None:
    with child() as pid:
        core = dump(pid, pending.RESOURCE).core
    assert core.tc.HasField("signals_s")
    assert core.thread_core.HasField("signals_p")


def test_a_signal_without_queue_entry_is_found() -> None:
    def setup() -> None:
        import resource

        block_all()
        resource.setrlimit(resource.RLIMIT_SIGPENDING, (0, 0))
        os.kill(os.getpid(), signal.SIGUSR1)

    with child(setup) as pid:
        core = dump(pid, pending.RESOURCE, sigmask.RESOURCE).core
        assert int(proc_status(pid, "ShdPnd"), 16) == 1 << signal.SIGUSR1 - 1
    assert [entry.siginfo[:4] for entry in core.tc.signals_s.signals] == [
        struct.pack("<i", signal.SIGUSR1)
    ]


def test_signals_of_the_tracer_are_held_back() -> None:
    core = pb.core_entry()
    core.tc.signals_s.signals.add(siginfo=struct.pack("<i", 19).ljust(128, b"\0"))
    core.thread_core.signals_p.signals.add(siginfo=struct.pack("<i", 5).ljust(128, b"\0"))
    core.thread_core.signals_p.signals.add(siginfo=struct.pack("<i", 10).ljust(128, b"\0"))
    core.tc.blk_sigset = (1 << 64) - 1
    assert pending.stops(core)
    assert pending.late(core) == [(False, struct.pack("<i", 5).ljust(128, b"\0"))]
    with child(lambda: restore(core, pending.RESOURCE)) as pid:
        assert int(proc_status(pid, "SigPnd"), 16) == 1 << signal.SIGUSR1 - 1
        assert int(proc_status(pid, "ShdPnd"), 16) == 0


@pytest.mark.parametrize(
    "siginfo", [b"", bytes(127), bytes(128), struct.pack("<i", 65) + bytes(124)]
)
def test_what_is_no_siginfo_is_refused(siginfo: bytes) -> None:
    core = pb.core_entry()
    core.tc.signals_s.signals.add(siginfo=siginfo)
    with pytest.raises(ImageError, match=r"tc\.signals_s"):
        pending.RESOURCE.check(core, None)


def test_a_table_of_actions_that_is_not_whole_is_refused() -> None:
    core = pb.core_entry()
    core.tc.sigactions.add(sigaction=0, flags=0, restorer=0, mask=0)
    with pytest.raises(ImageError, match="62 expected"):
        sigactions.RESOURCE.check(core, None)


@pytest.mark.parametrize("flags", [0, 1 << 31, 2])
def test_alternate_stack(flags: int) -> None:
    area = ctypes.create_string_buffer(1 << 16)
    address = ctypes.addressof(area)

    def setup() -> None:
        syscall(131, struct.pack("<QIxxxxQ", address, flags, 1 << 16), 0)

    def observe_in_child(core: object) -> None:
        syscall(131, struct.pack("<QIxxxxQ", address + 4096, 0, 1 << 15), 0)  # something else first
        restore(core, sigaltstack.RESOURCE)
        out = ctypes.create_string_buffer(24)
        syscall(131, 0, out)
        wanted = (0, 2, 0) if flags == 2 else (address, flags, 1 << 16)
        assert struct.unpack("<QIxxxxQ", out.raw) == wanted

    with child(setup) as pid:
        core = dump(pid, sigaltstack.RESOURCE, sigmask.RESOURCE).core
    with child(lambda: observe_in_child(core)):
        pass


def test_being_on_the_alternate_stack_is_no_part_of_the_setting() -> None:
    core = pb.core_entry()
    area = ctypes.create_string_buffer(1 << 16)
    sas = core.thread_core.sas
    sas.ss_sp, sas.ss_size, sas.ss_flags = ctypes.addressof(area), 1 << 16, 1
    with child(lambda: restore(core, sigaltstack.RESOURCE)) as pid:
        again = dump(pid, sigaltstack.RESOURCE).core
    assert again.thread_core.sas.ss_flags == 0
    assert again.thread_core.sas.ss_sp == ctypes.addressof(area)


def test_masks_of_main_and_other_threads_have_their_own_places() -> None:
    def setup() -> None:
        import threading

        def other() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR2})
            ready.set()
            signal.pause()

        ready = threading.Event()
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGUSR1})
        threading.Thread(target=other, daemon=True).start()
        ready.wait()

    with child(setup) as pid:
        dumped = dump(pid, sigmask.RESOURCE)
    (other,) = (core for tid, core in dumped.cores.items() if tid != pid)
    assert dumped.core.tc.blk_sigset == 1 << signal.SIGUSR1 - 1
    assert not dumped.core.thread_core.HasField("blk_sigset")
    assert other.thread_core.blk_sigset == 1 << signal.SIGUSR2 - 1
    assert not other.HasField("tc")
    assert [sigmask.sigmask(core) for core in (dumped.core, other)] == [1 << 9, 1 << 11]
