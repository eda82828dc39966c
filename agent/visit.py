"""One thread of a running process, stopped for some system calls and let go as if nothing had happened.

A live source must not depend on us: killed (SIGKILL) between any two instructions, we leave a process that
goes on by itself. So every system call that we have it make returns by itself. `tracee` does that for
batches, by code of ours in the scratch mapping. Before there is a scratch, and when it goes, `Caller` does it
with what the program has anyway:

    registers    rip -> "syscall; ret" in the program's text, rsp -> a signal frame (sigreturn(2))
    the frame    return address: the program's own restorer, "mov eax, rt_sigreturn; syscall"
                 content: the thread's registers, vector registers and signal mask as they were

The call is made, `ret` leads to the restorer, and the kernel puts everything back in one step. If we are
alive, we stop the thread before the `ret` and put everything back ourselves. In which order matters, for we
may die between two steps:

    frame written       nobody looks at it
    registers set       from here the thread finds its way back alone, through the frame
    signals blocked     only after that: the frame brings the mask back
    call made           by the thread, at any speed, watched or not
    mask put back       the frame would do it too
    registers put back  from here the frame is not needed any more

**Memory for the frame** must hold nothing, now or later, that anybody looks at. What is free in a foreign
process? Not what is below the stack pointer: a goroutine's or coroutine's stack may end there. But pages at
the lower end of the main stack's mapping that were never touched have no data, whatever the thread runs on at
the moment, and no program counts on them being zero, since every signal writes there. (Neither has the very
lowest page if it is all zeros: below anything alive on a stack there is a frame with a return address.)
Otherwise the mapping is extended downwards as by a deep call; the kernel does that for a write through
/proc/PID/mem as for a fault. The thread whose stack it is must stand still meanwhile, or a deep call of its
own gets there: so it is the one that is visited, and another only once it has ended.

**What can still be noticed** if we die, and only then:

- In the 0.1 ms between the stop and the next step, a call like epoll_wait fails with EINTR, as it does after
  SIGSTOP and SIGCONT (signal(7)).
- A wait with a time limit begins again, so that it lasts longer, but never longer than twice.
- A signal that arrives between "registers set" and "signals blocked" runs its handler at the lower end of
  the main stack.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import struct
import time
from collections.abc import Iterator
from typing import Final

from agent.kernel import pagemap, procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Registers
from agent.kernel.memory import RemoteMemory
from agent.kernel.procfs import MapsLine
from agent.pageset import Range
from agent.resources import signals, threads
from agent.tracee import ALL_SIGNALS, checked, return_frame_registers, stop, wait_event_stop, wait_for_syscall

# at the end of the memory of a frame, so that it is known for what it is; with its size in pages
_MARK: Final = struct.Struct("<16sQ")
_MARKER: Final = b"migrate: frame\0\0"
_MARK_ROOM: Final = 64
_MARKS_REACH: Final = 64  # pages from the lower end of the stack that are searched for marks
_SECONDS: Final = 2.0
_CANDIDATES: Final = 64  # threads that may end before one of them is stopped
_TEXT_PIECE: Final = 1 << 22


class NoFoothold(RuntimeError):
    """The process lacks something that a call which returns by itself needs; nothing was touched."""


class Caller:
    """Makes stopped threads of a living process do single system calls. Owned by the tracer's thread."""

    def __init__(self, pid: int, memory: RemoteMemory, adrift: set[int] | None = None) -> None:
        """Looks for the instructions, without stopping anything. NoFoothold; ProcessLookupError.

        `adrift`: notes threads that are on their own way back (`Tracee.adrift`, if the two work together).
        """
        self.pid = pid
        self.memory = memory
        self.place: Range | None = None  # where frames are written
        self.adrift = set() if adrift is None else adrift
        path = arch.find_return(_texts(memory, procfs.maps(pid)))
        if path is None:
            raise NoFoothold("the program has no code by which a system call returns by itself")
        self.path = path

    def call(self, tid: int, what: str, number: int, *arguments: int) -> int:
        """Make a stopped thread do one system call; its registers and mask are kept. InjectedCallFailed."""
        saved, mask = ptrace.get_registers(tid), ptrace.get_sigmask(tid)
        frame = self._write_frame(tid, saved, mask)
        start = arch.returning_registers(saved, self.path, frame, number, arguments)
        self.adrift.add(tid)
        ptrace.set_registers(tid, start)
        ptrace.set_sigmask(tid, ALL_SIGNALS)
        result = _result(tid)
        ptrace.set_sigmask(tid, mask)
        ptrace.set_registers(tid, saved)
        self.adrift.discard(tid)
        return checked(result, what, tid)

    def _write_frame(self, tid: int, saved: Registers, mask: int) -> int:
        """The address of a frame that leads to `saved` and `mask`."""
        self._check_path()
        back = return_frame_registers(saved, self.memory)
        xstate = ptrace.get_xstate(tid)
        if self.place is None:
            size = arch.frame_size(xstate) + 2 * _MARK_ROOM
            self.place = _claim(self.pid, self.memory, -(-size // PAGE) * PAGE, saved.rsp - arch.RED_ZONE)
        address, frame = arch.returning_frame(self.path, self.place[1] - _MARK_ROOM, back, xstate, mask)
        self.memory.write(address, frame)
        return address

    def _check_path(self) -> None:
        call, restorer = (self.memory.read(at, arch.RETURN_PATH_BYTES) for at in self.path)
        if not arch.is_return_path(self.path, call, restorer):
            raise NoFoothold("the program has unmapped its code")

    def sweep(self) -> None:
        """Leave no trace of frames. Nothing may be on its way through one."""
        if self.place is not None and not self.adrift:
            wipe(self.pid, self.memory, self.place)
            self.place = None


def _texts(memory: RemoteMemory, lines: list[MapsLine]) -> Iterator[tuple[int, bytes]]:
    """Executable text of files, in pieces that overlap; small mappings first: one that has all is enough."""
    texts = [m for m in lines if m.protection & procfs.PROT_EXEC and m.inode]
    overlap = arch.RETURN_PATH_BYTES
    for line in sorted(texts, key=lambda m: m.end - m.start):
        for at in range(line.start, line.end, _TEXT_PIECE):
            with contextlib.suppress(OSError):  # unmapped since
                yield at, memory.read(at, min(line.end - at, _TEXT_PIECE + overlap))


def _result(tid: int) -> int:
    """Let the thread make its call; what it returned. The thread stops before it goes on to its `ret`."""
    deadline = time.monotonic() + _SECONDS
    # no single step: the trap flag would outlive us (__ptrace_unlink)
    wait_for_syscall(tid, deadline)
    ptrace.interrupt(tid)
    ptrace.cont(tid)
    wait_event_stop(tid, deadline)
    return ptrace.get_registers(tid).result


# --- memory for a frame ---


def stack_of(pid: int) -> MapsLine | None:
    """The mapping of the main stack."""
    lines = (m for m in procfs.maps(pid) if m.name == "[stack]")
    return next((m for m in lines if m.protection & procfs.PROT_WRITE), None)


def _claim(pid: int, memory: RemoteMemory, size: int, limit: int) -> Range:
    """Marked memory for a frame: unused pages at the lower end of the main stack, and below `limit` there."""
    stack = stack_of(pid)
    if stack is None:
        raise NoFoothold("the process has no main stack")
    start = stack.start
    in_use = start <= limit < min(start + size, stack.end)
    if in_use or (not untouched(pid, start, start + size) and any(memory.read(start, size))):
        start -= size
    place = (start, start + size)
    with _any_stack_size():
        try:
            # first: what is not whole yet must be known for ours too
            memory.write(place[1] - _MARK_ROOM, _MARK.pack(_MARKER, size // PAGE))
            memory.write(start, bytes(16))  # all of it is there now
        except OSError as error:
            raise NoFoothold(f"there is no room below the main stack: {error.strerror}") from error
    return place


@contextlib.contextmanager
def _any_stack_size() -> Iterator[None]:
    """It is our own RLIMIT_STACK (getrlimit(2)) that the kernel holds against another's stack we extend."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _entries(pid: int, start: int, end: int) -> list[int]:
    view = pagemap.Pagemap(pid)
    try:
        data = view.entries(start, end)
    finally:
        view.close()
    return list(struct.unpack(f"<{len(data) // 8}Q", data))


def _is_untouched(entry: int) -> bool:
    """No page, in memory or swap; userfaultfd's mark on a hole is none."""
    mark = entry & pagemap.SWAP_TYPE == pagemap.SWP_PTE_MARKER and not entry & pagemap.PM_GUARD_REGION
    return not entry & pagemap.PM_PRESENT and (not entry & pagemap.PM_SWAP or mark)


def untouched(pid: int, start: int, end: int) -> bool:
    """Whether no page of a range was ever touched, or all were given back since."""
    return all(map(_is_untouched, _entries(pid, start, end)))


def marks(pid: int, memory: RemoteMemory) -> list[Range]:
    """What is marked as a frame's, by us or an agent that has died. Reads no page that was never touched."""
    stack = stack_of(pid)
    if stack is None:
        return []
    found: list[Range] = []
    pages = range(stack.start, min(stack.end, stack.start + _MARKS_REACH * PAGE), PAGE)
    for page, entry in zip(pages, _entries(pid, pages.start, pages.stop), strict=True):
        if not _is_untouched(entry):
            marker, count = _MARK.unpack(memory.read_whole(page + PAGE - _MARK_ROOM, _MARK.size))
            if marker == _MARKER and count <= _MARKS_REACH:
                found.append((max(stack.start, page + PAGE - count * PAGE), page + PAGE))
    return found


def wipe(pid: int, memory: RemoteMemory, place: Range) -> None:
    """Zero what was written there, but for pages that are not there (any more)."""
    for page, entry in zip(range(*place, PAGE), _entries(pid, *place), strict=True):
        if not _is_untouched(entry):
            memory.write(page, bytes(PAGE))


# --- the visit ---


class Pause:
    """A stopped thread, and with which registers it goes on as if it had not been stopped."""

    def __init__(self, tid: int, memory: RemoteMemory) -> None:
        self.tid = tid
        self.registers = threads.abort_rseq(ptrace.get_registers(tid), ptrace.get_rseq(tid), memory)
        self.put_back()  # at once: from here our death does not show

    def put_back(self) -> None:
        """EINTR that only the stop caused is hidden; if a signal is to be delivered it is the program's."""
        pending = signals.mask_of(signals.pending_of_process(self.tid) + signals.pending_of_thread(self.tid))
        deliverable = pending & ~ptrace.get_sigmask(self.tid)
        ptrace.set_registers(self.tid, arch.hide_stop(self.registers, bool(deliverable)))


@contextlib.contextmanager
def stopped(tid: int, memory: RemoteMemory) -> Iterator[None]:
    """Stop one thread for the time of the `with`. ProcessLookupError; TimeoutError."""
    ptrace.seize(tid)
    stop([tid], time.monotonic() + _SECONDS)
    pause = Pause(tid, memory)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            pause.put_back()
            ptrace.detach(tid)


@contextlib.contextmanager
def visit(caller: Caller) -> Iterator[int]:
    """Stop one thread for the time of the `with`; its number. ProcessLookupError; TimeoutError."""
    pause = _pause_one(caller)
    try:
        yield pause.tid
    finally:
        _let_go(caller, pause)


def _pause_one(caller: Caller) -> Pause:
    others = (tid for tid in procfs.threads(caller.pid) if tid != caller.pid)
    for tid in itertools.islice(itertools.chain([caller.pid], others), _CANDIDATES):
        with contextlib.suppress(ProcessLookupError):  # it has ended, another has not
            ptrace.seize(tid)
            stop([tid], time.monotonic() + _SECONDS)
            return Pause(tid, caller.memory)
    raise ProcessLookupError(3, "no such process", f"pid {caller.pid}")


def _let_go(caller: Caller, pause: Pause) -> None:
    """Resume the thread as if nothing had happened. One that is on its own way back just goes on."""
    with contextlib.suppress(ProcessLookupError, TimeoutError):  # it has ended; it is let go when we end
        try:
            if pause.tid in caller.adrift:
                _stop_again(pause.tid)
                Pause(pause.tid, caller.memory)  # that was one more stop, which does not show either
            else:
                pause.put_back()
                caller.sweep()
        finally:
            ptrace.detach(pause.tid)


def _stop_again(tid: int) -> None:
    """Only a stopped thread can be detached, and it may be or not be."""
    with contextlib.suppress(ProcessLookupError):
        ptrace.get_registers(tid)
        return
    ptrace.interrupt(tid)
    wait_event_stop(tid, time.monotonic() + _SECONDS)
