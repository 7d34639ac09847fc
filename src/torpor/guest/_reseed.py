"""Random state that a woken copy has in common with its siblings, renewed from the kernel's generator.

One function for each library, called only where it is loaded: importing anything here could run code of the program
before its state is renewed. Each returns how many states it has renewed.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

SEED_BYTES = 64

#: Generators that the program wants to be the same in all copies; the objects themselves, since an id may be reused.
kept: list[object] = []


def reseed(live: list[Any] | None = None) -> dict[str, int]:
    """Renew everything; name of the module → number of states. ``live`` is what :func:`live_generators` gave before."""
    if live is None:
        live = live_generators()
    done: dict[str, int] = {}
    for name, renew in RENEWERS.items():
        module = sys.modules.get(name)
        if module is not None:
            done[name] = renew(module, live)
    return done


def live_generators() -> list[Any]:
    """The generators of random and NumPy that are alive, without those that are kept.

    To look for them touches the reference count of every object, and with it all pages that copies have in common: so
    it is done once, before the snapshot, where there is a chance.
    """
    wanted: list[type] = []
    for module_name, names in (("random", ("Random",)), ("numpy.random", ("RandomState", "BitGenerator"))):
        module = sys.modules.get(module_name)
        wanted += [getattr(module, name) for name in names if hasattr(module, name)]
    if not wanted:
        return []
    classes = tuple(wanted)
    system = getattr(sys.modules.get("random"), "SystemRandom", ())
    frozen = gc.get_freeze_count()
    if frozen:
        gc.unfreeze()  # or they would not be among them
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    kept_ids = {id(one) for one in kept}
    kept_ids |= {id(one.bit_generator) for one in kept if hasattr(one, "bit_generator")}
    # By type, not isinstance(): that would ask an object for its __class__, and may run code of the program.
    return [
        one
        for one in objects
        if issubclass(type(one), classes) and not issubclass(type(one), system) and id(one) not in kept_ids
    ]


def _random(module: Any, live: list[Any]) -> int:
    generators = [one for one in live if issubclass(type(one), module.Random)]
    own = module._inst  # what module.random() and its like are methods of
    if all(one is not own for one in generators) and all(one is not own for one in kept):
        generators.append(own)
    for one in generators:
        # Not one.seed(): a subclass may have made something else of it.
        module.Random.seed(one, int.from_bytes(os.urandom(SEED_BYTES), "little"))
    return len(generators)


def _numpy(module: Any, live: list[Any]) -> int:
    count = 0
    own = module.mtrand._rand
    kept_here = any(one is own for one in kept)
    if not kept_here:
        module.seed(list(os.urandom(SEED_BYTES)))
        count += 1
    for one in live:
        if issubclass(type(one), module.BitGenerator):
            if kept_here and one is own._bit_generator:
                continue
            one.state = type(one)(int.from_bytes(os.urandom(SEED_BYTES), "little")).state
            _spawn_anew(module, one)
            count += 1
        elif issubclass(type(one), module.RandomState) and one is not own:
            one.seed(list(os.urandom(SEED_BYTES)))
            count += 1
    return count


def _spawn_anew(module: Any, generator: Any) -> None:
    """Children that a generator spawns come from its seed sequence, not from its state; that cannot be replaced."""
    sequence = getattr(generator, "seed_seq", None) or getattr(generator, "_seed_seq", None)
    begin: Any = module.SeedSequence.__init__
    if type(sequence) is module.SeedSequence:
        begin(sequence)  # anew, with entropy from the kernel


def _ssl(module: Any, live: list[Any]) -> int:
    # Reseeds the primary generator; those of all threads notice, and reseed from it before they give anything
    # (providers/implementations/rands/drbg.c compares the parent's reseed count).
    module.RAND_add(os.urandom(SEED_BYTES), float(SEED_BYTES))
    return 1


def _cryptography(module: Any, live: list[Any]) -> int:
    """The package of this name brings an OpenSSL of its own, of which keys are made."""
    openssl = getattr(module, "_openssl", None)
    if not hasattr(getattr(openssl, "lib", None), "RAND_add"):
        raise RuntimeError("this version of `cryptography` has no way to renew its random state")
    seed = os.urandom(SEED_BYTES)
    openssl.lib.RAND_add(seed, len(seed), float(len(seed)))  # type: ignore[union-attr]
    return 1


def _uuid(module: Any, live: list[Any]) -> int:
    """uuid1() without arguments asks libuuid, which keeps its clock sequence and last time in memory that we cannot
    reach: from now on it has a node and a clock sequence of this copy.
    """
    if not hasattr(module, "_generate_time_safe"):
        return 0
    node = int.from_bytes(os.urandom(6), "big") | 1 << 40  # the multicast bit: RFC 9562, section 6.10
    sequence = int.from_bytes(os.urandom(2), "big") & 0x3FFF
    last = [0]

    def generate_time_safe() -> tuple[bytes, None]:
        import time

        ticks = max(time.time_ns() // 100 + 0x01B21DD213814000, last[0] + 1)  # since 1582, in 100 ns
        last[0] = ticks
        fields = (ticks & 0xFFFFFFFF, ticks >> 32 & 0xFFFF, ticks >> 48 & 0xFFF | 0x1000)
        head = fields[0].to_bytes(4, "big") + fields[1].to_bytes(2, "big") + fields[2].to_bytes(2, "big")
        return head + (sequence | 0x8000).to_bytes(2, "big") + node.to_bytes(6, "big"), None

    module._generate_time_safe = generate_time_safe
    for name in ("_last_timestamp", "_last_timestamp_v6", "_last_timestamp_v7"):
        if hasattr(module, name):
            setattr(module, name, None)
    return 1


def _tempfile(module: Any, live: list[Any]) -> int:
    # Names that it has begun to give out; sequences of others hold a random.Random, which has been renewed.
    module._name_sequence = None
    return 1


def _multiprocessing(module: Any, live: list[Any]) -> int:
    """The key by which connections are let in, the folder for sockets, names of semaphores.

    Key and folder only of a process that has no others of its kind: they would not let each other in any more.
    """
    count = 0
    current = module.current_process()
    if module.parent_process() is None and not module._children:
        current.authkey = os.urandom(len(current.authkey))
        current._config.pop("tempdir", None)
        count += 1
    synchronize = sys.modules.get("multiprocessing.synchronize")
    tempfile: Any = sys.modules.get("tempfile")
    if hasattr(synchronize, "SemLock") and hasattr(tempfile, "_RandomNameSequence"):
        synchronize.SemLock._rand = tempfile._RandomNameSequence()  # type: ignore[union-attr]
        count += 1
    return count


#: module → what renews its state. The order matters to those that draw from others while they are renewed.
RENEWERS: dict[str, Callable[[Any, list[Any]], int]] = {
    "_ssl": _ssl,
    "cryptography.hazmat.bindings._rust": _cryptography,
    "random": _random,
    "numpy.random": _numpy,
    "uuid": _uuid,
    "tempfile": _tempfile,
    "multiprocessing.process": _multiprocessing,
}
