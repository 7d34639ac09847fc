"""Copies of one warmed Python program: from a template, and by the ways there are without one.

    python bench/clones.py                            Torpor alone
    python bench/clones.py --criu /usr/sbin/criu      beside CRIU, in the same run

The program has imported a web stack (some 110 mappings) and sleeps. Printed is a Markdown table: the time until a copy
runs (median, 99th percentile; as its maker sees it), what it costs in memory (proportional share, median), and how the
time grows with the number of copies alive. CRIU restores each copy in a pid namespace made by unshare(1), as a script
would. The last rows are of a tree: a Python program with four workers that have 8 MiB of their own each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path[:0] = [os.path.join(ROOT, "src"), os.path.join(ROOT, "tests"), HERE]

import programs
import torpor
from kit import Targets
from kit.host import become_subreaper, descendants, end_descendants


def pss_kib(root: int) -> int:
    """The proportional share of the memory of a process and its descendants."""
    total = 0
    for pid in (root, *descendants(root)):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += int(next(line for line in file if line.startswith("Pss:")).split()[1])
    return total


def measure(count: int, make: Callable[[], int | None]) -> tuple[list[float], list[int]]:
    """The milliseconds that each of ``count`` copies took, and the pids of those whose memory is to be looked at."""
    times, pids = [], []
    for _ in range(count):
        started = time.perf_counter()
        pid = make()
        times.append((time.perf_counter() - started) * 1e3)
        if pid:
            pids.append(pid)
    return times, pids


def row(name: str, times: list[float], pids: list[int]) -> str:
    ordered = sorted(times)
    tail = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    share = f"{statistics.median(map(pss_kib, pids[:50])):.0f}" if pids else "*(n)*"
    return f"| {name} | {len(times)} | {statistics.median(times):.2f} | {tail:.2f} | {share} |"


def growth(times: list[float]) -> str:
    """Medians of tenths of the run, the first as 1."""
    size = max(1, len(times) // 10)
    medians = [statistics.median(times[start : start + size]) for start in range(0, size * 10, size)]
    return ", ".join(f"{median / medians[0]:.2f}" for median in medians)


def by_criu(criu: str, folder: str) -> Callable[[], int | None]:
    def make() -> None:
        own = ["unshare", "--pid", "--mount-proc", "--fork"]
        argv = [*own, criu, "restore", "-D", folder, "-d", "--no-default-config", "-o", "/dev/null"]
        if subprocess.run(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
            raise SystemExit("criu restore failed: see restore.log")

    return make


def cold() -> None:
    """Start the same program and wait until it has imported everything."""
    subprocess.run([sys.executable, "-c", programs.PYTHON.partition("ready()")[0]], check=True)


def snapshot(folder: str, source: str, *args: str, plain: bool) -> None:
    """Dump a program into ``folder``, beside which it has its files."""
    targets = Targets(tempfile.mkdtemp(prefix="program-", dir=os.path.dirname(folder)))
    target = targets.python(source, *args)
    torpor.dump(target.pid, folder, share_pages=not plain)
    target.wait_gone()


def of_a_tree(few: int, criu: str, place: str, end: Callable[[], None]) -> list[str]:
    """Rows of a table for a program with workers."""
    folder, plain = new_folder(place, "tree"), new_folder(place, "tree for CRIU")
    snapshot(folder, programs.WORKERS, "4", "8", plain=False)
    with torpor.template(folder) as template:
        lines = [row("copy of a tree", *measure(5 * few, lambda: template.clone().pid))]
    end()
    for _ in range(2):  # the first time a virtual machine's host may have to find the memory
        restored = measure(few, lambda: torpor.restore(folder, own_pids=True).pid)
        again = row("restore --own-pids of a tree", *restored)
        end()
    lines.append(again)
    if criu:
        snapshot(plain, programs.WORKERS, "4", "8", plain=True)
        lines.append(row("CRIU, a tree", *measure(few, by_criu(criu, plain))))
        end()
    return lines


def new_folder(place: str, name: str) -> str:
    """A directory for images."""
    path = os.path.join(place, name)
    os.mkdir(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criu", default="", help="CRIU's program, to compare with")
    parser.add_argument("--copies", type=int, default=1000)
    parser.add_argument("--few", type=int, default=20, help="how often the slow ways are taken")
    args = parser.parse_args()
    become_subreaper()
    keep = set(descendants(os.getpid()))
    lines = ["| | copies | median, ms | 99 %, ms | PSS, KiB |", "|---|---|---|---|---|"]
    shapes = {}
    with tempfile.TemporaryDirectory(prefix="clones-", dir="/dev/shm") as place:
        folder = new_folder(place, "program")
        try:
            snapshot(folder, programs.PYTHON.partition("wait_told")[0] + "time.sleep(10**6)\n", plain=True)
            for name, wishes in (("copy of a template", {}), ("the same, with a fresh pid", {"fresh_pid": True})):
                with torpor.template(folder) as template:
                    times, pids = measure(args.copies, lambda t=template, w=wishes: t.clone(**w).pid)
                lines.append(row(name, times, pids))
                shapes[name] = growth(times)
                end_descendants(keep, timeout=60)
            restored = measure(args.few, lambda: torpor.restore(folder, own_pids=True).pid)
            lines.append(row("restore --own-pids", *restored))
            end_descendants(keep, timeout=60)
            if args.criu:
                lines.append(row("CRIU, in a pid namespace", *measure(args.few, by_criu(args.criu, folder))))
                end_descendants(keep, timeout=60)
            lines.append(row("cold start", *measure(args.few, cold)))
            lines += of_a_tree(args.few, args.criu, place, lambda: end_descendants(keep, timeout=60))
        finally:
            end_descendants(keep, timeout=60)
    print("\n".join(lines))
    for name, shape in shapes.items():
        print(f"\nGrowth, {name}: {shape}")


if __name__ == "__main__":
    main()
