"""Start-up is a feature: what is imported on the way is counted, not timed."""

from __future__ import annotations

import os
import subprocess
import sys

import google.protobuf
import pytest

from kit.verbs import SOURCES

PROTOBUF = os.path.dirname(os.path.dirname(os.path.dirname(google.protobuf.__file__)))

HEAVY = {
    "argparse",
    "asyncio",
    "dataclasses",
    "importlib.metadata",
    "inspect",
    "logging",
    "subprocess",
    "typing",
}


def modules_after(code: str) -> set[str]:
    """What is imported in an interpreter that does nothing but ``code``, without site's own imports."""
    program = f"import sys; sys.path[:0] = {[SOURCES, PROTOBUF]!r}\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_check_sees_what_is_imported() -> None:
    assert HEAVY & modules_after("import subprocess")


def test_the_library_imports_nothing_heavy() -> None:
    loaded = modules_after("import torpor")
    assert not HEAVY & loaded
    assert not any(name.startswith("google") for name in loaded), "protobuf is for those who dump or restore"


@pytest.mark.parametrize("module", ["torpor.cli.main", "torpor.cli.criu"])
def test_the_commands_import_nothing_heavy(module: str) -> None:
    assert not HEAVY & modules_after(f"import {module}")


def test_the_verbs_import_nothing_heavy() -> None:
    """All that a dump and a restore load, whatever there is."""
    loaded = modules_after(
        "from torpor.engine import dump, restore; from torpor import resources\n"
        "for folder in ('files', 'memory', 'task'): resources.load(folder)"
    )
    assert "torpor.resources.tcp" in loaded
    assert not (HEAVY | {"platform", "selectors", "socket", "uuid"}) & loaded


#: Kinds of which a sleeping program has nothing, and what belongs to them.
NOT_THERE = {
    "torpor.resources.files.inet", "torpor.resources.files.unix", "torpor.resources.files.eventpoll",
    "torpor.resources.files.pipe", "torpor.resources.memory.sysv", "torpor.resources.memory.aio",
    "torpor.resources.inet_dump", "torpor.resources.tcp", "torpor.resources.net_rules", "torpor.resources.unix_build",
    "torpor.resources.uring_build", "torpor.engine.pager",
}  # fmt: skip
SLEEPER = """
import os, tempfile, time
pid = os.fork()
if pid == 0:
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.execv("/bin/sleep", ["sleep", "60"])
while not open(f"/proc/{pid}/cmdline", "rb").read().startswith(b"sleep"):
    time.sleep(0.01)
"""


def test_only_what_a_program_has_is_loaded() -> None:
    loaded = modules_after(f"""{SLEEPER}
import torpor
with tempfile.TemporaryDirectory() as images:
    torpor.dump(pid, images)
    os.waitpid(pid, 0)
    torpor.restore(images)
os.kill(pid, 9)
os.waitpid(pid, 0)
""")
    assert {"torpor.engine.dump", "torpor.engine.restore", "torpor.resources.files.regular"} <= loaded
    assert not NOT_THERE & loaded
