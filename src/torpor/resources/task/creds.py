"""The credentials of a thread: users, groups, capabilities, securebits (kernel/sys.c,
security/commoncap.c).

Identities are asked from the thread itself, so that they are those of its own user namespace.
no_new_privs, which is one of them for the images, is restored with seccomp, which may depend on
it.

A thread is given its credentials by one that starts with all that are to be given and loses the
rest on the way:

1. SECBIT_NO_SETUID_FIXUP, so that a change of user leaves the capabilities alone;
2. groups, then users: each needs a capability that is still there;
3. the inheritable set, while the bounding set still allows all of it; the permitted set narrows
   to what is wanted, with CAP_SETPCAP beside it;
4. the bounding set is trimmed and ambient capabilities are raised, which must be permitted and
   inheritable by then, and not yet forbidden by the securebits;
5. securebits as they are to be, then the final sets, without CAP_SETPCAP.

Afterwards dumpable and the parent-death signal have been reset (commit_creds() in kernel/cred.c),
see there.

Image: creds_entry, sets of capabilities as two words, the lower half first.
"""

from __future__ import annotations

import errno
import os
import struct

from ... import log
from ...errors import Unsupported
from ...linux.kernel import prctl
from ...proc.read import read, read_system
from ..base import TaskResource
from ._own import OWN_USER_NAMESPACE, own_status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...images.schema import Message
    from ...remote.program import Program, Run
    from ..base import BuildContext, DumpContext

PR_CAPBSET_DROP, PR_GET_SECUREBITS, PR_SET_SECUREBITS, PR_CAP_AMBIENT = 24, 27, 28, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4
SECBIT_NO_SETUID_FIXUP = 1 << 2
CAP_SETPCAP = 1 << 8
CAPABILITY_VERSION_3 = 0x20080522
NOBODY = (
    0xFFFFFFFF  # an id that cannot be: setfsuid(2) answers with the present one and changes nothing
)

NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP "
    "LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER "
    "SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE "
    "SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP "
    "MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF "
    "CHECKPOINT_RESTORE"
).split()


class Asked:
    """Where the getters' results are."""

    __slots__ = ("count", "fsgid", "fsuid", "groups", "ids", "secbits")

    def __init__(self, program: Program, count: int) -> None:
        self.ids = program.out(24)
        program.call("getresuid", *(self.ids.at(4 * i) for i in range(3)))
        program.call("getresgid", *(self.ids.at(4 * i) for i in range(3, 6)))
        self.fsuid = program.call("setfsuid", NOBODY, why="only asks")
        self.fsgid = program.call("setfsgid", NOBODY, why="only asks")
        self.groups = program.out(4 * count)
        # With a size of 0 it would answer how many there are.
        self.count = program.call("getgroups", count, self.groups, may_fail=(errno.EINVAL,))
        self.secbits = program.call("prctl", PR_GET_SECUREBITS, 0, 0, 0, 0)


class Credentials(TaskResource):
    """Users, groups, capabilities."""

    PER = "thread"
    ORDER = 90

    def ask(self, program: Program, thread: Any) -> Asked:
        return Asked(program, len(thread.status.Groups))

    def dump(self, thread: Any, run: Run, asked: Asked, core: Message, ctx: DumpContext) -> None:
        entry = core.thread_core.creds
        ids = struct.unpack("<6I", run.bytes(asked.ids))
        entry.uid, entry.euid, entry.suid, entry.gid, entry.egid, entry.sgid = ids
        entry.fsuid, entry.fsgid = run.result(asked.fsuid), run.result(asked.fsgid)
        entry.secbits = run.result(asked.secbits)
        count = len(thread.status.Groups)
        if run.result(asked.count) != count:
            raise Unsupported("groups changed while they were read", hint="dump it again")
        entry.groups.extend(struct.unpack(f"<{count}I", run.bytes(asked.groups)))
        _fill_capabilities(entry, thread.status)
        if thread.status.NoNewPrivs:
            entry.no_new_privs = 1
        if thread.tid == thread.task.pid:
            profile = _profile(thread.tid)
            if profile not in ("", "unconfined", _profile(os.getpid())):
                log.warning(f"task {thread.tid}: it is confined ({profile}), which is not kept: it will be as we are")

    def check(self, core: Message, ctx: BuildContext) -> None:
        """Raise Unsupported for capabilities that we cannot give because we have not got them."""
        if not core.thread_core.HasField("creds"):
            return
        entry = core.thread_core.creds
        if entry.lsm_profile not in ("", "unconfined"):
            raise Unsupported(
                f"security profile {entry.lsm_profile!r}: there is none here to enter"
            )
        if ctx.memo.get(OWN_USER_NAMESPACE):
            return
        own = own_status(ctx)
        wanted = (
            mask(entry.cap_prm) | mask(entry.cap_eff) | mask(entry.cap_inh) | mask(entry.cap_amb)
        )
        if missing := wanted & ~own.CapPrm:
            raise Unsupported(
                f"the task has capabilities that we have not got to give: {names(missing)}",
                hint="restore with the privileges that it was dumped with",
            )
        if missing := mask(entry.cap_bnd) & ~own.CapBnd:
            log.warning(f"creds: left out of a bounding set, as they are of ours: {names(missing)}")

    def restore(self, thread: Any, core: Message, program: Program, ctx: BuildContext) -> None:
        if core.thread_core.HasField("creds") and not same_as_own(core.thread_core.creds, ctx):
            _restore_identities(core.thread_core.creds, program)
            _restore_capabilities(core.thread_core.creds, program)


