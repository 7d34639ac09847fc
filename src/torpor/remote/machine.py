"""The machine's bytes and the layout of its records. The source is machine.S, beside this file.

A record is twelve 64-bit words::

    0 number + 1 (0 ends the program)   1-6 arguments   7 result   8 address where the result is stored as well, or 0
    9 mask of tolerated errnos (below 64)   10 address of the program that a clone's child goes on with, or 0
    11 not 0: a transfer (fd, buffer, count, offset), repeated until count is 0

aarch64 needs the same walk in its own instructions (`svc 0`, number in x8); records and programs stay as they are.
"""

from __future__ import annotations

RECORD_WORDS = 12
RECORD_BYTES = 8 * RECORD_WORDS
RESULT_WORD = 7

STUB = bytes.fromhex(
    "498b074883e8017275498b7f08498b7710498b57184d8b57204d8b47284d8b4f300f05498b4f504885c0750a4885c974"
    "054989cfebca49894738483d01f0ffff732c498b4f404885c9740348890149837f580074134885c07424490147104901"
    "47204929471875984983c760eb9248f7d84883f83f7707490fa3474872eacc"
)

INIT = bytes.fromhex(
    "498b074883e8017275498b7f08498b7710498b57184d8b57204d8b47284d8b4f300f05498b4f504885c0750a4885c974"
    "054989cfebca49894738483d01f0ffff732c498b4f404885c9740348890149837f580074134885c07424490147104901"
    "47204929471875984983c760eb9248f7d84883f83f7707490fa3474872ea4c89ef4c89f6b80b0000000f0548c7c7ffff"
    "ffff4c89e6ba000000404531d2b83d0000000f054883f8fc74e14885c0781d4839d875d7418b042489c783e77f740881"
    "c780000000eb0a0fb6fceb05bf01000000b8e70000000f05f4"
)

#: One fault behind the other, and where in it the instructions are that earn a signal; they touch registers only.
FAULTS = bytes.fromhex("0f0bcc48bd00000000000000808b450031c9f7f1f40f05")
FAULT_AT = {4: 0, 5: 2, 7: 3, 8: 16, 11: 20, 31: 21}

GUEST = bytes.fromhex(
    "bf02000000488d352502000031d241ba08000000b80e0000000f0531ff488b35e5010000ba0300000041ba2100000049"
    "c7c0ffffffff4531c9b8090000000f0531ed483d01f0ffff0f83d00000004889c34989c7488b2dae010000488b3d8f01"
    "0000488b3590010000488b1591010000b8ea0000000f05498b074883e8017275498b7f08498b7710498b57184d8b5720"
    "4d8b47284d8b4f300f05498b4f504885c0750a4885c974054989cfebca49894738483d01f0ffff732c498b4f404885c9"
    "740348890149837f580074134885c0742449014710490147204929471875984983c760eb9248f7d84883f83f7707490f"
    "a3474872ea488b3df5000000488b35f6000000488b15f7000000b8ea0000000f054889df4889eeb80b0000000f05488b"
    "3dcc000000488b35cd000000488b15ce000000b8ea0000000f05bf02000000488d35eb00000031d241ba08000000b80e"
    "0000000f05488d25bd0000009d488b25bd000000bf02000000488d35a1000000ba0000000041ba08000000b80e000000"
    "0f054c8b3db00000004c8b35b10000004c8b2db20000004c8b25b3000000488b2db4000000488b1db50000004c8b1db6"
    "0000004c8b15b70000004c8b0db80000004c8b05b9000000488b05ba000000488b0dbb000000488b15bc000000488b35"
    "bd000000488b3dbe000000ff2538000000"
)

GUEST_RUN = 119
#: Behind the system call of GUEST that runs the records.
GUEST_CALLED = GUEST.index(bytes.fromhex("0f05498b4f50")) + 2
_TGKILL = bytes.fromhex("b8ea0000000f05")
#: Behind each tgkill of GUEST.
GUEST_STOPS = [at + len(_TGKILL) for at in range(len(GUEST)) if GUEST.startswith(_TGKILL, at)]

#: Words of the frame that follows GUEST: pid, tid, signal, arena bytes, signal mask, flags, stack, ip,
#: the mask that blocks, and REGISTERS.
REGISTERS = "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di".split()
FRAME_WORDS = 9 + len(REGISTERS)
GUEST_BYTES = len(GUEST) + 8 * FRAME_WORDS
