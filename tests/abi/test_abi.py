"""What Torpor declares of the kernel's interface, against the kernel's headers.

Everything in ``torpor.linux`` must be found there, be newer than they are (NEWER), or be our own
(OURS). A constant in any other module that has the name of one in the headers must have its value.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import os
import socket
from types import ModuleType

import pytest

import torpor
from torpor.linux import nr

from .probe import macros, values

ROOT = os.path.dirname(torpor.__file__)
LINUX = [
    importlib.import_module(f"torpor.linux.{name[:-3]}")
    for name in sorted(os.listdir(os.path.join(ROOT, "linux")))
    if name.endswith(".py") and name not in ("__init__.py", "nr.py")
]

# Prefixes that a module leaves out, since its own name says them.
PREFIXES = {
    "torpor.linux.bpf": "BPF_",
    "torpor.linux.btf": "BTF_KIND_",
    "torpor.linux.io_uring": "IORING_",
    # include/net/tcp_states.h is not exported; net/ipv4/tcp.c does not compile if these differ.
    "torpor.linux.inet_diag": "BPF_TCP_",
    "torpor.linux.packet_diag": "PDI_",
    "torpor.linux.ptrace": "PTRACE_",
    "torpor.linux.userfault": "UFFDIO_",
}
# Such names are whole in every module.
WHOLE = ("NT_", "AF_", "IPPROTO_", "PROT_", "MAP_")
# Under another name in the headers; any expression of C. Of private constants, only those here are
# compared.
RENAMED = {
    **{f"torpor.linux.bpf.R{number}": f"BPF_REG_{number}" for number in (0, 1, 2, 3, 6, 7, 8, 9, 10)},
    **{
        f"torpor.linux.bpf.{name}": f"BPF_FUNC_{name.lower()}"
        for name in (
            "KTIME_GET_NS KTIME_GET_BOOT_NS PROBE_READ_KERNEL SEQ_WRITE D_PATH MAP_LOOKUP_PERCPU_ELEM".split()
        )
    },
    **{f"torpor.linux.bpf.{name}": f"BPF_{name}" for name in ("MAP_CREATE", "MAP_TYPE_PERCPU_ARRAY")},
    **{
        f"torpor.linux.io_uring.{name}": f"IORING_SETUP_{name}"
        for name in (
            "IOPOLL SQPOLL SQ_AFF CQSIZE CLAMP ATTACH_WQ R_DISABLED SUBMIT_ALL COOP_TASKRUN TASKRUN_FLAG SQE128 CQE32 "
            "SINGLE_ISSUER DEFER_TASKRUN NO_MMAP REGISTERED_FD_ONLY NO_SQARRAY HYBRID_IOPOLL"
        ).split()
    },
    "torpor.linux.io_uring.CQE_SKIP_SUCCESS": "IOSQE_CQE_SKIP_SUCCESS",
    "torpor.linux.io_uring.SQE_BYTES": "sizeof(struct io_uring_sqe)",
    "torpor.linux.io_uring.CQE_BYTES": "sizeof(struct io_uring_cqe)",
    "torpor.linux.bpf.ATTACH_TRACE_ITER": "BPF_TRACE_ITER",
    **{
        f"torpor.linux.bpf_map.{name}": f"BPF_{whole}"
        for name, whole in {
            "CREATE": "MAP_CREATE", "LOOKUP": "MAP_LOOKUP_ELEM", "UPDATE": "MAP_UPDATE_ELEM",
            "NEXT_KEY": "MAP_GET_NEXT_KEY", "INFO_BY_FD": "OBJ_GET_INFO_BY_FD", "BTF_LOAD": "BTF_LOAD",
            "BTF_FD_BY_ID": "BTF_GET_FD_BY_ID", "FD_BY_ID": "MAP_GET_FD_BY_ID", "FREEZE": "MAP_FREEZE",
            "LOOKUP_BATCH": "MAP_LOOKUP_BATCH", "F_RDONLY": "F_RDONLY", "F_WRONLY": "F_WRONLY",
        }.items()
    },
    "torpor.linux.btf.MAGIC": "BTF_MAGIC",
    # One bit for each of the states, which are numbered from 1.
    "torpor.linux.inet_diag.ALL_STATES": "(1 << (BPF_TCP_CLOSING + 1)) - 1",
    "torpor.linux.inet_diag.LIVE_STATES": "(1 << (BPF_TCP_CLOSING + 1)) - 1 - (1 << BPF_TCP_TIME_WAIT)",
    "torpor.linux.inet_diag._INET_DIAG_SHUTDOWN": "INET_DIAG_SHUTDOWN",
    "torpor.linux.inet_diag._INET_DIAG_SKV6ONLY": "INET_DIAG_SKV6ONLY",
    "torpor.linux.kernel.PM_WRITTEN": "PAGE_IS_WRITTEN",
    "torpor.linux.kernel.PM_PRESENT": "PAGE_IS_PRESENT",
    "torpor.linux.kernel.PM_SWAPPED": "PAGE_IS_SWAPPED",
    "torpor.linux.kernel.PM_FILE": "PAGE_IS_FILE",
    "torpor.linux.kernel.PM_PFNZERO": "PAGE_IS_PFNZERO",
    "torpor.linux.kernel.PM_HUGE": "PAGE_IS_HUGE",
    "torpor.linux.kernel.PM_GUARD": "PAGE_IS_GUARD",
    "torpor.linux.kernel.PM_SCAN_WP_MATCHING": "PM_SCAN_WP_MATCHING",
    "torpor.linux.kernel.PM_SCAN_CHECK_WPASYNC": "PM_SCAN_CHECK_WPASYNC",
    "torpor.linux.packet_diag._SHOW": (
        "PACKET_SHOW_INFO | PACKET_SHOW_MCLIST | PACKET_SHOW_RING_CFG | PACKET_SHOW_FANOUT"
    ),
    "torpor.linux.ptrace.WALL": "__WALL",
    "torpor.linux.ptrace.SIGINFO_BYTES": "sizeof(siginfo_t)",
    **{
        f"torpor.linux.sock_diag.{name}": f"BPF_TCP_{name}"
        for name in ("ESTABLISHED", "CLOSE", "LISTEN")
    },
    "torpor.linux.sock_diag._SHOW_ALL": (
        "UDIAG_SHOW_NAME | UDIAG_SHOW_VFS | UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN"
        " | UDIAG_SHOW_UID"
    ),
    "torpor.linux.sockets.SUN_PATH_MAX": "UNIX_PATH_MAX",
    "torpor.linux.userfault.API": "UFFD_API",
    "torpor.linux.userfault.USER_MODE_ONLY": "UFFD_USER_MODE_ONLY",
    "torpor.linux.userfault.FEATURE_WP_ASYNC": "UFFD_FEATURE_WP_ASYNC",
    **{
        f"torpor.linux.userfault.IOC_{name}": f"UFFDIO_{name}"
        for name in ("API", "REGISTER", "UNREGISTER", "COPY", "WAKE", "ZEROPAGE", "POISON", "WRITEPROTECT")
    },
    **{
        f"torpor.linux.userfault.{kind}_{name}": f"UFFD_{kind}_{name}"
        for kind, names in (("FEATURE_EVENT", "FORK REMAP REMOVE UNMAP"), ("EVENT", "PAGEFAULT FORK REMAP REMOVE UNMAP"))
        for name in names.split()
    },
    "torpor.linux.userfault.EVENTS": (
        "UFFD_FEATURE_EVENT_FORK | UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP"
    ),
    "torpor.linux.userfault.MESSAGE_BYTES": "sizeof(struct uffd_msg)",
    "torpor.linux.userfault.MADV_POPULATE_READ": "MADV_POPULATE_READ",
    "torpor.linux.userfault.FLAGS": "O_CLOEXEC | O_NONBLOCK",
}
# C expression (or `struct name`) → the release whose headers have it first.
NEWER = {
    "PIDFD_THREAD": (6, 9),
    "PAGEMAP_SCAN": (6, 7),
    "struct pm_scan_arg": (6, 7),
    **dict.fromkeys(
        (f"PAGE_IS_{name}" for name in ("WRITTEN", "PRESENT", "SWAPPED", "FILE", "PFNZERO", "HUGE")),
        (6, 7),
    ),
    **dict.fromkeys(("PM_SCAN_WP_MATCHING", "PM_SCAN_CHECK_WPASYNC", "UFFD_FEATURE_WP_ASYNC"), (6, 7)),
    "PAGE_IS_GUARD": (6, 15),
    "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG": (6, 4),
    "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG": (6, 4),
    "PTRACE_SET_SYSCALL_INFO": (6, 16),
    **dict.fromkeys(("IORING_SETUP_NO_MMAP", "IORING_SETUP_REGISTERED_FD_ONLY"), (6, 5)),
    "IORING_SETUP_NO_SQARRAY": (6, 6),
    "IORING_SETUP_HYBRID_IOPOLL": (6, 13),
    "IORING_REGISTER_CLOCK": (6, 12),
    "IORING_MSG_RING_FLAGS_PASS": (6, 3),
    "UFFDIO_POISON": (6, 6),
    "SCM_PIDFD": (6, 5),  # in the C library since glibc 2.39
}
# Bounds and choices of our own.
OURS = {
    "torpor.linux.bpf.LOAD_TRIES", "torpor.linux.bpf.READ_MAX",
    "torpor.linux.mqueue.MQUEUE_MAGIC",  # ipc/mqueue.c: not exported
    "torpor.linux.mqueue_messages.PAGE",
    "torpor.linux.io_uring.ENTRIES_MAX",  # io_uring/io_uring.h, not exported
    "torpor.linux.kernel_memory.BYTES_MAX",
    "torpor.linux.kernel_memory.PLACES_MAX",
    "torpor.linux.bpf.CHUNK",  # of a program's stack, how much takes what is read
    "torpor.linux.bpf_map.ENOTSUPP",  # include/linux/errno.h: never meant to be seen outside, and seen
    "torpor.linux.ptrace.XSTATE_BYTES_MAX",
    "torpor.linux.task_files.PATH_BYTES",
    "torpor.linux.userfault.COPY_BYTES",  # at most so much by one call
}

STRUCTS = {"peeksiginfo_args": "struct ptrace_peeksiginfo_args"}
FIELDS = {
    "iovec": {"base": "iov_base", "len": "iov_len"},
    # The kernel names them as they are here, glibc's copy as in the manual of the CPU.
    "user_regs_struct": {
        **{name: f"r{name}" for name in ("bp", "bx", "ax", "cx", "dx", "si", "di", "ip", "sp")},
        "orig_ax": "orig_rax",
        "flags": "eflags",
    },
}

# Of the same name and yet another thing, on purpose.
OTHERWISE = {
    "torpor/engine/restart.py:FUTEX_CMD_MASK",  # enough for a call that the kernel has accepted
}


def constants(module: ModuleType) -> dict[str, int]:
    """The constants that a module defines itself, by name."""
    with open(module.__file__ or "") as file:
        tree = ast.parse(file.read())
    own = {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    return {
        name: value
        for name, value in vars(module).items()
        if name in own and name.isupper() and type(value) is int
        if not name.startswith("_") or f"{module.__name__}.{name}" in RENAMED
    }


def structs(module: ModuleType) -> dict[str, type[ctypes.Structure]]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, ctypes.Structure)
        and value.__module__ == module.__name__
    }


def in_c(module: ModuleType, name: str) -> str:
    full = f"{module.__name__}.{name}"
    prefix = "" if name.startswith(WHOLE) else PREFIXES.get(module.__name__, "")
    return RENAMED.get(full) or prefix + name


@pytest.fixture(scope="session")
def release() -> tuple[int, int]:
    """The kernel that the headers are of."""
    code = values(["LINUX_VERSION_CODE"])["LINUX_VERSION_CODE"]
    return code >> 16, code >> 8 & 0xFF


def excused(expression: str, release: tuple[int, int]) -> bool:
    return expression in NEWER and NEWER[expression] > release


def test_the_probe_can_tell() -> None:
    asked = ["EPOLL_CLOEXEC", "NO_SUCH_NAME", "sizeof(struct iovec)", "KCMP_VM", "-1", "AF_PACKET"]
    assert values(asked) == {
        "AF_PACKET": socket.AF_PACKET,
        "EPOLL_CLOEXEC": os.O_CLOEXEC,
        "sizeof(struct iovec)": 16,
        "KCMP_VM": 1,
        "-1": 2**64 - 1,
    }


def test_what_is_said_of_constants_is_of_some_that_exist() -> None:
    """A constant that got another name would no longer be compared, or be excused for nothing."""
    declared = {f"{module.__name__}.{name}" for module in LINUX for name in constants(module)}
    assert {*RENAMED, *OURS} <= declared
    assert PREFIXES.keys() <= {module.__name__ for module in LINUX}
    for entry in OTHERWISE:
        path, _, name = entry.partition(":")
        assert name in literals(os.path.join(os.path.dirname(ROOT), path)), entry


@pytest.mark.parametrize("module", LINUX, ids=lambda module: module.__name__.rpartition(".")[2])
def test_constants(module: ModuleType, release: tuple[int, int]) -> None:
    declared = constants(module)
    found = values(in_c(module, name) for name in declared)
    wrong = []
    for name, value in declared.items():
        expression = in_c(module, name)
        if expression in found:
            if found[expression] != value % 2**64:
                wrong.append(f"{name} is {value:#x}, in C {expression} is {found[expression]:#x}")
        elif f"{module.__name__}.{name}" not in OURS and not excused(expression, release):
            wrong.append(f"{name}: the headers of {release} know no {expression}")
    assert not wrong, "\n".join([module.__name__, *wrong])


@pytest.mark.parametrize("module", LINUX, ids=lambda module: module.__name__.rpartition(".")[2])
def test_structs(module: ModuleType, release: tuple[int, int]) -> None:
    expected: dict[str, int] = {}
    for name, struct in structs(module).items():
        c = STRUCTS.get(name, f"struct {name}")
        expected[f"sizeof({c})"] = ctypes.sizeof(struct)
        for field, *_ in struct._fields_:
            member = FIELDS.get(name, {}).get(field, field)
            expected[f"offsetof({c}, {member})"] = getattr(struct, field).offset
            expected[f"sizeof((({c} *)0)->{member})"] = getattr(struct, field).size
    found = values(expected)
    newer = [name for name in NEWER if name.startswith("struct ") and excused(name, release)]
    for expression, value in expected.items():
        if any(name in expression for name in newer):
            continue
        assert found.get(expression) == value, expression


SYSCALL_HEADERS = {
    "X86_64": ("#include <asm/unistd_64.h>\n", ()),
    # The generic table, with the older calls that arm64 has as well: arch/arm64/include/uapi/asm.
    "AARCH64": (
        "#include <asm-generic/unistd.h>\n",
        (
            "-D__BITS_PER_LONG=64",
            "-D__ARCH_WANT_RENAMEAT",
            "-D__ARCH_WANT_NEW_STAT",
            "-D__ARCH_WANT_SET_GET_RLIMIT",
            "-D__ARCH_WANT_TIME32_SYSCALLS",
            "-D__ARCH_WANT_SYS_CLONE3",
            "-D__ARCH_WANT_MEMFD_SECRET",
        ),
    ),
}
# Marks in the headers that are no calls.
NO_CALLS = {"syscalls", "arch_specific_syscall", "syscall_max"}


@pytest.mark.parametrize("table", SYSCALL_HEADERS)
def test_system_calls(table: str) -> None:
    source, options = SYSCALL_HEADERS[table]
    defined = macros(source, *options)

    def number(text: str) -> int:
        # The generic header names some by way of others: __NR3264_lseek.
        return int(text) if text.isdigit() else number(defined[text])

    headers = {
        name.removeprefix("__NR_"): number(text)
        for name, text in defined.items()
        if name.startswith("__NR_") and (text.isdigit() or text in defined)
    }
    headers = {name: value for name, value in headers.items() if name not in NO_CALLS}
    declared: dict[str, int] = getattr(nr, table)
    assert not NO_CALLS & set(declared), "these are no system calls"
    last = max(headers.values())
    assert {name: value for name, value in declared.items() if value <= last} == headers
    later = [value for value in declared.values() if value > last]
    assert len(set(later)) == len(later)


def test_numbers_of_new_system_calls_are_the_same_everywhere() -> None:
    """Since v5.1 a new call gets one number on all architectures."""
    for name in set(nr.X86_64) & set(nr.AARCH64):
        if nr.X86_64[name] >= 424:
            assert nr.AARCH64[name] == nr.X86_64[name], name


def literals(path: str) -> dict[str, int]:
    """The constants at the top of a module that can be computed without running it."""
    with open(path) as file:
        tree = ast.parse(file.read())
    names: dict[str, object] = {}
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        code = compile(ast.Module([node], []), path, "exec")
        try:
            exec(code, {"__builtins__": {"range": range}}, names)
        except Exception:
            continue  # it needs more than literals
    return {name: value for name, value in names.items() if name.isupper() and type(value) is int}


def test_constants_elsewhere() -> None:
    declared: dict[str, dict[str, int]] = {}
    for folder, _, files in os.walk(ROOT):
        for file in files:
            path = os.path.join(folder, file)
            short = os.path.relpath(path, os.path.dirname(ROOT))
            if file.endswith(".py"):
                declared[short] = {
                    name: value
                    for name, value in literals(path).items()
                    if f"{short}:{name}" not in OTHERWISE
                }
    names = {name for found in declared.values() for name in found}
    assert len(names) > 50
    headers = values(name for name in names if "_" in name)
    wrong = [
        f"{path}: {name} is {value:#x}, in the headers {headers[name]:#x}"
        for path, found in sorted(declared.items())
        for name, value in found.items()
        if name in headers and value % 2**64 not in (headers[name], as_mask(name, headers[name]))
    ]
    assert not wrong, "\n".join(wrong)


def as_mask(name: str, value: int) -> int | None:
    """Sets of capabilities are masks, and so are the names in code that handles them."""
    return 1 << value if name.startswith("CAP_") else None
