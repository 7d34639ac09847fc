"""What woken copies of one snapshot may not have in common, and what keeps it apart.

Every test that sees no duplicates stands beside one that sees them where the protection is off: or it might be blind.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from kit import Target

from .conftest import Copies

Program = Callable[..., Target]
Take = Callable[..., Copies]

DRAWS = """
import gc, json, multiprocessing, multiprocessing.synchronize, random, secrets, ssl, tempfile, threading, uuid
from torpor import guest

class Own(random.Random):
    def seed(self, *given):
        pass  # whoever seeds it so has not seeded it

guest.enable()
mine, own, fixed = random.Random(7), Own(), random.Random(11)
guest.keep(fixed)
lottery = {"generator": random.Random(3)}
names = tempfile._RandomNameSequence()

def in_thread(draw):
    answer = []
    thread = threading.Thread(target=lambda: answer.append(draw()))
    thread.start()
    thread.join()
    return answer[0]

def draw():
    return {
        "random": random.random(), "shuffle": random.sample(range(1000), 5), "Random": mine.random(),
        "subclass": own.random(), "in a dict": lottery["generator"].random(), "gauss": random.gauss(),
        "RAND_bytes": ssl.RAND_bytes(16).hex(), "RAND_bytes in a thread": in_thread(lambda: ssl.RAND_bytes(16).hex()),
        "uuid1": str(uuid.uuid1())[14:], "tempfile": next(tempfile._get_candidate_names()), "names": next(names),
        "authkey": bytes(multiprocessing.current_process().authkey).hex(),
        "semaphore": next(multiprocessing.synchronize.SemLock._rand),
        "uuid4": str(uuid.uuid4()), "urandom": os.urandom(16).hex(), "secrets": secrets.token_hex(),
        "fixed": fixed.random(), "id": guest.generation.id.hex(), "counter": guest.generation.counter,
    }

scans, get_objects = [], gc.get_objects
gc.get_objects = lambda *how: scans.append(how) or get_objects(*how)
draw()
gc.freeze()
ready()
wait_told("go")
tell("draws", json.dumps({**draw(), "scans": len(scans)}))
while True:
    time.sleep(1)
"""
KERNEL = {"uuid4", "urandom", "secrets"}  # from getrandom(2) every time
ALIKE = {"fixed", "counter", "scans"}


def test_no_duplicates(program: Program, copies: Take) -> None:
    woken = copies(program(DRAWS))
    draws = [woken.draws() for _ in range(4)]
    for name in draws[0]:
        values = [str(one[name]) for one in draws]
        assert len(set(values)) == (1 if name in ALIKE else len(values)), f"{name}: {values}"
    assert draws[0]["counter"] == 2
    assert draws[0]["scans"] == 1, "every copy looks at every object, and so shares none of them with the others"


def test_duplicates_without_the_protection(program: Program, copies: Take) -> None:
    woken = copies(program(DRAWS))
    draws = [woken.draws(new_generation=False) for _ in range(2)]
    equal = {name for name in draws[0] if draws[0][name] == draws[1][name]}
    assert set(draws[0]) - equal <= KERNEL | {"uuid1"}, "what was taken for protected is never equal"
    assert KERNEL.isdisjoint(equal)
    assert draws[0]["counter"] == 1


NUMPY = """
import json, random
import numpy
from torpor import guest

guest.enable()
kinds = {name: numpy.random.Generator(getattr(numpy.random, name)(5)) for name in ("PCG64", "MT19937", "Philox", "SFC64")}
state, fixed = numpy.random.RandomState(3), numpy.random.default_rng(4)
guest.keep(fixed)

def draw():
    return {
        "legacy": numpy.random.rand(), "normal": numpy.random.standard_normal(), "state": state.rand(),
        "spawned": kinds["PCG64"].bit_generator.seed_seq.spawn(1)[0].generate_state(2).tolist(),
        **{name: one.random() for name, one in kinds.items()}, "fixed": fixed.random(),
    }

draw()
ready()
wait_told("go")
tell("draws", json.dumps(draw()))
while True:
    time.sleep(1)
"""


@pytest.mark.skipif(not importlib.util.find_spec("numpy"), reason="needs NumPy: pip install numpy")
def test_numpy(program: Program, copies: Take) -> None:
    woken = copies(program(NUMPY))
    draws = [woken.draws() for _ in range(3)]
    for name in draws[0]:
        values = [str(one[name]) for one in draws]
        assert len(set(values)) == (1 if name == "fixed" else 3), f"{name}: {values}"
    assert woken.draws(new_generation=False) == woken.draws(new_generation=False), "it is never equal"


KEYS = """
import json
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives import serialization as s
from torpor import guest

guest.enable()

def draw():
    raw = (s.Encoding.Raw, s.PublicFormat.Raw)
    point = (s.Encoding.X962, s.PublicFormat.CompressedPoint)
    return {"ed25519": ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(*raw).hex(),
            "p256": ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(*point).hex()}

draw()
ready()
wait_told("go")
tell("draws", json.dumps(draw()))
while True:
    time.sleep(1)
"""


@pytest.mark.skipif(not importlib.util.find_spec("cryptography"), reason="needs cryptography: pip install cryptography")
def test_private_keys(program: Program, copies: Take) -> None:
    woken = copies(program(KEYS))
    first, second = woken.draws(), woken.draws()
    assert first["ed25519"] != second["ed25519"] and first["p256"] != second["p256"]
    assert woken.draws(new_generation=False) == woken.draws(new_generation=False), "it is never equal"


TREE = """
import json, random
from torpor import guest

guest.enable()
child = os.fork()

def pages():
    inodes = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            if "torpor-guest" in os.readlink("/proc/self/fd/" + fd):
                inodes.add(os.stat("/proc/self/fd/" + fd).st_ino)
        except FileNotFoundError:
            pass
    return len(inodes)

def draw():
    return {"id": guest.generation.id.hex(), "random": random.random(), "outcome": guest.outcome(), "pages": pages()}

if child == 0:
    wait_told("go")
    tell("child", json.dumps(draw()))
    time.sleep(1000)
ready()
wait_told("child")
tell("draws", json.dumps({"parent": draw(), "child": json.load(open(DIR + "/child"))}))
time.sleep(1000)
"""


def test_a_tree_has_one_id_and_each_process_is_told(program: Program, copies: Take) -> None:
    seen = copies(program(TREE)).draws()
    parent, child = seen["parent"], seen["child"]
    assert isinstance(parent, dict) and isinstance(child, dict)
    assert parent["id"] == child["id"]
    assert parent["random"] != child["random"], "forked with the same state, woken with the same state"
    assert parent["outcome"] == child["outcome"] == "restored"
    assert parent["pages"] == child["pages"] == 1, "a child has one page, its own"
