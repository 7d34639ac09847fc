"""Fixtures for all tests. What they hand out is in ``kit``.

Every process that a test starts through them is ended after it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator

import hypothesis
import pytest

from kit import Again, Clone, Command, CommandResult, Library, OwnPids, Peer, Targets, Untouched, Verbs, run_criu
from kit.host import become_subreaper, descendants, end_descendants

# The same examples in every run, so that a run says something about a change; others in a campaign. No limit of time: a
# busy machine is no defect.
hypothesis.settings.register_profile(
    "torpor",
    deadline=None,
    derandomize="TORPOR_CAMPAIGN" not in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("torpor")


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """As in a shell's foreground: a job in the background starts with SIGINT ignored, nohup(1) with SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def subreaper() -> None:
    """Whatever escapes from its parent becomes our child, so that it is seen and can be reaped."""
    become_subreaper()


@pytest.fixture
def start() -> Iterator[Targets]:
    """Starts programs to be snapshotted: ``start.c(source)``, ``.python(source)``, ``.command(*argv)``.

    Their folders are open to other users, since some of them change who they are.
    """
    with tempfile.TemporaryDirectory(prefix="targets-") as folder:
        os.chmod(folder, 0o755)
        targets = Targets(folder)
        yield targets
        targets.end()


@pytest.fixture
def ends_all() -> Iterator[None]:
    """Ends every process that the test leaves behind."""
    keep = set(descendants(os.getpid()))
    yield
    end_descendants(keep)


@pytest.fixture
def images() -> Iterator[str]:
    """An empty folder for images, in memory where the machine has /dev/shm."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="images-", dir=place) as folder:
        yield folder


@pytest.fixture(params=os.environ.get("TORPOR_TEST_VIA", "library,command").split(","))
def verbs(request: pytest.FixtureRequest) -> Verbs:
    """Dump and restore as users do: a test with this fixture runs once with each way.

    TORPOR_TEST_VIA chooses the ways. ``untouched`` does nothing: every test has to pass that way.
    ``criu:PATH`` is CRIU itself: what it does not pass is either something that only Torpor can do,
    or a test that is wrong. ``own-pids``: as a library, into a pid namespace for each restore; ``clone``: from a template;
    ``again``: that copy is dumped and cloned once more.
    """
    way, _, path = request.param.partition(":")
    if way == "criu":
        return Peer(path)
    kinds: dict[str, type[Verbs]] = {k.name: k for k in (Library, Command, Untouched, OwnPids, Clone, Again)}
    return kinds[way]()


@pytest.fixture
def library() -> Library:
    return Library()


@pytest.fixture
def command() -> Command:
    return Command()


@pytest.fixture
def criu_cmd() -> Callable[..., CommandResult]:
    """Runs ``torpor criu VERB`` on an images folder: ``criu_cmd("dump", images, "-t", pid)``."""
    return run_criu
