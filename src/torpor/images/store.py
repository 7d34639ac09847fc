"""An image set in a directory: reading one, writing one.

The frame is CRIU's: magics, then for each message its length in four bytes (little endian), the message, and in some
images a payload. Images are named as in :mod:`torpor.images.magic`, without ``.img``.

A set is written beside whatever the directory holds and put in place at the end, so that a dump
that fails leaves the directory as it was.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import namedtuple

from .. import limits
from ..errors import ImageError, UsageError
from ..undo import Undo
from . import magic, payload, quick
from . import schema as pb
from .source import Source, refused, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType
    from typing import Any

_PARENT = "parent"  # the link to the directory of the snapshot before this one
_MODE = 0o644  # as CRIU; the directory is what keeps others out

#: A message and where its payload lies in the file, without padding: bytes from ``offset`` on.
Span = namedtuple("Span", "message offset size")


def _files(directory: int) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError as error:
        raise refused("read the images directory", error) from None


def write_all(fd: int, view: memoryview, file: str) -> None:
    """Write all of it to an image, wherever the file stands. Raises KernelError, by the ``file``'s name."""
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        raise refused(f"write `{file}`", error) from None


class _Output:
    """One image on its way: gathered in memory, then in a file under a name of its own."""

    __slots__ = ("chunks", "entries", "fd", "gathered", "image", "name", "size", "temporary")

    def __init__(self, name: str, image: Any) -> None:
        self.name = name
        self.image = image
        self.chunks: list[bytes] = [magic.head(image)]
        self.gathered = len(self.chunks[0])
        self.entries = 0
        self.size = 0  # bytes in the file already
        self.fd = -1
        self.temporary = f".{magic.file_name(name)}.{os.getpid()}.tmp"