def _profile(pid: int) -> str:
    """How a security module (AppArmor, SELinux, …) confines a process; empty where none says so."""
    try:
        return read(pid, "attr/current").rstrip(b"\0\n").decode(errors="replace")
    except OSError:
        return ""


def _restore_identities(entry: Message, program: Program) -> None:
    program.call(
        "prctl", PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0, why="keep capabilities"
    )
    if (
        list(entry.groups) != os.getgroups()
    ):  # in a user namespace it may be forbidden (setgroups: deny)
        groups = struct.pack(f"<{len(entry.groups)}I", *entry.groups)
        program.call("setgroups", len(entry.groups), groups or 0)
    program.call("setresgid", entry.gid, entry.egid, entry.sgid)
    program.call("setfsgid", entry.fsgid)
    program.call("setresuid", entry.uid, entry.euid, entry.suid)
    program.call("setfsuid", entry.fsuid)


def _restore_capabilities(entry: Message, program: Program) -> None:
    inheritable, permitted, effective = (
        mask(entry.cap_inh),
        mask(entry.cap_prm),
        mask(entry.cap_eff),
    )
    _capset(program, effective | CAP_SETPCAP, permitted | CAP_SETPCAP, inheritable)
    bounding = mask(entry.cap_bnd)
    for number in range(_last_capability() + 1):
        if not bounding >> number & 1:
            program.call("prctl", PR_CAPBSET_DROP, number, 0, 0, 0, why=names(1 << number))
    program.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    ambient = mask(entry.cap_amb)
    for number in range(ambient.bit_length()):
        if ambient >> number & 1:
            program.call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
    program.call("prctl", PR_SET_SECUREBITS, entry.secbits, 0, 0, 0)
    _capset(program, effective, permitted, inheritable)


def _capset(program: Program, effective: int, permitted: int, inheritable: int) -> None:
    low = [word & 0xFFFFFFFF for word in (effective, permitted, inheritable)]
    high = [word >> 32 for word in (effective, permitted, inheritable)]
    header = struct.pack("<Ii", CAPABILITY_VERSION_3, 0)
    program.call("capset", header, struct.pack("<6I", *low, *high))


def mask(words: Any) -> int:
    """A set of capabilities as one number, from the words of an image."""
    return sum(int(word) << 32 * index for index, word in enumerate(words))


def names(capabilities: int) -> str:
    """The capabilities of a set by name, for a person."""
    numbers = (n for n in range(capabilities.bit_length()) if capabilities >> n & 1)
    return ", ".join(f"CAP_{NAMES[n]}" if n < len(NAMES) else f"capability {n}" for n in numbers)


def _fill_capabilities(entry: Message, status: Any) -> None:
    for field, name in (
        (entry.cap_inh, "CapInh"),
        (entry.cap_prm, "CapPrm"),
        (entry.cap_eff, "CapEff"),
        (entry.cap_bnd, "CapBnd"),
        (entry.cap_amb, "CapAmb"),
    ):
        held = status[name]
        field.extend((held & 0xFFFFFFFF, held >> 32))


def _last_capability() -> int:
    return int(read_system("sys/kernel/cap_last_cap"))


def same_as_own(entry: Message, ctx: BuildContext) -> bool:
    """Are these the builder's own credentials, with which the tasks begin: nothing to do?"""
    if ctx.memo.get(OWN_USER_NAMESPACE):
        return False
    own = own_status(ctx)
    ids = (
        (entry.uid, entry.euid, entry.suid, entry.fsuid),
        (entry.gid, entry.egid, entry.sgid, entry.fsgid),
    )
    return (
        ids == (own.Uid, own.Gid)
        and list(entry.groups) == own.Groups
        and entry.secbits == prctl(PR_GET_SECUREBITS)
        and mask(entry.cap_bnd) & own.CapBnd == own.CapBnd
        and [mask(entry.cap_inh), mask(entry.cap_prm), mask(entry.cap_eff), mask(entry.cap_amb)]
        == [own.CapInh, own.CapPrm, own.CapEff, own.CapAmb]
    )


RESOURCE = Credentials()
