"""``torpor dump PID -D DIR``."""

from __future__ import annotations

import os

from ..collector import Paused
from ..errors import UsageError
from ..log import INFO
from ..options import Options
from .common import catch_signals, open_log
from .parse import VerbHelp, parse, pid_of, settle_paths
from .terminal import Progress, out, out_json, seconds, size, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..engine.dump import DumpResult

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

HELP = VerbHelp(
    "dump",
    "torpor dump PID -D DIR [OPTION...]",
    """\
Freezes process PID and all processes below it into image files in DIR, then ends them. If anything
cannot be saved, the processes run on as if nothing had been, and the message says what it is and
which option would allow it. DIR is made if it does not exist; the log is DIR/dump.log.
""",
    """\
  torpor dump 4242 -D /snap              freeze it and end it
  torpor dump 4242 -D /snap -R           take a copy and let it run on
  torpor dump 4242 -D /snap -j --json    a job of this shell; the result for a program to read
""",
)


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    options = Options(log_level=INFO)
    others = parse(words, HELP, options)
    if others is None:
        return 0
    if len(others) != 1:
        raise UsageError("dump takes one process id: torpor dump PID -D DIR")
    options.pid = pid_of(others[0])
    options.validate("dump")
    if options.explain:
        from ..engine.dump import explain

        for line in explain(options.pid, options.freeze()):
            out(f"{line}\n")
        return 0
    settle_paths(options, "dump.log")
    os.makedirs(options.images_dir, mode=0o700, exist_ok=True)
    os.makedirs(options.work_dir, mode=0o700, exist_ok=True)
    open_log(options)
    catch_signals()
    with Progress() as progress:
        options.progress = progress
        progress(f"dumping {options.pid}")
        with Paused():
            from ..engine.dump import dump

        result = dump(options.pid, options.freeze())
    bytes_used = _disk_use(options.images_dir)
    if options.json:
        out_json(_as_json(result, bytes_used))
    else:
        out(_summary(options, result, bytes_used))
    return 0


def _disk_use(images_dir: str) -> int:
    """What the images take on disk, in bytes, holes not counted."""
    with os.scandir(images_dir) as entries:
        return sum(e.stat().st_blocks * 512 for e in entries if e.name.endswith(".img"))


def _as_json(result: DumpResult, bytes_used: int) -> dict[str, object]:
    return {
        "images_dir": result.images_dir,
        "pids": result.pids,
        "threads": result.threads,
        "mappings": result.mappings,
        "files": result.files,
        "pages": result.pages,
        "early_pages": result.early_pages,
        "page_bytes": PAGE_BYTES,
        "image_bytes": bytes_used,
        "frozen_s": result.frozen_s,
        "total_s": result.total_s,
    }


def _summary(options: Options, result: DumpResult, bytes_used: int) -> str:
    afterwards = (
        "It runs on." if options.leave_running
        else "It is left stopped." if options.leave_stopped
        else "It was ended."
    )  # fmt: skip
    rows = [
        ("tasks", f"{len(result.pids)} ({result.threads} threads)"),
        ("mappings", f"{result.mappings:,}"),
        ("files", f"{result.files:,}"),
        ("pages", f"{result.pages:,} ({size(result.pages * PAGE_BYTES)})"),
        *([("copied early", size(result.early_pages * PAGE_BYTES))] if result.early_pages else []),
        ("on disk", size(bytes_used)),
        ("frozen", seconds(result.frozen_s)),
        ("in all", seconds(result.total_s)),
    ]
    return (
        f"Dumped process {options.pid} to {result.images_dir}. {afterwards}\n"
        f"{table(rows, '  ')}"
        f"Wake it with: torpor restore {result.images_dir}\n"
    )
