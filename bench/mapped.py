"""restore --map: how long a program waits for its first instruction, whatever its size, and what it pays later.

    python bench/mapped.py                         256 MiB, 1 GiB and 4 GiB, images on tmpfs (two copies of each!)
    python bench/mapped.py --mib 64 --rounds 3 --place /var/tmp

Printed is a Markdown table of medians, in milliseconds: until the first instruction of the program and until all of its
memory is in place, for a plain restore and a mapped one (calls in this process, in which everything is loaded), and how
long a page takes that is touched while the rest of the memory stays in the images.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [os.path.join(ROOT, "src"), os.path.join(ROOT, "tests"), HERE]

import torpor
from kit import Target, Targets
from kit.host import become_subreaper
from torpor.engine import paging

# argv[1]: MiB. Watches the clock: when it has stood still it was frozen, and the time is that of its first
# instruction since. Then it touches pages here and there, and says how long each took.
PROGRAM = """
static int compare(const void *a, const void *b)
{
	return *(const double *)a < *(const double *)b ? -1 : 1;
}

int main(int argc, char **argv)
{
	size_t size = (size_t)atoi(argv[argc - 1]) << 20, pages = size >> 12, at = 1;
	char *all = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), text[200];
	double last, now, took[200];

	CHECK(all != MAP_FAILED);
	for (size_t n = 0; n < pages; n++) {
		memset(all + (n << 12), (int)n | 1, 4096);
		*(size_t *)(all + (n << 12)) = n + 1;
	}
	ready();
	for (last = seconds(); (now = seconds()) - last < 0.1; last = now)
		;
	snprintf(text, sizeof(text), "%.9f", now);
	tell("woken", text);
	wait_told("touch");
	for (int n = 0; n < 200; n++) {
		at = (at * 6364136223846793005ul + 1442695040888963407ul);
		last = seconds();
		CHECK(*(volatile size_t *)(all + ((at >> 20) % pages << 12)) == (at >> 20) % pages + 1);
		took[n] = seconds() - last;
	}
	qsort(took, 200, sizeof(*took), compare);
	snprintf(text, sizeof(text), "%.3f %.3f", took[100] * 1e3, took[198] * 1e3);
	tell("touched", text);
	wait_told("go");
	for (size_t n = 0; n < pages; n++)
		CHECK(*(size_t *)(all + (n << 12)) == n + 1);
	pass();
}
"""


def restored(target: Target, folder: str, **options: object) -> tuple[float, float]:
    """Restore it; ms until its first instruction, and until everything is in place (0 where it is lazy)."""
    for name in ("woken", "touched", "touch"):
        if os.path.exists(target.path(name)):
            os.unlink(target.path(name))
    started = time.monotonic()
    target.pid = torpor.restore(folder, **options).pid
    first = float(target.wait_file("woken", timeout=60)) - started
    if not options.get("map_lazy"):
        while options.get("map") and paging.is_served(target.pid):
            time.sleep(0.002)
        return first * 1e3, max(time.monotonic() - started if options.get("map") else first, first) * 1e3
    return first * 1e3, 0.0


def touched(target: Target) -> tuple[float, float]:
    """Have it touch pages; median and 99th percentile of the ms that one takes."""
    target.tell("touch")
    middle, late = target.wait_file("touched", timeout=120).split()
    return float(middle), float(late)


def end(target: Target) -> None:
    os.kill(target.pid, 9)
    target.wait_gone(timeout=60)


def measure(mib: int, rounds: int, place: str) -> list[str]:
    """A row of the table."""
    folder = tempfile.mkdtemp(prefix="bench-", dir=place)
    targets = Targets(tempfile.mkdtemp(prefix="bench-"))
    figures: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            figures.setdefault(name, []).append(value)

    try:
        target = targets.c(PROGRAM, str(mib), wait=False)
        target.wait_file("ready", timeout=120)
        time.sleep(0.2)
        torpor.dump(target.pid, folder)
        target.wait_gone(timeout=60)
        for number in range(rounds + 1):
            first, done = restored(target, folder)
            end(target)
            mapped_first, mapped_done = restored(target, folder, map=True)
            end(target)
            lazy_first, _ = restored(target, folder, map=True, map_lazy=True)
            middle, late = touched(target)
            if number == rounds:
                target.go(timeout=300)
            else:
                end(target)
            if number:  # the first one is for caches and imports
                note(first=first, mapped=mapped_first, lazy=lazy_first, done=done, mapped_done=mapped_done)
                note(middle=middle, late=late)
    finally:
        targets.end()
        shutil.rmtree(folder)
        shutil.rmtree(targets.folder)
    order = ("first", "mapped", "lazy", "done", "mapped_done", "middle", "late")
    print(f"{mib} MiB, mapped: {sorted(round(one, 1) for one in figures['mapped'])}", file=sys.stderr)
    return [f"{mib} MiB", *(f"{statistics.median(figures[name]):.{3 if name in order[5:] else 1}f}" for name in order)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--place", default="/dev/shm", help="where images go")
    args = parser.parse_args()
    become_subreaper()
    print(f"load at the start: {os.getloadavg()[0]:.1f}", end="\n\n")
    print("| | first instruction | … with --map | … and --map-lazy | all there | … with --map | a touch, lazy | 99 % |")
    print("|---|---|---|---|---|---|---|---|")
    for mib in args.mib:
        print(f"| {' | '.join(measure(mib, args.rounds, args.place))} |", flush=True)


if __name__ == "__main__":
    main()
