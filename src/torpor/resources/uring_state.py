"""What the kernel knows about an io_uring and shows nowhere, read from struct io_ring_ctx by BPF.

fdinfo has the counters and the completions that did not fit (io_uring/fdinfo.c); flags, registered files, buffers and
eventfd, and how many requests are under way stand in the structure alone. Kernel: include/linux/io_uring_types.h.
"""

from __future__ import annotations

import struct

from ..errors import Unsupported
from ..linux import bpf, btf
from ..linux.kernel_memory import KernelMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .uring_requests import Reader, Request

#: Fields of the structure: what it is for us → (path, bytes).
FIELDS = {
    "flags": ("flags", 4),
    "submitter": ("submitter_task", 8),
    "clockid": ("clockid", 4),
    "idle": ("sq_thread_idle", 4),
    "sq_head": ("cached_sq_head", 4),
    "sq_entries": ("sq_entries", 4),
    "files": ("file_table.data.nr", 4),
    "file_nodes": ("file_table.data.nodes", 8),
    "buffers": ("buf_table.nr", 4),
    "buffer_nodes": ("buf_table.nodes", 8),
    "provided": ("io_bl_xa.xa_head", 8),
    "cancel_table": ("cancel_table.hbs", 8),
    "cancel_bits": ("cancel_table.hash_bits", 4),
    "cq_tail": ("cached_cq_tail", 4),
    "cq_timeouts": ("cq_timeouts", 4),
    "cq_entries": ("cq_entries", 4),
    "eventfd": ("io_ev_fd", 8),
    "sq_data": ("sq_data", 8),
    "alloc_start": ("file_alloc_start", 4),
    "alloc_end": ("file_alloc_end", 4),
    "restricted": ("restrictions.registered", 1),
    "personalities": ("personalities.xa_head", 8),
    "mm": ("mm_account", 8),
    "bounded": ("iowq_limits", 4),
}
#: Fields that not all kernels have.
OPTIONAL = {
    "zcrx": ("zcrx_ctxs.xa_head", 8),
    "napi": ("napi_track_mode", 1),
    "napi_enabled": ("napi_enabled", 1),  # up to v6.12
    "region": ("param_region.ptr", 8),
    "ring_pages": ("ring_region.pages", 8),
    "sqe_pages": ("sq_region.pages", 8),
    "ring_pages_before": ("ring_pages", 8),  # v6.13
    "sqe_pages_before": ("sqe_pages", 8),
}
#: What is asked about other structures.
OTHERS = """
    task_struct.pid task_struct.tgid task_struct.mm task_struct.files task_struct.io_uring files_struct.fdt
    fdtable.fd file.private_data io_uring_task.cached_refs io_uring_task.inflight.count
    io_uring_task.inflight.counters io_uring_task.registered_rings io_tctx_node.task io_ring_ctx.tctx_list
    io_rsrc_node.tag io_rsrc_node.file_ptr io_rsrc_node.buf io_rsrc_node{} io_mapped_ubuf.ubuf io_mapped_ubuf.len
    io_mapped_ubuf.refs io_mapped_ubuf.is_kbuf io_mapped_ubuf{} io_ev_fd.cq_ev_fd io_ev_fd.eventfd_async
    io_sq_data.sq_cpu io_sq_data.thread io_hash_bucket{} io_uring_task{} io_ring_ctx{} page{}
""".split()
REGISTERED_RINGS = 16  # IO_RINGFD_REG_MAX
NAPI_INACTIVE = 255


class User:
    """A thread that has used a ring: the address of its struct io_uring_task, how many requests of it have not ended,
    and the struct file, or 0, at each place of its own table of rings (IORING_REGISTER_RING_FDS).
    """

    __slots__ = ("context", "rings", "tid", "under_way")

    def __init__(self, tid: int, context: int, under_way: int, rings: list[int]) -> None:
        self.tid = tid
        self.context = context
        self.under_way = under_way
        self.rings = rings


class State:
    """One ring. Addresses are the kernel's; what they stand for has to be found among the tree's tasks."""

    __slots__ = ("address", "buffers", "eventfd", "eventfd_async", "files", "numbers", "sq_cpu", "submitter")

    def __init__(self, address: int, numbers: dict[str, int]) -> None:
        self.address = address
        self.numbers = numbers
        #: (address of the struct file or 0, tag) and (address, bytes, tag; 0, 0 for an empty place)
        self.files: list[tuple[int, int]] = []
        self.buffers: list[tuple[int, int, int]] = []
        #: The address of the eventfd_ctx, and is it told only of what completes later?
        self.eventfd = 0
        self.eventfd_async = False
        #: The thread that alone may submit.
        self.submitter = 0
        self.sq_cpu = 0

    @property
    def flags(self) -> int:
        """IORING_SETUP_*"""
        return self.numbers["flags"]

    @property
    def ring_pages(self) -> int:
        """The address of the array of the pages that the rings lie in, if the program has given them."""
        return self.numbers["ring_pages"] or self.numbers["ring_pages_before"]

    @property
    def sqe_pages(self) -> int:
        """The same for the submission entries."""
        return self.numbers["sqe_pages"] or self.numbers["sqe_pages_before"]


