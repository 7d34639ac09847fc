"""Where the start of the command goes: every import on the way to a verb, with its cost.

    python bench/startup.py [dump|restore]

prints the modules that take longest to import for one verb (their own time, without what they import
themselves), as the interpreter's ``-X importtime`` says, medians of several runs, and the time of a
bare interpreter beside it.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

SRC = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "src")
RUNS = 9


def interpreter(*flags: str, code: str) -> tuple[float, str]:
    """Milliseconds and standard error of a fresh interpreter that runs ``code``."""
    argv = [sys.executable, "-I", "-S", *flags, "-c", code]
    started = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return (time.perf_counter() - started) * 1e3, done.stderr


def main() -> None:
    verb = sys.argv[1] if len(sys.argv) > 1 else "dump"
    site = next(path for path in sys.path if os.path.isdir(os.path.join(path, "google", "protobuf")))
    code = f"import sys; sys.path[:0] = [{SRC!r}, {site!r}]; import torpor.cli.criu, torpor.engine.{verb}"
    costs: dict[str, list[float]] = {}
    for _ in range(RUNS):
        for line in interpreter("-X", "importtime", code=code)[1].splitlines():
            own, _, rest = line.removeprefix("import time:").partition("|")
            name = rest.partition("|")[2].strip()
            if own.strip().isdigit():
                costs.setdefault(name, []).append(int(own) / 1e3)
    bare = statistics.median(interpreter(code="pass")[0] for _ in range(RUNS))
    whole = statistics.median(interpreter(code=code)[0] for _ in range(RUNS))
    medians = sorted(((statistics.median(c), name) for name, c in costs.items()), reverse=True)
    print(f"bare interpreter {bare:.1f} ms, with everything that `{verb}` needs {whole:.1f} ms\n")
    print("| own ms | module |\n|---|---|")
    for cost, name in medians[:25]:
        print(f"| {cost:.2f} | {name} |")
    print(f"| {sum(cost for cost, _ in medians[25:]):.2f} | {len(medians) - 25} others |")


if __name__ == "__main__":
    main()
