"""The state of a frozen process, gathered in one batch per thread and a few reads of /proc."""

from __future__ import annotations

import os
import struct
import time

from agent.inventory import own_number
from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.resources import identity, signals, threads, timers, waits
from agent.state import MemoryFields, ProcessState, ThreadState
from agent.tracee import Tracee

_NR_BRK = 12


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

    def __init__(self, tracee: Tracee, tids: list[int], asleep: dict[int, waits.Asleep | None]) -> None:
        self.tids = tids
        self.shared_pending = signals.pending_of_process(tracee.pid)
        self.pending = {tid: signals.pending_of_thread(tid) for tid in tids}
        self.registers = {tid: self._settle(tracee, tid) for tid in tids}
        # what the destination gets: a wait under its own number, and how much of it is left
        self.there = {tid: waits.identified(self.registers[tid], tracee.memory) for tid in tids}
        now = waits.observe("self")
        self.remaining = {
            tid: waits.remaining_ns(self.there[tid], tracee.memory, asleep.get(tid), waits.observe(tid), now)
            if waits.interrupted(self.there[tid])
            else None
            for tid in tids
        }

    def _settle(self, tracee: Tracee, tid: int) -> arch.Registers:
        pending = signals.mask_of(self.shared_pending) | signals.mask_of(self.pending[tid])
        return threads.settled_registers(tid, tracee.memory, pending)


def capture_process(tracee: Tracee, frozen: Frozen, executable: int) -> ProcessState:
    """Ask every thread for what only it knows, the leader also for what is the process's."""
    pid = tracee.pid
    leader = frozen.tids.index(pid)
    order = [pid, *frozen.tids[:leader], *frozen.tids[leader + 1 :]]
    process, first = _capture_leader(tracee, frozen, executable)
    process.threads = [first, *(_capture_thread(tracee, frozen, tid) for tid in order[1:])]
    # after the timers were read: one that ran out meanwhile is disarmed, and only its signal is left
    process.pending = signals.pending_of_process(pid)
    for tid, thread in zip(order, process.threads, strict=True):
        thread.pending = signals.pending_of_thread(tid)
    return process


def _capture_thread(tracee: Tracee, frozen: Frozen, tid: int) -> ThreadState:
    batch = tracee.batch()
    answer = threads.ask(batch, tid, frozen.registers[tid], frozen.pending[tid])
    state = answer(tracee.run(tid, batch, frozen.registers[tid]))
    return _finish(state, tracee.pid, frozen, tid)


def _finish(state: ThreadState, pid: int, frozen: Frozen, tid: int) -> ThreadState:
    state.tid = own_number(pid, tid)
    state.registers = frozen.there[tid]
    state.remaining_ns = frozen.remaining[tid]
    return state


def _capture_leader(tracee: Tracee, frozen: Frozen, executable: int) -> tuple[ProcessState, ThreadState]:
    pid = tracee.pid
    batch = tracee.batch()
    actions = signals.ask_actions(batch, pid)
    itimers = timers.ask_itimers(batch)
    posix = timers.ask_posix(batch, pid)
    brk = batch.call("brk", _NR_BRK, 0)
    securebits = batch.call("PR_GET_SECUREBITS", arch.NR_prctl, identity.PR_GET_SECUREBITS)
    dumpable = batch.call("PR_GET_DUMPABLE", arch.NR_prctl, identity.PR_GET_DUMPABLE)
    subreaper_at = batch.space(8)
    batch.call("PR_GET_CHILD_SUBREAPER", arch.NR_prctl, identity.PR_GET_CHILD_SUBREAPER, subreaper_at)
    thp = batch.call("PR_GET_THP_DISABLE", arch.NR_prctl, identity.PR_GET_THP_DISABLE, optional=True)
    thread = threads.ask(batch, pid, frozen.registers[pid], frozen.pending[pid])
    captured_at = time.monotonic_ns() + namespace_offset(pid)[0]
    outcome = tracee.run(pid, batch, frozen.registers[pid])
    status = procfs.status(pid)
    state = ProcessState(
        threads=[],
        actions=actions(outcome),
        pending=frozen.shared_pending,
        itimers=itimers(outcome),
        timers=posix(outcome),
        credentials=identity.credentials(pid, securebits=outcome.results[securebits]),
        limits=tuple(procfs.limits(pid)),
        memory=_memory_fields(pid, outcome.results[brk]),
        auxv=procfs.auxv(pid),
        executable=executable,
        cwd=os.readlink(f"/proc/{pid}/cwd"),
        umask=int(status["Umask"], 8),
        personality=int(procfs.read(f"/proc/{pid}/personality"), 16),
        oom_score_adj=int(procfs.read(f"/proc/{pid}/oom_score_adj")),
        dumpable=outcome.results[dumpable],
        child_subreaper=struct.unpack("<i", outcome.read(subreaper_at, 4))[0],
        thp_disable=max(0, outcome.results[thp]),
        captured_at=captured_at,
    )
    return state, _finish(thread(outcome), pid, frozen, pid)


def _memory_fields(pid: int, brk: int) -> MemoryFields:
    stat = procfs.stat(pid)
    return MemoryFields(
        start_code=stat.start_code,
        end_code=stat.end_code,
        start_data=stat.start_data,
        end_data=stat.end_data,
        start_brk=stat.start_brk,
        brk=brk,
        start_stack=stat.start_stack,
        arg_start=stat.arg_start,
        arg_end=stat.arg_end,
        env_start=stat.env_start,
        env_end=stat.env_end,
    )
