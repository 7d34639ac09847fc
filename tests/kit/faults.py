"""Failing on purpose: make the n-th call of the gate to the kernel fail, for every n."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator

from torpor.errors import KernelError
from torpor.linux import call as gate

PTRACE_DETACH, PTRACE_INTERRUPT = 17, 0x4207


class Faults:
    """Fails call number ``nth`` (from 1) with ``number``.

    ``calls`` counts the calls, ``hit`` names the one that failed.
    """

    def __init__(self, nth: int = 0, number: int = errno.ENOMEM) -> None:
        self.nth = nth
        self.number = number
        self.calls = 0
        self.hit = ""

    def __call__(self, name: str) -> None:
        # The gate tells the name alone; what the call is about stands in its frame.
        args = sys._getframe(1).f_locals.get("args", ())
        if name == "ptrace" and args[0] in (PTRACE_DETACH, PTRACE_INTERRUPT):
            return  # fail only for a task that is gone (kernel/ptrace.c)
        self.calls += 1
        if self.calls == self.nth:
            self.hit = f"{name}{tuple(arg for arg in args if isinstance(arg, int))}"
            raise KernelError(name, self.number)

    def __enter__(self) -> Faults:
        assert gate.fault is None
        gate.fault = self
        return self

    def __exit__(self, *exc: object) -> None:
        gate.fault = None


def for_every_call(
    operation: Callable[[], object], *, number: int = errno.ENOMEM, step: int = 1, first: int = 1
) -> Iterator[tuple[Faults, BaseException | None]]:
    """Run ``operation`` again and again, each time with another call failing, until none is left.

    Yields the fault and the exception that came out (None when the failure was tolerated). The run
    without any fault, which is the last one, is not yielded: when the loop ends, the operation has
    been done.
    """
    nth = first
    while True:
        error: BaseException | None = None
        with Faults(nth, number) as faults:
            try:
                operation()
            except Exception as caught:
                error = caught
        if not faults.hit:
            assert error is None, f"without a fault: {error!r}"
            return
        yield faults, error
        nth += step


class OsFaults:
    """The same for calls that go through :mod:`os`: fails call number ``nth`` of ``NAMES``.

    Left out is what cannot fail for a reason that the caller has no part in: close, waitpid.
    """

    NAMES = (
        "open", "read", "write", "pread", "pwrite", "preadv", "pwritev", "readv", "writev", "dup2",
        "ftruncate", "fstat", "memfd_create", "kill", "pidfd_open", "copy_file_range",
        "sendfile", "posix_fallocate", "link", "unlink", "mkfifo", "mknod", "pipe2", "eventfd",
        "lseek", "rename", "mkdir",
    )  # fmt: skip

    def __init__(self, nth: int, number: int = errno.EIO) -> None:
        self.nth, self.number, self.calls, self.hit = nth, number, 0, ""
        self.saved: dict[str, Callable[..., object]] = {}

    def _wrap(self, name: str, real: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == self.nth:
                self.hit = f"os.{name}"
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **kwargs)

        return wrapped

    def __enter__(self) -> OsFaults:
        for name in self.NAMES:
            self.saved[name] = getattr(os, name)
            setattr(os, name, self._wrap(name, self.saved[name]))
        return self

    def __exit__(self, *exc: object) -> None:
        for name, real in self.saved.items():
            setattr(os, name, real)
