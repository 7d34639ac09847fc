"""How the text of an option becomes a value: one function for each ``kind`` of the options table.

Each function gets the options, the row, the text ("" when there is none) and whether the option was
negated. A ValueError says what is wrong with the text.
"""

from __future__ import annotations

import os

from .. import options as table
from ..errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..options import Option, Options


def apply(options: Options, row: Option, text: str | None, negated: bool = False) -> None:
    """Do to ``options`` what this option says. Raises UsageError if its argument makes no sense."""
    try:
        KINDS[row.kind](options, row, text or "", negated)
    except ValueError as error:
        raise UsageError(f"--{row.long}: {error}") from None


def _switch(options: Options, row: Option, text: str, negated: bool) -> None:
    if row.attr:
        setattr(options, row.attr, not negated)


def _text(options: Options, row: Option, text: str, negated: bool) -> None:
    setattr(options, row.attr, text)


def _append(options: Options, row: Option, text: str, negated: bool) -> None:
    setattr(options, row.attr, (*getattr(options, row.attr), text))


def _names(options: Options, row: Option, text: str, negated: bool) -> None:
    setattr(options, row.attr, (*getattr(options, row.attr), *filter(None, text.split(","))))


def whole(text: str) -> int:
    """Like C's atoi, but text that is not a number is an error instead of 0."""
    digits = text.strip().removeprefix("+").removeprefix("-")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"`{text}` is not a number")
    return int(text)


def _number(options: Options, row: Option, text: str, negated: bool) -> None:
    setattr(options, row.attr, whole(text))


def _natural(options: Options, row: Option, text: str, negated: bool) -> None:
    if whole(text) < 0:
        raise ValueError(f"`{text}` is negative")
    setattr(options, row.attr, whole(text))


def _positive(options: Options, row: Option, text: str, negated: bool) -> None:
    if whole(text) <= 0:
        raise ValueError(f"`{text}` is not a positive number")
    setattr(options, row.attr, whole(text))


def _port(options: Options, row: Option, text: str, negated: bool) -> None:
    if not 0 < whole(text) < 1 << 16:
        raise ValueError(f"`{text}` is not a port, which is between 1 and 65535")
    options.port = whole(text)


def bytes_of(text: str) -> int:
    """A number of bytes, or of K, M or G of them. Raises ValueError."""
    shift = {"K": 10, "M": 20, "G": 30}.get(text[-1:].upper(), 0)
    size = whole(text[:-1] if shift else text)
    if size < 0:
        raise ValueError(f"`{text}` is negative")
    return size << shift


def _size(options: Options, row: Option, text: str, negated: bool) -> None:
    setattr(options, row.attr, bytes_of(text))


def _choice(options: Options, row: Option, text: str, negated: bool) -> None:
    known = row.arg.split("|")
    if text not in known:
        raise ValueError(f"`{text}` is none of {', '.join(known)}")
    setattr(options, row.attr, text)


def _network_lock(options: Options, row: Option, text: str, negated: bool) -> None:
    _choice(options, row, "skip" if text == "none" else text, negated)


def _cgroup_mode(options: Options, row: Option, text: str, negated: bool) -> None:
    if text and text not in table.CGROUP_MODES:
        raise ValueError(f"`{text}` is none of {', '.join(table.CGROUP_MODES)}")
    options.manage_cgroups = text or "soft"


def _empty_ns(options: Options, row: Option, text: str, negated: bool) -> None:
    if text != "net":
        raise ValueError(f"`{text}`: only `net` can be left empty")
    options.empty_ns = ("net",)


def _verbosity(options: Options, row: Option, text: str, negated: bool) -> None:
    # A bare option adds one, -vvv adds three, and a number sets the level. Other text counts as 0,
    # as atoi has it: CRIU's test runner asks for silence with `-verbosity=0`, which is -v with the
    # text `erbosity=0`.
    if not text or text[0] == "v":
        options.log_level += len(text) + 1
        return
    digits = len(text) - len(text.lstrip("0123456789"))
    options.log_level = int(text[:digits] or "0")


def _leave(options: Options, row: Option, text: str, negated: bool) -> None:
    # There is one final state, so the last of --leave-running and --leave-stopped wins.
    options.leave_running = row.attr == "leave_running"
    options.leave_stopped = not options.leave_running


def _check_all(options: Options, row: Option, text: str, negated: bool) -> None:
    options.extra = options.experimental = True


def _feature(options: Options, row: Option, text: str, negated: bool) -> None:
    if text != "list" and text not in table.FEATURES:
        raise ValueError(f"there is no feature `{text}` (--feature list names them all)")
    options.feature = text


def _close(options: Options, row: Option, text: str, negated: bool) -> None:
    try:
        os.close(whole(text))
    except OSError:
        pass  # it is not open, which is what was asked for


def _removed(options: Options, row: Option, text: str, negated: bool) -> None:
    raise ValueError("no longer exists; criu check knows --extra, --experimental and --all")


