"""Open files that cannot be dumped, each with the reason why. Asked last, after everybody else."""

from __future__ import annotations

import os
import stat

from ...errors import Unsupported
from ..base import FileResource, unsupported

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...images.schema import Message
    from ..base import BuildContext, DumpContext, SourceFile

# : Devices whose open descriptions hold state that nobody but the driver can see: (major, minor or
# -1) → name. : Documentation/admin-guide/devices.txt
DEVICES = {
    (10, 200): "a network tunnel (/dev/net/tun)",
    (10, 229): "a connection to a FUSE file system (/dev/fuse)",
    (10, 232): "virtual machines (/dev/kvm)",
    (10, 130): "a watchdog",
    (10, 135): "the real-time clock",
    (10, 223): "a virtual input device (/dev/uinput)",
    (13, -1): "an input device",
    (29, -1): "a frame buffer",
    (108, -1): "a PPP connection (/dev/ppp)",
    (116, -1): "a sound device",
    (195, -1): "a GPU (nvidia)",
    (226, -1): "a GPU (/dev/dri)",
}


class Refused(FileResource):
    """What no other resource takes."""

    LINKS = ("/secretmem (deleted)",)
    MODES = (
        stat.S_IFREG,
        stat.S_IFDIR,
        stat.S_IFLNK,
        stat.S_IFCHR,
        stat.S_IFBLK,
        stat.S_IFIFO,
        stat.S_IFSOCK,
        0,
    )
    PRIORITY = 100

    def check(self, source: SourceFile, ctx: DumpContext) -> None:
        raise reason(source)

    def dump(self, source: SourceFile, ctx: DumpContext) -> Message:
        raise reason(source)

    def restore(self, entry: Message, ctx: BuildContext) -> int:
        raise AssertionError("nothing of this kind is in any image")


def reason(source: SourceFile) -> Unsupported:
    """Why a description that nobody takes cannot be dumped."""
    if source.link == "/secretmem (deleted)":
        return unsupported(source, "memory of memfd_secret(2), which nobody but the task may read")
    if stat.S_ISCHR(source.stat.st_mode):
        major, minor = os.major(source.stat.st_rdev), os.minor(source.stat.st_rdev)
        what = (
            DEVICES.get((major, minor))
            or DEVICES.get((major, -1))
            or f"character device {major}:{minor}"
        )
        return unsupported(
            source,
            f"{what}: its driver keeps what cannot be seen from outside",
            hint="close it before the dump",
        )
    return unsupported(source, "a kind of file that Torpor does not know")


RESOURCE = Refused()
