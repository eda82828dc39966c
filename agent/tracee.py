"""A stopped task that can be made to do syscalls, many in one stop.

Syscalls are collected in a `Batch` (a table, and the data its arguments point to), written to a scratch
mapping of the process and walked there by a few bytes of code (`arch`). Two ways out of it:

- trap: ends in int3. For a shadow, which dies with its tracer anyway.
- park: for a process that must outlive us. Its context is put into a signal frame first; after the table it
  waits in ppoll for its tracer, and if nobody comes it returns through that frame to where it was: our death
  in a batch only delays it. The calls that make and remove the scratch are `agent.visit`'s.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import struct
import time
from typing import Final

from agent.kernel import ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Registers
from agent.kernel.memory import RemoteMemory
from agent.resources import waits

# the scratch mapping: label, code | control (flag, timespec, signal frame) | stack | table | data
CODE: Final = 64  # after the label (`agent.scratch`)
CONTROL: Final = PAGE
FRAME: Final = CONTROL + 64
STACK_TOP: Final = 24 * PAGE
TABLE: Final = STACK_TOP
ENTRIES: Final = 1024
DATA: Final = TABLE + ENTRIES * 64
DATA_SIZE: Final = 256 * 1024
SCRATCH_SIZE: Final = DATA + DATA_SIZE

ENTRY: Final = struct.Struct("<7Qq")  # number, arguments, result
_NO_ARGUMENTS: Final = (0, 0, 0, 0, 0, 0)
NOT_MADE: Final = -(1 << 63)  # the result of a call that was not made yet
PARK_SECONDS: Final = 2  # that a process waits for its tracer
ALL_SIGNALS: Final = (1 << 64) - 1


class InjectedCallFailed(OSError):
    """A syscall that we had a task make failed; errno is the kernel's."""


