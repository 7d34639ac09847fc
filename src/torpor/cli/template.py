"""``torpor template start|list|stop``: snapshots that are ready to be copied."""

from __future__ import annotations

import os

from ..errors import TorporError, UsageError
from ..options import Option, Options
from .common import default_signals, open_log, shown
from .parse import VerbHelp, local_options, parse, settle_paths
from .terminal import err, out, out_json, table

USAGE = "torpor template start DIR [OPTION...], torpor template list|stop [NAME]"
TEXT = """\
A template is a snapshot whose memory has been restored once and is held just before the first instruction. `torpor
clone NAME` makes copies of it, in about a millisecond each, that share all memory which they do not write to.

  start DIR    restore the snapshot in DIR and hold it; --name NAME, or else the name of the directory
  list         the templates that there are; --json
  stop NAME    end a template; its copies go on. --all: every one
"""
EXAMPLES = """\
  torpor template start /snap --name web
  torpor clone web -n 1000
  torpor template stop web
"""
ROWS = (
    Option("name", "", "NAME", "", "text", "", "*", "what it is to be called"),
    Option("foreground", "", "", "", "flag", "", "*", "stay in the foreground and hold it here"),
    Option("all", "", "", "", "flag", "", "*", "stop every template"),
    Option("json", "", "", "", "flag", "", "*", "print it as JSON"),
    Option("help", "h", "", "", "flag", "", "*", "show this text"),
)
START = VerbHelp("restore", "torpor template start DIR [--name NAME] [--foreground] [OPTION...]", TEXT, EXAMPLES)


def main(words: list[str]) -> int:
    """Run the verb; its exit status."""
    if words and words[0] == "start":
        return _start(words[1:])
    said = local_options(words, ROWS, USAGE, TEXT, EXAMPLES)
    if said is None:
        return 0
    flags, others = said
    if others[:1] == ["list"] and len(others) == 1:
        return _list("json" in flags)
    if others[:1] == ["stop"] and (len(others) == 2) != ("all" in flags):
        return _stop(others[1:])
    raise UsageError(f"usage: {USAGE}")


def _start(words: list[str]) -> int:
    name, foreground, rest = _own_words(words)
    options = Options()
    others = parse(rest, START, options)
    if others is None:
        return 0
    if len(others) != 1:
        raise UsageError("template start takes one directory")
    options.images_dir = others[0]
    options.validate("restore")
    settle_paths(options)
    name = name or os.path.basename(options.images_dir)
    from ..engine.holder import Holder

    if foreground:
        open_log(options)
        holder = Holder(name, options)
        out(f"{name}\n")
        holder.serve()
        return 0
    return _in_background(name, options)


def _own_words(words: list[str]) -> tuple[str, bool, list[str]]:
    """--name and --foreground, which are not options of a restore, and the other words."""
    name, foreground = "", False
    rest: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word == "--name" and words:
            name = words.pop(0)
        elif word.startswith("--name="):
            name = word[7:]
        elif word == "--foreground":
            foreground = True
        else:
            rest.append(word)
    return name, foreground, rest


def _in_background(name: str, options: Options) -> int:
    """A process of its own holds the template; this one ends when it is ready, or says why it is not."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os._exit(_hold(name, options, write_end))
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        told = pipe.read().decode(errors="replace")
    if told.startswith("ready"):
        out(f"{name}\n")
        return 0
    os.waitpid(pid, 0)
    err(told or "Error: the holder of the template has ended\n")
    return 1


def _hold(name: str, options: Options, write_end: int) -> int:
    from ..engine.holder import Holder

    try:
        os.setsid()
        default_signals()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        os.closerange(3, write_end)
        os.closerange(write_end + 1, os.sysconf("SC_OPEN_MAX"))
        if options.log_file in ("", "-"):
            from .. import log

            log.open_log(-1)
        else:
            open_log(options)
        holder = Holder(name, options)
    except TorporError as error:
        os.write(write_end, shown(error).encode())
        return 1
    except OSError as error:
        os.write(write_end, f"Error: {error}\n".encode())
        return 1
    os.write(write_end, b"ready")
    os.close(write_end)
    holder.serve()
    return 0


def _list(as_json: bool) -> int:
    from ..engine.holder import Client, names

    found = []
    for name in names():
        try:
            with Client(name) as client:
                found.append(client.ask({"verb": "info"}))
        except TorporError:
            found.append({"name": name, "dead": True})
    if as_json:
        out_json(found)
        return 0
    rows = [("NAME", "HOLDER", "COPIES", "RUNNING", "SNAPSHOT")]
    for one in found:
        if one.get("dead"):
            rows.append((one["name"], "-", "-", "-", "its holder was killed; nothing of it is left but the name"))
        else:
            rows.append((one["name"], *(str(one[key]) for key in ("holder", "copies", "running", "images_dir"))))
    out(table(rows) if found else "There is no template.\n")
    return 0


def _stop(wanted: list[str]) -> int:
    from ..engine.holder import Client, names, socket_path

    failed = 0
    for name in wanted or names():
        try:
            with Client(name) as client:
                client.ask({"verb": "stop"})
        except TorporError as error:
            if name in names():
                os.unlink(socket_path(name))  # of a holder that was killed
                continue
            err(shown(error))
            failed = 1
    return failed
