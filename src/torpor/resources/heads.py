"""The heads of the modules in ``files`` and ``memory``: what tells kinds of files and mappings apart, to be known
without loading them. Made by tools/make_heads.py.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import FileHead, MappingHead

FILES: dict[str, FileHead] = {
    "bpfmap": (19, "bpf", ("anon_inode:bpf-map",), (), 50, False),
    "eventfd": (6, "efd", ("anon_inode:[eventfd]",), (), 50, True),
    "eventpoll": (7, "epfd", ("anon_inode:[eventpoll]",), (), 50, True),
    "external": (16, "ext", (), (), 50, False),
    "fanotify": (12, "ffy", ("anon_inode:[fanotify]",), (), 50, False),
    "fifo": (3, "fifo", (), (4096,), 30, False),
    "inet": (4, "isk", (), (49152,), 30, False),
    "inotify": (8, "ify", ("anon_inode:inotify",), (), 50, False),
    "io_uring": (1000, "uring", ("anon_inode:[io_uring]",), (), 50, False),
    "memfd": (18, "memfd", (), (32768,), 5, False),
    "mqueue": (1010, "mq", (), (32768,), 4, False),
    "namespace": (14, "nsf", (), (32768,), 3, False),
    "netlink": (13, "nlsk", (), (49152,), 40, False),
    "packet": (10, "psk", (), (49152,), 50, False),
    "pidfd": (20, "pidfd", ("anon_inode:[pidfd]",), (), 50, False),
    "pipe": (2, "pipe", (), (4096,), 20, False),
    "refused": (0, "", ("/secretmem (deleted)",), (32768, 16384, 40960, 8192, 24576, 4096, 49152, 0), 100, False),
    "regular": (1, "reg", (), (32768, 16384, 40960, 8192, 24576, 4096, 49152), 10, False),
    "signalfd": (9, "sgfd", ("anon_inode:[signalfd]",), (), 50, True),
    "timerfd": (17, "tfd", ("anon_inode:[timerfd]",), (), 50, True),
    "tty": (11, "tty", (), (8192,), 20, False),
    "tun": (15, "tunf", (), (8192,), 20, False),
    "unix": (5, "usk", (), (49152,), 20, False),
    "userfaultfd": (1008, "uffd", ("anon_inode:[userfaultfd]",), (), 50, False),
    "vsock": (1009, "vsock", (), (49152,), 60, False),
}
MEMORY: dict[str, MappingHead] = {
    "aio": (("aio",), 8192, 0, 50),
    "anonymous": (("anon", "heap", "stack", "named", "hugepage"), 512, 4104, 50),
    "file_mapping": (("file",), 192, 18432, 50),
    "io_uring": (("anon_inode",), 16777216, 0, 50),
    "packet_ring": (("socket",), 2048, 0, 50),
    "shared": (("shmem", "memfd", "named_shmem", "hugepage"), 16384, 0, 60),
    "sysv": (("sysv",), 1024, 0, 50),
    "vdso": (("vdso", "vvar", "vvar_vclock", "vsyscall"), 4108, 0, 10),
}
