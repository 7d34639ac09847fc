"""A program worth waking up: it counts, remembers what it has seen, and has a file open.

    python counter.py LOG

appends a line to LOG for every tick: the tick, the process id, and a checksum of a megabyte of
random bytes that exist nowhere but in its memory.
"""

import os
import sys
import time
import zlib


def main() -> None:
    memory = os.urandom(1 << 20)
    with open(sys.argv[1], "a", buffering=1) as log:
        tick = 0
        while True:
            tick += 1
            print(f"tick {tick:4} pid {os.getpid()} memory {zlib.crc32(memory):08x}", file=log)
            time.sleep(0.2)


if __name__ == "__main__":
    main()
