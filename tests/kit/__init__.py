"""The test kit: programs to be snapshotted, observers of their state, and faults to inject.

Nothing in here uses Torpor's own code to look at a task: what the engine believes about a task must
not decide whether the engine was right. Only :mod:`kit.verbs` (which runs Torpor), :mod:`kit.file_bench` (which runs
one resource of it), :mod:`kit.faults` and :mod:`kit.campaign` (which break it) and :mod:`kit.images` (which changes what
it has written) import it.
"""

from .faults import Faults, for_every_call
from .host import descendants, end_descendants, host_state, start_time, wait_until
from .observe import (
    assert_same,
    diff,
    observe,
    observe_memory,
    observe_settled,
    observe_tree,
)
from .programs import compile_c
from .target import Target, Targets
from .verbs import (
    Again,
    Clone,
    Command,
    CommandResult,
    Library,
    OwnPids,
    Peer,
    Untouched,
    Verbs,
    round_trip,
    run_criu,
    run_torpor,
)

__all__ = [
    "Again",
    "Clone",
    "Command",
    "CommandResult",
    "Faults",
    "Library",
    "OwnPids",
    "Peer",
    "Target",
    "Targets",
    "Untouched",
    "Verbs",
    "assert_same",
    "compile_c",
    "descendants",
    "diff",
    "end_descendants",
    "for_every_call",
    "host_state",
    "observe",
    "observe_memory",
    "observe_settled",
    "observe_tree",
    "round_trip",
    "run_criu",
    "run_torpor",
    "start_time",
    "wait_until",
]
