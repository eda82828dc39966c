"""Stopping all threads of a running process for a moment, so that it does not notice."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from agent.kernel import procfs, ptrace
from agent.kernel.memory import RemoteMemory
from agent.resources import signals, threads, waits
from agent.tracee import wait_event_stop

_ATTEMPTS: Final = 40
_SECONDS: Final = 0.02  # that the others stand still for one that is in the middle of a disk operation
_RETRY_SECONDS: Final = 0.005


class Halt:
    """`with halt:` the process stands still. The longest time that it did so far is `longest_ms`.

    `waits` knows the waits that it interrupted, for a later stop after which they are to go on elsewhere.
    """

    def __init__(self, pid: int, memory: RemoteMemory) -> None:
        self.pid = pid
        self.longest_ms = 0.0
        self._memory = memory
        self._awaited: set[int] = set()  # told to stop
        self._stopped: list[int] = []
        self._began = 0.0
        self._asleep: dict[int, waits.Asleep | None] = {}
        self.waits = waits.History()

    def __enter__(self) -> None:
        """TimeoutError if a thread does not stop in any of some attempts over four seconds; ProcessLookupError."""
        for attempt in range(_ATTEMPTS):
            self._asleep = {tid: waits.observe(tid) for tid in procfs.threads(self.pid)}
            self._began = time.perf_counter()
            try:
                self._stop(time.monotonic() + _SECONDS)
                return
            except TimeoutError:
                self._let_go()
                if attempt == _ATTEMPTS - 1:
                    raise
            except BaseException:
                self._let_go()
                raise
            time.sleep(_RETRY_SECONDS * (attempt + 1))

    def __exit__(self, *_: object) -> None:
        self._let_go()

    def _stop(self, deadline: float) -> None:
        """Until no thread is left that is not stopped: a running one may make another."""
        while fresh := self._fresh():
            if time.monotonic() > deadline:
                raise TimeoutError(f"tasks {fresh} do not stop")
            for tid in fresh:
                self._interrupt(tid)
            for tid in sorted(self._awaited):
                self._await(tid, deadline)

    def _fresh(self) -> list[int]:
        return [tid for tid in procfs.threads(self.pid) if tid not in self._stopped]

    def _interrupt(self, tid: int) -> None:
        if tid in self._awaited:
            return
        try:
            ptrace.seize(tid)
            self._awaited.add(tid)
            ptrace.interrupt(tid)
        except ProcessLookupError:
            if tid == self.pid:
                raise

    def _await(self, tid: int, deadline: float) -> None:
        try:
            wait_event_stop(tid, deadline)
            self._stopped.append(tid)
        except ProcessLookupError:
            if tid == self.pid:
                raise
        self._awaited.discard(tid)

    def _let_go(self) -> None:
        """What did not stop in time will be awaited in the next attempt; the kernel lets it go when we end."""
        with contextlib.ExitStack() as every_one:
            for tid in self._stopped:
                every_one.callback(self._resume, tid)
        self._stopped.clear()
        self.longest_ms = max(self.longest_ms, (time.perf_counter() - self._began) * 1000)

    def _resume(self, tid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            try:
                thread = threads.look(tid)
                pending = signals.mask_of((*signals.pending_of_process(tid), *thread.pending))
                registers = thread.settled(self._memory, pending, None)
                if registers != thread.registers:
                    ptrace.set_registers(tid, registers)
                self.waits.note(tid, registers, self._asleep.get(tid))
            finally:
                ptrace.detach(tid)