class ImageWriter:
    """Writes one image set into the directory ``dir_fd``, which the caller keeps open.

    ``existing`` says what becomes of an older set there:

    * ``"overwrite"``, as CRIU does: files of the same name are replaced, and those that a restore
      would look for in any set (``magic.GLOBAL``) removed; the older set's other files stay.
    * ``"replace"``: every file with the name of an image is removed.
    * ``"refuse"``: UsageError, at once.

    Nothing is visible before :meth:`commit`; leaving the ``with`` block without it, or
    :meth:`close`, discards everything.
    """

    def __init__(self, dir_fd: int, *, existing: str = "overwrite") -> None:
        assert existing in ("overwrite", "replace", "refuse")
        self._dir = dir_fd
        self._existing = existing
        self._outputs: dict[str, _Output] = {}
        self._undo = Undo()
        self._parent = ""
        self._scratch: list[int] = []
        #: image name -> bytes in its file; filled by commit()
        self.sizes: dict[str, int] = {}
        if existing == "refuse" and (older := self.stale()):
            shown = ", ".join(older[:3]) + (" …" if len(older) > 3 else "")
            raise UsageError(f"the images directory already holds a set: {shown}")

    def stale(self) -> list[str]:
        """Files in the directory that have the name of an image and are not part of this set."""
        written = {magic.file_name(name) for name in self._outputs}
        return sorted(
            file
            for file in _files(self._dir)
            if magic.image_name(file) is not None and file not in written
        )

    def create(self, name: str) -> None:
        """Let the image exist even if nothing is ever appended to it."""
        self._output(name)

    def write_one(self, name: str, message: Any, content: bytes = b"") -> None:
        """Write an image that holds one message (and its payload)."""
        assert name not in self._outputs, f"{name} is written twice"
        self.append(name, message, content)

    def append(self, name: str, message: Any, content: bytes = b"") -> None:
        """Add a message to an image, and the payload that the message announces.

        Raises ImageError where the message lacks a required field. For a payload that is too
        large for memory, append the message without it and write to :meth:`fd`.
        """
        output = self._output(name)
        file = f"{name}.img"
        body = pb.encode(message, file, f"entry {output.entries}")
        output.chunks += (len(body).to_bytes(4, "little"), body)
        output.gathered += 4 + len(body)
        if content:
            assert output.image.payload, f"{file} has no payloads"
            assert _announced(output, message, content), f"{file}: payload of another length"
            zeros = bytes(payload.padding(output.image.magic, len(content)))
            output.chunks += (content, zeros)
            output.gathered += len(content) + len(zeros)
        output.entries += 1
        if output.gathered > limits.WRITE_BUFFER_BYTES:
            self._spill(output)

    def append_framed(self, name: str, messages: list[bytes]) -> None:
        """Add messages without payloads that are encoded already, complete, and each with its length in front."""
        output = self._output(name)
        output.chunks += messages
        output.gathered += sum(map(len, messages))
        output.entries += len(messages)
        if output.gathered > limits.WRITE_BUFFER_BYTES:
            self._spill(output)

    def fd(self, name: str) -> int:
        """The file of the image, open for writing, at the end of what was appended so far.

        For payloads: splice or copy into it (and pad it, see payload.padding), then go on
        appending. The writer closes it.
        """
        output = self._output(name)
        self._spill(output)
        return output.fd

    def raw(self, name: str) -> int:
        """The file of a raw image, open for reading and writing: for pages, archives. The writer closes it."""
        assert magic.kind_of(name).form == magic.RAW, f"{name} is not raw"
        return self.fd(name)

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Add to a raw image. Raises KernelError."""
        write_all(self.raw(name), memoryview(content), magic.file_name(name))

    def drop(self, name: str) -> None:
        """The set is to have no such image after all."""
        output = self._outputs.pop(name)
        if output.fd >= 0:
            os.close(output.fd)
            self._unlink(output.temporary)

    def scratch(self) -> int:
        """A file without a name beside the images, for what is on its way to one. The writer closes it."""
        name = f".scratch.{os.getpid()}.tmp"
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600, dir_fd=self._dir)
            self._scratch.append(fd)
            self._remove_on_failure(name)
            os.unlink(name, dir_fd=self._dir)
        except OSError as error:
            raise refused("create a file beside the images", error) from None
        return fd

    def parent(self, target: str) -> None:
        """Name the directory of the snapshot before this one, relative to this set's directory."""
        if os.path.isabs(target):
            raise UsageError(f"parent snapshot `{target}`: the path must be relative to the images")
        self._parent = target

    def flush(self) -> None:
        """Write out what is gathered in memory; the files still have temporary names."""
        for output in self._outputs.values():
            self._spill(output)

    def commit(self) -> None:
        """Write everything out and put the set in place, the inventory last. Ends the writer.

        If anything fails, the directory is put back as it was and the error raised.
        """
        try:
            self.flush()
            self._put_in_place()
        except BaseException as error:
            self._discard(error)
            raise
        self.sizes = {output.name: output.size for output in self._outputs.values()}
        self._close_files()

    def close(self) -> None:
        """Discard everything that was not committed."""
        self._discard(None)

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._discard(error)

    def _output(self, name: str) -> _Output:
        output = self._outputs.get(name)
        if output is None:
            output = self._outputs[name] = _Output(name, magic.kind_of(name))
        return output

    def _spill(self, output: _Output) -> None:
        if output.fd < 0:
            self._open(output)
        data = b"".join(output.chunks)
        output.chunks.clear()
        output.gathered = 0
        write_all(output.fd, memoryview(data), magic.file_name(output.name))

    def _open(self, output: _Output) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        temporary = output.temporary
        try:
            try:
                output.fd = os.open(temporary, flags, _MODE, dir_fd=self._dir)
            except FileExistsError:  # of a process with our pid that was killed
                self._unlink(temporary)
                output.fd = os.open(temporary, flags, _MODE, dir_fd=self._dir)
        except OSError as error:
            raise refused(f"create `{magic.file_name(output.name)}`", error) from None
        self._remove_on_failure(temporary)

    def _put_in_place(self) -> None:
        present = set(_files(self._dir))
        replaced: list[str] = []
        for file in self._superfluous():
            self._set_aside(file, replaced)
        if _PARENT in present and (self._parent or self._existing == "replace"):
            self._set_aside(_PARENT, replaced)
        if self._parent:
            self._link_parent()
        for output in sorted(self._outputs.values(), key=lambda one: one.name == "inventory"):
            file = magic.file_name(output.name)
            if file in present:
                self._set_aside(file, replaced)
            output.size = size_of(output.fd, file)
            self._rename(output.temporary, file)
            self._remove_on_failure(file)
        self._undo.commit()
        for old in replaced:
            try:
                self._unlink(old)
            except OSError:
                pass  # the new set is complete; what remains has no image's name

    def _superfluous(self) -> list[str]:
        stale = self.stale()
        if self._existing == "replace":
            return stale
        return [file for file in stale if file.removesuffix(".img") in magic.GLOBAL]

    def _set_aside(self, file: str, replaced: list[str]) -> None:
        old = f".{file}.{os.getpid()}.old"
        self._rename(file, old)
        self._undo.add(f"put {file} back", lambda: self._rename(old, file))
        replaced.append(old)

    def _link_parent(self) -> None:
        try:
            os.symlink(self._parent, _PARENT, dir_fd=self._dir)
        except OSError as error:
            raise refused(f"symlink `{_PARENT}`", error) from None
        self._remove_on_failure(_PARENT)

    def _remove_on_failure(self, file: str) -> None:
        self._undo.add(f"remove {file}", lambda: self._unlink(file))

    def _rename(self, old: str, new: str) -> None:
        try:
            os.rename(old, new, src_dir_fd=self._dir, dst_dir_fd=self._dir)
        except OSError as error:
            raise refused(f"rename `{old}` to `{new}`", error) from None

    def _unlink(self, file: str) -> None:
        try:
            os.unlink(file, dir_fd=self._dir)
        except FileNotFoundError:
            pass

    def _discard(self, error: BaseException | None) -> None:
        self._close_files()
        self._undo.roll_back(error)

    def _close_files(self) -> None:
        for output in self._outputs.values():
            if output.fd >= 0:
                os.close(output.fd)
        for fd in self._scratch:
            os.close(fd)
        self._outputs, self._scratch = {}, []


