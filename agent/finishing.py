"""The last part of building a shadow, in the freeze: descriptors, threads, settings, registers.

The order is fixed by what takes something away: descriptors and threads need our privileges, credentials end them, rseq
lets the kernel write into the process, and leaving the scratch ends our ability to make it do anything.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from agent import kinds, protocol
from agent.api import Notice
from agent.descriptors import Rebuilding
from agent.kernel import ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.phases import Phases
from agent.resources import epoll, identity, signals, threads, timers, waits
from agent.shadow import Shadow
from agent.state import ProcessState, ThreadState
from agent.tracee import ALL_SIGNALS, Batch

# int3 must reach its tracer: a blocked SIGTRAP would reset its disposition (force_sig_info)
_BLOCKED: Final = ALL_SIGNALS & ~(1 << 4)
_AT_SYSINFO_EHDR: Final = 33
NR_chdir: Final = 80
NR_prctl: Final = arch.NR_prctl


def rebuild(
    shadow: Shadow,
    message: protocol.Rebuild,
    context: Rebuilding,
    open_file: Callable[[int], int],
    delta: int,
    phases: Phases,
) -> list[Notice]:
    """Everything but memory; afterwards the shadow is whole, stopped, and has nothing of ours in it."""
    state = message.process
    leader = state.threads[0]
    own_pid = leader.tid
    notices: list[Notice] = []
    context.elapsed_ns = max(0, time.monotonic_ns() + delta - state.captured_at)
    ptrace.set_sigmask(shadow.pid, _BLOCKED)
    executable = _descriptors(shadow, message, context, open_file(state.executable))
    phases.mark("descriptors")
    shadow.make_threads([(t.tid, t.clear_child_tid) for t in state.threads])
    phases.mark("make threads")
    _settings(shadow, state, message, executable, own_pid, delta)
    phases.mark("settings")
    identity.restore_limits(shadow.pid, state.limits)
    notices += _outside(shadow, state)
    now = identity.credentials(shadow.pid)
    for thread in reversed(state.threads):
        _thread(shadow, thread, state, own_pid, now)
    phases.mark("threads")
    _leave(shadow, state)
    phases.mark("registers")
    return notices


def _descriptors(shadow: Shadow, message: protocol.Rebuild, context: Rebuilding, executable: int) -> int:
    """Place all descriptors; the number under which the executable is open for the moment."""
    # listeners before connections, which share their port
    order = sorted(range(len(message.descriptors)), key=lambda i: not kinds.is_listener(message.descriptors[i]))
    rebuilt = {i: kinds.rebuild(message.descriptors[i], context) for i in order}
    ours = [rebuilt[i] for i in range(len(order))]
    keep = {fd for fd, _ in context.sockets}
    try:
        received = shadow.receive([*ours, executable])
    finally:
        for fd in ours:
            if fd not in keep:
                os.close(fd)
    wanted = [d.numbers for d in message.descriptors]
    taken = {number for group in wanted for number, _ in group}
    place = max(taken, default=0) + 1
    shadow.place(received, [*wanted, ((place, True),)])
    return place


def _settings(
    shadow: Shadow, state: ProcessState, message: protocol.Rebuild, executable: int, own_pid: int, delta: int
) -> None:
    batch = shadow.batch()
    batch.call(f"chdir {state.cwd}", NR_chdir, batch.put(os.fsencode(state.cwd) + b"\0"))
    batch.call("umask", arch.NR_umask, state.umask)
    batch.call("personality", arch.NR_personality, state.personality)
    signals.restore_actions(batch, state.actions)
    if state.child_subreaper:
        batch.call("child subreaper", NR_prctl, identity.PR_SET_CHILD_SUBREAPER, 1)
    if state.thp_disable:
        batch.call("THP disable", NR_prctl, identity.PR_SET_THP_DISABLE, 1)
    _memory_map(batch, state, executable)
    batch.call("close executable", arch.NR_close, executable)
    for descriptor in message.descriptors:
        if descriptor.kind == epoll.NAME:
            epoll.add_entries(batch, descriptor.numbers[0][0], kinds.decode(descriptor))
    places = timers.create_posix(batch, state.timers)
    signals.requeue_process(batch, own_pid, state.pending)
    outcome = shadow.run(shadow.pid, batch)
    _check_timers(state, [struct.unpack("<i", outcome.read(p, 4))[0] for p in places])
    elapsed = max(0, time.monotonic_ns() + delta - state.captured_at)
    batch = shadow.batch()
    timers.restore_itimers(batch, state.itimers, elapsed)
    timers.arm_posix(batch, state.timers, elapsed)
    shadow.run(shadow.pid, batch)


def _check_timers(state: ProcessState, numbers: list[int]) -> None:
    for timer, number in zip(state.timers, numbers, strict=True):
        if timer.timer.id != number:
            raise RuntimeError(f"POSIX timer {timer.timer.id} got number {number}")


def _memory_map(batch: Batch, state: ProcessState, executable: int) -> None:
    """PR_SET_MM_MAP: where text, data, heap, stack, arguments are; the auxiliary vector; /proc/PID/exe (prctl(2))."""
    auxv = batch.put(state.auxv)
    m = state.memory
    fields = (
        *(m.start_code, m.end_code, m.start_data, m.end_data, m.start_brk, m.brk),
        *(m.start_stack, m.arg_start, m.arg_end, m.env_start, m.env_end),
    )
    structure = struct.pack("<11QQII", *fields, auxv, len(state.auxv), executable)
    place = batch.put(structure)
    batch.call("PR_SET_MM_MAP", NR_prctl, identity.PR_SET_MM, identity.PR_SET_MM_MAP, place, len(structure), 0)


def _outside(shadow: Shadow, state: ProcessState) -> list[Notice]:
    """Settings made from outside: scheduling, CPU affinity, OOM score."""
    notices: list[Notice] = []
    for thread in state.threads:
        said = threads.restore_scheduling(shadow.threads[thread.tid], thread.scheduling)
        if said:
            notices.append(Notice(kind="affinity", message=said))
    path = f"/proc/{shadow.pid}/oom_score_adj"
    with open(path) as file:
        now = int(file.read())
    if now != state.oom_score_adj:
        try:
            with open(path, "w") as file:
                file.write(str(state.oom_score_adj))
        except PermissionError:
            message = f"oom_score_adj {state.oom_score_adj} needs CAP_SYS_RESOURCE here; it is {now}"
            notices.append(Notice(kind="oom-score", message=message))
    return notices


def _thread(shadow: Shadow, thread: ThreadState, state: ProcessState, own_pid: int, now: Any) -> None:
    tid = shadow.threads[thread.tid]
    ptrace.set_sigmask(tid, _BLOCKED)
    batch = shadow.batch()
    threads.restore(batch, thread, own_pid)
    wanted = state.credentials
    identity.restore_credentials(batch, wanted, now)
    if thread.tid == own_pid:
        batch.call("dumpable", NR_prctl, identity.PR_SET_DUMPABLE, int(state.dumpable == 1))
    threads.restore_rseq(batch, thread)
    shadow.run(tid, batch)
    if waits.interrupted(thread.registers):
        thread.registers = _wait_again(shadow, tid, thread)


def _wait_again(shadow: Shadow, tid: int, thread: ThreadState) -> Registers:
    """Give a thread the restart block of its interrupted wait; the registers with which it goes on.

    A wait for an absolute time needs none: it is run again.
    """
    captured = thread.registers
    if thread.remaining_ns is None:
        return arch.rerun(captured)
    batch = shadow.batch()
    place = batch.put(waits.timespec(thread.remaining_ns))
    number, *arguments = waits.call_with(captured, thread.remaining_ns, place)
    result = shadow.interrupted_call(tid, batch, number, arguments)
    if result == -arch.ERESTART_RESTARTBLOCK:
        return captured
    finished = arch.outside_syscall(captured)
    finished.rax = result & ALL_SIGNALS
    return finished


def _leave(shadow: Shadow, state: ProcessState) -> None:
    shadow.leave_scratch()
    for thread in state.threads:
        tid = shadow.threads[thread.tid]
        ptrace.set_xstate(tid, thread.xstate)
        ptrace.set_registers(tid, thread.registers)
        ptrace.set_sigmask(tid, thread.sigmask)