class Batch:
    """Syscalls to make in one stop, in order; all are made, whatever the ones before them answer."""

    def __init__(self, data_at: int, size: int = DATA_SIZE) -> None:
        """`data_at`: where the process will have the data, at most `size` bytes."""
        self.data_at = data_at
        self._size = size
        self.calls: list[tuple[int, ...]] = []
        self.names: list[str] = []
        self.optional: set[int] = set()
        self.data = bytearray()

    def call(self, what: str, number: int, *arguments: int, optional: bool = False) -> int:
        """Add one; `what` names it in an error. Returns its index in the results."""
        if arguments and min(arguments) < 0:
            arguments = tuple(a & ALL_SIGNALS for a in arguments)
        self.calls.append((number, *arguments, *_NO_ARGUMENTS[len(arguments) :]))
        self.names.append(what)
        if optional:
            self.optional.add(len(self.calls) - 1)
        return len(self.calls) - 1

    def put(self, data: bytes) -> int:
        """Place argument data; its address in the process."""
        position = -(-len(self.data) // 16) * 16
        self.data += bytes(position - len(self.data)) + data
        if len(self.data) > self._size:
            raise MemoryError("batch data exceeds the scratch mapping")
        return self.data_at + position

    def space(self, size: int) -> int:
        """Place room for a result."""
        return self.put(bytes(size))

    @property
    def room(self) -> int:
        return self._size - len(self.data)


class Outcome:
    """What the syscalls of a batch returned, and the data area after them."""

    def __init__(self, batch: Batch, tid: int, results: list[int], data: bytes) -> None:
        """InjectedCallFailed for the first call that failed and was not optional."""
        for index, result in enumerate(results):
            if result < 0 and index not in batch.optional:
                checked(result, batch.names[index], tid)
        self.results = results
        self._base = batch.data_at
        self._data = data

    def read(self, address: int, size: int) -> bytes:
        return self._data[address - self._base : address - self._base + size]


def stop(tids: list[int], deadline: float) -> set[int]:
    """Interrupt seized tasks and wait until each is off its CPU; signals on their way are delivered first.

    What stopped them: SIGTRAP, or a stop signal if that was job control (ptrace(2), "Group-stop"). TaskEnded
    if one is gone; TimeoutError if one does not stop by `deadline` (time.monotonic()).
    """
    for tid in tids:
        ptrace.interrupt(tid)
    return {wait_event_stop(tid, deadline) for tid in tids}


def wait_event_stop(tid: int, deadline: float) -> int:
    """What stopped it, as of `stop`."""
    while True:
        status = wait_until(tid, deadline)
        if ptrace.event(status) == ptrace.PTRACE_EVENT_STOP:
            return os.WSTOPSIG(status)
        # any other stop cancels one that was asked for before it (kernel/signal.c, ptrace_stop)
        ptrace.interrupt(tid)
        ptrace.cont(tid, _passed_on(status))


def _passed_on(status: int) -> int:
    """The signal that a stop holds up; 0 if it is a stop of another kind."""
    return 0 if ptrace.event(status) else os.WSTOPSIG(status)


def wait_for_syscall(tid: int, deadline: float) -> None:
    """Resume a stopped task until it enters a syscall, as it is about to. Its signals must be blocked.

    SIGSTOP cannot be: the process then stops as it should, but for this task, until it is detached.
    """
    # without it, our death in the stop would send the task a SIGTRAP (linux/ptrace.h, ptrace_report_syscall)
    ptrace.set_options(tid, ptrace.PTRACE_O_TRACESYSGOOD)
    signal_number = 0
    while True:
        ptrace.to_syscall(tid, signal_number)
        status = wait_until(tid, deadline)
        if os.WSTOPSIG(status) == ptrace.SYSCALL_STOP:
            return
        signal_number = _passed_on(status)


def wait_until(tid: int, deadline: float) -> int:
    """The status of the next stop; spins first, since a running task stops within microseconds."""
    spins = 0
    while True:
        found, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
        if found:
            if not os.WIFSTOPPED(status):
                raise ptrace.TaskEnded(tid, status)
            return status
        spins += 1
        if spins > 200:
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {tid} does not stop (uninterruptible sleep?)")
            time.sleep(0.00005)


class Tracee:
    """One process whose tasks we stop, and its scratch mapping.

    `fragile` says that the process must survive our death (park) instead of sharing it (trap).
    """

    def __init__(self, pid: int, memory: RemoteMemory, fragile: bool) -> None:
        self.pid = pid
        self.memory = memory
        self.fragile = fragile
        self.scratch = 0
        self.code = 0  # address of the batch runner
        self.adrift: set[int] = set()  # fragile tasks on their own way back: their registers are their own
        self._buffer = ctypes.create_string_buffer(SCRATCH_SIZE)

    # --- the scratch mapping ---

    def adopt_scratch(self, address: int, code: int | None = None) -> None:
        """Use a mapping that is there: SCRATCH_SIZE bytes, the first page executable once it has the code."""
        self.scratch, self.code = address, address + CODE if code is None else code

    def runner_code(self) -> bytes:
        return arch.BATCH_PARK if self.fragile else arch.BATCH_TRAP

    # --- one call ---

    def single_syscall(self, tid: int, at: int, what: str, number: int, *arguments: int) -> int:
        """Make a stopped task execute one syscall at the instruction `at`; its registers are kept.

        Our death in it is fatal for the task: only for one that shares it anyway (see `agent.visit`).
        """
        saved = ptrace.get_registers(tid)
        mask = ptrace.get_sigmask(tid)
        try:
            ptrace.set_sigmask(tid, ALL_SIGNALS)
            ptrace.set_registers(tid, arch.syscall_registers(saved, at, number, arguments))
            ptrace.to_syscall(tid)
            ptrace.wait(tid)
            ptrace.interrupt(tid)
            ptrace.cont(tid)
            wait_event_stop(tid, time.monotonic() + PARK_SECONDS)
            result = ptrace.get_registers(tid).result
        finally:
            ptrace.set_registers(tid, saved)
            ptrace.set_sigmask(tid, mask)
        return checked(result, what, tid)

    # --- a batch ---

    def batch(self) -> Batch:
        return Batch(self.scratch + DATA)

    def run(self, tid: int, batch: Batch, restore: Registers | None = None) -> Outcome:
        """Make a stopped task run a batch; InjectedCallFailed for the first failure that was not optional.

        Afterwards the task is stopped with the registers `restore` (default: those it had).
        """
        saved = ptrace.get_registers(tid) if restore is None else restore
        results: list[int] = []
        for first in range(0, len(batch.calls), ENTRIES):
            results += self._run_part(tid, batch, batch.calls[first : first + ENTRIES], saved, first == 0)
        ptrace.set_registers(tid, saved)
        data = b""
        if batch.data:
            start = self.scratch + DATA
            self.memory.read_into(ctypes.addressof(self._buffer), [(start, start + len(batch.data))])
            data = self._buffer.raw[: len(batch.data)]
        return Outcome(batch, tid, results, data)

    def _run_part(
        self, tid: int, batch: Batch, calls: list[tuple[int, ...]], saved: Registers, with_data: bool
    ) -> list[int]:
        self._write(TABLE, b"".join(ENTRY.pack(*call, NOT_MADE) for call in calls))
        if with_data:
            self.load_data(batch)
        start = arch.batch_registers(saved, self.code, self.scratch + TABLE, len(calls))
        if self.fragile:
            self._run_parked(tid, start, saved)
        else:
            self._run_trapped(tid, start)
        return self._results(len(calls))

    def load_data(self, batch: Batch) -> None:
        """Write the data that a batch's arguments point to."""
        if batch.data:
            self._write(DATA, bytes(batch.data))

    def _results(self, count: int) -> list[int]:
        at = self.scratch + TABLE
        self.memory.read_into(ctypes.addressof(self._buffer), [(at, at + 64 * count)])
        return list(struct.unpack_from(f"<{count * 8}q", self._buffer)[7::8])

    def _write(self, offset: int, data: bytes) -> None:
        at = self.scratch + offset
        ctypes.memmove(self._buffer, data, len(data))
        self.memory.write_from(ctypes.addressof(self._buffer), [(at, at + len(data))])

    def _run_trapped(self, tid: int, start: Registers) -> None:
        ptrace.set_registers(tid, start)
        ptrace.cont(tid)
        self.await_trap(tid)

    def await_trap(self, tid: int) -> None:
        """Until the trap runner is at its end; what happens on the way is for `on_event`."""
        while True:
            status = ptrace.wait(tid)
            if os.WSTOPSIG(status) == signal.SIGTRAP and not ptrace.event(status):
                return
            if not ptrace.event(status):  # a fault in the injected code: our bug, never to be passed on
                registers = ptrace.get_registers(tid)
                raise RuntimeError(f"shadow task {tid}: signal {os.WSTOPSIG(status)} at {registers.rip:#x}")
            self.on_event(tid, status)
            ptrace.cont(tid)

    def on_event(self, tid: int, status: int) -> None:
        """A ptrace event inside a batch (a thread was made); the shadow overrides it."""

    def _run_parked(self, tid: int, start: Registers, saved: Registers) -> None:
        mask = ptrace.get_sigmask(tid)
        frame_at = self.scratch + FRAME
        back = return_frame_registers(saved, self.memory)
        frame = arch.sigreturn_frame(frame_at, back, ptrace.get_xstate(tid), mask)
        timeout = struct.pack("<QQQQ", 0, 0, PARK_SECONDS, 0).ljust(64, b"\0")
        self._write(CONTROL, timeout + frame)
        control = self.scratch + CONTROL
        # order matters if we die in between: from the registers on, the process finds its own way back
        ptrace.set_registers(
            tid,
            parked(start, flag=control, timeout=control + 16, frame=frame_at + 8),
        )
        self.adrift.add(tid)
        ptrace.set_sigmask(tid, ALL_SIGNALS)
        ptrace.cont(tid)
        try:
            self._await_flag(tid, control)
        finally:  # whatever fails: it must not be in the scratch when that is removed
            ptrace.interrupt(tid)
            self.put_back(tid, saved, mask, time.monotonic() + PARK_SECONDS)

    def put_back(self, tid: int, registers: Registers, sigmask: int, deadline: float) -> None:
        """Out of its batch, as far as that got, with a task that was interrupted.

        TimeoutError: it did not wait for us any longer, and is to be let go on; or it does not stop.
        """
        wait_event_stop(tid, deadline)
        if not self.scratch <= ptrace.get_registers(tid).rip < self.scratch + PAGE:
            raise TimeoutError(f"task {tid} did not wait any longer: this agent was held up")
        ptrace.set_sigmask(tid, sigmask)
        # from here it needs its part of the scratch no more, which the next batch overwrites
        ptrace.set_registers(tid, registers)
        self.adrift.discard(tid)

    def _await_flag(self, tid: int, control: int) -> None:
        """Spin until the runner has been through its table: microseconds, so no sleep."""
        address = ctypes.addressof(self._buffer)
        deadline = time.monotonic() + PARK_SECONDS
        while True:
            self.memory.read_into(address, [(control, control + 8)])
            if self._buffer.raw[:8] != bytes(8):
                return
            keep_going(tid)
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {tid}: injected calls do not end")
            os.sched_yield()


def keep_going(tid: int) -> None:
    """A running task with all signals blocked may still get SIGSTOP or SIGKILL.

    After SIGSTOP it goes on, and stops when detached.
    """
    found, status = os.waitpid(tid, ptrace.WALL | os.WNOHANG)
    if found:
        if not os.WIFSTOPPED(status):
            raise ptrace.TaskEnded(tid, status)
        ptrace.cont(tid, _passed_on(status))


def parked(start: Registers, flag: int, timeout: int, frame: int) -> Registers:
    """A batch's registers for the park runner: where its flag, its timeout and its signal frame are."""
    start.r13, start.r14, start.r15 = flag, timeout, frame
    start.rsp = flag - PAGE + STACK_TOP
    return start


def return_frame_registers(saved: Registers, memory: RemoteMemory) -> Registers:
    """The registers for a signal frame that leads back to `saved`.

    The kernel restarts nothing after rt_sigreturn.
    """
    if waits.interrupted(saved):
        with contextlib.suppress(ValueError, OSError):  # unknown: it will fail with EINTR
            saved = waits.identified(saved, memory)
    return arch.as_restarted(saved)


def checked(result: int, what: str, tid: int) -> int:
    """The result of a syscall, or InjectedCallFailed."""
    if -4096 < result < 0:
        raise InjectedCallFailed(-result, os.strerror(-result), f"{what} (task {tid})")
    return result