def _announced(output: _Output, message: Any, content: bytes) -> bool:
    """Is ``content`` as long as ``message`` says?"""
    if output.image.magic == "IPCNS_MSG":
        count: int = message.qnum
        return len(payload.queue_messages(content, output.name, "payload")) == count
    size = len(content)
    first = output.entries == 0
    told = payload.size_of(
        output.image.magic, message, first=first, rest=size, image=output.name, field="payload"
    )
    return size == told


class ImageReader:
    """Reads the image set in the directory ``dir_fd``, which the caller keeps open.

    Images are untrusted: every length is checked before it is used, nothing but plain files of
    this very directory is opened, symbolic links are refused.
    """

    def __init__(self, dir_fd: int) -> None:
        self._dir = dir_fd

    def names(self) -> list[str]:
        """All images in the directory, sorted."""
        found = (magic.image_name(file) for file in _files(self._dir))
        return sorted(name for name in found if name is not None)

    def has(self, name: str) -> bool:
        """Is there such an image? Many are absent from a set that has nothing of the kind."""
        try:
            found = os.stat(magic.file_name(name), dir_fd=self._dir, follow_symlinks=False)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise refused(f"stat `{name}`", error) from None
        return stat.S_ISREG(found.st_mode)

    def size(self, name: str) -> int:
        """Bytes in the image's file."""
        fd = self.open(name)
        try:
            return size_of(fd, magic.file_name(name))
        finally:
            os.close(fd)

    def read_one(self, name: str) -> Any:
        """The message of an image that holds just one; ImageError if it is missing or not alone."""
        messages = self.read_all(name, required=True)
        if len(messages) != 1:
            raise ImageError(magic.file_name(name), "", f"{len(messages)} messages, one expected")
        return messages[0]

    def read_all(self, name: str, *, required: bool = False) -> list[Any]:
        """All messages of an image; none if it is missing, as for CRIU, unless ``required``."""
        source = self._source(name, required)
        if source is None:
            return []
        try:
            image = magic.kind_of(name)
            found = None
            if source.size <= quick.BYTES_MAX:
                at = _past_head(source, image)
                found = quick.messages(source.read(0, source.size), at, image)
            return [span.message for span in _scan(source, image)] if found is None else found
        finally:
            os.close(source.fd)

    def read_known(self, name: str, known: dict[bytes, Any]) -> Any:
        """As :meth:`read_one`; of images with the same bytes all get one message, not to be changed."""
        fd = self.open(name)
        try:
            content = os.pread(fd, limits.READ_WINDOW_BYTES, 0)
        finally:
            os.close(fd)
        if len(content) == limits.READ_WINDOW_BYTES:  # there may be more of it
            return self.read_one(name)
        if content not in known:
            known[content] = self.read_one(name)
        return known[content]

    def read_first(self, name: str) -> tuple[Any, bytes]:
        """The first message of an image, and the bytes that follow it. Raises ImageError if there is none."""
        fd = self.open(name)
        try:
            content = os.pread(fd, limits.READ_WINDOW_BYTES, 0)
        finally:
            os.close(fd)
        image, file = magic.kind_of(name), magic.file_name(name)
        head = magic.head(image)
        at = len(head) + 4
        size = int.from_bytes(content[at - 4 : at], "little")
        told = image.form != magic.HEADED and image.magic != "IPCNS_MSG"  # is what follows told by the message?
        whole = len(content) < limits.READ_WINDOW_BYTES and at + size <= len(content)
        if told and whole and content.startswith(head) and len(content) >= at:
            message = pb.decode(pb.message_class(image.message), content[at : at + size], file, "entry 0")
            at += size
            length = payload.size_of(
                image.magic, message, first=True, rest=len(content) - at, image=file, field="entry 0"
            )
            if at + length + payload.padding(image.magic, length) <= len(content):
                return message, content[at : at + length]
        # Large ones, and those with something wrong about them.
        for found in self.iter_with_payload(name, required=True):
            return found
        raise ImageError(magic.file_name(name), "", "is empty")

    def iter_with_payload(self, name: str, *, required: bool = False) -> Iterator[tuple[Any, bytes]]:
        """Each message of an image with the bytes that follow it (``b""`` if it has none)."""
        source = self._source(name, required)
        if source is None:
            return
        try:
            for index, span in enumerate(_scan(source, magic.kind_of(name))):
                if span.size > limits.PAYLOAD_BYTES_MAX:
                    raise ImageError(source.file, f"entry {index}", f"{span.size} bytes follow")
                yield span.message, source.read(span.offset, span.size)
        finally:
            os.close(source.fd)

    def spans(self, name: str, *, required: bool = False) -> Generator[Span, None, None]:
        """As :meth:`iter_with_payload`, but only says where in the file (:meth:`open`) it lies."""
        source = self._source(name, required)
        if source is None:
            return
        try:
            yield from _scan(source, magic.kind_of(name))
        finally:
            os.close(source.fd)

    def files(self) -> list[Any]:
        """All open file descriptions, as file_entry messages; from files.img or, in sets of old
        versions of CRIU, from one image for each type."""
        if self.has("files"):
            return self.read_all("files")
        entries = []
        for name, (kind, field) in magic.OLD_STYLE_FILES.items():
            for message in self.read_all(name):
                entry = pb.file_entry(type=pb.fd_types.Value(kind), id=message.id)
                getattr(entry, field).CopyFrom(message)
                entries.append(entry)
        return entries

    def pages(self, name: str) -> int:
        """The file of a raw image (``pages-1``), open for reading; the caller closes it."""
        assert magic.kind_of(name).form == magic.RAW, f"{name} is not raw"
        return self.open(name)

    def open(self, name: str) -> int:
        """The file of any image, open for reading; the caller closes it. ImageError if missing."""
        fd = self._open(name)
        if fd < 0:
            raise ImageError(magic.file_name(name), "", "missing")
        return fd

    def open_parent(self) -> int:
        """The directory of the snapshot before this one, open, or -1; the caller closes it."""
        flags = os.O_RDONLY | os.O_DIRECTORY
        try:
            return os.open(_PARENT, flags, dir_fd=self._dir)
        except FileNotFoundError:
            try:
                os.stat(_PARENT, dir_fd=self._dir, follow_symlinks=False)
            except FileNotFoundError:
                return -1
            raise ImageError(_PARENT, "", "the snapshot that it names is missing") from None
        except OSError as error:
            raise ImageError(_PARENT, "", f"cannot be opened: {error.strerror}") from None

    def _open(self, name: str) -> int:
        file = magic.file_name(name)
        # Not to be blocked by a FIFO put in an image's place; has no meaning for plain files.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
        try:
            fd = os.open(file, flags, dir_fd=self._dir)
        except FileNotFoundError:
            return -1
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise ImageError(file, "", "not a plain file") from None
            raise refused(f"open `{file}`", error) from None
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ImageError(file, "", "not a plain file")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _source(self, name: str, required: bool) -> Source | None:
        image = magic.kind_of(name)
        assert image.form != magic.RAW, f"{name} holds no messages"
        fd = self._open(name)
        if fd < 0 and required:
            raise ImageError(magic.file_name(name), "", "missing")
        try:
            return Source(fd, magic.file_name(name)) if fd >= 0 else None
        except BaseException:
            os.close(fd)
            raise


