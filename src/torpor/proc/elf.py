"""A minimal reader of 64-bit little-endian ELF images as they lie in memory, written for the vDSO.

The image is untrusted: a task may have changed its own vDSO. All reading stays within the bytes
given, and whatever does not fit raises ValueError.
"""

from __future__ import annotations

import struct

from .record import Record

PT_LOAD, PT_DYNAMIC, PT_NOTE = 1, 2, 4
PF_X, PF_W, PF_R = 1, 2, 4
NT_GNU_BUILD_ID = 3
STT_FUNC = 2

_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_GNU_HASH = 4, 5, 6, 10, 0x6FFFFEF5
_SHN_UNDEF, _SHN_ABS = 0, 0xFFF1

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SYM = struct.Struct("<IBBHQQ")
_DYN = struct.Struct("<QQ")
_NOTE = struct.Struct("<III")
_WORD = struct.Struct("<I")


class Segment(Record):
    """A program header."""

    type: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


class Symbol(Record):
    """``value`` is an offset into the image, ``size`` is in bytes, ``type`` is STT_*."""

    value: int
    size: int
    type: int


class Elf:
    """An image as it lies in memory. ``base`` is what its tables call its first byte, usually 0."""

    def __init__(self, image: bytes) -> None:
        """Read the headers. Raises ValueError when this is no such image."""
        self.image = image
        try:
            header = _EHDR.unpack_from(image)
        except struct.error:
            raise ValueError(f"elf: {len(image)} bytes are no image") from None
        if header[0][:7] != b"\x7fELF\x02\x01\x01":
            raise ValueError(f"elf: no 64-bit little-endian image: {header[0]!r}")
        (self.type, self.machine) = header[1:3]
        self.entry, phoff, self._shoff = header[4:7]
        phentsize, phnum, shentsize, shnum = header[9:13]
        if phentsize != _PHDR.size:
            raise ValueError(f"elf: program headers of {phentsize} bytes")
        self._shend = self._shoff + shentsize * shnum
        self.segments = [
            Segment(*self._unpack(_PHDR, phoff + number * _PHDR.size, "program header"))
            for number in range(phnum)
        ]
        # Addresses in the tables count from where the first segment would be loaded.
        self.base = next((s.vaddr - s.offset for s in self.segments if s.type == PT_LOAD), 0)

    def symbols(self) -> dict[str, Symbol]:
        """Return name → symbol of what the dynamic symbol table defines. Raises ValueError."""
        dynamic = self._dynamic()
        try:
            table, strings = dynamic[_DT_SYMTAB], dynamic[_DT_STRTAB]
        except KeyError:
            raise ValueError("elf: no dynamic symbol table") from None
        names = self.image[strings : strings + dynamic.get(_DT_STRSZ, len(self.image))]
        found: dict[str, Symbol] = {}
        for number in range(self._symbol_count(dynamic)):
            name, info, _, section, value, size = self._unpack(
                _SYM, table + number * _SYM.size, "symbol"
            )
            if section in (_SHN_UNDEF, _SHN_ABS):  # versions are absolute symbols
                continue
            end = names.find(b"\0", name)
            if end < 0:
                raise ValueError(f"elf: the name of symbol {number} has no end")
            found[names[name:end].decode("ascii", "replace")] = Symbol(
                value - self.base, size, info & 0xF
            )
        return found

    def notes(self) -> list[tuple[bytes, int, bytes]]:
        """Return (owner, type, description) of each note. Raises ValueError."""
        found = []
        for segment in self.segments:
            if segment.type != PT_NOTE:
                continue
            at, end = segment.offset, segment.offset + segment.filesz
            while at < end:
                namesz, descsz, kind = self._unpack(_NOTE, at, "note")
                name = at + _NOTE.size
                desc = name + _align(namesz)
                at = desc + _align(descsz)
                if at > len(self.image):
                    raise ValueError(f"elf: a note ends at {at:#x}, outside of the image")
                owner = self.image[name : name + namesz].rstrip(b"\0")
                found.append((owner, kind, self.image[desc : desc + descsz]))
        return found

    def build_id(self) -> bytes | None:
        """Return the GNU build id, or None without one. Raises ValueError."""
        for owner, kind, description in self.notes():
            if owner == b"GNU" and kind == NT_GNU_BUILD_ID:
                return description
        return None

    def padding(self) -> tuple[int, int]:
        """Return (start, end) of the unused end of the last page: behind all segments, sections and
        their headers.

        The range may be empty. It is only taken as unused as far as it holds zeros.
        """
        used = max([self._shend, *(s.offset + s.filesz for s in self.segments)])
        # What is not zero is somebody's, whatever the headers say.
        return max(min(used, len(self.image)), len(self.image.rstrip(b"\0"))), len(self.image)

    def find_code(self, code: bytes) -> list[int]:
        """Return the offsets of all places in executable segments that hold these bytes, aligned or
        not.
        """
        found = []
        for segment in self.segments:
            if segment.type == PT_LOAD and segment.flags & PF_X:
                end = segment.offset + segment.filesz
                at = self.image.find(code, segment.offset, end)
                while at >= 0:
                    found.append(at)
                    at = self.image.find(code, at + 1, end)
        return found

    def _dynamic(self) -> dict[int, int]:
        segment = next((s for s in self.segments if s.type == PT_DYNAMIC), None)
        if segment is None:
            raise ValueError("elf: no dynamic segment")
        entries: dict[int, int] = {}
        for at in range(segment.offset, segment.offset + segment.filesz, _DYN.size):
            tag, value = self._unpack(_DYN, at, "dynamic entry")
            if tag == 0:
                break
            is_address = tag in (_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_GNU_HASH)
            entries[tag] = value - self.base if is_address else value
        return entries

    def _symbol_count(self, dynamic: dict[int, int]) -> int:
        # Nothing says how many symbols there are. The older hash table has a chain word for each
        # of them.
        if _DT_HASH in dynamic:
            return self._word(dynamic[_DT_HASH] + 4)
        if _DT_GNU_HASH not in dynamic:
            raise ValueError("elf: no hash table of symbols")
        # The newer one has chains that begin at its buckets and end at a word with the lowest bit
        # set.
        at = dynamic[_DT_GNU_HASH]
        buckets, first, bloom = self._word(at), self._word(at + 4), self._word(at + 8)
        table = at + 16 + bloom * 8
        last = max((self._word(table + 4 * number) for number in range(buckets)), default=0)
        if last < first:
            return first
        chains = table + 4 * buckets
        while not self._word(chains + 4 * (last - first)) & 1:
            last += 1
        return last + 1

    def _word(self, at: int) -> int:
        word: int = self._unpack(_WORD, at, "hash table")[0]
        return word

    def _unpack(self, form: struct.Struct, at: int, what: str) -> tuple[int, ...]:
        if not 0 <= at <= len(self.image) - form.size:
            raise ValueError(f"elf: a {what} at {at:#x} is outside of the image")
        return form.unpack_from(self.image, at)


def _align(size: int) -> int:
    return (size + 3) & ~3
