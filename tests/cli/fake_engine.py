"""A command around a pretended engine: ``fake_engine.py criu|torpor WORD...``.

The engine only says what it was asked, which shows how the command line behaves around it. What it
does is in $FAKE: nothing (it succeeds), ``unsupported``, ``blockers``, ``oserror``, ``bug``,
``wait`` (until interrupted), ``lacking``, ``wanting``, or for a restore ``exit N``, ``die N`` and
``linger``: the end of the process that it starts.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types

from torpor import log
from torpor.errors import Blockers, Unsupported, doing
from torpor.options import Options

HOW, _, NUMBER = os.environ.get("FAKE", "").partition(" ")


def said(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def behave(verb: str) -> None:
    if HOW == "unsupported":
        with doing(verb), doing("task 42"):
            error = Unsupported("fd 7 (io_uring): requests are in flight", hint="wait for them")
            error.add_note("undo: thaw: no such group")
            raise error
    if HOW == "blockers":
        with doing(verb):
            raise Blockers([Unsupported("fd 3: odd", hint="close it"), Unsupported("fd 4: odd")])
    if HOW == "oserror":
        os.open("/no/such/place", os.O_RDONLY)
    if HOW == "bug":
        raise ZeroDivisionError("of the engine")
    if HOW == "wait":
        try:
            said("waiting")
            time.sleep(30)
        finally:
            said("taken back")


class DumpResult:
    def __init__(self, options: Options) -> None:
        self.images_dir = options.images_dir
        self.pids, self.threads, self.mappings, self.files = [42, 43], 3, 1110, 5
        self.pages, self.shared_pages, self.early_pages = 1812, 0, 0
        self.frozen_s, self.total_s = 0.0054, 1.25


def dump(pid: int, options: Options) -> DumpResult:
    log.debug("dump: in detail")
    log.info("dump: as such")
    said(f"dump {pid} {options.replace(progress=None)}")
    behave("dump")
    return DumpResult(options)


class RestoreResult:
    def __init__(self, pid: int) -> None:
        self.pid = self.waits_for = pid
        self.written_to = ""


def restore(options: Options) -> RestoreResult:
    said(f"restore {options.replace(progress=None)}")
    behave("restore")
    log.info("restore: as such")
    pid = os.fork()
    if pid:
        return RestoreResult(pid)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
    said(f"child {os.getpid()}")
    if HOW == "exit":
        os._exit(int(NUMBER))
    if HOW == "die":
        os.kill(os.getpid(), int(NUMBER))
    for _ in range(300 if HOW == "linger" else 2):  # a signal may come just before it sleeps
        time.sleep(0.1)
    said("child ends")
    os._exit(0)


class Finding:
    def __init__(self, name: str, ok: bool, text: str, required: bool) -> None:
        self.name, self.ok, self.text, self.required = name, ok, text, required


def check_kernel(options: Options) -> list[Finding]:
    return [
        Finding("ptrace", True, "fine", True),
        Finding("clone3", HOW != "lacking", "set_tid", True),
        Finding("guards", HOW not in ("lacking", "wanting"), "regions", False),
    ]


def check_task(pid: int, options: Options) -> list[Unsupported]:
    if HOW != "lacking":
        return []
    with_context = Unsupported("fd 3: odd", hint="close it")
    with_context.context = [f"task {pid}"]
    return [with_context, Unsupported("fd 4: odd")]


def feature(name: str) -> bool:
    return name == "userns"


def main() -> int:
    modules = {
        "dump": {"dump": dump},
        "restore": {"restore": restore},
        "check": {"check_kernel": check_kernel, "check_task": check_task, "feature": feature},
    }
    for name, functions in modules.items():
        module = types.ModuleType(f"torpor.engine.{name}")
        vars(module).update(functions)
        sys.modules[module.__name__] = module
    from torpor.cli import criu, main

    command = {"criu": criu.main, "torpor": main.main}[sys.argv[1]]
    return command(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
