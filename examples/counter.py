"""A program worth waking up: it counts, remembers what it has seen, and has a file open.

    python counter.py LOG

appends one line a tick to LOG: the tick, its process id, and a checksum over everything that it has in memory.
"""

import os
import sys
import time
import zlib


def main() -> None:
    memory = bytearray(
        os.urandom(1 << 20)
    )  # exists nowhere else: only a snapshot can bring it back
    with open(sys.argv[1], "a", buffering=1) as log:
        tick = 0
        while True:
            tick += 1
            memory[tick % len(memory)] = tick % 256
            print(f"tick {tick:4} pid {os.getpid()} memory {zlib.crc32(memory):08x}", file=log)
            time.sleep(0.2)


if __name__ == "__main__":
    main()
