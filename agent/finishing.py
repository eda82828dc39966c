"""The last part of building a shadow, in the freeze: descriptors, threads, settings, registers.

The order is fixed by what takes something away: descriptors and threads need our privileges,
credentials end them, rseq lets the kernel write into the process, and leaving the scratch ends our
ability to make it do anything.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Final

from agent import checks, kinds, protocol
from agent.api import Notice
from agent.descriptors import Descriptor, Rebuilding
from agent.kernel import ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.kernel.arch.x86_64_features import fitted
from agent.phases import Phases
from agent.resources import (
    epoll,
    file_locks,
    identity,
    memory_lock,
    oom_score,
    regular_file,
    signals,
    threads,
    timers,
    waits,
)
from agent.shadow import Shadow
from agent.silencing import add_fired_entries
from agent.state import ProcessState, ThreadState
from agent.together import Job, run_all
from agent.tracee import ALL_SIGNALS, Batch
from transport.frames import ProtocolError

NR_chdir: Final = 80
NR_prctl: Final = arch.NR_prctl


class Finish:
    """The rebuilding of one shadow: `begin`, `descriptors` and `threads` as they come, and `end`."""

    def __init__(
        self,
        shadow: Shadow,
        state: ProcessState,
        context: Rebuilding,
        open_file: Callable[[int], int],
        delta: int,
        phases: Phases,
    ) -> None:
        """`delta`: nanoseconds that the process's monotonic clock is ahead of ours."""
        self._shadow = shadow
        self._state = state
        self._context = context
        self._open_file = open_file
        self._delta = delta
        self._phases = phases
        self._credentials = identity.credentials(shadow.pid)
        # what all threads of a shadow have in common, made as they were by its first one
        self._registers = ptrace.get_registers(shadow.pid)
        self._xstate = ptrace.get_xstate(shadow.pid)
        self._scheduling = threads.scheduling(shadow.pid)
        self._executable = -1  # where the shadow has it open
        self._to_come = set(state.tids) - {self._leader.tid}
        self._descriptors: list[Descriptor] = []
        self._numbers: set[int] = set()  # theirs
        self._ours: list[int] = []  # the same, rebuilt
        self.notices: list[Notice] = []

    @property
    def _leader(self) -> ThreadState:
        return self._state.threads[0]

    def begin(self) -> None:
        """Empty threads."""
        if self._shadow.threads.get(self._leader.tid) != self._shadow.pid:
            raise ProtocolError(f"another first thread than was offered: {self._leader.tid}")
        self._shadow.make_threads(self._state.tids)
        self._phases.mark("make threads")

    def descriptors(self, message: protocol.Descriptors) -> None:
        """Open files; with the last, all get their numbers, and the settings that need them are made."""
        if self._executable >= 0:
            raise ProtocolError("descriptors after the last ones")
        checks.add_numbers(self._numbers, message.descriptors)
        self._context.elapsed_ns = max(0, time.monotonic_ns() + self._delta - message.captured_at)
        self._descriptors += message.descriptors
        self._ours += [kinds.rebuild(one, self._context) for one in message.descriptors]
        if message.last:
            self._executable = self._place(self._open_file(self._state.executable))
        self._phases.mark("descriptors")
        if message.last:
            _settings(self._shadow, self._state, self._descriptors, self._leader.tid, self._delta)
            self._phases.mark("settings")

    def _place(self, executable: int) -> int:
        """All descriptors to the shadow; the number under which it has the executable for the moment."""
        keep = {fd for fd, _ in self._context.sockets}
        for fd, descriptor in zip(self._ours, self._descriptors, strict=True):
            if fd in keep:
                self._context.placed[fd] = descriptor.numbers[0][0]
        try:
            received = self._shadow.receive([*self._ours, executable])
        finally:
            for fd in self._ours:
                if fd not in keep:
                    os.close(fd)
            self._ours.clear()
        wanted = [d.numbers for d in self._descriptors]
        place = max(self._numbers, default=0) + 1
        self._shadow.place(received, [*wanted, ((place, True),)])
        add_fired_entries(self._shadow, self._descriptors)
        return place

    def threads(self, threads: list[ThreadState]) -> None:
        """All that these threads do for themselves, and their registers. The first one's turn is in `end`."""
        for thread in threads:
            if thread.tid not in self._to_come:
                raise ProtocolError(f"thread {thread.tid}, which was not announced, or was here already")
            self._to_come.remove(thread.tid)
        self._state.threads += threads
        self._run(threads)
        self._phases.mark("threads")

    def end(self, last: protocol.Complete) -> list[Notice]:
        """Afterwards the shadow is whole, stopped, and has nothing of ours in it.

        With its credentials our rights end.
        """
        shadow, state = self._shadow, self._state
        state.memory.brk, state.lock_future = last.brk, last.lock_future
        if self._executable < 0:
            raise ProtocolError("the descriptors were not announced as complete")
        if self._to_come:
            raise ProtocolError(f"{len(self._to_come)} of {len(state.tids)} threads did not come")
        _memory_map(shadow, state, self._executable)
        identity.restore_limits(shadow.pid, state.limits)  # after it: it may have more than it could get now
        self.notices += oom_score.restore(shadow.pid, state.oom_score_adj, shadow.oom_score_adj)
        self._run([self._leader])
        shadow.leave_scratch()
        _set_registers(shadow, self._leader)
        self._phases.mark("end")
        return self.notices

    def _run(self, some: list[ThreadState]) -> None:
        shadow = self._shadow
        by_tid = {shadow.threads[t.tid]: t for t in some}
        for thread in some:
            thread.xstate = fitted(thread.xstate, self._xstate)

        def make(tid: int, batch: Batch) -> Job:
            self._fill(batch, by_tid[tid])
            return Job(tid, batch, self._registers)

        for _ in run_all(shadow, list(by_tid), make):
            pass
        for tid, thread in by_tid.items():
            said = threads.restore_scheduling(tid, thread.scheduling, self._scheduling)
            if said:
                self.notices.append(Notice(kind="affinity", message=said))
        _wait_again(shadow, by_tid, self._registers)
        for thread in some:
            if thread is not self._leader:
                _set_registers(shadow, thread)

    def _fill(self, batch: Batch, thread: ThreadState) -> None:
        state = self._state
        if thread is self._leader:  # from here on it decides what mmap does
            batch.call("personality", arch.NR_personality, state.personality)
            memory_lock.restore_future(batch, state.lock_future)
        threads.restore(batch, thread, self._leader.tid)
        identity.restore_credentials(batch, state.credentials, self._credentials)
        if thread is self._leader:
            batch.call("dumpable", NR_prctl, identity.PR_SET_DUMPABLE, int(state.dumpable == 1))
        threads.restore_rseq(batch, thread)