def _cpu_cap(options: Options, row: Option, text: str, negated: bool) -> None:
    caps = options.cpu_cap
    bits = {
        "fpu": table.CPU_CAP_FPU,
        "cpu": table.CPU_CAP_CPU,
        "ins": table.CPU_CAP_INS,
        "all": table.CPU_CAP_ALL,
    }
    for word in text.split(",") if text else ("all",):
        name = word.lstrip("^")
        inverse = (len(word) - len(name)) % 2 == 1
        if name == "none":
            caps = table.CPU_CAP_ALL if inverse else 0
        elif name in bits:
            caps = caps & ~bits[name] if inverse else caps | bits[name]
        elif word:
            raise ValueError(f"`{word}` is none of {', '.join(bits)}, none")
    options.cpu_cap = caps | table.CPU_CAP_IMAGE if caps else 0


def _external(options: Options, row: Option, text: str, negated: bool) -> None:
    if text.startswith("mnt[]"):
        flags = text[5:].removeprefix(":")
        if flags.strip("ms"):
            raise ValueError(f"`{text}`: after mnt[]: only m (masters) and s (sharing) make sense")
        options.ext_mount_auto = True
        options.enable_external_masters |= "m" in flags
        options.enable_external_sharing |= "s" in flags
        return
    kind, bracket, rest = text.partition("[")
    ident, closing, value = rest.partition("]")
    if not (kind and bracket and ident and closing) or (value and value[0] != ":"):
        raise ValueError(f"`{text}` is not of the form TYPE[ID] or TYPE[ID]:VALUE")
    options.external = (*options.external, text)


def _ext_mount_map(options: Options, row: Option, text: str, negated: bool) -> None:
    key, colon, value = text.partition(":")
    if text == "auto":
        options.ext_mount_auto = True
    elif colon:
        options.external = (*options.external, f"mnt[{key}]:{value}")
    else:
        raise ValueError(f"`{text}` is not of the form KEY:VALUE, nor `auto`")


def _veth_pair(options: Options, row: Option, text: str, negated: bool) -> None:
    inside, equals, outside = text.partition("=")
    if not equals:
        raise ValueError(f"`{text}` is not of the form INSIDE=OUTSIDE")
    options.external = (*options.external, f"veth[{inside}]:{outside}")


def _ext_unix_sk(options: Options, row: Option, text: str, negated: bool) -> None:
    for inode in filter(None, text.split(",")):
        if whole(inode) <= 0:
            raise ValueError(f"`{inode}` is not the inode of a socket")
        options.external = (*options.external, f"unix[{whole(inode)}]")
    options.ext_unix_sk = True


def _inherit_fd(options: Options, row: Option, text: str, negated: bool) -> None:
    head, _, key = text.partition("]:")
    kind, bracket, number = head.partition("[")
    if kind not in ("fd", "debug") or not bracket or not key:
        raise ValueError(f"`{text}` is not of the form fd[N]:RESOURCE")
    fd = whole(number)
    try:
        os.fstat(fd)
        if kind == "debug":  # a test's way of leaving a mark behind a descriptor
            os.write(fd, os.fsencode(key))
            return
    except OSError as error:
        raise ValueError(f"descriptor {fd}: {error.strerror}") from None
    options.inherit_fd = (*options.inherit_fd, (fd, key))


def _remap_address(options: Options, row: Option, text: str, negated: bool) -> None:
    from ..resources.unix_remap import check

    options.remap_address = (*options.remap_address, check(text))


def _join_ns(options: Options, row: Option, text: str, negated: bool) -> None:
    kind, _, rest = text.partition(":")
    where, _, extra = rest.partition(",")
    if kind not in table.JOINABLE_NAMESPACES:
        raise ValueError(f"`{kind}` is none of {', '.join(table.JOINABLE_NAMESPACES)}")
    if extra and (kind != "user" or not all(part.isdigit() for part in extra.split(","))):
        raise ValueError(f"`{extra}`: only a user namespace takes more, and that is UID,GID")
    if not os.path.exists(f"/proc/{where}" if where.isdigit() else where):
        raise ValueError(f"`{where}` is neither a running process nor a file")
    options.join_ns = (*options.join_ns, (kind, where, extra))


def _cgroup_root(options: Options, row: Option, text: str, negated: bool) -> None:
    controllers, colon, path = text.partition(":")
    pair = (controllers, path) if colon else ("", text)
    options.cgroup_root = (*options.cgroup_root, pair)


def _argument(options: Options, row: Option, text: str, negated: bool) -> None:
    options.argument = os.fsencode(text)
    if text == "-":
        given = bytearray()
        while len(given) <= table.ARGUMENT_BYTES and (chunk := os.read(0, 1 << 16)):
            given += chunk
        options.argument = bytes(given)


KINDS: dict[str, Callable[[Options, Option, str, bool], None]] = {
    "append": _append,
    "argument": _argument,
    "cgroup_mode": _cgroup_mode,
    "cgroup_root": _cgroup_root,
    "check_all": _check_all,
    "choice": _choice,
    "close": _close,
    "cpu_cap": _cpu_cap,
    "empty_ns": _empty_ns,
    "ext_mount_map": _ext_mount_map,
    "ext_unix_sk": _ext_unix_sk,
    "external": _external,
    "feature": _feature,
    "flag": _switch,
    "inherit_fd": _inherit_fd,
    "join_ns": _join_ns,
    "leave": _leave,
    "names": _names,
    "natural": _natural,
    "network_lock": _network_lock,
    "number": _number,
    "port": _port,
    "positive": _positive,
    "remap_address": _remap_address,
    "removed": _removed,
    "size": _size,
    "switch": _switch,
    "text": _text,
    "verbosity": _verbosity,
    "veth_pair": _veth_pair,
}
