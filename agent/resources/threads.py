"""One thread: registers, masks, thread-local kernel settings. Captured and rebuilt here.

What a stopped thread's registers say of an interrupted syscall stays as it is (`rax` = -ERESTART...,
`orig_rax`): the destination's kernel restarts it as this one would have. Three things need help: a
restartable sequence (rseq(2)) is moved to its abort handler, an EINTR that only our stop caused is turned
back, and a relative wait gets its restart block made anew (`agent.resources.waits`).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable

import msgspec

from agent.kernel import ptrace, sched
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.kernel.memory import RemoteMemory
from agent.resources import identity, signals
from agent.state import Scheduling, ThreadState
from agent.tracee import Batch, Outcome


def settled_registers(tid: int, memory: RemoteMemory, pending: int) -> Registers:
    """The registers with which a stopped thread may go on anywhere, as if it had not been stopped.

    `pending`: the signals queued for it, as a set.
    """
    return look(tid).settled(memory, pending, None)


class Stopped(msgspec.Struct, frozen=True):
    """A stopped thread as ptrace shows it."""

    registers: Registers
    rseq: tuple[int, int, int]
    sigmask: int
    pending: tuple[bytes, ...]

    def settled(self, memory: RemoteMemory, pending: int, section: int | None) -> Registers:
        """As `settled_registers`; `section`: its rseq's rseq_cs word, if it was read already."""
        registers = abort_rseq(self.registers, self.rseq, memory, section)
        return arch.hide_stop(registers, bool(pending & ~self.sigmask))


def look(tid: int) -> Stopped:
    return Stopped(
        ptrace.get_registers(tid),
        ptrace.get_rseq(tid),
        ptrace.get_sigmask(tid),
        signals.pending_of_thread(tid),
    )


def rseq_sections(stopped: dict[int, Stopped], memory: RemoteMemory) -> dict[int, int]:
    """The rseq_cs words of many threads, read in one go; 0: not in a restartable sequence."""
    tids = [tid for tid, thread in stopped.items() if thread.rseq[0]]
    words = (ctypes.c_uint64 * len(tids))()
    ranges = [(stopped[tid].rseq[0] + 8, stopped[tid].rseq[0] + 16) for tid in tids]
    memory.read_into(ctypes.addressof(words), ranges)
    return dict(zip(tids, words, strict=True))


def abort_rseq(
    registers: Registers, rseq: tuple[int, int, int], memory: RemoteMemory, section: int | None = None
) -> Registers:
    """A thread in a restartable sequence continues at its abort handler, as after a preemption (rseq(2))."""
    if not rseq[0]:
        return registers
    if section is None:
        section = struct.unpack("<Q", memory.read_whole(rseq[0] + 8, 8))[0]
    if not section:
        return registers
    try:
        _, _, start, length, abort = struct.unpack("<IIQQQ", memory.read_whole(section, 32))
    except OSError:  # it points to nothing, for which the kernel will end the program, here or over there
        return registers
    if start <= registers.rip < start + length:
        return msgspec.structs.replace(registers, rip=abort)
    return registers


def ask(
    batch: Batch, tid: int, registers: Registers, stopped: Stopped
) -> tuple[ThreadState, Callable[[Outcome], ThreadState]]:
    """What is known from outside, and calls for what only the thread knows: they complete the state."""
    altstack = signals.ask_altstack(batch)
    clear_tid = batch.space(8)
    batch.call("PR_GET_TID_ADDRESS", arch.NR_prctl, identity.PR_GET_TID_ADDRESS, clear_tid)
    slack = batch.call("PR_GET_TIMERSLACK", arch.NR_prctl, identity.PR_GET_TIMERSLACK)
    name = batch.space(16)
    batch.call("PR_GET_NAME", arch.NR_prctl, identity.PR_GET_NAME, name)
    death = batch.space(8)
    batch.call("PR_GET_PDEATHSIG", arch.NR_prctl, identity.PR_GET_PDEATHSIG, death)
    state = ThreadState(
        tid=tid,
        registers=registers,
        xstate=ptrace.get_xstate(tid),
        sigmask=stopped.sigmask,
        comm="",
        scheduling=scheduling(tid),
        pending=stopped.pending,
        robust_list=sched.robust_list(tid),
        rseq=stopped.rseq,
    )

    def answer(outcome: Outcome) -> ThreadState:
        state.altstack = altstack(outcome)
        state.clear_child_tid = struct.unpack("<Q", outcome.read(clear_tid, 8))[0]
        # any bytes; text on the link is UTF-8
        state.comm = outcome.read(name, 16).partition(b"\0")[0].decode("latin-1")
        state.timer_slack = outcome.results[slack]
        state.pdeathsig = struct.unpack("<i", outcome.read(death, 4))[0]
        return state

    return state, answer


def restore(batch: Batch, state: ThreadState, tgid: int) -> None:
    """The calls that the thread of the shadow makes itself. Credentials come after, rseq last."""
    prctl = arch.NR_prctl
    batch.call("set_tid_address", arch.NR_set_tid_address, state.clear_child_tid)
    batch.call("name", prctl, identity.PR_SET_NAME, batch.put(state.comm.encode("latin-1") + b"\0"))
    if state.robust_list[0]:
        batch.call("set_robust_list", arch.NR_set_robust_list, *state.robust_list)
    signals.restore_altstack(batch, state.altstack)
    batch.call("timer slack", prctl, identity.PR_SET_TIMERSLACK, state.timer_slack, optional=True)
    if state.pdeathsig:
        batch.call("parent-death signal", prctl, identity.PR_SET_PDEATHSIG, state.pdeathsig)
    signals.requeue_thread(batch, tgid, state.tid, state.pending)


def restore_rseq(batch: Batch, state: ThreadState) -> None:
    address, size, signature = state.rseq
    if address:
        batch.call("rseq", arch.NR_rseq, address, size, 0, signature)


def scheduling(tid: int) -> Scheduling:
    return Scheduling(sched.get_attributes(tid), tuple(sorted(os.sched_getaffinity(tid))))


def restore_scheduling(tid: int, wanted: Scheduling, ours: Scheduling) -> str | None:
    """From outside; `ours` is what it has. Returns what could not be kept, in words; None if all was."""
    if wanted.attributes != ours.attributes:
        sched.set_attributes(tid, wanted.attributes)
    cpus, here = set(wanted.affinity), set(ours.affinity)
    if cpus >= here:
        return None
    if not cpus & here:
        return f"task {tid}: none of its CPUs {sorted(cpus)} exists here; it may use all"
    os.sched_setaffinity(tid, cpus & here)
    return f"task {tid}: of its CPUs {sorted(cpus)} only {sorted(cpus & here)} exist here"