def scan(fd: int, image: Any, file: str) -> Iterator[Span]:
    """The messages in an open file of the kind ``image``; ``file`` names it in errors."""
    return _scan(Source(fd, file), image)


def read_magic(fd: int, file: str) -> Any:
    """The kind of image in an open file, by its magic; ImageError if it has none that is known."""
    source = Source(fd, file)
    number = int.from_bytes(source.read(0, 4), "little")
    if number in (magic.COMMON, magic.SERVICE):
        number = int.from_bytes(source.read(4, 4), "little")
    image = magic.by_number(number)
    if image is None:
        raise ImageError(file, "magic", f"{number:#x} is unknown (raw data has none)")
    return image


def _past_head(source: Source, image: Any) -> int:
    """Check the magics; the offset behind them. The common one is absent from version 1 sets."""
    expected = magic.head(image)
    if len(expected) == 8:
        first = source.read(0, 4)
        if first == expected[:4] and source.read(4, 4) == expected[4:]:
            return 8
        if first == expected[4:]:
            return 4
    elif source.read(0, 4) == expected:
        return 4
    raise ImageError(source.file, "magic", f"not an image of type {image.magic}")


def _scan(source: Source, image: Any) -> Iterator[Span]:
    at, index, used = _past_head(source, image), 0, 0
    own = pb.message_class(image.message)
    read, file, end = source.read, source.file, source.size
    kind = pb.pagemap_head if image.form == magic.HEADED else own
    while at < end:
        field = f"entry {index}"
        size = int.from_bytes(read(at, 4), "little")
        used += size
        _check_bounds(file, field, size, used, index)
        message = pb.decode(kind, read(at + 4, size), file, field)
        at += 4 + size
        length = _follows(source, image, message, index, at, field) if image.payload else 0
        yield Span(message, at, length)
        at += length + payload.padding(image.magic, length)
        if at > end:
            raise ImageError(file, field, "padding is missing")
        index += 1
        kind = own
        if image.magic == "GHOST_FILE":
            kind = pb.ghost_chunk_entry
    if image.form == magic.HEADED and index == 0:
        raise ImageError(file, "", "no pagemap_head")


def _check_bounds(file: str, field: str, size: int, used: int, index: int) -> None:
    if size > limits.MESSAGE_BYTES_MAX:
        raise ImageError(file, field, f"{size} bytes, the limit is {limits.MESSAGE_BYTES_MAX}")
    if used > limits.IMAGE_BYTES_MAX:
        raise ImageError(file, field, f"more than {limits.IMAGE_BYTES_MAX} bytes of messages")
    if index >= limits.IMAGE_ENTRIES_MAX:
        raise ImageError(file, field, f"more than {limits.IMAGE_ENTRIES_MAX} messages")


def _follows(source: Source, image: Any, message: Any, index: int, at: int, field: str) -> int:
    if image.magic == "IPCNS_MSG":
        return payload.queue_size(source.read, at, message.qnum, source.file, field)
    return payload.size_of(
        image.magic,
        message,
        first=index == 0,
        rest=source.size - at,
        image=source.file,
        field=field,
    )
