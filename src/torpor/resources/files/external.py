"""Files that a plugin dumps and restores. Image: file_entry.ext (ext_file_entry); nothing of ours
is in it."""

from __future__ import annotations

from ...errors import Unsupported
from ..base import FileResource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, SourceFile


class External(FileResource):
    """``ctx.memo["restore external file"]``, where set, is a function from the file's id to a
    descriptor or -1."""

    FD_TYPE, FIELD = 16, "ext"

    def claims(self, source: SourceFile) -> bool:
        return False

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        plugin = ctx.memo.get("restore external file")
        fd = -1 if plugin is None else int(plugin(entry.id))
        if fd < 0:
            raise Unsupported(
                f"file {entry.id} was dumped by a plugin, and none here restores it",
                hint="--libdir DIR",
            )
        return fd


RESOURCE = External()