def _settings(
    shadow: Shadow, state: ProcessState, descriptors: list[Descriptor], own_pid: int, delta: int
) -> None:
    batch = shadow.batch()
    batch.call(f"chdir {state.cwd}", NR_chdir, batch.put(os.fsencode(state.cwd) + b"\0"))
    batch.call("umask", arch.NR_umask, state.umask)
    signals.restore_actions(batch, state.actions)
    if state.child_subreaper:
        batch.call("child subreaper", NR_prctl, identity.PR_SET_CHILD_SUBREAPER, 1)
    if state.thp_disable:
        batch.call("THP disable", NR_prctl, identity.PR_SET_THP_DISABLE, 1)
    for descriptor in descriptors:
        number = descriptor.numbers[0][0]
        if descriptor.kind == epoll.NAME:
            epoll.add_entries(batch, number, kinds.decode(descriptor), fired=False)
        elif descriptor.kind == regular_file.NAME:
            file = kinds.decode(descriptor)
            file_locks.take_in(batch, number, file.path, file.locks)
    places = timers.create_posix(batch, state.timers)
    signals.requeue_process(batch, own_pid, state.pending)
    outcome = shadow.run(shadow.pid, batch)
    _check_timers(state, [struct.unpack("<i", outcome.read(p, 4))[0] for p in places])
    elapsed = max(0, time.monotonic_ns() + delta - state.captured_at)
    batch = shadow.batch()
    timers.restore_itimers(batch, state, own_pid, elapsed)
    timers.arm_posix(batch, state, own_pid, elapsed)
    shadow.run(shadow.pid, batch)


def _check_timers(state: ProcessState, numbers: list[int]) -> None:
    for timer, number in zip(state.timers, numbers, strict=True):
        if timer.timer.id != number:
            raise RuntimeError(f"POSIX timer {timer.timer.id} got number {number}")


def _memory_map(shadow: Shadow, state: ProcessState, executable: int) -> None:
    """PR_SET_MM_MAP (prctl(2)): where text, data, heap, stack and arguments are; auxv; /proc/PID/exe."""
    batch = shadow.batch()
    auxv = batch.put(state.auxv)
    m = state.memory
    fields = (
        *(m.start_code, m.end_code, m.start_data, m.end_data, m.start_brk, m.brk),
        *(m.start_stack, m.arg_start, m.arg_end, m.env_start, m.env_end),
    )
    structure = struct.pack("<11QQII", *fields, auxv, len(state.auxv), executable)
    place = batch.put(structure)
    batch.call(
        "PR_SET_MM_MAP", NR_prctl, identity.PR_SET_MM, identity.PR_SET_MM_MAP, place, len(structure), 0
    )
    batch.call("close executable", arch.NR_close, executable)
    shadow.run(shadow.pid, batch)


def _wait_again(shadow: Shadow, some: dict[int, ThreadState], registers: Registers) -> None:
    """Give threads the restart blocks of their interrupted waits, and the registers to go on with.

    A wait for an absolute time needs none: it is run again.
    """
    batch = shadow.batch()
    again: list[tuple[int, tuple[int, ...]]] = []
    for tid, thread in some.items():
        captured = thread.registers
        if not waits.interrupted(captured):
            continue
        if thread.remaining_ns is None:
            thread.registers = arch.rerun(captured)
            continue
        place = batch.put(waits.timespec(thread.remaining_ns))
        again.append((tid, waits.call_with(captured, thread.remaining_ns, place)))
    for (tid, _), result in zip(again, shadow.interrupted_calls(batch, again, registers), strict=True):
        if result != -arch.ERESTART_RESTARTBLOCK:
            finished = arch.outside_syscall(some[tid].registers)
            finished.rax = result & ALL_SIGNALS
            some[tid].registers = finished


def _set_registers(shadow: Shadow, thread: ThreadState) -> None:
    tid = shadow.threads[thread.tid]
    ptrace.set_xstate(tid, thread.xstate)
    ptrace.set_registers(tid, thread.registers)
    ptrace.set_sigmask(tid, thread.sigmask)
