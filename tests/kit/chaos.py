"""Operations that are killed in their middle, at a moment nobody chose."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable


def campaign_size(default: int) -> int:
    """How often a campaign repeats itself: TORPOR_CAMPAIGN, or a number that CI has the time for."""
    return int(os.environ.get("TORPOR_CAMPAIGN", default))


def in_child(operation: Callable[[], object]) -> int:
    """Start ``operation`` in a copy of this process, in which everything is imported already; its pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            operation()
            status = 0
        finally:
            os._exit(status)
    return pid


def duration(operation: Callable[[], object]) -> float:
    """Seconds that ``operation`` takes in a child, which must succeed."""
    started = time.monotonic()
    _, status = os.waitpid(in_child(operation), 0)
    assert status == 0, f"status {status:#x} without any interference"
    return time.monotonic() - started


def kill_in_the_middle(operation: Callable[[], object], seconds: float, dice: random.Random) -> bool:
    """Run ``operation`` in a child, kill it at a random moment within ``seconds``; was it in time?"""
    pid = in_child(operation)
    time.sleep(dice.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, f"failed by itself: status {status:#x}"
    return os.WIFSIGNALED(status)
