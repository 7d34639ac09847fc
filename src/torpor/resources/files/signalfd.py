"""signalfd(2): signals read from a file descriptor. The signals themselves are pending in the
tasks, not in here.

Image: file_entry.sgfd (signalfd_entry). Kernel: fs/signalfd.c.
"""

from __future__ import annotations

import os
import struct

from ...images import schema as pb
from ...linux.call import call
from ...proc import fdinfo_kinds
from ..base import FileResource
from ..fown import with_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

SIGSET_BYTES = 8


class Signalfd(FileResource):
    """A set of signals, signal n at bit n - 1."""

    FD_TYPE, FIELD = 9, "sgfd"
    LINKS = ("anon_inode:[signalfd]",)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        mask = fdinfo_kinds.signalfd(source.fdinfo)
        return pb.signalfd_entry(
            id=source.id, flags=source.flags, fown=ctx.fown(source), sigmask=mask
        )

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        mask = struct.pack("=Q", entry.sigmask)
        return with_flags(call("signalfd4", -1, mask, SIGSET_BYTES, os.O_CLOEXEC), entry.flags)


RESOURCE = Signalfd()
