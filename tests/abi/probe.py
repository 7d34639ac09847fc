"""Asks the C compiler what the kernel's own headers say: values, sizes and offsets.

The C library is asked for what they leave to it: families, types and flags of sockets.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable

# All may be missing or lack something: headers are as old as the distribution.
HEADERS = """
    linux/version.h asm/unistd.h linux/types.h linux/auxvec.h linux/aio_abi.h linux/audit.h
    linux/bpf.h linux/btf.h linux/capability.h linux/elf.h linux/eventfd.h linux/eventpoll.h
    linux/fanotify.h linux/fcntl.h linux/filter.h linux/fs.h linux/futex.h linux/if_packet.h linux/if_tun.h
    linux/in.h linux/inet_diag.h linux/inotify.h linux/io_uring.h linux/ipc.h linux/kcmp.h
    linux/landlock.h linux/loop.h linux/magic.h linux/membarrier.h linux/memfd.h linux/mempolicy.h
    linux/mman.h linux/mount.h linux/mqueue.h linux/msg.h linux/netlink.h linux/netlink_diag.h
    linux/nsfs.h linux/openat2.h linux/packet_diag.h linux/perf_event.h linux/personality.h
    linux/pidfd.h linux/prctl.h linux/ptrace.h linux/random.h linux/resource.h linux/rseq.h
    linux/rtnetlink.h linux/sched.h linux/sched/types.h linux/seccomp.h linux/securebits.h
    linux/sem.h linux/shm.h linux/signal.h linux/signalfd.h linux/sock_diag.h linux/socket.h
    linux/sockios.h linux/stat.h linux/tcp.h linux/time.h linux/time_types.h linux/timerfd.h
    linux/tty.h linux/uio.h linux/un.h linux/unix_diag.h linux/userfaultfd.h linux/utsname.h
    linux/vm_sockets_diag.h linux/wait.h linux/xattr.h asm/mman.h asm/prctl.h asm/ptrace.h
    asm/signal.h asm/siginfo.h asm/socket.h asm/termios.h asm/ioctls.h asm/sigcontext.h
    asm/ucontext.h
""".split()
# struct user_regs_struct is not among the headers that the kernel exports; glibc copies it.
PREAMBLE = "".join(
    f"#if __has_include(<{header}>)\n#include <{header}>\n#endif\n" for header in HEADERS
) + ("#include <stddef.h>\n#include <sys/user.h>\nint printf(const char *, ...);\n")
# The kernel does not export include/linux/socket.h. Apart, as the two do not go together.
LIBRARY = "#define _GNU_SOURCE\n#include <stdio.h>\n#include <sys/socket.h>\n#include <net/if.h>\n"

COMPILER = ["cc", "-w", "-std=gnu11", "-x", "c", "-fmax-errors=0", "-fno-diagnostics-show-caret"]
_UNKNOWN = re.compile(r"<stdin>:(\d+):\d+: error: ")


def values(expressions: Iterable[str]) -> dict[str, int]:
    """Evaluate C expressions; those that no header knows are left out. At most 64 bits.

    The C library has a say only in what the kernel's headers do not know.
    """
    found: dict[str, int] = {}
    wanted = sorted(set(expressions))
    for preamble in (PREAMBLE, LIBRARY):
        known = _compiling(preamble, [one for one in wanted if one not in found])
        body = "".join(f'printf("%llu\\n", (unsigned long long)({one}));\n' for one in known)
        lines = _run(f"{preamble}int main(void) {{\n{body}return 0;\n}}\n")
        found.update(zip(known, map(int, lines), strict=True))
    return found


def macros(source: str, *options: str) -> dict[str, str]:
    """Return name → text of all macros that are defined after a piece of C."""
    done = subprocess.run(
        ["cc", "-E", "-dM", "-x", "c", *options, "-"],
        input=source.encode(),
        capture_output=True,
        check=True,
    )
    lines = (line.split(" ", 2) for line in done.stdout.decode().splitlines())
    return {line[1]: line[2] for line in lines if len(line) == 3}


def _compiling(preamble: str, expressions: list[str]) -> list[str]:
    """Those of the expressions that compile; one line of source each, told apart by its number."""
    source = preamble + "".join(
        f"unsigned long long f{number}(void) {{ return (unsigned long long)({one}); }}\n"
        for number, one in enumerate(expressions)
    )
    first = preamble.count("\n") + 1
    done = subprocess.run(
        [*COMPILER, "-fsyntax-only", "-"], input=source.encode(), capture_output=True, check=False
    )
    errors = done.stderr.decode()
    bad = {int(line) - first for line in _UNKNOWN.findall(errors)}
    assert all(line >= 0 for line in bad), f"the headers do not go together:\n{errors[:2000]}"
    assert (done.returncode != 0) == bool(bad), errors[:2000]
    return [one for number, one in enumerate(expressions) if number not in bad]


def _run(source: str) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        program = os.path.join(folder, "probe")
        subprocess.run([*COMPILER, "-o", program, "-"], input=source.encode(), check=True)
        return subprocess.run([program], capture_output=True, check=True).stdout.decode().split()
