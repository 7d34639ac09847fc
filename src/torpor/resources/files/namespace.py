"""An open namespace, as /proc/PID/ns/… gives it: those of the host, in which the tree lives, or its own of the network.

Image: file_entry.nsf (ns_file_entry). Kernel: fs/nsfs.c
"""

from __future__ import annotations

import os
import stat

from ...errors import ImageError
from ...images import schema as pb
from ...proc.links import parse
from .. import net_namespace
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

#: Kind → CLONE_NEW* (include/uapi/linux/sched.h) and its number among the host's (see engine/preflight.py).
KINDS = {
    "pid": (0x20000000, 1), "net": (0x40000000, 2), "ipc": (0x08000000, 3), "uts": (0x04000000, 4),
    "mnt": (0x00020000, 5), "user": (0x10000000, 6), "cgroup": (0x02000000, 7), "time": (0x00000080, 8),
}  # fmt: skip


class OpenNamespace(FileResource):
    """A descriptor that keeps a namespace."""

    FD_TYPE, FIELD = 14, "nsf"
    MODES = (stat.S_IFREG,)
    PRIORITY = 3

    def claims(self, source: SourceFile) -> bool:
        kind, _, rest = source.link.partition(":[")
        return kind in KINDS and rest.endswith("]") and rest[:-1].isdigit()

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        self._number(source, ctx)

    @staticmethod
    def _number(source: SourceFile, ctx: DumpContext) -> int:
        kind, inode = parse(os.fsencode(source.link))
        visit = ctx.memo.get("network namespace")
        if kind == "net" and visit is not None and visit.elsewhere:
            if inode == visit.inode:
                return net_namespace.NUMBER
            here = visit.home
        else:
            here = os.stat(f"/proc/thread-self/ns/{kind}").st_ino
        if here != inode:
            raise unsupported(source, "a namespace other than ours", "namespaces are not supported yet")
        return KINDS[kind][1]

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        number = self._number(source, ctx)
        flag, _ = KINDS[source.link.partition(":")[0]]
        return pb.ns_file_entry(id=source.id, ns_id=number, ns_cflag=flag, flags=source.flags)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        kind = next((kind for kind, (flag, _) in KINDS.items() if flag == entry.ns_cflag), None)
        if kind is None:
            raise ImageError("files.img", f"file {entry.id}", f"{entry.ns_cflag:#x} is no kind of namespace")
        if kind == "net":
            return net_namespace.reopen(entry.ns_id, ctx)
        return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


RESOURCE = OpenNamespace()
