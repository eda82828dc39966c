"""What an agent that died has left in a running process, found and undone: `migrate-agent cleanup PID`.

Everything of ours can be known by itself, so all that is needed is the process's number: the scratch
mapping (`agent.scratch`), frames on its stack (`agent.visit`), a userfaultfd that was made for us, sockets
under our filter (`agent.kernel.sock_filter`), which may be in repair. Packet sockets, duplicates of
descriptors and the watching of memory ended with the agent. Nothing else is touched; what is not there is
not undone, so it may be done again.

A process that a living agent works on is left alone (Busy). So is one in doubt: it is stopped with its
sockets held because its copy may live elsewhere, and a person has to decide (docs/operations.md).
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Final

import msgspec

from agent import scratch, visit
from agent.kernel import pidfd, procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.pageset import Range
from agent.resources import tcp
from agent.tracee import PARK_SECONDS, InjectedCallFailed

EXIT_BUSY: Final = 75  # sysexits.h EX_TEMPFAIL: later, or after a decision
PATIENCE: Final = PARK_SECONDS + 3.0  # until a thread that was left in our code is back in its own
_PAUSE: Final = 0.02
_ATTEMPTS: Final = 5


class Busy(Exception):
    """Nothing can be undone now; the message says why, and what to do."""


class Leftovers(msgspec.Struct):
    """What of ours was found in a process."""

    scratches: list[scratch.Found]
    frames: list[Range]
    sockets: list[int]  # its descriptors

    def __bool__(self) -> bool:
        return bool(self.scratches or self.frames or self.sockets)


def clean(pid: int, born: int | None = None, resume: bool = False) -> list[str]:
    """Undo what an agent left in a process; what was undone, in words. Busy; OSError.

    `born` (procfs.stat's starttime) tells the process from a later one with its number. Of a process that is
    gone nothing is left. `resume`: one that is stopped goes on; a person has decided that.
    """
    done: list[str] = []
    for _ in range(_ATTEMPTS):
        now = procfs.born(pid)
        if now is None or born not in (None, now):
            break
        with contextlib.suppress(ProcessLookupError):  # it, or only the thread that was asked: once more
            done.extend(_clean(pid, resume))
            break
    else:
        raise Busy(f"the threads of process {pid} end faster than they can be stopped")
    return done


def _clean(pid: int, resume: bool) -> Iterator[str]:
    with _opened(pid) as memory:
        found = look(pid, memory)
        if not found:
            return
        _refuse(pid, found)
        stopped = procfs.stat(pid).state in "Tt"
        if stopped and not resume:
            raise Busy(_stopped(pid, found))
        for fd in _release(pid, found.sockets):  # before it goes on: reading a socket in repair fails
            yield f"unlocked the socket of descriptor {fd}"
        if stopped:
            os.kill(pid, signal.SIGCONT)
            yield "continued it"
        ranges = [*found.frames, *(one.range for one in found.scratches)]
        await_threads(pid, memory, procfs.threads(pid) if ranges else (), ranges)
        scratches = scratch.find(pid, memory)  # again: a thread may have made the call that maps it only now
        if scratches:
            yield from _leave(pid, memory, scratches)
        if found.frames:
            yield from _wipe(pid, memory, found.frames)


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[RemoteMemory]:
    try:
        memory = RemoteMemory(pid)
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", f"pid {pid}") from None
    try:
        yield memory
    finally:
        memory.close()


# --- looking ---


def look(pid: int, memory: RemoteMemory) -> Leftovers:
    """Touches nothing."""
    return Leftovers(scratch.find(pid, memory), visit.marks(pid, memory), held_sockets(pid))


def held_sockets(pid: int) -> list[int]:
    """Its TCP sockets that are under a filter of ours."""
    process = pidfd.open_process(pid)
    try:
        return [
            fd for fd, link in procfs.fds(pid).items() if link.startswith("socket:") and _is_held(process, fd)
        ]
    finally:
        os.close(process)


def _is_held(process: int, fd: int) -> bool:
    # OSError: closed since, or with a filter of another kind
    with contextlib.suppress(OSError), _borrowed(process, fd) as ours:
        return tcp.held(ours)
    return False


@contextlib.contextmanager
def _borrowed(process: int, fd: int) -> Iterator[int]:
    ours = pidfd.getfd(process, fd)
    try:
        yield ours
    finally:
        os.close(ours)


def _refuse(pid: int, found: Leftovers) -> None:
    """Busy if somebody alive, or a decision that is not ours, has a claim on it."""
    for owner in (one.owner for one in found.scratches if one.owner is not None):
        try:
            if owner.alive():
                raise Busy(f"a migration of process {pid} is under way (agent {owner.pid})")
        except scratch.ForeignOwner as error:
            raise Busy(f"process {pid}: {error}; clean up from there") from error
    for tracer in procfs.each_thread(pid, lambda tid: procfs.status(pid, tid)["TracerPid"]):
        if tracer != "0":
            raise Busy(f"process {pid} is being traced (by process {tracer})")


def _stopped(pid: int, found: Leftovers) -> str:
    why = (
        "its copy may live on another host: find out" if found.sockets else "nothing can be undone in it then"
    )
    return f"process {pid} is stopped, and {why}; if it shall go on here, clean up with --resume"


# --- undoing ---


def _release(pid: int, fds: list[int]) -> Iterator[int]:
    process = pidfd.open_process(pid)
    try:
        for fd in fds:
            # OSError: the process has closed it since
            with contextlib.suppress(OSError), _borrowed(process, fd) as ours:
                tcp.release(ours)
                yield fd
    finally:
        os.close(process)


def await_threads(pid: int, memory: RemoteMemory, tids: Iterable[int], ranges: list[Range]) -> None:
    """Until no thread is in our code any more: each finds its way back by itself. Busy if one does not."""
    deadline = time.monotonic() + PATIENCE
    for tid in tids:
        with contextlib.suppress(ProcessLookupError):
            while _is_inside(pid, tid, memory, ranges):
                if time.monotonic() > deadline:
                    raise Busy(f"thread {tid} of process {pid} does not come back by itself")
                time.sleep(_PAUSE)


def _is_inside(pid: int, tid: int, memory: RemoteMemory, ranges: list[Range]) -> bool:
    found = procfs.in_syscall(pid, tid)
    pointers = found[1:] if found is not None else _pointers(tid, memory)
    return any(start <= pointer < end for start, end in ranges for pointer in pointers)


def _pointers(tid: int, memory: RemoteMemory) -> tuple[int, int]:
    """Stack and instruction pointer of a running thread, which has to be stopped for that."""
    with visit.stopped(tid, memory):
        registers = ptrace.get_registers(tid)
    return registers.rsp, registers.rip


def _leave(pid: int, memory: RemoteMemory, scratches: list[scratch.Found]) -> Iterator[str]:
    caller = visit.Caller(pid, memory)
    with visit.visit(caller) as tid:
        call = partial(caller.call, tid)
        for found in scratches:
            fd = scratch.left_open(pid, memory, found)
            if fd is not None:
                call("close", arch.NR_close, fd)
                yield f"closed descriptor {fd} (userfaultfd)"
            scratch.unmap(found, call)
            yield f"removed the mapping at {found.start:#x}"


def _wipe(pid: int, memory: RemoteMemory, frames: list[Range]) -> Iterator[str]:
    """Frames below the main stack, while its thread stands still.

    What the stack has grown over is the program's now.
    """
    with visit.stopped(pid, memory):
        stack, pointer = visit.stack_of(pid), ptrace.get_registers(pid).rsp
        for frame in frames:
            if stack is not None and not stack.start <= pointer < frame[1]:
                visit.wipe(pid, memory, frame)
                yield f"wiped {frame[1] - frame[0]} bytes below the stack"


def run(pid: int, resume: bool = False) -> int:
    """Clean and say so; the exit status: 0 if nothing of ours is in the process now, EXIT_BUSY, 1."""
    try:
        for line in clean(pid, resume=resume):
            print(line)
    except Busy as error:
        print(error, file=sys.stderr)
        return EXIT_BUSY
    except (OSError, InjectedCallFailed, RuntimeError) as error:
        print(f"process {pid}: {error}", file=sys.stderr)
        return 1
    return 0
