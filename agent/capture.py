"""The state of a frozen process, gathered in one batch per thread and a few reads of /proc."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable, Iterator

from agent.inventory import own_numbers
from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.resources import identity, memory_lock, signals, threads, timers, waits
from agent.state import MemoryFields, ProcessState, ThreadState
from agent.together import Job, run_all
from agent.tracee import Batch, Outcome, Tracee

_NR_BRK = 12
_P_ALL = 0
# waitid(2) of any child, also of other threads and of clone(2), that changes nothing: ECHILD if there is none
_ANY_CHILD = os.WNOHANG | os.WEXITED | os.WSTOPPED | os.WCONTINUED | os.WNOWAIT | ptrace.WALL


def namespace_offset(pid: int) -> tuple[int, int]:
    """How far the process's monotonic and boot clocks are ahead of ours, nanoseconds (time_namespaces(7))."""
    return _subtract(_offsets(pid), _offsets(os.getpid()))


def _offsets(pid: int) -> tuple[int, int]:
    found = {}
    for line in procfs.read(f"/proc/{pid}/timens_offsets").decode().splitlines():
        name, seconds, nanoseconds = line.split()
        found[name] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return found.get("monotonic", 0), found.get("boottime", 0)


def _subtract(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] - b[0], a[1] - b[1]


class Frozen:
    """What the freeze knows of each thread before anything is injected: how it goes on, here or there."""

    def __init__(
        self, tracee: Tracee, tids: list[int], sleepers: waits.Sleepers, history: waits.History
    ) -> None:
        self.tids = tids
        self.slept = sleepers.slept()
        self.has_children = True  # until the first thread was asked
        self.order = [tracee.pid, *(tid for tid in tids if tid != tracee.pid)]  # of the threads in the state
        self.numbers = own_numbers(tracee.pid, tids)
        self.shared_pending = signals.pending_of_process(tracee.pid)
        self.stopped = {tid: threads.look(tid) for tid in tids}
        self.registers = self._settle(tracee.memory)
        # what the destination gets: a wait under its own number, and how much of it is left
        known = {
            tid: history.recall(tid, self.registers[tid], sleepers.before.get(tid)) for tid in tids
        }
        self.there = {
            tid: waits.identified(registers, tracee.memory) for tid, (registers, _) in known.items()
        }
        self._memory = tracee.memory
        self._waiting = {tid: known[tid][1] for tid in tids if waits.interrupted(self.there[tid])}
        self._clocks = waits.clocks({before.cpu for before in self._waiting.values() if before is not None})

    def remaining_ns(self, tid: int) -> int | None:
        """What is left of a thread's wait, None if it was in none. Before anything is injected into it."""
        if tid not in self._waiting:
            return None
        registers, before = self.there[tid], self._waiting[tid]
        now = self._clocks.get(before.cpu) if before is not None else None
        return waits.remaining_ns(registers, self._memory, before, tid in self.slept, now)

    def _settle(self, memory: RemoteMemory) -> dict[int, arch.Registers]:
        sections = threads.rseq_sections(self.stopped, memory)
        shared = signals.mask_of(self.shared_pending)
        return {
            tid: thread.settled(memory, shared | signals.mask_of(thread.pending), sections.get(tid))
            for tid, thread in self.stopped.items()
        }


def capture_process(tracee: Tracee, frozen: Frozen, executable: int) -> ProcessState:
    """What is the process's, and its first thread, which is asked for it."""
    process, first = _capture_leader(tracee, frozen, executable)
    process.threads = [first]
    return process


def capture_last(tracee: Tracee, frozen: Frozen, state: ProcessState) -> None:
    """What is asked by calls that change mappings, or could: they would wait for the last scan to end."""
    batch = tracee.batch()
    brk = batch.call("brk", _NR_BRK, 0)
    lock_future = memory_lock.ask_future(batch, tracee.scratch)
    outcome = tracee.run(tracee.pid, batch, frozen.registers[tracee.pid])
    state.memory.brk, state.lock_future = outcome.results[brk], lock_future(outcome)