class Kernel:
    """Reads rings."""

    def __init__(self, processors: int) -> None:
        """Raises Unsupported or KernelError where the kernel does not let itself be read."""
        self.memory = KernelMemory()
        fields = {name: f"io_ring_ctx.{path}" for name, (path, _) in FIELDS.items()}
        fields |= {name: f"io_ring_ctx.{path}?" for name, (path, _) in OPTIONAL.items()}
        answers = btf.lookup([*fields.values(), *OTHERS])
        self.at = {name: answers[question] for name, question in fields.items()} | answers
        self._offsets = self.memory.per_cpu_offsets(processors)
        self._requests: Reader | None = None

    def files_of(self, pid: int, fds: Iterable[int]) -> dict[int, int]:
        """fd → address of the struct file, for descriptors of a task."""
        fds = list(fds)
        way = (self.at["task_struct.files"], self.at["files_struct.fdt"])
        (data,) = self.memory.walk([bpf.Place(self.at["fdtable.fd"], 8, through=way)], pid)
        table = int.from_bytes(data, "little")
        return dict(zip(fds, self.memory.words(table + 8 * fd for fd in fds), strict=True))

    def private_data(self, files: Iterable[int]) -> list[int]:
        """What the kernel keeps for each struct file: the ring, the eventfd_ctx, …"""
        return self.memory.words(file + self.at["file.private_data"] for file in files)

    def read(self, addresses: Sequence[int]) -> list[State]:
        """The rings at the addresses."""
        size = self.at["io_ring_ctx{}"]
        structs = self.memory.read((address, size) for address in addresses)
        states = [State(*found) for found in zip(addresses, map(self._numbers, structs), strict=True)]
        parts = iter(self.memory.read(span for state in states for span in self._parts(state.numbers)))
        for state in states:
            state.submitter, state.eventfd, later, state.sq_cpu = (
                int.from_bytes(next(parts), "little") for _ in range(4)
            )
            state.eventfd_async = bool(later & 1)
            for node in self._nodes(state.numbers["file_nodes"], state.numbers["files"]):
                file, tag = (self._word(node, f"io_rsrc_node.{name}") for name in ("file_ptr", "tag"))
                state.files.append((file & ~7, tag))
            self._read_buffers(state)
        return states

    def _numbers(self, data: bytes) -> dict[str, int]:
        numbers = {}
        for name, (_, size) in {**FIELDS, **OPTIONAL}.items():
            at = self.at[name]
            numbers[name] = int.from_bytes(data[at : at + size], "little") if at >= 0 else 0
        at = self.at["bounded"] + 4
        numbers["unbounded"] = int.from_bytes(data[at : at + 4], "little")
        if self.at["napi"] >= 0:
            numbers["napi_enabled"] = int(numbers["napi"] != NAPI_INACTIVE)
        return numbers

    def _parts(self, numbers: dict[str, int]) -> list[tuple[int, int]]:
        """The spans of what is reached from a ring; nothing where there is none."""
        wanted = (
            ("submitter", "task_struct.pid", 4), ("eventfd", "io_ev_fd.cq_ev_fd", 8),
            ("eventfd", "io_ev_fd.eventfd_async", 1), ("sq_data", "io_sq_data.sq_cpu", 4),
        )  # fmt: skip
        return [
            (numbers[start] + self.at[question], size) if numbers[start] else (0, 0)
            for start, question, size in wanted
        ]

    def _nodes(self, table: int, count: int) -> list[bytes]:
        """The nodes of a table of registered things; zeros for empty places."""
        size = self.at["io_rsrc_node{}"]
        pointers = self.memory.words(table + 8 * index for index in range(count)) if count else []
        found = iter(self.memory.read((pointer, size) for pointer in pointers if pointer))
        return [next(found) if pointer else bytes(size) for pointer in pointers]

    def _read_buffers(self, state: State) -> None:
        nodes = self._nodes(state.numbers["buffer_nodes"], state.numbers["buffers"])
        pointers = [self._word(node, "io_rsrc_node.buf") for node in nodes]
        size = self.at["io_mapped_ubuf{}"]
        found = iter(self.memory.read((pointer, size) for pointer in pointers if pointer))
        for node, pointer in zip(nodes, pointers, strict=True):
            data = next(found) if pointer else bytes(size)
            if data[self.at["io_mapped_ubuf.is_kbuf"]]:
                raise Unsupported("a driver's buffer is registered with it", hint="unregister it before the dump")
            if pointer and struct.unpack_from("<I", data, self.at["io_mapped_ubuf.refs"])[0] != 1:
                raise Unsupported("it shares registered buffers with another ring", hint="unregister them first")
            length = struct.unpack_from("<I", data, self.at["io_mapped_ubuf.len"])[0]
            state.buffers.append(
                (self._word(data, "io_mapped_ubuf.ubuf"), length, self._word(node, "io_rsrc_node.tag"))
            )

    def _word(self, data: bytes, question: str) -> int:
        return int(struct.unpack_from("<Q", data, self.at[question])[0])

    # ------------------------------------------------------------------------- what is under way

    def users(self, addresses: Sequence[int]) -> list[list[User]]:
        """Who has used each ring, with all requests that have not ended: a thread's are counted for all its rings.

        io_uring/tctx.c; tctx_inflight() counts in the same way.
        """
        offset = self.at["io_ring_ctx.tctx_list"]
        tasks: list[list[int]] = [[] for _ in addresses]
        # The thread that polls a ring submits for all, and is not in the list.
        words = self.memory.words(
            address + at for address in addresses for at in (offset, self.at["sq_data"])
        )
        at = {index: node for index, node in enumerate(words[::2]) if node not in (0, addresses[index] + offset)}
        polling = [(index, data) for index, data in enumerate(words[1::2]) if data]
        threads = self.memory.words(data + self.at["io_sq_data.thread"] for _, data in polling)
        for (index, _), thread in zip(polling, threads, strict=True):
            tasks[index] += [thread] if thread else []
        while at:
            task_at = self.at["io_tctx_node.task"]
            words = self.memory.words(node + plus for node in at.values() for plus in (0, task_at))
            for index, task in zip(at, words[1::2], strict=True):
                tasks[index] += [task] if task else []
            following = zip(at, words[::2], strict=True)
            at = {index: node for index, node in following if node not in (0, addresses[index] + offset)}
        known = self._contexts(sorted({task for some in tasks for task in some}))
        return [[known[task] for task in some if task in known] for some in tasks]

    def _contexts(self, tasks: list[int]) -> dict[int, User]:
        """struct io_uring_task of each task that has one."""
        data = self.memory.read(
            span
            for task in tasks
            for span in ((task + self.at["task_struct.pid"], 4), (task + self.at["task_struct.io_uring"], 8))
        )
        numbers = [int.from_bytes(one, "little") for one in data]
        size = self.at["io_uring_task{}"]
        structs = self.memory.read((context, size) for context in numbers[1::2])
        counters = [self._word(one, "io_uring_task.inflight.counters") if one else 0 for one in structs]
        places = [
            (pointer + offset & (1 << 64) - 1 if pointer else 0, 4) for pointer in counters for offset in self._offsets
        ]
        parts = [int.from_bytes(part, "little", signed=True) for part in self.memory.read(places)]
        users = {}
        for index, (task, tid, context, one) in enumerate(
            zip(tasks, numbers[::2], numbers[1::2], structs, strict=True)
        ):
            if not one:
                continue
            (cached,) = struct.unpack_from("<i", one, self.at["io_uring_task.cached_refs"])
            (count,) = struct.unpack_from("<q", one, self.at["io_uring_task.inflight.count"])
            own = parts[index * len(self._offsets) : (index + 1) * len(self._offsets)]
            table = struct.unpack_from(f"<{REGISTERED_RINGS}Q", one, self.at["io_uring_task.registered_rings"])
            users[task] = User(tid, context, count + sum(own) - cached, list(table))
        return users

    def waiting(self, state: State) -> list[Request]:
        """The requests that wait for an event or for their time, as far as the kernel lists them."""
        from .uring_requests import Reader

        if self._requests is None:
            self._requests = Reader(self)
        return self._requests.read(state)

    def memory_of(self, pid: int) -> int:
        """The address of a task's mm_struct, as in State.numbers["mm"]."""
        return int.from_bytes(self.memory.walk([bpf.Place(self.at["task_struct.mm"], 8)], pid)[0], "little")
