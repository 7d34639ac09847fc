"""A program in Python that takes part in snapshots.

    python guest_python.py LOG

writes a line to LOG for everything that happens to it, and in every woken copy a number that no other copy has.
Snapshot it with `torpor dump`, wake it with `torpor restore --argument WORD`.
"""

import random
import sys

from torpor import guest

log = open(sys.argv[1], "a", buffering=1)


@guest.before_snapshot
def put_away() -> None:
    """Close what copies cannot share: connections, sessions, files that only one may write."""
    print("prepare", file=log)


@guest.after_restore
def take_out() -> None:
    """Open it again. Random state has been renewed by now, and nothing else of the program has run."""
    print(f"restored {guest.generation.counter} {guest.argument().decode()} {random.getrandbits(64):016x}", file=log)


@guest.after_snapshot
def go_on() -> None:
    """The original goes on, whether or not a snapshot came of it."""
    print(guest.outcome(), file=log)


def main() -> None:
    random.random()  # all that takes long and is the same in every copy is done before the snapshot
    print("start", file=log)
    while True:
        guest.snapshot_point()


if __name__ == "__main__":
    main()
