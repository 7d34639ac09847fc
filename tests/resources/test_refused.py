"""Open files that cannot be dumped: each is named, with a reason and advice."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable

import pytest

from kit import Library, Targets
from kit.file_bench import Bench, source
from kit.files import slurp_text
from torpor.errors import Unsupported
from torpor.linux.call import buffer, call
from torpor.resources import load
from torpor.resources.files import refused

TYPE_FD = {
    "io_uring": lambda: call("io_uring_setup", 4, buffer(120)),
    "ring buffer": lambda: call("bpf", 0, struct.pack("=12I", 27, 0, 0, 4096, 0, 0, 0, 0, 0, 0, 0, 0), 48),
    "Landlock": lambda: call("landlock_create_ruleset", struct.pack("=Q", 1), 8, 0),
    "fsopen": lambda: call("fsopen", b"tmpfs\0", 0),
    "memfd_secret": lambda: call("memfd_secret", 0),
    "virtual machine": lambda: fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0),
    "FUSE": lambda: os.open("/dev/fuse", os.O_RDWR),
    "short latency": lambda: os.open("/dev/cpu_dma_latency", os.O_RDWR),
    "perf_event_open": lambda: call("perf_event_open", struct.pack("=IIQ112x", 1, 128, 1), 0, -1, -1, 0),
    "AF_XDP": lambda: call("socket", 44, 3, 0),
}


@pytest.mark.parametrize("name", TYPE_FD)
def test_it_is_named_before_anything_is_frozen(name: str) -> None:
    make: Callable[[], int] = TYPE_FD[name]
    try:
        fd = make()
    except OSError as error:
        assert name not in ("io_uring", "ring buffer", "fsopen"), "every kernel has this"
        pytest.skip(f"not here: {error}")
    with Bench() as bench:
        one = source(fd, 1)
        found = bench.kinds.find(one)
        for verb in (found.check, found.dump):
            with pytest.raises(Unsupported, match=name) as caught:
                verb(one, bench.dumping)
            assert caught.value.hint
            assert str(caught.value).startswith(f"fd {fd} ({os.readlink(f'/proc/self/fd/{fd}')}): ")
    os.close(fd)


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
    own = refused.RESOURCE
    for resource in load("files"):
        if resource is not own:
            assert not set(resource.LINKS) & set(own.LINKS)
            assert resource.PRIORITY < own.PRIORITY and set(resource.MODES) <= set(own.MODES)


@pytest.mark.parametrize("path", ["loop-control", "btrfs-control", "hwrng", "kvm", "vsock", "userfaultfd", "autofs"])
def test_devices_that_keep_nothing_are_opened_again(path: str) -> None:
    try:
        fd = os.open(f"/dev/{path}", os.O_RDWR if path == "kvm" else os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        pytest.skip(f"not here: {error}")
    with Bench() as bench:
        bench.check(fd)
        number = bench.dump(fd)
        bench.commit()
        copy = bench.build(number)
        assert os.fstat(copy).st_rdev == os.fstat(fd).st_rdev
        assert fcntl.fcntl(copy, fcntl.F_GETFL) == fcntl.fcntl(fd, fcntl.F_GETFL)
        if path == "kvm":
            assert fcntl.ioctl(copy, 0xAE00, 0) == 12  # KVM_GET_API_VERSION
    os.close(fd)


def test_what_is_mapped_is_named_too(start: Targets, library: Library, images: str) -> None:
    target = start.c(
        "#include <linux/perf_event.h>\nint main(void) { struct perf_event_attr a = {.type = 1, .size = sizeof(a), .config = 0};"
        "int fd = syscall(SYS_perf_event_open, &a, 0, -1, -1, 0); if (fd < 0) { ready(); pause(); }"
        "void *m = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); CHECK(m != MAP_FAILED); close(fd);"
        'ready(); wait_told("go"); pass(); }'
    )
    if "perf_event" not in slurp_text(f"/proc/{target.pid}/maps"):
        pytest.skip("perf_event_open is not allowed here")
    with pytest.raises(Unsupported, match="perf_event_open") as caught:
        library.dump(target.pid, images)
    assert "detach perf" in str(caught.value)
    target.go()
