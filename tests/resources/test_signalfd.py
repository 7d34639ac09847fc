"""signalfd through the images: every mask."""

from __future__ import annotations

import fcntl
import os
import signal
import struct

from hypothesis import given
from hypothesis import strategies as st

from kit.file_bench import Bench, in_child, seen
from torpor.linux.call import call


def mask_of(fd: int) -> int:
    with open(f"/proc/self/fdinfo/{fd}") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("sigmask"))


@given(mask=st.integers(0, 2**64 - 1), nonblocking=st.booleans())
def test_round_trip_leaves_no_visible_difference(mask: int, nonblocking: bool) -> None:
    fd = call("signalfd4", -1, struct.pack("=Q", mask), 8, os.O_NONBLOCK if nonblocking else 0)
    with Bench() as bench:
        number = bench.dump(fd)
        bench.commit()
        copy = bench.build(number)
        # SIGKILL and SIGSTOP cannot be taken.
        assert mask_of(copy) == mask_of(fd) == mask & ~(1 << 8 | 1 << 18)
        assert seen(copy) == seen(fd)
        assert bool(fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_NONBLOCK) == nonblocking
    os.close(fd)


def test_the_copy_takes_a_signal() -> None:
    def work() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        fd = call("signalfd4", -1, struct.pack("=Q", 1 << signal.SIGUSR1 - 1), 8, 0)
        with Bench() as bench:
            number = bench.dump(fd)
            bench.commit()
            copy = bench.build(number)
            os.close(fd)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert struct.unpack_from("=I", os.read(copy, 128))[0] == signal.SIGUSR1

    in_child(work)
