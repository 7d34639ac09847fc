"""Open files that cannot be dumped: each is named, with a reason and advice."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import pytest

from kit.file_bench import Bench, source
from torpor.errors import KernelError, Unsupported
from torpor.linux.call import buffer, call
from torpor.resources import FileKinds
from torpor.resources.files import refused

TYPE_FD = {
    "io_uring": lambda: call("io_uring_setup", 4, buffer(120)),
    "userfaultfd": lambda: call("userfaultfd", 1),
    "BPF map": lambda: call("bpf", 0, struct.pack("=12I", 2, 4, 8, 1, 0, 0, 0, 0, 0, 0, 0, 0), 48),
    "Landlock": lambda: call("landlock_create_ruleset", struct.pack("=Q", 1), 8, 0),
    "fsopen": lambda: call("fsopen", b"tmpfs\0", 0),
    "memfd_secret": lambda: call("memfd_secret", 0),
    "virtual machines": lambda: os.open("/dev/kvm", os.O_RDWR),
    "tunnel": lambda: os.open("/dev/net/tun", os.O_RDWR),
}


@pytest.mark.parametrize("name", TYPE_FD)
def test_it_is_named_before_anything_is_frozen(name: str) -> None:
    make: Callable[[], int] = TYPE_FD[name]
    try:
        fd = make()
    except (KernelError, FileNotFoundError):
        assert name in ("memfd_secret", "Landlock", "virtual machines", "tunnel"), (
            "every kernel has this"
        )
        return
    with Bench() as bench:
        one = source(fd, 1)
        found = bench.kinds.find(one)
        for verb in (found.check, found.dump):
            with pytest.raises(Unsupported, match=name) as caught:
                verb(one, bench.dumping)
            assert caught.value.hint
            assert str(caught.value).startswith(f"fd {fd} ({os.readlink(f'/proc/self/fd/{fd}')}): ")
    os.close(fd)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_VSOCK, socket.SOCK_STREAM),
    ],
)
def test_sockets_are_not_supported_yet(family: int, kind: int) -> None:
    refuses = pytest.raises(Unsupported, match="not supported yet")
    with socket.socket(family, kind) as one, Bench() as bench, refuses:
        bench.check(one.fileno())


def test_a_perf_event_and_a_seccomp_listener_are_named() -> None:
    for link, name in (
        ("anon_inode:[perf_event]", "perf"),
        ("anon_inode:seccomp notify", "seccomp"),
        ("anon_inode:bpf_link", "bpf"),
        ("anon_inode:kvm-vcpu:0", "virtual machine"),
        ("anon_inode:[made-up]", "does not know"),
    ):
        assert name in str(refused.reason(look_alike(link)))


def look_alike(link: str) -> object:
    class Source:
        fd, pid = 3, 1
        stat = os.stat_result((0o600, 1, 1, 1, 0, 0, 0, 0, 0, 0))

    Source.link = link  # type: ignore[attr-defined]
    return Source()


def test_what_other_modules_restore_is_not_refused() -> None:
    """Refused is asked last, and by no exact link that another module has."""
    kinds = FileKinds()
    for link, resources in kinds.by_link.items():
        if link not in refused.RESOURCE.LINKS:
            assert refused.RESOURCE not in resources
    for resources in kinds.by_mode.values():
        assert resources[-1] is refused.RESOURCE
