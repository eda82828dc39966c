"""A stopped task that can be made to do syscalls, many in one stop.

Syscalls are collected in a `Batch` (a table, and the data its arguments point to), written to a scratch mapping of the
process and walked there by a few bytes of code (`arch`). Two ways out of it:

- trap: ends in int3. For a shadow, which dies with its tracer anyway.
- park: for a process that must outlive us. Its context is put into a signal frame first; after the table it waits in
  ppoll for its tracer, and if nobody comes it returns through that frame to where it was: our death in a batch only
  delays it. The single calls that make and remove the scratch have no such frame: our death inside one breaks it.
"""

from __future__ import annotations

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

# the scratch mapping: code | control (flag, timespec, signal frame) | stack | table | data
CODE: Final = 0
CONTROL: Final = PAGE
FRAME: Final = CONTROL + 64
STACK_TOP: Final = 24 * PAGE
TABLE: Final = STACK_TOP
ENTRIES: Final = 1024
DATA: Final = TABLE + ENTRIES * 64
DATA_SIZE: Final = 256 * 1024
SCRATCH_SIZE: Final = DATA + DATA_SIZE

_ENTRY: Final = struct.Struct("<8Q")
_PARK_SECONDS: Final = 2
ALL_SIGNALS: Final = (1 << 64) - 1


class InjectedCallFailed(OSError):
    """A syscall that we had a task make failed; errno is the kernel's."""


