"""Many copies of one warmed program, alive at once: each answers with an identity and random numbers of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest

import torpor
from kit import Target, Targets
from kit.chaos import campaign_size
from kit.host import descendants, end_descendants, stat_fields
from kit.verbs import SOURCES

COPIES, VALUES = campaign_size(1000), 100

PROGRAM = f"""
import asyncio, ctypes, email, html, http.server, json, random, secrets, ssl, struct, sys, tempfile, uuid
sys.path.append({SOURCES!r})
from torpor import guest

def vdso_getrandom():
    \"\"\"A function that draws from the vDSO's generator, with a state in memory that forks find empty.\"\"\"
    line = next(line for line in open("/proc/self/maps") if line.endswith("[vdso]\\n"))
    start, end = (int(word, 16) for word in line.split()[0].split("-"))
    image = ctypes.string_at(start, end - start)
    offset = symbol(image, b"__vdso_getrandom")
    if not offset:
        return None
    call = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p,
                            ctypes.c_size_t)(start + offset)
    params = ctypes.create_string_buffer(64)
    assert call(None, 0, 0, params, ctypes.c_size_t(-1).value) == 0
    size, prot, flags = struct.unpack_from("<3I", params)
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t] + 4 * [ctypes.c_long]
    state = libc.mmap(None, 4096, prot, flags, -1, 0)
    buffer = ctypes.create_string_buffer(16)
    def draw():
        assert call(buffer, 16, 0, state, size) == 16
        return buffer.raw.hex()
    return draw

def symbol(image, name):
    sections, = struct.unpack_from("<Q", image, 40)
    size, count = struct.unpack_from("<HH", image, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, sections + size * index) for index in range(count)]
    for kind in headers:
        if kind[1] == 11:  # SHT_DYNSYM
            strings = headers[kind[6]][4]
            for at in range(kind[4], kind[4] + kind[5], 24):
                text, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", image, at)
                if image[strings + text :].startswith(name + b"\\0"):
                    return value
    return 0

from_vdso = vdso_getrandom()
DRAWS = {{
    "random": lambda: random.random().hex(), "uuid4": lambda: str(uuid.uuid4()), "urandom": lambda: os.urandom(16).hex(),
    "secrets": secrets.token_hex, "RAND_bytes": lambda: ssl.RAND_bytes(16).hex(),
    **({{"vdso": from_vdso}} if from_vdso else {{}}),
}}
for draw in DRAWS.values():
    draw()
guest.enable()
ready()
wait_told("go")
number = os.read(0, 8).decode()
answer = {{name: [draw() for _ in range({VALUES})] for name, draw in DRAWS.items()}}
answer["id"], answer["pid"] = [guest.generation.id.hex()], os.getpid()
tell("answer." + number, json.dumps(answer))
while True:
    time.sleep(1000)
"""


@pytest.fixture
def snapshot(start: Targets, images: str) -> Iterator[Target]:
    target = start.python(PROGRAM)
    keep = set(descendants(os.getpid())) - set(target.pids())
    torpor.dump(target.pid, images)
    target.wait_gone()
    target.tell("go")
    yield target
    end_descendants(keep, timeout=60)


def answers(target: Target, images: str, count: int, **options: object) -> list[dict]:
    read_end, write_end = os.pipe()
    try:
        with torpor.template(images, **options) as template:
            copies = [template.clone(stdin=read_end) for _ in range(count)]
        assert all((stat_fields(copy.pid) or "??Z")[2] != "Z" for copy in copies), "not all are alive at once"
        for number in range(count):
            os.write(write_end, b"%08d" % number)
        found = []
        for number in range(count):
            text = target.wait_file(f"answer.{number:08}", timeout=120)
            found.append(json.loads(text))
        for copy in copies:
            copy.kill()
            assert copy.wait() == 137
    finally:
        os.close(read_end)
        os.close(write_end)
    return found


def duplicates(found: list[dict]) -> set[str]:
    """The kinds of which a value occurs twice."""
    kinds = set(found[0]) - {"pid"}
    values = {kind: [value for one in found for value in one[kind]] for kind in kinds}
    return {kind for kind in kinds if len(set(values[kind])) < len(values[kind])}


@pytest.mark.timeout(300)
@pytest.mark.campaign
def test_copies_have_nothing_in_common(snapshot: Target, images: str) -> None:
    snapshot.alive = lambda: True  # it is gone, and its copies write its answers
    found = answers(snapshot, images, COPIES)
    assert duplicates(found) == set()
    assert {one["pid"] for one in found} == {snapshot.pid}
    assert "vdso" in found[0] or os.uname().release < "6.11"


@pytest.mark.timeout(120)
def test_they_would_without_the_protection(snapshot: Target, images: str) -> None:
    snapshot.alive = lambda: True
    assert {"random", "RAND_bytes", "id"} <= duplicates(answers(snapshot, images, 5, new_generation=False))
