"""Stopping all threads of a running process for a moment, so that it does not notice."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from agent.kernel import procfs, ptrace
from agent.kernel.memory import RemoteMemory
from agent.resources import waits
from agent.tracee import wait_event_stop
from agent.visit import Pause

_ATTEMPTS: Final = 40
_SECONDS: Final = 0.02  # that the others stand still for one that is in the middle of a disk operation
_RETRY_SECONDS: Final = 0.005
_LAST_SECONDS: Final = 5.0  # for one that never did, before it is left to the kernel


class Halt:
    """`with halt:` the process stands still. The longest time that it did so far is `longest_ms`.

    `waits` knows the waits that it interrupted, for a later stop after which they are to go on elsewhere.
    """

    def __init__(self, pid: int, memory: RemoteMemory) -> None:
        self.pid = pid
        self.longest_ms = 0.0
        self._memory = memory
        self._awaited: set[int] = set()  # told to stop
        self._stopped: dict[int, Pause | None] = {}  # by thread
        self._began = 0.0
        self._asleep: dict[int, waits.Asleep | None] = {}
        self.waits = waits.History()

    def __enter__(self) -> None:
        """TimeoutError if a thread stops in none of some attempts over four seconds; ProcessLookupError."""
        for attempt in range(_ATTEMPTS):
            self._asleep = {tid: waits.observe(tid) for tid in procfs.threads(self.pid)}
            self._began = time.perf_counter()
            try:
                self._stop(time.monotonic() + _SECONDS)
                return
            except BaseException as error:
                if not isinstance(error, TimeoutError) or attempt == _ATTEMPTS - 1:
                    self._give_up()
                    raise
            self._let_go()
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
            self._stopped[tid] = None
            self._stopped[tid] = Pause(tid, self._memory)
        except ProcessLookupError:
            if tid == self.pid:
                raise
        self._awaited.discard(tid)

    def _give_up(self) -> None:
        """Only a stopped thread can be let go; one that never stops is let go by the kernel when we end."""
        for tid in sorted(self._awaited):
            with contextlib.suppress(TimeoutError, ProcessLookupError):
                self._await(tid, time.monotonic() + _LAST_SECONDS)
        self._let_go()

    def _let_go(self) -> None:
        """All that are stopped. What did not stop in time is awaited in the next attempt."""
        with contextlib.ExitStack() as every_one:
            for tid, pause in self._stopped.items():
                every_one.callback(self._resume, tid, pause)
        self._stopped.clear()
        self.longest_ms = max(self.longest_ms, (time.perf_counter() - self._began) * 1000)

    def _resume(self, tid: int, pause: Pause | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            try:
                if pause is not None:
                    pause.put_back()
                    self.waits.note(tid, pause.registers, self._asleep.get(tid))
            finally:
                ptrace.detach(tid)
