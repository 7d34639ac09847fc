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

GUEST = bytes.fromhex(
    "0f0531ed483d01f0ffff0f83d00000004889c34989c7488b2d94010000488b3d75010000488b3576010000488b157701"
    "0000b8ea0000000f05498b074883e8017275498b7f08498b7710498b57184d8b57204d8b47284d8b4f300f05498b4f50"
    "4885c0750a4885c974054989cfebca49894738483d01f0ffff732c498b4f404885c9740348890149837f580074134885"
    "c0742449014710490147204929471875984983c760eb9248f7d84883f83f7707490fa3474872ea488b3ddb000000488b"
    "35dc000000488b15dd000000b8ea0000000f054889df4889eeb80b0000000f05488b3db2000000488b35b3000000488b"
    "15b4000000b8ea0000000f05488d25be0000009d488b25be000000bf02000000488d35a2000000ba0000000041ba0800"
    "0000b80e0000000f054c8b3da90000004c8b35aa0000004c8b2dab0000004c8b25ac000000488b2dad000000488b1dae"
    "0000004c8b1daf0000004c8b15b00000004c8b0db10000004c8b05b2000000488b05b3000000488b0db4000000488b15"
    "b5000000488b35b6000000488b3db7000000ff253900000090"
)

GUEST_RUN = 57

#: Words of the frame that follows GUEST: pid, tid, signal, arena bytes, signal mask, flags, stack, ip, and REGISTERS.
REGISTERS = "r15 r14 r13 r12 bp bx r11 r10 r9 r8 ax cx dx si di".split()
FRAME_WORDS = 8 + len(REGISTERS)
GUEST_BYTES = len(GUEST) + 8 * FRAME_WORDS
