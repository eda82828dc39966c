"""Relative waits that were interrupted: their restart block cannot be copied, so it is made again.

nanosleep, clock_nanosleep, poll and futex with a relative time keep the end of the wait in the task's restart
block, which no interface reads or writes (restart_syscall(2)). Rebuilding: the shadow's thread makes the same
call with the time that remains and is interrupted in it; its kernel then has an equal restart block, and with
the captured registers put back the wait goes on to its end.

How much remains is known from when the thread went off its CPU to wait, `se.exec_start` in
/proc/PID/task/TID/sched: it must be read before the thread is stopped.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Iterable
from typing import Final

import msgspec

from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.kernel.memory import RemoteMemory

MARGIN: Final = 1_000_000  # nanoseconds
_SINCE: Final = re.compile(rb"se\.exec_start\s*:\s*([0-9.]+)")
_SWITCHES: Final = re.compile(rb"nr_voluntary_switches\s*:\s*(\d+)")
_PROCESSOR: Final = 36  # of /proc/PID/stat behind the name, proc(5)
_SLEEPING: Final = "SD"
_SCHEDSTAT_SIZE: Final = 128
_LOOK_BACK: Final = 48
_MOV_EAX: Final = re.compile(rb"(?s)\xb8(.{4})")
_RESTARTED: Final = frozenset({arch.NR_poll, arch.NR_nanosleep, arch.NR_clock_nanosleep, arch.NR_futex})
_TIMESPEC: Final = struct.Struct("<qq")
_LONGEST: Final = (1 << 63) - 1  # nanoseconds
_FUTEX_CMD_MASK: Final = ~0x180  # FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME
_FUTEX_WAIT: Final = 0


def interrupted(registers: Registers) -> bool:
    return registers.syscall is not None and registers.result == -arch.ERESTART_RESTARTBLOCK


def can_go_on(registers: Registers) -> bool:
    """Whether it is a wait that can be made again for the time that remains."""
    return interrupted(registers) and registers.orig_rax in _RESTARTED


def identified(registers: Registers, memory: RemoteMemory) -> Registers:
    """Registers in which an already restarted wait shows its own number again instead of restart_syscall's.

    The kernel forgets the number; the code before the syscall has it (mov eax, number). ValueError if not.
    """
    if registers.syscall != arch.NR_restart_syscall:
        return registers
    code = memory.read(registers.rip - 2 - _LOOK_BACK, _LOOK_BACK)
    found = [(m.start(), int.from_bytes(m[1], "little")) for m in _MOV_EAX.finditer(code)]
    known = [number for _, number in found if number in _RESTARTED]
    if not known:
        raise ValueError(f"a wait at {registers.rip:#x} was interrupted before, and its call is not known")
    return msgspec.structs.replace(registers, orig_rax=known[-1])


class Asleep(msgspec.Struct, frozen=True):
    """When a sleeper left its CPU (ms on the scheduler's clock), after how many voluntary switches."""

    since: float
    switches: int
    cpu: int = -1  # whose clock that is
    state: str = "S"  # proc(5): it may run


def observe(tid: int | str) -> Asleep | None:
    """Read before the task is stopped; None where the kernel does not tell (CONFIG_SCHED_DEBUG)."""
    try:
        status = procfs.read_record(f"/proc/{tid}/stat").rpartition(b")")[2].split()
        text = procfs.read_record(f"/proc/{tid}/sched")
    except ProcessLookupError:
        return None
    since, switches = _SINCE.search(text), _SWITCHES.search(text)
    if since is None or switches is None:
        return None
    return Asleep(float(since[1]), int(switches[1]), int(status[_PROCESSOR]), status[0].decode())


class Sleepers:
    """Threads as they were before a stop, and which of them slept from then on until the stop.

    What only a thread itself can change is as it was then. /proc/PID/task/TID/schedstat tells how often it
    was given a CPU (Documentation/scheduler/sched-stats.rst); for a sleeper, our stop is once. Files are open
    until `close`.
    """

    def __init__(self, tids: Iterable[int]) -> None:
        self._files: dict[int, int] = {}
        self._runs: dict[int, int] = {}
        self.before: dict[int, Asleep | None] = {}
        for tid in tids:
            with contextlib.suppress(OSError):  # it has ended, or there are no more descriptors
                self._files[tid] = os.open(f"/proc/{tid}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            runs = self._count(tid)
            self.before[tid] = before = observe(tid)
            if runs and before is not None and before.state in _SLEEPING:
                self._runs[tid] = runs

    def slept(self) -> frozenset[int]:
        """Threads that did; asked when all have stopped, and nothing was injected into any."""
        return frozenset(tid for tid, runs in self._runs.items() if self._count(tid) == runs + 1)

    def _count(self, tid: int) -> int:
        """0 where the kernel does not count (CONFIG_SCHED_INFO)."""
        try:
            return int(os.pread(self._files[tid], _SCHEDSTAT_SIZE, 0).split()[2])
        except (KeyError, ProcessLookupError):
            return 0

    def close(self) -> None:
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()


def clocks(cpus: Iterable[int]) -> dict[int, Asleep]:
    """Now, on the scheduler's clock of each of these CPUs; without those where we may not run.

    Each has its own, which leaves out the time that interrupts and a hypervisor took from it: so they
    drift apart without bound, and a time is only told by the clock of the CPU that it was taken on. Takes
    us to each for a moment.
    """
    found: dict[int, Asleep] = {}
    allowed = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {cpu})
                now = observe("self")
                if now is not None and now.cpu == cpu:
                    found[cpu] = now
    finally:
        os.sched_setaffinity(0, allowed)
    return found


class _Known(msgspec.Struct, frozen=True):
    """A wait that goes on after a stop."""

    number: int
    rip: int
    since: float
    switches: int
    cpu: int


class History:
    """Waits that stops of ours interrupted before, and that went on: which call each is, and since when.

    From its second interruption on, the kernel shows such a wait as restart_syscall, begun at the last stop.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def note(self, tid: int, registers: Registers, before: Asleep | None) -> None:
        """A stopped thread goes on with these registers; `before`: as observed before it was stopped."""
        registers, before = self.recall(tid, registers, before)
        self._known.pop(tid, None)
        if before is not None and interrupted(registers) and registers.syscall != arch.NR_restart_syscall:
            self._known[tid] = _Known(
                registers.orig_rax, registers.rip, before.since, before.switches, before.cpu
            )

    def recall(
        self, tid: int, registers: Registers, before: Asleep | None
    ) -> tuple[Registers, Asleep | None]:
        """The same, as if the wait had never been interrupted before."""
        known = self._known.get(tid)
        if known is None or before is None or registers.syscall != arch.NR_restart_syscall:
            return registers, before
        # the same wait still: since then it only left its CPU for our stop, and for the wait again
        if registers.rip != known.rip or before.switches != known.switches + 2:
            return registers, before
        asleep = Asleep(known.since, before.switches, known.cpu)
        return msgspec.structs.replace(registers, orig_rax=known.number), asleep


def requested_ns(registers: Registers, memory: RemoteMemory) -> int | None:
    """The relative time that an interrupted call asked for; None if it is none of ours."""
    address = _timeout_address(registers)
    if registers.syscall == arch.NR_poll:
        return (registers.rdx & 0xFFFFFFFF) * 1_000_000
    if address is None:
        return None
    return _read_timespec(memory, address)


def _read_timespec(memory: RemoteMemory, address: int) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(memory.read_whole(address, _TIMESPEC.size))
    # the kernel waits no longer than that either (ktime_t)
    return int(min(max(0, seconds * 1_000_000_000 + nanoseconds), _LONGEST))


def _timeout_address(registers: Registers) -> int | None:
    match registers.syscall:
        case arch.NR_nanosleep:
            return registers.rdi
        case arch.NR_clock_nanosleep:
            return registers.rdx
        case arch.NR_futex if registers.rsi & _FUTEX_CMD_MASK & 0xFFFFFFFF == _FUTEX_WAIT:
            return registers.r10
    return None


def remaining_ns(
    registers: Registers,
    memory: RemoteMemory,
    before: Asleep | None,
    slept: bool,
    now: Asleep | None,
) -> int | None:
    """What is left of an interrupted wait; all of it where its beginning is not known. None: no such wait.

    `before` the stop it was seen asleep, and it `slept` until then. `now` is of the CPU that `before` is of
    (`clocks`). That clock is never ahead of the wait's: it may end late (by what interrupts and a hypervisor
    took, and MARGIN for rounding), never early.
    """
    if not interrupted(registers):
        return None
    written = remainder_at(registers)
    if written is not None:  # the kernel has said it itself (and may have overwritten the request by that)
        return _read_timespec(memory, written[0])
    requested = requested_ns(registers, memory)
    if requested is None or before is None or not slept or now is None or now.cpu != before.cpu:
        return requested
    elapsed = int((now.since - before.since) * 1e6) - MARGIN
    return max(0, requested - max(0, elapsed))


def remainder_at(registers: Registers) -> tuple[int, int] | None:
    """Where the kernel writes what is left of an interrupted sleep (nanosleep(2)), and again when rebuilt."""
    places = {arch.NR_nanosleep: registers.rsi, arch.NR_clock_nanosleep: registers.r10}
    address = places.get(registers.orig_rax)
    return (address, address + _TIMESPEC.size) if address and interrupted(registers) else None


def call_with(registers: Registers, remaining: int, timespec_at: int) -> tuple[int, ...]:
    """(number, arguments) of the same call with `remaining` nanoseconds; its timespec is at `timespec_at`."""
    number = registers.orig_rax
    arguments = [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9]
    match number:
        case arch.NR_poll:
            arguments[2] = -(-remaining // 1_000_000)
        case arch.NR_nanosleep:
            arguments[0] = timespec_at
        case arch.NR_clock_nanosleep:
            arguments[2] = timespec_at
        case arch.NR_futex:
            arguments[3] = timespec_at
    return (number, *arguments)


def timespec(remaining: int) -> bytes:
    return _TIMESPEC.pack(remaining // 1_000_000_000, remaining % 1_000_000_000)
