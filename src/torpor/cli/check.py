"""``torpor check [PID]``."""

from __future__ import annotations

from ..errors import UsageError
from ..options import Options
from .common import open_log
from .parse import VerbHelp, parse, pid_of, settle_paths
from .terminal import out, out_json, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..engine.check import Finding
    from ..errors import TorporError

HELP = VerbHelp(
    "check",
    "torpor check [PID] [OPTION...]",
    """\
Without a PID: what this kernel can do for Torpor. With one: everything that stands in the way of a
dump of that process and all below it, found without stopping them. Give the options that the dump
would have. The exit status is 0 when all is well and 1 when something is missing that every
program needs.
""",
    """\
  torpor check                           is this machine fit?
  torpor check 4242                      would a dump of 4242 work?
  torpor check 4242 --tcp-established    and if connections may be saved?
""",
    also="dump",
)


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    options = Options()
    others = parse(words, HELP, options)
    if others is None:
        return 0
    if len(others) > 1:
        raise UsageError("check takes one process id: torpor check PID")
    if others:
        options.pid = pid_of(others[0])
    settle_paths(options)
    open_log(options)
    options.freeze()
    return _check_task(options) if others else _check_kernel(options)


def _check_kernel(options: Options) -> int:
    from ..engine.check import check_kernel

    findings = check_kernel(options)
    if options.json:
        out_json([
            {"name": f.name, "ok": f.ok, "required": f.required, "text": f.text} for f in findings
        ])
    else:
        out(table([(_verdict(finding), finding.name, finding.text) for finding in findings]))
    return 0 if all(finding.ok or not finding.required for finding in findings) else 1


def _verdict(finding: Finding) -> str:
    # Loud only about what every program needs.
    return "yes" if finding.ok else "NO" if finding.required else "no"


def _check_task(options: Options) -> int:
    from ..engine.check import check_task

    problems = check_task(options.pid, options)
    if options.json:
        out_json([_as_json(problem) for problem in problems])
    elif problems:
        count = "One thing stands" if len(problems) == 1 else f"{len(problems)} things stand"
        out(f"{count} in the way of a dump of process {options.pid}:\n")
        for problem in problems:
            out(f"  - {': '.join([*problem.context, problem.what])}\n")
            if problem.hint:
                out(f"    hint: {problem.hint}\n")
    else:
        out(f"Process {options.pid} can be dumped.\n")
    return 1 if problems else 0


def _as_json(problem: TorporError) -> dict[str, object]:
    return {"context": problem.context, "what": problem.what, "hint": problem.hint}
