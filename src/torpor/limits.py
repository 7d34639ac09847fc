"""Every bound that Torpor puts on what it reads, with its reason.

Images are untrusted input: whatever one of them says about a size or a count is checked against
these before memory is taken for it.
"""

from __future__ import annotations

#: One message. The largest honest ones hold all mappings of a task (60 bytes each, and
#: vm.max_map_count may be raised to a million) or all directories of a cgroup tree.
MESSAGE_BYTES_MAX = 256 << 20

#: All messages of one image, without payloads: what may lie in memory at once when it is read.
#: The pagemap of a 100 GiB process of which every other page is present needs 250 MB.
IMAGE_BYTES_MAX = 1 << 30

#: Messages of one image. More runs of pages than that take minutes just to look at.
IMAGE_ENTRIES_MAX = 1 << 24

#: One payload that is read into memory: what waits in a pipe, a socket or a message queue. None of
#: them holds more than one read(2) can give (MAX_RW_COUNT, include/linux/fs.h); the contents of
#: files may be larger, but are copied, see ImageReader.spans.
PAYLOAD_BYTES_MAX = (1 << 31) - 4096

#: Semaphores of one set: ipc/sem.c takes 32000 (SEMMSL) unless a sysctl says more.
SEMAPHORES_MAX = 65535

#: Snapshots behind one another (`parent`): each costs a directory descriptor while pages are read.
#: Also ends a chain that loops.
PARENTS_MAX = 256

#: Bytes gathered in memory for one image before they go to its file.
WRITE_BUFFER_BYTES = 1 << 20

#: Images up to this size are read in one go, larger ones through a window of that size.
READ_WINDOW_BYTES = 4 << 20

#: End of what a task can map: x86-64 with five-level page tables and the vsyscall page above them
#: all end below 2^64; addresses are checked not to wrap around.
ADDRESS_MAX = 1 << 64

#: Descriptor numbers: fs.nr_open of a kernel at its largest useful setting.
FD_MAX = 1 << 24

#: How far an io_uring's counters may have come. A new ring has to be brought there by as many empty requests, of which
#: a processor does some ten million in a second.
RING_REQUESTS_MAX = 1 << 30
