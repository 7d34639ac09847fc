"""Finding a task's pages on kernels without PAGEMAP_SCAN, measured by PAGEMAP_SCAN where it is there."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import pytest

from kit import Library, Targets
from torpor.engine import find_pages
from torpor.linux import kernel

from .conftest import Survives

PROGRAM = """
#define PAGE 4096ul
#define RW (PROT_READ | PROT_WRITE)

static char *map(size_t pages, int prot, int flags, int fd)
{
	char *place = mmap(NULL, pages * PAGE, prot, flags, fd, 0);

	CHECK(place != MAP_FAILED);
	return place;
}

int main(void)
{
	char *text = map(200, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1), *hidden, *huge, *file, *zeros;
	int fd = MUST(open("data", O_CREAT | O_RDWR, 0600));
	unsigned long sum = 0;

	fill(text, 200 * PAGE, 1);
	CHECK_EQ(write(fd, text, 200 * PAGE), 200 * PAGE);
	file = map(200, RW, MAP_PRIVATE, fd);
	fill(file + 7 * PAGE, 3 * PAGE, 2);  /* copied; around it, the file */
	sum += file[5 * PAGE] + file[150 * PAGE];
	zeros = map(1000, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	MUST(madvise(zeros, 1000 * PAGE, MADV_NOHUGEPAGE));
	for (int i = 0; i < 1000; i++)
		sum += zeros[i * PAGE];  /* read, never written */
	fill(zeros + 300 * PAGE, 2 * PAGE, 3);
	memset(zeros + 500 * PAGE, 0, PAGE);  /* written, with zeros: a page like any other */
	hidden = map(10, RW, MAP_PRIVATE | MAP_ANONYMOUS, -1);
	fill(hidden, 10 * PAGE, 4);
	MUST(mprotect(hidden, 10 * PAGE, PROT_NONE));
	huge = map(1ul << 21, RW, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);  /* 8 GiB, two pages at chunk borders */
	MUST(madvise(huge, PAGE << 21, MADV_NOHUGEPAGE));
	huge[((1ul << 17) - 1) * PAGE] = huge[(1ul << 20) * PAGE] = 5;
	ready();
	wait_told("go");
	CHECK(filled(text, 200 * PAGE, 1) && filled(file + 7 * PAGE, 3 * PAGE, 2) && zeroed(zeros, 300 * PAGE));
	CHECK(memcmp(file, text, 7 * PAGE) == 0 && memcmp(file + 10 * PAGE, text + 10 * PAGE, 190 * PAGE) == 0);
	CHECK(filled(zeros + 300 * PAGE, 2 * PAGE, 3) && zeroed(zeros + 302 * PAGE, 698 * PAGE));
	MUST(mprotect(hidden, 10 * PAGE, PROT_READ));
	CHECK(filled(hidden, 10 * PAGE, 4));
	CHECK(huge[((1ul << 17) - 1) * PAGE] == 5 && huge[(1ul << 20) * PAGE] == 5 && huge[0] == 0);
	pass();
}
"""


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not know the ioctl."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.setattr(kernel, "pagemap_scan", refuse)


@pytest.mark.usefixtures("old_kernel")
@pytest.mark.parametrize("verbs", [Library()], ids=["library"])
def test_all_comes_back(survives: Survives, verbs: Library) -> None:
    survives(PROGRAM)


def test_it_finds_what_a_scan_finds(
    start: Targets, library: Library, images: str, request: pytest.FixtureRequest
) -> None:
    target = start.c(PROGRAM)
    stored = []
    for way in ("new", "old"):
        if way == "old":
            request.getfixturevalue("old_kernel")
        folder = os.path.join(images, way)
        os.mkdir(folder)
        library.dump(target.pid, folder, leave_running=True)
        with open(os.path.join(folder, f"pagemap-{target.pid}.img"), "rb") as file:
            stored.append(file.read())
    assert stored[0] == stored[1]


def test_a_kernel_that_does_not_know_guard_regions_is_not_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux 6.7 to 6.15 answer EINVAL to the category."""
    real, refused = fcntl.ioctl, []

    def ioctl(fd: int, request: int, arg: kernel.pm_scan_arg) -> int:
        if arg.return_mask & kernel.PM_GUARD:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return int(real(fd, request, arg))

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    with mmap.mmap(-1, 8 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area, open("/proc/self/pagemap") as file:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        area[4096] = area[2 * 4096] = 1
        start = kernel.writable_address(area)
        present = kernel.PM_PRESENT
        found = kernel.pagemap_scan(
            file.fileno(), start, start + 8 * 4096, anyof=present, wanted=present | kernel.PM_GUARD
        )
        with pytest.raises(OSError, match="Invalid"):
            kernel.pagemap_scan(file.fileno(), start + 1, start + 4096, anyof=present, wanted=present)
    assert found == [(start + 4096, start + 3 * 4096, present)]
    assert refused


def test_the_page_of_zeros() -> None:
    number = find_pages.zero_frame()
    assert number
    with mmap.mmap(-1, 8 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area.madvise(mmap.MADV_NOHUGEPAGE)
        assert area[0] == 0
        area[4096] = 1
        address = kernel.writable_address(area)
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            read, written = memoryview(os.pread(file.fileno(), 16, address // 4096 * 8)).cast("Q")
    assert read & (1 << 55) - 1 == number
    assert written & (1 << 55) - 1 != number
