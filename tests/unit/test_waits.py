"""Interrupted waits as numbers: which call it was, what is left of it, and how it is made again."""

from __future__ import annotations

import os
import struct
import subprocess
import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import compiled, wait_for

from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.resources import waits
from agent.resources.waits import MARGIN, Asleep
from agent.tracee import stop

RESTART = (1 << 64) - arch.ERESTART_RESTARTBLOCK
SECOND = 1_000_000_000
FUTEX_WAIT_PRIVATE = 128
FUTEX_LOCK_PI = 6


class Memory:
    """A process's memory: some bytes at some addresses."""

    def __init__(self, **contents: bytes) -> None:
        self.contents = {int(address[1:]): data for address, data in contents.items()}

    def read(self, address: int, size: int) -> bytes:
        return self.contents[address][:size]

    read_whole = read


def interrupted(number: int, **registers: int) -> Registers:
    return Registers(orig_rax=number, rax=RESTART, rip=0x1000, **registers)


def timespec(nanoseconds: int) -> bytes:
    return struct.pack("<qq", nanoseconds // SECOND, nanoseconds % SECOND)


# --- which call ---


def code(*numbers: int) -> bytes:
    """mov eax, number for each, in front of a syscall instruction."""
    return b"".join(b"\xb8" + struct.pack("<i", n) for n in numbers).rjust(48, b"\x90")


def identified(text: bytes) -> int:
    registers = Registers(orig_rax=arch.NR_restart_syscall, rax=RESTART, rip=2050)
    memory = Memory(_2000=text)
    return waits.identified(registers, memory).orig_rax  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [arch.NR_poll, arch.NR_nanosleep, arch.NR_clock_nanosleep, arch.NR_futex])
def test_the_number_before_the_instruction_tells_the_call(number: int) -> None:
    assert identified(code(number)) == number
    assert identified(code(arch.NR_mmap, number)) == number
    assert identified(code(arch.NR_futex, number)) == number
    assert identified(code(number)[:-3] + struct.pack("<I", number)[1:]) == number


def test_a_call_that_cannot_be_told_is_said() -> None:
    for text in (b"\x90" * 48, code(arch.NR_mmap), code(arch.NR_restart_syscall)):
        with pytest.raises(ValueError, match="0x802"):
            identified(text)


def test_other_calls_are_left_alone() -> None:
    registers = interrupted(arch.NR_nanosleep)
    assert waits.identified(registers, Memory()) is registers  # type: ignore[arg-type]


# --- what is left ---

REQUESTED = 10 * SECOND


def remaining(registers: Registers, slept: float, **memory: bytes) -> int | None:
    """`slept` seconds after the thread went to sleep and was then stopped."""
    now = Asleep(1000.0 + slept * 1000, 0)
    return waits.remaining_ns(registers, Memory(**memory), Asleep(1000.0, 5), True, now)  # type: ignore[arg-type]


