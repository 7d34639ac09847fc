"""The messages of a POSIX message queue, read from the kernel's memory: there is no call that leaves them in it.

Taking them out and putting them back would not do: a queue that was empty for a moment tells others so (blocked
senders go on, mq_notify(3) fires), and if we died meanwhile the messages would be lost.

Kernel: ipc/mqueue.c (a tree of priorities, a list of messages each), ipc/msgutil.c (a message in pieces of a page)
"""

from __future__ import annotations

import os
import struct

from . import bpf, btf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 4096
_FILE = ("task_struct.files", "files_struct.fdt", "fdtable.fd", "file.f_inode")
_QUEUE = ("mqueue_inode_info.vfs_inode", "mqueue_inode_info.msg_tree", "mqueue_inode_info.notify")
_NODE = ("posix_msg_tree_node.rb_node", "posix_msg_tree_node.msg_list", "posix_msg_tree_node.priority")
_MESSAGE = ("msg_msg.m_list", "msg_msg.m_ts", "msg_msg.next", "msg_msg.security")
_LINKS = ("rb_node.rb_right", "rb_node.rb_left")
_SEGMENT_HEAD = 8  # struct msg_msgseg: the pointer to the next one
_DEPTH_MAX = 64


class Reader:
    """Reads the queues of our own descriptors. Raises KernelError or Unsupported where that is not allowed."""

    def __init__(self) -> None:
        self._at = btf.lookup([*_FILE, *_QUEUE, *_NODE, *_MESSAGE, *_LINKS, "bpf_iter_task()"])
        self._memory = bpf.KernelMemory()
        try:
            self._task = bpf.own_task(self._at["bpf_iter_task()"])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the program."""
        self._memory.close()

    def _info(self, fd: int) -> int:
        at, word = self._at, self._memory.word
        files, table, array, inode = (at[name] for name in _FILE)
        file = word(word(word(word(self._task + files) + table) + array) + 8 * fd)
        return word(file + inode) - at["mqueue_inode_info.vfs_inode"]

    def notify_value(self, fd: int) -> int:
        """The sigev_value that whoever asked to be notified is told."""
        return self._memory.word(self._info(fd) + self._at["mqueue_inode_info.notify"])

    def messages(self, fd: int, count_max: int) -> list[tuple[int, bytes]]:
        """(priority, text) of each message, in the order in which they will be received.

        Nobody is kept from the queue meanwhile: the caller has to see whether it was changed. Raises ValueError
        where what is found makes no sense.
        """
        found: list[tuple[int, bytes]] = []
        for node in self._nodes(self._memory.word(self._info(fd) + self._at["mqueue_inode_info.msg_tree"]), 0):
            head = node + self._at["posix_msg_tree_node.msg_list"]
            (priority,) = struct.unpack("<i", self._memory.read(node + self._at["posix_msg_tree_node.priority"], 4))
            link = self._memory.word(head)
            while link != head:
                if len(found) >= count_max:
                    raise ValueError("the queue has more messages than it said")
                found.append((priority, self._text(link - self._at["msg_msg.m_list"])))
                link = self._memory.word(link)
        return found

    def _nodes(self, place: int, depth: int) -> Iterator[int]:
        """The nodes of the tree, highest priority first."""
        if not place:
            return
        if depth > _DEPTH_MAX:
            raise ValueError("the tree of messages is too deep")
        word, at = self._memory.word, self._at
        yield from self._nodes(word(place + at["rb_node.rb_right"]), depth + 1)
        yield place - at["posix_msg_tree_node.rb_node"]
        yield from self._nodes(word(place + at["rb_node.rb_left"]), depth + 1)

    def _text(self, message: int) -> bytes:
        at = self._at
        left = self._memory.word(message + at["msg_msg.m_ts"])
        if left > 1 << 24:  # HARD_MSGSIZEMAX
            raise ValueError(f"a message of {left} bytes")
        head = at["msg_msg.security"] + 8  # the last field; the text follows
        parts, place, next_at = [], message, message + at["msg_msg.next"]
        while left:
            part = min(left, PAGE - head)
            parts.append(self._memory.read(place + head, part))
            left -= part
            if left:
                place = next_at = self._memory.word(next_at)
                head = _SEGMENT_HEAD
        return b"".join(parts)


def possible() -> bool:
    """May we read the kernel's memory? Asked once for each process."""
    from ..errors import KernelError, Unsupported

    if os.getpid() not in _possible:
        try:
            Reader().close()
            _possible[os.getpid()] = True
        except (KernelError, Unsupported, OSError):
            _possible[os.getpid()] = False
    return _possible[os.getpid()]


_possible: dict[int, bool] = {}
