"""The memory of an io_uring, which others look at while it is written."""

from __future__ import annotations

import os
import subprocess
from functools import partial

from kit import compile_c
from torpor.linux import io_uring

# Looks at a word of the ring, as a thread of the kernel's does that polls it, until it has seen it change often enough;
# tells how often it was neither the one nor the other.
WATCH = """
int main(int argc, char **argv)
{
	volatile unsigned *word = (void *)((char *)mmap(NULL, 4096, PROT_READ, MAP_SHARED, 0, 0) + atoi(argv[1]));
	unsigned seen, wrong = 0, changes = 0, last = *word;
	(void)argc;

	puts("ready");
	fflush(stdout);
	while (changes < 300) {
		seen = *word;
		wrong += seen != 0x1234f8 && seen != 0x123500;
		changes += seen != last;
		last = seen;
	}
	printf("%u\\n", wrong);
	return 0;
}
"""


def test_nobody_sees_a_word_half_written() -> None:
    """A tail that is 0 for an instant makes the kernel take entries that are not there."""
    shape = io_uring.Params(0)
    fd = io_uring.setup(8, shape)
    rings = io_uring.Rings(fd, shape)
    words = [
        (partial(rings.set_sq, "tail"), shape.sq_off["tail"]), (partial(rings.set_cq, "head"), shape.cq_off["head"])
    ]  # fmt: skip
    for set_word, at in words:
        set_word(0x1234F8)
        argv = [compile_c(WATCH), str(at)]
        with subprocess.Popen(argv, stdin=fd, stdout=subprocess.PIPE, text=True) as watcher:
            assert watcher.stdout.readline() == "ready\n"
            while watcher.poll() is None:
                for _ in range(1000):
                    set_word(0x123500)
                    set_word(0x1234F8)
            assert watcher.stdout.read() == "0\n"
    rings.close()
    os.close(fd)