CALLS: dict[str, tuple[Registers, dict[str, bytes]]] = {
    "poll": (interrupted(arch.NR_poll, rdx=10_000), {}),
    "nanosleep": (interrupted(arch.NR_nanosleep, rdi=100), {"_100": timespec(REQUESTED)}),
    "clock_nanosleep": (interrupted(arch.NR_clock_nanosleep, rdx=100), {"_100": timespec(REQUESTED)}),
    "futex": (interrupted(arch.NR_futex, rsi=FUTEX_WAIT_PRIVATE, r10=100), {"_100": timespec(REQUESTED)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_rest_of_a_wait_never_ends_early(name: str) -> None:
    registers, memory = CALLS[name]
    for slept in (0.0, 0.01, 1.0, 9.99):
        left = remaining(registers, slept, **memory)
        assert left is not None
        exact = REQUESTED - int(slept * SECOND)
        assert exact <= left <= min(REQUESTED, exact + MARGIN + 1000)
    assert remaining(registers, 100.0, **memory) == 0


@pytest.mark.parametrize("name", CALLS)
def test_where_the_beginning_is_not_known_it_is_the_whole_time(name: str) -> None:
    registers, memory = CALLS[name]
    space = Memory(**memory)
    some = Asleep(1.0, 1)
    for known in ((None, True, some), (some, False, some), (some, True, None)):
        assert waits.remaining_ns(registers, space, *known) == REQUESTED  # type: ignore[arg-type]


def test_what_the_kernel_wrote_itself_counts() -> None:
    for registers in (
        interrupted(arch.NR_nanosleep, rdi=100, rsi=200),
        interrupted(arch.NR_clock_nanosleep, rdx=100, r10=200),
        interrupted(arch.NR_nanosleep, rdi=200, rsi=200),  # the request is overwritten
    ):
        assert waits.remainder_at(registers) == (200, 216)
        assert remaining(registers, 1.0, _100=timespec(REQUESTED), _200=timespec(1234)) == 1234


def test_calls_that_are_no_such_wait() -> None:
    running = Registers(orig_rax=(1 << 64) - 1, rax=5)
    read = Registers(orig_rax=0, rax=(1 << 64) - arch.ERESTARTSYS)
    assert remaining(running, 1.0) is None
    assert remaining(read, 1.0) is None
    assert remaining(interrupted(arch.NR_futex, rsi=FUTEX_LOCK_PI, r10=100), 1.0) is None
    done = msgspec.structs.replace(CALLS["nanosleep"][0], rax=0)
    assert remaining(done, 1.0) is None
    assert waits.remainder_at(running) is None


# --- made again ---


@given(st.integers(0, 1 << 62))
def test_timespec(nanoseconds: int) -> None:
    seconds, rest = struct.unpack("<qq", waits.timespec(nanoseconds))
    assert 0 <= rest < SECOND
    assert seconds * SECOND + rest == nanoseconds


@given(st.integers(0, 1 << 40))
def test_only_the_time_of_a_call_changes(left: int) -> None:
    registers = Registers(rdi=1, rsi=2, rdx=3, r10=4, r8=5, r9=6)
    place = 0x5000
    for number, position in (
        (arch.NR_nanosleep, 1),
        (arch.NR_clock_nanosleep, 3),
        (arch.NR_futex, 4),
        (arch.NR_poll, 3),
    ):
        call = waits.call_with(msgspec.structs.replace(registers, orig_rax=number), left, place)
        milliseconds = -(-left // 1_000_000)
        wanted = [number, 1, 2, 3, 4, 5, 6]
        wanted[position] = milliseconds if number == arch.NR_poll else place
        assert list(call) == wanted


# --- interrupted more than once ---

RESTARTED = interrupted(arch.NR_restart_syscall)


def after(first: Registers, asleep: Asleep | None, tid: int = 7) -> waits.History:
    """What is known after one stop."""
    history = waits.History()
    history.note(tid, first, asleep)
    return history


def test_a_wait_that_goes_on_is_known_by_its_number_and_beginning() -> None:
    history = after(interrupted(arch.NR_poll), Asleep(100.0, 5))
    for switches in (7, 9, 11):
        registers, asleep = history.recall(7, RESTARTED, Asleep(100.0 + switches, switches))
        assert (registers.orig_rax, asleep) == (arch.NR_poll, Asleep(100.0, switches))
        assert msgspec.structs.replace(registers, orig_rax=arch.NR_restart_syscall) == RESTARTED
        history.note(7, RESTARTED, Asleep(100.0 + switches, switches))


@pytest.mark.parametrize("switches", [5, 6, 8, 20])
def test_a_wait_after_it_is_another_one(switches: int) -> None:
    """It left its CPU more often than for our stop and the wait again (or less: another thread's number)."""
    history = after(interrupted(arch.NR_poll), Asleep(100.0, 5))
    now = Asleep(110.0, switches)
    assert history.recall(7, RESTARTED, now) == (RESTARTED, now)


def test_nothing_is_made_up() -> None:
    poll, asleep = interrupted(arch.NR_poll), Asleep(100.0, 5)
    now = Asleep(110.0, 7)
    elsewhere = msgspec.structs.replace(RESTARTED, rip=0x2000)
    running = Registers(orig_rax=arch.NR_poll, rax=0, rip=0x1000)
    for history, registers, before in (
        (waits.History(), RESTARTED, now),
        (after(poll, None), RESTARTED, now),
        (after(running, asleep), RESTARTED, now),
        (after(RESTARTED, asleep), RESTARTED, now),
        (after(poll, asleep, tid=8), RESTARTED, now),
        (after(poll, asleep), elsewhere, now),
        (after(poll, asleep), RESTARTED, None),
        (after(poll, asleep), poll, now),
    ):
        assert history.recall(7, registers, before) == (registers, before)


def test_a_time_is_told_by_the_clock_of_its_cpu() -> None:
    """Those of two CPUs drift apart without bound."""
    registers = interrupted(arch.NR_poll)
    before = Asleep(1000.0, 5, cpu=0)
    requested = waits.remaining_ns(registers, Memory(), before, True, None)  # type: ignore[arg-type]
    elsewhere = waits.remaining_ns(registers, Memory(), before, True, Asleep(2000.0, 0, cpu=1))  # type: ignore[arg-type]
    assert requested == elsewhere == waits.requested_ns(registers, Memory())  # type: ignore[arg-type]


def test_the_clocks_of_all_our_cpus() -> None:
    cpus = os.sched_getaffinity(0)
    found = waits.clocks(cpus)
    assert {cpu: now.cpu for cpu, now in found.items()} == {cpu: cpu for cpu in cpus}
    assert os.sched_getaffinity(0) == cpus
    later = waits.clocks(cpus)
    assert all(later[cpu].since >= found[cpu].since for cpu in cpus)
    assert waits.clocks([max(cpus) + 4000]) == {}


# --- who slept ---

SLEEPER_AND_OTHERS = r"""
#include <pthread.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
#include <sys/syscall.h>
static void *spin(void *none)
{
    for (volatile long n = 0;; n++)
        ;
    return none;
}
static void *nap(void *none)
{
    for (;;)
        nanosleep(&(struct timespec){0, 100000}, NULL);
    return none;
}
int main(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, spin, NULL);
    pthread_create(&thread, NULL, nap, NULL);
    puts("ready");
    fflush(stdout);
    pause();
}
"""


def test_who_slept_until_it_was_stopped() -> None:
    """Not one that ran, however short, and not one that was on a CPU when it was looked at."""
    program = subprocess.Popen(
        [compiled(SLEEPER_AND_OTHERS, "-pthread")], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        assert program.stdout is not None and program.stdout.readline() == b"ready\n"
        pid = program.pid
        wait_for(lambda: procfs.stat(pid).state == "S", "the first thread to sleep")
        tids = procfs.threads(pid)
        sleepers = waits.Sleepers(tids)
        napped = waits.observe(tids[2])
        assert napped is not None

        def has_napped() -> bool:
            now = waits.observe(tids[2])
            return now is not None and now.switches > napped.switches

        wait_for(has_napped, "the third thread to have run")
        for tid in tids:
            ptrace.seize(tid)
        stop(tids, time.monotonic() + 10)
        slept = sleepers.slept()
        for tid in tids:
            ptrace.detach(tid)
        assert slept == {pid}
        sleepers.close()
        assert sleepers.slept() == frozenset()  # nothing is known without its files
    finally:
        program.kill()
        program.communicate()
