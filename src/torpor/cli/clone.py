"""``torpor clone NAME``: copies of a template."""

from __future__ import annotations

import os

from ..errors import UsageError
from ..options import Option
from .grammar import Grammar, scan
from .help import option_line
from .terminal import out, out_json
from .values import bytes_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

USAGE = "torpor clone NAME [-n COUNT] [OPTION...]"
TEXT = """\
Makes copies of the template NAME (`torpor template start`). Each has the pids of the snapshot in a pid namespace of its
own, memory that it shares with its siblings until it writes to it, and open files of its own. The pid of each is
printed. A %d in FILE, HOST or TEXT stands for the number of the copy, from 1.
"""
EXAMPLES = """\
  torpor clone web                                   one copy
  torpor clone web -n 1000 --stdout /var/log/web.%d  a thousand, each with a log of its own
  torpor clone web --attach                          with this terminal as its input and output, waited for
  torpor clone web -n 9 --remap-address :80=:808%d   with ports of their own: 8081, 8082 ...
  torpor clone db -n 9 --overlay /var/lib/db         what each writes to its data is for it alone
  torpor clone web -n 3 --net new --hostname web%d   each in a network namespace of its own
"""
ROWS = (
    Option("count", "n", "COUNT", "", "text", "", "*", "how many (default 1)"),
    Option("stdin", "", "FILE", "", "text", "", "*", "open FILE in place of the root's standard input"),
    Option("stdout", "", "FILE", "", "text", "", "*", "append to FILE in place of its standard output"),
    Option("stderr", "", "FILE", "", "text", "", "*", "the same for standard error"),
    Option("file", "", "N:FILE", "", "text", "", "*", "open FILE for reading and writing as descriptor N; repeatable"),
    Option("chdir", "", "DIR", "", "text", "", "*", "the root's working directory"),
    Option("hostname", "", "HOST", "", "text", "", "*", "in a UTS namespace of its own"),
    Option("net", "", "new|FILE", "", "text", "", "*", "in a new network namespace, or in that of FILE"),
    Option("remap-address", "", "OLD=NEW", "", "text", "", "*",
           "sockets at ADDRESS[:PORT], :PORT, PATH or @NAME OLD come up at NEW; repeatable"),
    Option("cgroup", "", "DIR", "", "text", "", "*", "in the control group DIR; repeatable"),
    Option("overlay", "", "DIR", "", "text", "", "*", "what it writes in DIR is for it alone; repeatable"),
    Option("overlay-upper", "", "PATH", "", "text", "", "*",
           "write to a new folder in PATH, not to a tmpfs; removed with the copy"),
    Option("overlay-size", "", "SIZE", "", "text", "", "*",
           "limit of that tmpfs, such as 64M (default: half of the memory)"),
    Option("overlay-keep", "", "", "", "flag", "", "*", "do not remove the folder in PATH"),
    Option("argument", "", "TEXT", "", "text", "", "*", "handed to a program that takes one (torpor.guest)"),
    Option("fresh-pid", "", "", "", "flag", "", "*", "no pid namespace: the process has any pid, as after a fork"),
    Option("attach", "", "", "", "flag", "", "*", "this command's input and outputs are the copy's; wait for it"),
    Option("wait", "w", "", "", "flag", "", "*", "wait for all; exit with the status of the first that failed"),
    Option("json", "", "", "", "flag", "", "*", "a line of JSON for each copy"),
    Option("help", "h", "", "", "flag", "", "*", "show this text"),
)  # fmt: skip


class _Said:
    """The words of one command."""

    def __init__(self, words: list[str]) -> None:
        self.others: list[str] = []
        self.values: dict[str, list[str]] = {}
        for entry, argument in scan(words, Grammar(ROWS), self.others):
            self.values.setdefault(entry.name, []).append(argument or "")

    def has(self, name: str) -> bool:
        """Was it said?"""
        return name in self.values

    def text(self, name: str, number: int) -> str:
        """What was said last, for one copy."""
        return self.values.get(name, [""])[-1].replace("%d", str(number))

    def all(self, name: str, number: int) -> list[str]:
        """All that was said, for one copy."""
        return [value.replace("%d", str(number)) for value in self.values.get(name, [])]


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    said = _Said(words)
    if said.has("help"):
        lines = "".join(option_line(row) for row in ROWS)
        out(f"Usage: {USAGE}\n\n{TEXT}\n{lines}\nExamples:\n{EXAMPLES}")
        return 0
    if len(said.others) != 1:
        raise UsageError(f"usage: {USAGE}")
    count = said.text("count", 0) or "1"
    if not (count.isascii() and count.isdigit() and int(count)):
        raise UsageError(f"`{count}` is not a number of copies")
    attach = said.has("attach")
    if attach and int(count) != 1:
        raise UsageError("--attach is for one copy")
    return _clone(said, int(count), attach)