class Batch:
    """Syscalls to make in one stop, in order; all are made, whatever the ones before them answer."""

    def __init__(self, scratch: int) -> None:
        self._scratch = scratch
        self.calls: list[tuple[int, ...]] = []
        self.names: list[str] = []
        self.optional: set[int] = set()
        self.data = bytearray()

    def call(self, what: str, number: int, *arguments: int, optional: bool = False) -> int:
        """Add one; `what` names it in an error. Returns its index in the results."""
        padded = (*arguments, 0, 0, 0, 0, 0, 0)[:6]
        self.calls.append((number, *(a & ALL_SIGNALS for a in padded)))
        self.names.append(what)
        if optional:
            self.optional.add(len(self.calls) - 1)
        return len(self.calls) - 1

    def put(self, data: bytes) -> int:
        """Place argument data; its address in the process."""
        position = -(-len(self.data) // 16) * 16
        self.data += bytes(position - len(self.data)) + data
        if len(self.data) > DATA_SIZE:
            raise MemoryError("batch data exceeds the scratch mapping")
        return self._scratch + DATA + position

    def space(self, size: int) -> int:
        """Place room for a result."""
        return self.put(bytes(size))

    @property
    def room(self) -> int:
        return DATA_SIZE - len(self.data)


class Outcome:
    """What the syscalls of a batch returned, and the data area after them."""

    def __init__(self, scratch: int, results: list[int], data: bytes) -> None:
        self.results = results
        self._base = scratch + DATA
        self._data = data

    def read(self, address: int, size: int) -> bytes:
        return self._data[address - self._base : address - self._base + size]


def stop(tids: list[int], deadline: float) -> None:
    """Interrupt seized tasks and wait until each is off its CPU; signals on their way are delivered first.

    TaskEnded if one is gone; TimeoutError if one does not stop by `deadline` (time.monotonic()).
    """
    for tid in tids:
        ptrace.interrupt(tid)
    for tid in tids:
        wait_event_stop(tid, deadline)


def wait_event_stop(tid: int, deadline: float) -> None:
    while True:
        status = wait_until(tid, deadline)
        if ptrace.event(status) == ptrace.PTRACE_EVENT_STOP:
            return
        signal_number = 0 if ptrace.event(status) else os.WSTOPSIG(status)
        ptrace.cont(tid, signal_number)


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
        self._buffer = ctypes.create_string_buffer(SCRATCH_SIZE)

    # --- the scratch mapping ---

    def adopt_scratch(self, address: int, code: int | None = None) -> None:
        """Use a mapping that is there: SCRATCH_SIZE bytes, the first page executable once the code is in it."""
        self.scratch, self.code = address, address if code is None else code

    def runner_code(self) -> bytes:
        return arch.BATCH_PARK if self.fragile else arch.BATCH_TRAP

    def map_scratch(self, tid: int, syscall_at: int) -> None:
        """Map the scratch with single calls at a syscall instruction of the process (source side)."""
        step = self.single_syscall
        address = step(tid, syscall_at, "map scratch", arch.NR_mmap, 0, SCRATCH_SIZE, 3, 0x22, -1 & ALL_SIGNALS, 0)
        self.memory.write(address, self.runner_code())
        step(tid, syscall_at, "protect scratch", arch.NR_mprotect, address, PAGE, 5)
        self.adopt_scratch(address)

    def unmap_scratch(self, tid: int, syscall_at: int) -> None:
        if self.scratch:
            self.single_syscall(tid, syscall_at, "unmap scratch", arch.NR_munmap, self.scratch, SCRATCH_SIZE)
            self.scratch = self.code = 0

    # --- one call ---

    def single_syscall(self, tid: int, at: int, what: str, number: int, *arguments: int) -> int:
        """Make a stopped task execute one syscall at the instruction `at`; its registers are kept."""
        saved = ptrace.get_registers(tid)
        mask = ptrace.get_sigmask(tid)
        try:
            ptrace.set_sigmask(tid, ALL_SIGNALS)
            ptrace.set_registers(tid, arch.syscall_registers(saved, at, number, arguments))
            # no single step: the trap flag outlives a tracer that dies (__ptrace_unlink); still fatal if we die in here
            ptrace.to_syscall(tid)
            ptrace.wait(tid)
            ptrace.interrupt(tid)
            ptrace.cont(tid)
            wait_event_stop(tid, time.monotonic() + _PARK_SECONDS)
            result = ptrace.get_registers(tid).result
        finally:
            ptrace.set_registers(tid, saved)
            ptrace.set_sigmask(tid, mask)
        return _checked(result, what, tid)

    # --- a batch ---

    def batch(self) -> Batch:
        return Batch(self.scratch)

    def run(self, tid: int, batch: Batch, restore: Registers | None = None) -> Outcome:
        """Make a stopped task run a batch; InjectedCallFailed for the first call that failed and was not optional.

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
        for index, result in enumerate(results):
            if index not in batch.optional:
                _checked(result, batch.names[index], tid)
        return Outcome(self.scratch, results, data)

    def _run_part(
        self, tid: int, batch: Batch, calls: list[tuple[int, ...]], saved: Registers, with_data: bool
    ) -> list[int]:
        self._write(TABLE, b"".join(_ENTRY.pack(*call, 0) for call in calls))
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
        frame = arch.sigreturn_frame(frame_at, arch.as_restarted(saved), ptrace.get_xstate(tid), mask)
        timeout = struct.pack("<QQQQ", 0, 0, _PARK_SECONDS, 0).ljust(64, b"\0")
        self._write(CONTROL, timeout + frame)
        control = self.scratch + CONTROL
        # order matters if we die in between: from the registers on, the process finds its own way back
        ptrace.set_registers(
            tid,
            _parked(start, flag=control, timeout=control + 16, frame=frame_at + 8),
        )
        ptrace.set_sigmask(tid, ALL_SIGNALS)
        try:
            ptrace.cont(tid)
            self._await_flag(tid, control)
            ptrace.interrupt(tid)
            wait_event_stop(tid, time.monotonic() + _PARK_SECONDS)
        finally:
            ptrace.set_sigmask(tid, mask)

    def _await_flag(self, tid: int, control: int) -> None:
        """Spin until the runner has been through its table: microseconds, so no sleep."""
        address = ctypes.addressof(self._buffer)
        deadline = time.monotonic() + _PARK_SECONDS
        while True:
            self.memory.read_into(address, [(control, control + 8)])
            if self._buffer.raw[:8] != bytes(8):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"task {tid}: injected calls do not end")
            os.sched_yield()


def _parked(start: Registers, flag: int, timeout: int, frame: int) -> Registers:
    start.r13, start.r14, start.r15 = flag, timeout, frame
    start.rsp = flag - PAGE + STACK_TOP
    return start


def _checked(result: int, what: str, tid: int) -> int:
    if -4096 < result < 0:
        raise InjectedCallFailed(-result, os.strerror(-result), f"{what} (task {tid})")
    return result
