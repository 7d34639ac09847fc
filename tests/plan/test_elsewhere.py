"""A snapshot on another machine: what is said where the CPU or the kernel's vDSO is not the one it was taken on."""

from __future__ import annotations

import pytest

from torpor.engine import cpu
from torpor.errors import Unsupported
from torpor.images import schema as pb
from torpor.linux import cpuid
from torpor.resources.memory import vdso

AVX, AVX512 = 1 << 2, 7 << 5
PLACE = (0x7000, 0xD000, 0xF000)


def using(components: int) -> object:
    core = pb.core_entry(mtype=1)
    core.thread_info.fpregs.xsave.xstate_bv = components | 3
    return core


def test_a_cpu_without_a_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpuid, "xsave_components", lambda: {2: (576, 256)})
    cpu.check(using(AVX), "core-5.img")
    with pytest.raises(Unsupported, match=r"core-5\.img: .* this CPU does not have: AVX-?512"):
        cpu.check(using(AVX | AVX512), "core-5.img")
    monkeypatch.setattr(cpuid, "xsave_components", dict)
    with pytest.raises(Unsupported, match=r"does not have: AVX\b"):
        cpu.check(using(AVX), "core-5.img")


def test_the_vdso_of_another_kernel() -> None:
    vdso.check(PLACE, PLACE, b"same\0\0", b"same")
    with pytest.raises(Unsupported, match="another vDSO"):
        vdso.check(PLACE, PLACE, b"other", b"same")
    with pytest.raises(Unsupported, match="another vDSO"):
        vdso.check(PLACE, (0x8000, 0xD000, 0xF000), b"same", b"same")
