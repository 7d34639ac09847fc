"""Many system calls at once do what they do one by one; what fails is named, and what went before it has been done."""

from __future__ import annotations

import errno
import os
import socket
import struct

import pytest

from torpor.errors import KernelError
from torpor.linux import call as gate
from torpor.remote.many import AT_ONCE, Block, Many, parts

SEEK_SET, SEEK_CUR = 0, 1


@pytest.fixture
def files(tmp_path) -> list[int]:
    made = [os.open(tmp_path / f"file{number}", os.O_CREAT | os.O_RDWR) for number in range(5)]
    yield made
    for fd in made:
        os.close(fd)


def test_each_row_has_its_own_arguments_and_result(files: list[int]) -> None:
    many = Many()
    moved = many.calls("lseek", files, [10, 20, 30, 40, 50], SEEK_SET)
    further = many.calls("lseek", files, 7, SEEK_CUR)
    many.run()
    assert moved.results == [10, 20, 30, 40, 50]
    assert further.results == [17, 27, 37, 47, 57]
    assert [os.lseek(fd, 0, SEEK_CUR) for fd in files] == further.results


def test_the_kernel_reads_and_writes_what_was_placed(files: list[int]) -> None:
    many = Many()
    text = many.place(b"abcdefghij")
    found = many.area(bytes(4 * len(files)))
    many.calls("pwrite64", files, [text + at for at in range(5)], 4, 0)
    at = range(found.address, found.address + 4 * len(files), 4)
    many.calls("pread64", files, at, 4, 0)
    many.run()
    assert found.content == b"abcdbcdecdefdefgefgh"


def test_the_first_that_fails_is_the_last_that_is_made(files: list[int]) -> None:
    many = Many()
    one = many.calls("lseek", files[:2], 5, SEEK_SET)
    other = many.calls("lseek", [files[2], -1 & 0xFFFFFFFF, files[3]], 5, SEEK_SET)
    with pytest.raises(KernelError, match="lseek: Bad file descriptor"):
        many.run()
    assert (one.results, other.results) == ([5, 5], [5])
    assert [os.lseek(fd, 0, SEEK_CUR) for fd in files] == [5, 5, 5, 0, 0]


def test_it_goes_on_where_an_error_is_tolerated(files: list[int]) -> None:
    many = Many()
    many.calls("lseek", [files[0], 9999, files[1], 9998], 5, SEEK_SET)
    seen = []

    def failed(block: Block, row: int, error: KernelError) -> None:
        seen.append((block.name, row, error.errno))

    many.run(failed)
    assert seen == [("lseek", 1, errno.EBADF), ("lseek", 3, errno.EBADF)]
    assert [os.lseek(fd, 0, SEEK_CUR) for fd in files[:2]] == [5, 5]


def test_errors_beyond_63_are_told() -> None:
    made = socket.socket()
    many = Many()
    many.calls("getsockopt", [made.fileno()], 6, 9999, many.place(bytes(4)), many.place(struct.pack("I", 4)))
    with pytest.raises(KernelError, match="Protocol not available"):
        many.run()
    made.close()


def test_each_call_can_be_made_to_fail(files: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fault(name: str) -> None:
        asked.append(name)
        if len(asked) == 8:
            raise KernelError(name, errno.ENOMEM)

    monkeypatch.setattr(gate, "fault", fault)
    many = Many()
    many.calls("lseek", files, 5, SEEK_SET)
    many.calls("fsync", files)
    with pytest.raises(KernelError, match="fsync"):
        many.run()
    assert asked == ["lseek"] * 5 + ["fsync"] * 3


def test_parts() -> None:
    assert [len(some) for some in parts(range(2 * AT_ONCE + 1))] == [AT_ONCE, AT_ONCE, 1]
    assert list(parts([])) == []
