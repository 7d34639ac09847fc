"""The SEM_UNDO adjustments of a task, read from the kernel's memory: there is no call that tells them.

Kernel: ipc/sem.c (struct sem_undo_list, struct sem_undo)
"""

from __future__ import annotations

import struct

from . import bpf, btf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_QUESTIONS = (
    "task_struct.sysvsem", "sysv_sem.undo_list", "sem_undo_list.list_proc", "sem_undo.list_proc", "sem_undo.semid",
    "sem_undo.semadj", "bpf_iter_task()",
)  # fmt: skip
_SETS_MAX = 1 << 16


class Reader:
    """Reads the lists of any number of threads. Raises KernelError or Unsupported where that is not allowed."""

    def __init__(self) -> None:
        self._at = at = btf.lookup(_QUESTIONS)
        place = bpf.Place(at["task_struct.sysvsem"] + at["sysv_sem.undo_list"], 8)
        self._tasks = bpf.TaskReader(at["bpf_iter_task()"], [place])
        try:
            self._memory = bpf.KernelMemory()
        except BaseException:
            self._tasks.close()
            raise

    def close(self) -> None:
        """Drop the programs."""
        self._tasks.close()
        self._memory.close()

    def list_of(self, tid: int) -> int:
        """What identifies a thread's list, which others may share; 0 if it has none."""
        record = self._tasks.read(tid)
        return 0 if record is None else int.from_bytes(record.fields[0], "little")

    def adjustments(self, which: int, sizes: Mapping[int, int]) -> list[tuple[int, int, int]]:
        """(semid, number, adjustment) of a list, without zeros; ``sizes`` are the numbers of semaphores by semid.

        Raises ValueError where what is found makes no sense.
        """
        at, word = self._at, self._memory.word
        head = which + at["sem_undo_list.list_proc"]
        found: list[tuple[int, int, int]] = []
        link, count = word(head), 0
        while link != head:
            count += 1
            if count > _SETS_MAX:
                raise ValueError("the list of adjustments does not end")
            undo = link - at["sem_undo.list_proc"]
            (semid,) = struct.unpack("<i", self._memory.read(undo + at["sem_undo.semid"], 4))
            size = sizes.get(semid, 0)  # -1: the set was removed
            if size:
                place = undo + at["sem_undo.semadj"]
                # Once a pointer: it lay eight bytes behind semid, and the array itself lies four behind it.
                if at["sem_undo.semadj"] % 8 == 0:
                    place = word(place)
                values = struct.unpack(f"<{size}h", self._memory.read(place, 2 * size))
                found += [(semid, number, value) for number, value in enumerate(values) if value]
            link = word(link)
        return found
