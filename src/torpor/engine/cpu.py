"""The registers of a thread, between ptrace's form and the images'.

XSAVE's uncompacted layout is read from CPUID leaf 13 by asking where each component lies; the images hold the
components by name. Intel SDM volume 1, 13.4; kernel: arch/x86/kernel/fpu/xstate.c
"""

from __future__ import annotations

import struct

from ..errors import ImageError, Unsupported
from ..linux import ptrace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..images.schema import Message
    from ..linux.ptrace import user_regs_struct

NATIVE = 1
FXSAVE_BYTES, HEADER_BYTES = 512, 64
#: XCR0 bit → (field of user_x86_xsave_entry, 32- or 64-bit words, bytes); in the order of the standard layout.
COMPONENTS = {
    2: ("ymmh_space", "I", 256),
    3: ("bndreg_state", "Q", 64),
    4: ("bndcsr_state", "Q", 64),
    5: ("opmask_reg", "Q", 64),
    6: ("zmm_upper", "Q", 512),
    7: ("hi16_zmm", "Q", 1024),
    9: ("pkru", "I", 8),
}


#: XCR0 bit → what people call it.
FEATURES = {
    2: "AVX", 3: "MPX", 4: "MPX", 5: "AVX-512", 6: "AVX-512", 7: "AVX-512", 9: "PKU", 17: "AMX", 18: "AMX", 19: "APX",
}  # fmt: skip


def dump(thread: Any, core: Message, regs: user_regs_struct) -> None:
    """Fill in core.thread_info from the stopped thread; ``regs`` are the general registers to store."""
    info = core.thread_info
    info.clear_tid_addr = 0  # set by the resource that asks for it
    for name in ptrace.user_regs_struct.NAMES:
        setattr(info.gpregs, name, getattr(regs, name))
    info.gpregs.mode = NATIVE
    _dump_fpu(ptrace.get_xstate(thread.tid), info.fpregs)
    for number in (12, 13, 14):
        info.tls.add(
            entry_number=number, base_addr=0, limit=0, seg_32bit=False, contents_h=False, contents_l=False,
            read_exec_only=True, limit_in_pages=False, seg_not_present=True, usable=False,
        )  # fmt: skip


def _dump_fpu(state: bytes, fp: Message) -> None:
    fp.cwd, fp.swd, fp.twd, fp.fop, fp.rip, fp.rdp, fp.mxcsr, fp.mxcsr_mask = struct.unpack_from("<4H2Q2I", state)
    fp.st_space.extend(struct.unpack_from("<32I", state, 32))
    fp.xmm_space.extend(struct.unpack_from("<64I", state, 160))
    if len(state) <= FXSAVE_BYTES:
        return
    fp.xsave.xstate_bv = struct.unpack_from("<Q", state, FXSAVE_BYTES)[0]
    offsets = component_offsets(len(state))
    for bit, offset in offsets.items():
        name, word, size = COMPONENTS[bit]
        count = size // struct.calcsize(word)
        getattr(fp.xsave, name).extend(struct.unpack_from(f"<{count}{word}", state, offset))


_offsets: dict[int, dict[int, int]] = {}


def component_offsets(state_bytes: int) -> dict[int, int]:
    """Where each component of this CPU's uncompacted state lies: XCR0 bit → offset."""
    if state_bytes not in _offsets:
        from ..linux.cpuid import xsave_components

        found = xsave_components()
        _offsets[state_bytes] = {
            bit: offset
            for bit, (offset, size) in found.items()
            if bit in COMPONENTS and offset + size <= state_bytes
        }
    return _offsets[state_bytes]


def check(core: Message, image: str) -> None:
    """Raise Unsupported when the thread uses a register set that this CPU, or its kernel, does not have."""
    from ..linux.cpuid import xsave_components

    fp = core.thread_info.fpregs
    in_use = fp.xsave.xstate_bv if fp.HasField("xsave") else 3
    here = xsave_components() if in_use >> 2 else {}
    for bit in range(2, 64):
        if in_use >> bit & 1 and (bit not in here or bit not in COMPONENTS):
            name = FEATURES.get(bit, f"XSAVE component {bit}")
            raise Unsupported(
                f"{image}: the task uses registers that this CPU does not have: {name}",
                hint="restore it on a CPU with at least the features of the one it was dumped on",
            )


def restore_fpu(fp: Message, template: bytes, image: str) -> bytes:
    """The state to set: ``template`` is what the stub has (its layout is this CPU's), the rest comes from the image.

    What this CPU does not have was refused by :func:`check` before.
    """
    state = bytearray(template)
    for name in ("cwd", "swd", "twd", "fop"):
        if getattr(fp, name) >> 16:
            raise ImageError(image, f"thread_info.fpregs.{name}", f"{getattr(fp, name):#x} has more than 16 bits")
    struct.pack_into("<4H2Q2I", state, 0, fp.cwd, fp.swd, fp.twd, fp.fop, fp.rip, fp.rdp, fp.mxcsr, fp.mxcsr_mask)
    if len(fp.st_space) < 32 or len(fp.xmm_space) < 64:
        raise ImageError(image, "thread_info.fpregs", "registers are missing")
    struct.pack_into("<32I", state, 32, *fp.st_space[:32])
    struct.pack_into("<64I", state, 160, *fp.xmm_space[:64])
    if len(state) <= FXSAVE_BYTES:
        return bytes(state)
    in_use = fp.xsave.xstate_bv if fp.HasField("xsave") else 3
    offsets = component_offsets(len(state))
    struct.pack_into("<Q", state, FXSAVE_BYTES, in_use)
    for bit, offset in offsets.items():
        name, word, size = COMPONENTS[bit]
        count = size // struct.calcsize(word)
        values = getattr(fp.xsave, name)
        if len(values) >= count:
            struct.pack_into(f"<{count}{word}", state, offset, *values[:count])
    return bytes(state)


def restored_regs(core: Message, image: str) -> user_regs_struct:
    """The general registers of the image, checked: a restored task must not be given the kernel's segments."""
    regs = ptrace.user_regs_struct()
    for name in ptrace.user_regs_struct.NAMES:
        setattr(regs, name, getattr(core.thread_info.gpregs, name))
    if regs.cs != 0x33:
        raise ImageError(image, "thread_info.gpregs.cs", f"{regs.cs:#x} is not 64-bit user code")
    # Not inside a system call: see restart.resume() for those who were.
    regs.orig_ax = (1 << 64) - 1
    return regs
