"""Registers, what an interruption means, and the small programs made of bytes."""

from __future__ import annotations

import io
import itertools
import os
import signal
import struct

import msgspec
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import clone
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Registers

U64 = (1 << 64) - 1
OUTSIDE = U64
WORDS = st.integers(0, U64)


def in_call(number: int, result: int) -> Registers:
    return Registers(orig_rax=number, rax=result & U64, rip=0x1002, rdi=7, rcx=0x1002, r11=0x246)


# --- registers ---


@given(st.lists(WORDS, min_size=27, max_size=27))
def test_pack_and_unpack(words: list[int]) -> None:
    registers = Registers(*words)
    assert registers.pack() == struct.pack("<27Q", *words)
    assert Registers.unpack(registers.pack()) == registers


def test_which_call_and_what_it_said() -> None:
    assert in_call(202, -516).syscall == 202
    assert in_call(202, -516).result == -516
    assert in_call(0, 5).syscall == 0 and in_call(0, 5).result == 5
    assert Registers(orig_rax=OUTSIDE).syscall is None


# --- what a stop does to a syscall ---

READ, EPOLL_WAIT, NANOSLEEP, FUTEX = 0, 232, 35, 202


def again(number: int) -> Registers:
    """At the syscall instruction, about to make the call as it was made first."""
    return Registers(orig_rax=OUTSIDE, rax=number, rip=0x1000, rdi=7, rcx=0x1002, r11=0x246)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("result", [-arch.EINTR, -arch.ERESTARTSYS, 3, -11, 0])
@pytest.mark.parametrize("number", [*sorted(arch.EINTR_ON_STOP), NANOSLEEP, FUTEX, OUTSIDE])
def test_hide_stop(number: int, result: int, pending: bool) -> None:
    """Only an EINTR, only of a call that a mere stop interrupts, only if no signal is the reason."""
    registers = in_call(number, result)
    hidden = number in arch.EINTR_ON_STOP and result == -arch.EINTR and not pending
    assert arch.hide_stop(registers, pending) == (again(number) if hidden else registers)


@pytest.mark.parametrize(
    "number, result, expected",
    [
        (READ, -arch.ERESTARTSYS, again(READ)),
        (READ, -arch.ERESTARTNOINTR, again(READ)),
        (READ, -arch.ERESTARTNOHAND, again(READ)),
        (NANOSLEEP, -arch.ERESTART_RESTARTBLOCK, again(NANOSLEEP)),
        (READ, 12, msgspec.structs.replace(in_call(READ, 12), orig_rax=OUTSIDE)),
        (READ, -arch.EINTR, msgspec.structs.replace(in_call(READ, -arch.EINTR), orig_rax=OUTSIDE)),
        (OUTSIDE, -arch.ERESTARTSYS, in_call(OUTSIDE, -arch.ERESTARTSYS)),
        (OUTSIDE, 12, in_call(OUTSIDE, 12)),
    ],
)
def test_as_restarted(number: int, result: int, expected: Registers) -> None:
    assert arch.as_restarted(in_call(number, result)) == expected


def test_a_call_in_a_stopped_task() -> None:
    base = Registers(rip=1, rax=2, rdi=3, r9=4, rbx=5, rsp=6)
    found = arch.syscall_registers(base, 0x2000, 9, (10, 11, 12, 13, 14))
    wanted = Registers(
        rip=0x2000, rax=9, orig_rax=OUTSIDE, rdi=10, rsi=11, rdx=12, r10=13, r8=14, r9=0, rbx=5, rsp=6
    )
    assert found == wanted


# --- code ---


def segments(image: bytes) -> list[tuple[int, int, int, int, int]]:
    elf = ELFFile(io.BytesIO(image))
    assert (elf.elfclass, elf.little_endian) == (64, True)
    assert (elf.header.e_type, elf.header.e_machine) == ("ET_EXEC", "EM_X86_64")
    found = []
    for segment in elf.iter_segments():
        h = segment.header
        assert h.p_type == "PT_LOAD" and h.p_align == PAGE
        assert h.p_vaddr % PAGE == h.p_offset % PAGE, "such a segment cannot be mapped"
        assert h.p_offset + h.p_filesz <= len(image)
        found.append((h.p_vaddr, h.p_vaddr + h.p_memsz, h.p_flags, h.p_offset, h.p_filesz))
    return found


@given(st.integers(16, 1 << 34), st.integers(1, 64))
def test_seed(page: int, pages: int) -> None:
    address = page * PAGE
    image, code = arch.seed_elf(address, pages * PAGE)
    text, data = segments(image)
    assert text == (address, address + len(image), 5, 0, len(image))
    assert data[:3] == (address + PAGE, address + PAGE + pages * PAGE, 6)
    assert ELFFile(io.BytesIO(image)).header.e_entry == code
    assert image[code - address :] == arch.BATCH_TRAP


def test_code_fits_its_page() -> None:
    assert len(arch.seed_elf(PAGE, PAGE)[0]) < PAGE
    assert max(len(arch.BATCH_TRAP), len(arch.BATCH_PARK)) < PAGE
    for code in (arch.BATCH_TRAP, arch.BATCH_PARK):
        offset = arch.find_syscall_offset(code)
        assert code[offset : offset + 2] == b"\x0f\x05" == code[arch.find_syscall(code) or 0 :][:2]
    assert arch.find_syscall(b"\x90" * 10) is None


def run_image(image: bytes, children: int = 0) -> int:
    """The wait status of a process that becomes `image`, with so many children that end by themselves."""
    pid = os.fork()
    if pid == 0:
        for _ in range(children):
            if os.fork() == 0:
                os._exit(7)
        clone.exec_image(image, "test-image")
    return os.waitpid(pid, 0)[1]


def test_the_reaper_ends_when_nobody_is_left() -> None:
    (text,) = segments(arch.reaper_elf())
    assert text[2] == 5
    for children in (0, 1, 5):
        assert run_image(arch.reaper_elf(), children) == 0


def test_the_seed_stops_at_once() -> None:
    image, _ = arch.seed_elf(0x7000_0000_0000, 16 * PAGE)
    status = run_image(image)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTRAP


# --- the signal frame ---


def test_a_frame_is_aligned_and_holds_the_xsave_area() -> None:
    for features, size in itertools.product((3, 7, 0xE7), (576, 832, 2696)):
        xstate = bytearray(size)
        struct.pack_into("<Q", xstate, 464, features)
        xstate[:8] = b"\x7f\x03abcdef"
        frame = arch.sigreturn_frame(0x10000, Registers(rsp=1), bytes(xstate), 0)
        area = frame.index(b"\x7f\x03abcdef")
        assert area % 64 == 0
        assert frame[area + 512 : area + size] == xstate[512:]
        assert frame[area + size :] == struct.pack("<I", 0x46505845)
        # struct _fpx_sw_bytes at offset 464
        magic, extended, bits, of = struct.unpack_from("<IIQI", frame, area + 464)
        assert (magic, extended, bits, of) == (0x46505853, size + 4, features, size)
