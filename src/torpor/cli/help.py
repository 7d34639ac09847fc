"""Help texts and the option lists of the manual pages, made from the options table."""

from __future__ import annotations

from ..options import GROUPS, OPTIONS_NOT_YET, OURS_IN_CRIU, VERBS_NOT_YET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..options import Option

COLUMN = 33  # where the explanations begin


def spelled(row: Option) -> str:
    """An option as help shows it: ``-D, --images-dir DIR``, ``--cpu-cap[=CAP,...]``."""
    short = f"-{row.short}, " if row.short else "    "
    long = f"--[no-]{row.long}" if row.kind == "switch" else f"--{row.long}"
    if not row.arg:
        return short + long
    if row.arg[0] == "[" and row.long != "cgroup-root":
        return f"{short}{long}[={row.arg[1:]}"
    return f"{short}{long} {row.arg}"


def explained(row: Option) -> str:
    """The line of help, which says so if the option is not implemented yet."""
    return f"{row.help} (not yet)" if row.attr in OPTIONS_NOT_YET else row.help


def option_list(wanted: Callable[[Option], bool]) -> str:
    """All wanted options in their groups, aligned."""
    parts = []
    for title, rows in GROUPS:
        lines = [option_line(row) for row in rows if row.long and wanted(row)]
        if lines:
            parts.append(f"{title}:\n" + "".join(lines))
    return "\n".join(parts)


def option_line(row: Option) -> str:
    """One option and its explanation."""
    left = f"  {spelled(row)}"
    if len(left) >= COLUMN - 1:
        return f"{left}\n{'':{COLUMN}}{explained(row)}\n"
    return f"{left:{COLUMN}}{explained(row)}\n"


def option_markdown(wanted: Callable[[Option], bool]) -> str:
    """The same as the definition lists of a manual page in Markdown."""
    parts = []
    for title, rows in GROUPS:
        items = [
            f"`{spelled(row).strip()}`\n:   {explained(row)}\n"
            for row in rows
            if row.long and wanted(row)
        ]
        if items:
            parts.append(f"### {title}\n\n" + "\n".join(items))
    return "\n".join(parts)


CRIU_USAGE = (
    ("dump", "criu dump     -t PID [-D DIR] [OPTION...]", "freeze a tree of processes into images"),
    ("restore", "criu restore  [-D DIR] [OPTION...]", "make the tree again from its images"),
    ("check", "criu check    [--feature NAME]", "can this kernel do it?"),
    ("pre-dump", "criu pre-dump -t PID [-D DIR] [OPTION...]", "copy memory while the tree runs"),
    ("page-server", "criu page-server [OPTION...]", "receive memory from a dump elsewhere"),
    ("lazy-pages", "criu lazy-pages [-D DIR] [OPTION...]", "bring memory in when it is touched"),
    ("dedup", "criu dedup    [-D DIR]", "drop from older images what newer ones hold"),
    ("service", "criu service  [OPTION...]", "take requests from programs on a socket"),
    ("swrk", "criu swrk     FD", "take requests from the program above it"),
    ("cpuinfo dump", "criu cpuinfo  dump|check", "save what this processor can do; compare it"),
)


def criu_usage() -> str:
    """The commands of ``criu``, one a line."""
    lines = []
    for verb, usage, summary in CRIU_USAGE:
        mark = " (not yet)" if verb in VERBS_NOT_YET else ""
        lines.append(f"  {usage:44}{summary}{mark}\n")
    return "Usage:\n" + "".join(lines)


CRIU_BEFORE = """\
Torpor's criu: freezes running Linux processes into image files and wakes them again. Its commands,
options and exit statuses are those of CRIU {criu}, and so is the format of its images.

{short}
The command may stand anywhere among the options. A long option may be shortened as long as it stays
unambiguous; where --[no-] is shown, --no- switches off. Options that take a value in brackets have
it attached: -v4, --cpu-cap=fpu. Every long option may also stand in a configuration file.
"""

CRIU_AFTER = """\
RES names something outside of the tree. When dumping:
  tty[RDEV:DEV]              a terminal, by st_rdev and st_dev in hexadecimal
  file[MNT_ID:INODE]         an open file out of the reach of the tree's mounts, in hexadecimal
  unix[INODE]                a unix socket whose peer stays outside
  dev[MAJOR/MINOR]:NAME      a mounted block device
  mnt[MOUNTPOINT]:NAME       a bind mount; mnt[] finds all (mnt[]:ms also masters and shared ones)
  net[INODE]:NAME, pid[INODE]:NAME   a namespace
When restoring with --external:
  mnt[NAME]:PATH, dev[NAME]:PATH, veth[IN]:OUT@BRIDGE, macvlan[IN]:OUT, netdev[IN]:OUT
When restoring with --inherit-fd fd[N]:...:
  tty[RDEV:DEV], pipe:[INODE], socket:[INODE], file[MNT_ID:INODE], NAME, path/without/first/slash
With --remap-address OLD and NEW are ADDRESS, ADDRESS:PORT ([IPV6]:PORT) or :PORT, as in
  10.0.0.1=10.0.0.2, 10.0.0.1:80=:8080, :80=:8080
or both names of unix sockets: /run/a.sock=/run/b.sock, @a=@b

Configuration files, each overriding the one before: /etc/criu/default.conf,
$HOME/.criu/default.conf, $CRIU_CONFIG_FILE, --config FILE. One option a line, without dashes:
  tcp-established
  ghost-limit 16M         # "quotes" around a value with spaces

Exit status: 0 done; 1 refused or failed, and the log says why.

Examples:
  criu dump -t 4242 -D /snap -j               a job of your shell, into /snap
  criu restore -D /snap -j                    back again, in this terminal
  criu dump -t 4242 -D /snap -R -o dump.log -v4    a copy; the job runs on, the log says all
"""


def criu_help(version: str) -> str:
    """The whole text of ``criu --help``."""
    before = CRIU_BEFORE.format(criu=version, short=criu_usage())
    options = option_list(lambda row: (not row.ours or row.long in OURS_IN_CRIU) and row.long != "ms")
    return f"{before}\n{options}\n{CRIU_AFTER}"
