"""What a program may depend on in a CPU: which words count, and extended state that fits a CPU with more."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
from unit.children import forked

from agent import inventory, suitability
from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64_features as features

CPUINFO = """processor\t: 0
model name\t: Some CPU
flags\t\t: fpu sse2 avx2 hypervisor vmx constant_tsc ibrs md_clear brand_new
bugs\t\t: spectre_v1
"""


def test_words_that_are_the_hosts_own_affair_do_not_count() -> None:
    assert features.program_words(CPUINFO) == {"fpu", "sse2", "avx2", "brand_new"}
    assert features.program_words("processor : 0\n") == frozenset()


def test_each_word_is_left_out_for_one_reason() -> None:
    words = [word for text in features.HOST_ONLY.values() for word in text.split()]
    assert sorted(words) == sorted(set(words))
    for kept in (
        *("avx", "avx512f", "fsgsbase", "ospke", "pku"),
        *("rdpid", "sha_ni", "xsavec", "syscall", "misalignsse"),
    ):
        assert kept not in words


def test_this_cpu() -> None:
    """As the kernel itself has it in the registers of a stopped task."""
    with forked(lambda: None) as pid:
        ptrace.seize(pid)
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        area = ptrace.get_xstate(pid)
    assert struct.unpack_from("<Q", area, 464)[0] == features.xcr0()
    words = features.xstate_words()
    assert len(words) == (features.xcr0() & ~3).bit_count()
    for word in words:
        offset, size = map(int, word.partition("@")[2].split("+"))
        assert offset >= 576 and offset + size <= len(area)
    assert "avx" not in procfs.read("/proc/cpuinfo").decode().split() or "xstate-2@576+256" in words


def lacking(monkeypatch: pytest.MonkeyPatch, theirs: set[str], ours: set[str]) -> list[str]:
    """Why the destination, which has `ours`, refuses a process that may depend on `theirs`."""
    monkeypatch.setattr(inventory, "cpu_flags", lambda: tuple(ours))
    offer = SimpleNamespace(cpu_flags=tuple(theirs), vdso_digest=b"")
    return [b.why for b in suitability._cpu_blockers(cast(Any, offer)) if b.kind == "cpu-features"]


def test_extended_state_that_the_destination_lacks_or_has_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    avx, here, elsewhere = "xstate-2@576+256", "xstate-5@832+64", "xstate-5@1088+64"
    assert lacking(monkeypatch, {avx}, {avx, here}) == []
    assert lacking(monkeypatch, {avx, here}, {avx}) == [f"the destination's CPU lacks {here}"]
    assert lacking(monkeypatch, {avx, here}, {avx, elsewhere}) == [f"the destination's CPU lacks {here}"]


def test_the_state_of_a_smaller_cpu() -> None:
    """Cut to x87, SSE and AVX, as a CPU without more would give it."""
    with forked(lambda: None) as pid:
        ptrace.seize(pid)
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        ours = ptrace.get_xstate(pid)
        small = bytearray(ours[:832])
        small[464:472] = struct.pack("<Q", 7)
        small[512:520] = struct.pack("<Q", 7)
        small[160:416] = bytes(range(256))  # xmm0 ... xmm15
        small[576:832] = bytes(reversed(range(256)))  # their upper halves
        found = features.fitted(bytes(small), ours)
        ptrace.set_xstate(pid, found)
        back = ptrace.get_xstate(pid)
        assert back == found
        assert back[160:416] == bytes(range(256)) and back[576:832] == bytes(reversed(range(256)))
        if len(ours) > 832:
            with pytest.raises(OSError):
                ptrace.set_xstate(pid, bytes(small))
        assert features.fitted(ours, ours) == ours
    with pytest.raises(ValueError, match=f"{len(ours) + 64} bytes"):
        features.fitted(ours + bytes(64), ours)
