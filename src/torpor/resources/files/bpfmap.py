"""BPF maps with plain content: tables and arrays, those with a value for each CPU and those that forget included.

Image: file_entry.bpf (bpfmap_file_entry), the content in bpfmap-data. The restored map is a new one. Programs that
used the old one go on using that: they live in the kernel, not in the tasks. Kernel: kernel/bpf/syscall.c
"""

from __future__ import annotations

import os

from ...errors import ImageError, KernelError, Unsupported, doing
from ...images import schema as pb
from ...linux import bpf_map
from ..base import FileResource, unsupported
from ..fown import with_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LRU_PERCPU_HASH, LPM_TRIE = 1, 2, 5, 6, 9, 10, 11
PLAIN = (HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH, LRU_PERCPU_HASH, LPM_TRIE)
_PER_CPU = (PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH)
#: include/uapi/linux/bpf.h, enum bpf_map_type
NAMES = {
    3: "of programs (PROG_ARRAY)", 4: "of perf events", 7: "of stack traces", 8: "of control groups",
    12: "of maps", 13: "of maps", 14: "of devices", 15: "of sockets", 16: "of CPUs", 17: "of AF_XDP sockets",
    18: "of sockets", 22: "that is a queue", 23: "that is a stack", 24: "of sockets' storage", 25: "of devices",
    26: "with operations of the kernel (STRUCT_OPS)", 27: "that is a ring buffer", 28: "of inodes' storage",
    29: "of tasks' storage", 30: "that is a Bloom filter", 31: "that is a ring buffer", 32: "of groups' storage",
    33: "that is an arena",
}  # fmt: skip
_BYTES_MAX = (1 << 32) - 1


class BpfMap(FileResource):
    """An open BPF map. Several descriptions of one map share it again."""

    FD_TYPE, FIELD = 19, "bpf"
    LINKS = ("anon_inode:bpf-map",)

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        try:
            found = bpf_map.Map(source.borrow())
        except KernelError as error:
            raise unsupported(source, f"a BPF map that cannot be looked at: {error}") from None
        if found.type not in PLAIN:
            what = NAMES.get(found.type, f"of type {found.type}")
            raise unsupported(
                source, f"a BPF map {what}: what is in it cannot be read, or is not in the tasks",
                hint="close it before the dump",
            )  # fmt: skip
        if found.ifindex:
            raise unsupported(source, "a BPF map on a network card", hint="close it before the dump")
        if _mode(source.flags) & bpf_map.F_WRONLY and ("bpf map", found.id) not in ctx.memo:
            raise unsupported(source, "a BPF map that is open for writing only", hint="open it for reading, too")

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        self.check(source, ctx)
        fd = source.borrow()
        found = bpf_map.Map(fd)
        entry = pb.bpfmap_file_entry(
            id=source.id, flags=source.flags, pos=source.pos, fown=ctx.fown(source), map_type=found.type,
            key_size=found.key_size, value_size=found.value_size, map_id=found.id, max_entries=found.max_entries,
            map_flags=found.flags, memlock=int(source.fdinfo.get(b"memlock", [b"0"])[0]),
            frozen=source.fdinfo.get(b"frozen", [b"0"])[0] != b"0", map_name=found.name.decode(errors="replace"),
            ifindex=0, map_extra=found.extra,
        )  # fmt: skip
        if found.btf:
            entry.btf = bpf_map.btf_bytes(found.btf)
            entry.btf_key, entry.btf_value = found.btf_key, found.btf_value
        if ("bpf map", found.id) not in ctx.memo:
            ctx.memo["bpf map", found.id] = True
            _dump_content(fd, found, ctx, entry)
        return entry

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        with doing(f"BPF map {entry.map_name or entry.map_id}"):
            number = ctx.once(("bpf map", entry.map_id), lambda: _make(entry, ctx))
            return with_flags(bpf_map.by_id(number, _mode(entry.flags)), entry.flags)


def _mode(flags: int) -> int:
    return {os.O_RDONLY: bpf_map.F_RDONLY, os.O_WRONLY: bpf_map.F_WRONLY}.get(flags & os.O_ACCMODE, 0)


def _value_bytes(kind: int, size: int) -> int:
    """Bytes of what a lookup gives: for some kinds a value for each CPU that there may be."""
    return (size + 7 & ~7) * _cpus() if kind in _PER_CPU else size


def _cpus() -> int:
    with open("/sys/devices/system/cpu/possible", encoding="ascii") as file:
        return int(file.read().replace(",", "-").split("-")[-1]) + 1


def _dump_content(fd: int, found: bpf_map.Map, ctx: DumpContext, entry: Message) -> None:
    size = _value_bytes(found.type, found.value_size)
    keys, values, count = bpf_map.read(fd, found.key_size, size)
    if len(values) > _BYTES_MAX or len(keys) > _BYTES_MAX:
        raise Unsupported(f"BPF map {entry.map_name}: it has more than 4 GiB")
    content = pb.bpfmap_data_entry(
        map_id=found.id, keys_bytes=len(keys), values_bytes=len(values), count=count
    )
    ctx.images.append("bpfmap-data", content, keys + values)


# ---------------------------------------------------------------------- restore


def _make(entry: Message, ctx: BuildContext) -> int:
    """Make the map with its content; its id. It lives as long as a descriptor of ours that is closed in the end."""
    if entry.map_type not in PLAIN:
        raise Unsupported(f"a map of type {entry.map_type}")
    btf = -1
    types = (0, 0, 0)
    if entry.btf:
        btf = bpf_map.load_btf(entry.btf)
        types = btf, entry.btf_key, entry.btf_value
    try:
        fd = bpf_map.create(
            entry.map_type, entry.key_size, entry.value_size, entry.max_entries,
            # BPF_F_NUMA_NODE stays, but the kernel does not tell which node: the first, which is always there.
            entry.map_flags & ~(bpf_map.F_RDONLY | bpf_map.F_WRONLY),
            entry.map_name.encode()[:15], extra=entry.map_extra, btf=types,
        )  # fmt: skip
    finally:
        if btf >= 0:
            os.close(btf)
    fd = ctx.keep(fd)
    for content, data in ctx.images.iter_with_payload("bpfmap-data"):
        if content.map_id == entry.map_id:
            _fill(fd, entry, content, data)
    if entry.frozen:
        bpf_map.freeze(fd)
    number: int = bpf_map.Map(fd).id
    return number


def _fill(fd: int, entry: Message, content: Message, data: bytes) -> None:
    size = _value_bytes(entry.map_type, entry.value_size)
    count = content.count
    if content.keys_bytes < count * entry.key_size:
        raise ImageError("bpfmap-data.img", f"map {content.map_id}: keys_bytes", f"too few for {count} entries")
    if content.values_bytes < count * size:
        if entry.map_type in _PER_CPU and count and not content.values_bytes % count:
            raise Unsupported("its values are for the CPUs of another machine", hint="restore it where it was dumped")
        raise ImageError("bpfmap-data.img", f"map {content.map_id}: values_bytes", f"too few for {count} entries")
    values = data[content.keys_bytes :]
    bpf_map.write(fd, entry.key_size, size, data[: content.keys_bytes], values, count)


RESOURCE = BpfMap()