def capture_threads(tracee: Tracee, frozen: Frozen) -> Iterator[ThreadState]:
    """All threads but the first: each is asked for what only it knows."""
    answers: dict[int, Callable[[Outcome], ThreadState]] = {}

    def make(tid: int, batch: Batch) -> Job:
        state, answers[tid] = threads.ask(batch, tid, frozen.registers[tid], frozen.stopped[tid])
        state.remaining_ns = frozen.remaining_ns(tid)
        return Job(tid, batch, frozen.registers[tid], state.xstate, state.sigmask)

    for tid, outcome in run_all(tracee, frozen.order[1:], make):
        yield _finish(answers[tid](outcome), frozen, tid)


def _finish(state: ThreadState, frozen: Frozen, tid: int) -> ThreadState:
    state.tid = frozen.numbers[tid]
    state.registers = frozen.there[tid]
    return state


def _capture_leader(tracee: Tracee, frozen: Frozen, executable: int) -> tuple[ProcessState, ThreadState]:
    pid = tracee.pid
    batch = tracee.batch()
    actions = signals.ask_actions(batch, pid)
    itimers = timers.ask_itimers(batch)
    posix = timers.ask_posix(batch, pid, frozen.numbers)
    # right after the timers: what a look before the batch says is earlier by all that kept the batch waiting
    clock = batch.space(16)
    batch.call("clock_gettime", arch.NR_clock_gettime, time.CLOCK_MONOTONIC, clock)
    securebits = batch.call("PR_GET_SECUREBITS", arch.NR_prctl, identity.PR_GET_SECUREBITS)
    dumpable = batch.call("PR_GET_DUMPABLE", arch.NR_prctl, identity.PR_GET_DUMPABLE)
    subreaper_at = batch.space(8)
    batch.call("PR_GET_CHILD_SUBREAPER", arch.NR_prctl, identity.PR_GET_CHILD_SUBREAPER, subreaper_at)
    thp = batch.call("PR_GET_THP_DISABLE", arch.NR_prctl, identity.PR_GET_THP_DISABLE, optional=True)
    children = batch.call("waitid", arch.NR_waitid, _P_ALL, 0, 0, _ANY_CHILD, 0, optional=True)
    first, thread = threads.ask(batch, pid, frozen.registers[pid], frozen.stopped[pid])
    first.remaining_ns = frozen.remaining_ns(pid)
    outcome = tracee.run(pid, batch, frozen.registers[pid])
    frozen.has_children = outcome.results[children] != -errno.ECHILD
    seconds, nanoseconds = struct.unpack("<qq", outcome.read(clock, 16))
    status = procfs.status(pid)
    state = ProcessState(
        threads=[],
        tids=tuple(frozen.numbers[tid] for tid in frozen.order),
        actions=actions(outcome),
        pending=frozen.shared_pending,
        itimers=itimers(outcome),
        timers=posix(outcome),
        credentials=identity.credentials(pid, securebits=outcome.results[securebits]),
        limits=tuple(procfs.limits(pid)),
        memory=_memory_fields(pid),
        auxv=procfs.auxv(pid),
        executable=executable,
        cwd=os.readlink(f"/proc/{pid}/cwd"),
        umask=int(status["Umask"], 8),
        personality=int(procfs.read(f"/proc/{pid}/personality"), 16),
        oom_score_adj=int(procfs.read(f"/proc/{pid}/oom_score_adj")),
        dumpable=outcome.results[dumpable],
        child_subreaper=struct.unpack("<i", outcome.read(subreaper_at, 4))[0],
        thp_disable=max(0, outcome.results[thp]),
        captured_at=seconds * 1_000_000_000 + nanoseconds,
    )
    return state, _finish(thread(outcome), frozen, pid)


def _memory_fields(pid: int) -> MemoryFields:
    stat = procfs.stat(pid)
    return MemoryFields(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=0,
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
    )
