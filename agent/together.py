"""Batches of many tasks of one process in one go: all are set going, then all are waited for.

One after another, each costs a switch to the task and one back while everything else stands still; together
they run beside each other and beside us. Each task gets a slot of the scratch for a wave:

    control (flag, timespec) and signal frame (park only) | data | table
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import msgspec

from agent.kernel import ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Registers
from agent.tracee import (
    ALL_SIGNALS,
    ENTRY,
    NOT_MADE,
    PARK_SECONDS,
    SCRATCH_SIZE,
    Batch,
    Outcome,
    Tracee,
    keep_going,
    parked,
    return_frame_registers,
)

DATA_SIZE: Final = 1024
CALLS: Final = 48
_CONTROL: Final = 64
_SLOTS_AT: Final = PAGE  # behind the code
_TIMEOUT: Final = struct.pack("<QQQQ", 0, 0, PARK_SECONDS, 0).ljust(_CONTROL, b"\0")


class Job(msgspec.Struct):
    """One task and what it shall do. `registers` are those it has afterwards, `xstate` and `sigmask` stay."""

    tid: int
    batch: Batch
    registers: Registers
    xstate: bytes = b""
    sigmask: int = 0


# makes the job of a task with this empty batch
Maker = Callable[[int, Batch], Job]


def run_all(tracee: Tracee, tids: Sequence[int], make: Maker) -> Iterator[tuple[int, Outcome]]:
    """Run each task's batch; (tid, outcome) as they come. Errors as of `Tracee.run`."""
    wave = _Wave(tracee)
    for tid in tids:
        if wave.full:
            yield from wave.run()
        if not wave.add(tid, make):  # does not fit into a slot
            yield from wave.run()
            job = make(tid, tracee.batch())
            yield tid, tracee.run(tid, job.batch, job.registers)
    yield from wave.run()


class _Wave:
    def __init__(self, tracee: Tracee) -> None:
        self._tracee = tracee
        self._frame = 0  # bytes of a signal frame, once known
        self._jobs: list[Job] = []

    @property
    def _size(self) -> int:
        """Of a slot."""
        return -(-(_CONTROL + self._frame + DATA_SIZE + CALLS * ENTRY.size) // 64) * 64

    def _slot(self, number: int) -> int:
        return self._tracee.scratch + _SLOTS_AT + number * self._size

    def _data(self, number: int) -> int:
        return self._slot(number) + _CONTROL + self._frame

    def _table(self, number: int) -> int:
        return self._data(number) + DATA_SIZE

    @property
    def full(self) -> bool:
        return _SLOTS_AT + (len(self._jobs) + 1) * self._size > SCRATCH_SIZE

    def add(self, tid: int, make: Maker) -> bool:
        """Whether it fits."""
        if self._tracee.fragile and not self._frame:
            self._frame = -(-len(arch.sigreturn_frame(0, Registers(), ptrace.get_xstate(tid), 0)) // 64) * 64
        try:
            job = make(tid, Batch(self._data(len(self._jobs)), DATA_SIZE))
        except MemoryError:
            return False
        if len(job.batch.calls) > CALLS:
            return False
        self._jobs.append(job)
        return True

    def run(self) -> Iterator[tuple[int, Outcome]]:
        if not self._jobs:
            return
        self._load()
        run = self._run_parked if self._tracee.fragile else self._run_trapped
        run()
        yield from self._outcomes()
        self._jobs.clear()

    def _load(self) -> None:
        """Write all slots at once."""
        content = bytearray(len(self._jobs) * self._size)
        for number, job in enumerate(self._jobs):
            base = number * self._size
            if self._tracee.fragile:
                back = return_frame_registers(job.registers, self._tracee.memory)
                frame = arch.sigreturn_frame(self._slot(number) + _CONTROL, back, job.xstate, job.sigmask)
                content[base : base + _CONTROL + len(frame)] = _TIMEOUT + frame
            data = base + _CONTROL + self._frame
            content[data : data + len(job.batch.data)] = job.batch.data
            for position, call in enumerate(job.batch.calls):
                ENTRY.pack_into(content, data + DATA_SIZE + position * ENTRY.size, *call, NOT_MADE)
        start = self._slot(0)
        address = ctypes.addressof(ctypes.c_char.from_buffer(content))
        self._tracee.memory.write_from(address, [(start, start + len(content))])

    def _start(self, number: int, job: Job) -> Registers:
        return arch.batch_registers(
            job.registers, self._tracee.code, self._table(number), len(job.batch.calls)
        )

    def _run_trapped(self) -> None:
        for number, job in enumerate(self._jobs):
            ptrace.set_registers(job.tid, self._start(number, job))
            ptrace.cont(job.tid)
        for job in self._jobs:
            self._tracee.await_trap(job.tid)

    def _run_parked(self) -> None:
        started: list[Job] = []
        deadline = time.monotonic() + PARK_SECONDS
        try:
            for number, job in enumerate(self._jobs):
                slot = self._slot(number)
                # order matters if we die in between: from the registers on, the task finds its own way back
                registers = parked(self._start(number, job), slot, slot + 16, slot + _CONTROL + 8)
                # for a handler that runs if we die right here
                registers.rsp = job.registers.rsp - arch.RED_ZONE
                ptrace.set_registers(job.tid, registers)
                self._tracee.adrift.add(job.tid)
                ptrace.set_sigmask(job.tid, ALL_SIGNALS)
                started.append(job)
                ptrace.cont(job.tid)
            self._await_flags(deadline)
        finally:
            with contextlib.ExitStack() as steps:
                for job in started:
                    steps.callback(self._stop_again, job, deadline)
                for job in started:
                    steps.callback(_interrupt, job.tid)

    def _stop_again(self, job: Job, deadline: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._tracee.put_back(job.tid, job.registers, job.sigmask, deadline + PARK_SECONDS)

    def _await_flags(self, deadline: float) -> None:
        """Spin until all runners have been through their tables."""
        ranges = [(self._slot(n), self._slot(n) + 8) for n in range(len(self._jobs))]
        flags = (ctypes.c_uint64 * len(ranges))()
        while True:
            self._tracee.memory.read_into(ctypes.addressof(flags), ranges)
            if all(flags):
                return
            for job, flag in zip(self._jobs, flags, strict=True):
                if not flag:
                    keep_going(job.tid)
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self._tracee.pid}: injected calls do not end")
            os.sched_yield()

    def _outcomes(self) -> Iterator[tuple[int, Outcome]]:
        start, size = self._slot(0), len(self._jobs) * self._size
        content = bytearray(size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(content))
        self._tracee.memory.read_into(address, [(start, start + size)])
        for number, job in enumerate(self._jobs):
            data, table = self._data(number) - start, self._table(number) - start
            count = len(job.batch.calls)
            results = list(struct.unpack_from(f"<{count * 8}q", content, table)[7::8])
            written = bytes(content[data : data + len(job.batch.data)])
            yield job.tid, Outcome(job.batch, job.tid, results, written)


def _interrupt(tid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        ptrace.interrupt(tid)