def _clone(said: _Said, count: int, attach: bool) -> int:
    from ..engine.holder import Client

    waits = attach or said.has("wait")
    # Copies that differ are asked for one by one.
    batch = 1 if any("%d" in value for values in said.values.values() for value in values) else count
    with Client(said.others[0]) as client:
        running = 0
        ended: list[dict[str, Any]] = []
        for number in range(1, count + 1, batch):
            options, fds = _wishes(said, number, attach)
            request = {"verb": "clone", "count": batch, "wait": waits, "options": options, "fds": list(fds)}
            try:
                answer = client.ask(request, list(fds.values()))
            finally:
                for name, fd in fds.items():
                    if not attach or name.isdigit():
                        os.close(fd)
            while "done" not in answer:
                if "status" in answer:
                    ended.append(answer)
                else:
                    running += 1
                    _tell(answer, said, attach)
                answer = client.answer()
        while waits and len(ended) < running:
            ended.append(client.answer())
    return next((one["status"] for one in ended if one["status"]), 0)


def _tell(answer: dict[str, Any], said: _Said, attach: bool) -> None:
    if said.has("json"):
        out_json(answer)
    elif not attach:
        out(f"{answer['pid']}\n")


def _wishes(said: _Said, number: int, attach: bool) -> tuple[dict[str, object], dict[str, int]]:
    """The options of one copy as text, and the descriptors that go with it by name."""
    options: dict[str, object] = {}
    for name, key in (("hostname", "hostname"), ("net", "net"), ("chdir", "cwd")):
        if said.has(name):
            options[key] = said.text(name, number)
    if said.has("remap-address"):
        options["remap_address"] = said.all("remap-address", number)
    if said.has("cgroup"):
        options["cgroup"] = [os.path.abspath(path) for path in said.all("cgroup", number)]
    if said.has("argument"):
        options["argument"] = said.text("argument", number)
    for name, key in (("fresh-pid", "fresh_pid"), ("overlay-keep", "overlay_keep")):
        if said.has(name):
            options[key] = True
    if said.has("overlay"):
        options["overlay"] = [os.path.abspath(path) for path in said.all("overlay", number)]
    if said.has("overlay-upper"):
        options["overlay_upper"] = os.path.abspath(said.text("overlay-upper", number))
    if said.has("overlay-size"):
        try:
            options["overlay_size"] = bytes_of(said.text("overlay-size", number))
        except ValueError as error:
            raise UsageError(f"--overlay-size: {error}") from None
    for key in ("cwd", "net"):
        if options.get(key, "new") != "new":
            options[key] = os.path.abspath(str(options[key]))
    fds: dict[str, int] = dict(zip(("stdin", "stdout", "stderr"), range(3), strict=True)) if attach else {}
    try:
        _open_files(said, number, fds)
    except BaseException:
        for name, fd in fds.items():
            if not attach or name.isdigit():
                os.close(fd)
        raise
    return options, fds


def _open_files(said: _Said, number: int, fds: dict[str, int]) -> None:
    flags = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY, "stderr": os.O_WRONLY}
    for name, access in flags.items():
        if said.has(name) and name not in fds:
            extra = 0 if access == os.O_RDONLY else os.O_CREAT | os.O_APPEND
            fds[name] = _open(said.text(name, number), access | extra)
    for value in said.all("file", number):
        target, colon, path = value.partition(":")
        if not colon or not target.isdigit():
            raise UsageError(f"--file {value}: N:FILE is expected")
        fds[target] = _open(path, os.O_RDWR)


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UsageError(f"`{path}`: {error.strerror}") from None
