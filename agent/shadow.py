"""The destination process under construction: address space, threads, descriptors, and at last its own life.

Every step works on a real, stopped process held with EXITKILL: if this agent dies, so does the shadow. The
order is fixed by what the kernel allows: mappings follow the source during pre-copy; threads, descriptors and
settings come in the freeze; credentials and rseq last, since each of them takes something away from us.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from agent import hold, layout, spawn
from agent.api import Notice
from agent.bounds import Word
from agent.descriptors import Refusal
from agent.kernel import clone, pidfd, procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE, Address, Registers
from agent.kernel.memory import IOV_MAX, MemoryFault, RemoteMemory, address_of
from agent.layout import Flag, Mapping
from agent.pageset import PageSet
from agent.resources import oom_score, signals
from agent.tracee import (
    ALL_SIGNALS,
    CODE,
    SCRATCH_SIZE,
    Batch,
    InjectedCallFailed,
    Outcome,
    Tracee,
    wait_event_stop,
)

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_ANONYMOUS: Final = 0x20
MAP_GROWSDOWN: Final = 0x100
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MREMAP_MAYMOVE_FIXED: Final = 3
MADV_DONTNEED_LOCKED: Final = 24
MADV_DONTNEED: Final = 4
MADV_GUARD_INSTALL: Final = 102

# flag -> (advice that sets it, advice that clears it)
ADVICE: Final = {
    Flag.HUGEPAGE: (14, 15),
    Flag.NOHUGEPAGE: (15, 14),
    Flag.DONTFORK: (10, 11),
    Flag.DONTDUMP: (16, 17),
    Flag.WIPEONFORK: (18, 19),
    Flag.MERGEABLE: (12, 13),
    Flag.SEQUENTIAL: (2, 0),
    Flag.RANDOM: (1, 0),
}
_SCM_MAX: Final = 250
# int3 must reach its tracer: a blocked SIGTRAP would reset its disposition (force_sig_info)
_BLOCKED: Final = ALL_SIGNALS & ~(1 << 4)
_LOW: Final = 0x1_0000  # below where programs are: little is ever mapped there

Range = tuple[int, int]


class Special(msgspec.Struct, frozen=True):
    """Where the source has its vDSO and the data pages before it: name and range, in address order."""

    name: Word
    start: Address
    end: Address


class Shadow(Tracee):
    """One process under construction, driven by the destination's engine thread."""

    def __init__(self, spawned: spawn.Spawned) -> None:
        super().__init__(spawned.pid, RemoteMemory(spawned.pid), fragile=False)
        self.new_pid_namespace = spawned.new_pid_namespace
        self._channel = spawned.channel
        self._channel_fd = spawned.channel_fd
        self.layout: list[Mapping] = []
        self.threads: dict[int, int] = {}  # the process's own number -> as we see it
        self._born: list[int] = []  # threads of the last batch, as we see them
        self.oom_score_adj = oom_score.go_first(spawned.pid)  # that it had before
        self._process = pidfd.open_process(spawned.pid)  # which it stays, also when we have let it go
        self._locking: list[tuple[int, int, int]] = []  # mlock2 calls of a batch: index, start, end

    # --- birth ---

    def settle(
        self, own_pid: int, code: int, seed_at: int, specials: Sequence[Special], planned: list[Mapping]
    ) -> None:
        """Leave the seed: a scratch of our own, nothing else mapped but the vDSO, where the source has it."""
        self.threads = {own_pid: self.pid}
        _, hard = resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK)
        resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK, (hard, hard))
        self.adopt_scratch(seed_at, code)
        occupied = [Mapping(m.start, m.end, 0) for m in procfs.maps(self.pid)]
        reserved = [Mapping(s.start, s.end, 0) for s in specials]
        home = layout.find_gap([planned, occupied, reserved], SCRATCH_SIZE, _LOW, arch.TASK_SIZE)
        self._move_scratch(home)
        self._clear(specials)

    def _move_scratch(self, home: int) -> None:
        batch = self.batch()
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
        batch.call("map scratch", arch.NR_mmap, home, SCRATCH_SIZE, 3, flags, -1, 0)
        self.run(self.pid, batch)
        code = self.runner_code()
        buffer = ctypes.create_string_buffer(code, len(code))
        self.memory.write_from(ctypes.addressof(buffer), [(home + CODE, home + CODE + len(code))])
        batch = self.batch()
        batch.call("protect scratch", arch.NR_mprotect, home, PAGE, 5)
        self.run(self.pid, batch)
        self.adopt_scratch(home)

    def _clear(self, specials: Sequence[Special]) -> None:
        """Unmap all but scratch and vDSO; move that. Two steps each, lest old and new place overlap."""
        keep = {s.name for s in specials}
        lines = [m for m in procfs.maps(self.pid) if m.name != "[vsyscall]" and m.start != self.scratch]
        ours = [m for m in lines if m.name in keep]
        batch = self.batch()
        for line in lines:
            inside_scratch = self.scratch <= line.start < self.scratch + SCRATCH_SIZE
            if line not in ours and not inside_scratch:
                batch.call(f"unmap {line.name}", arch.NR_munmap, line.start, line.end - line.start)
        total = sum(m.end - m.start for m in ours)
        wanted = [Mapping(s.start, s.end, 0) for s in specials]
        scratch = Mapping(self.scratch, self.scratch + SCRATCH_SIZE, 0)
        there = [Mapping(m.start, m.end, 0) for m in lines]
        aside = layout.find_gap([there, wanted, [scratch]], total, _LOW, arch.TASK_SIZE)
        for line in ours:
            size = line.end - line.start
            batch.call("mremap vdso", arch.NR_mremap, line.start, size, size, MREMAP_MAYMOVE_FIXED, aside)
            target = next(s for s in specials if s.name == line.name)
            batch.call("mremap vdso", arch.NR_mremap, aside, size, size, MREMAP_MAYMOVE_FIXED, target.start)
            aside += size
        self.run(self.pid, batch)

    # --- descriptors ---

    def receive(self, fds: Sequence[int]) -> list[int]:
        """Hand our descriptors to the shadow; the numbers that they have there."""
        received: list[int] = []
        for first in range(0, len(fds), _SCM_MAX):
            received += self._receive_some(fds[first : first + _SCM_MAX])
        return received

    def _receive_some(self, fds: Sequence[int]) -> list[int]:
        socket.send_fds(self._channel, [b"f"], list(fds))
        batch = self.batch()
        size = socket.CMSG_SPACE(4 * len(fds))
        byte, control = batch.space(16), batch.space(size)
        vector = batch.put(struct.pack("<QQ", byte, 1))
        header = batch.put(struct.pack("<QIxxxxQQQQi", 0, 0, vector, 1, control, size, 0))
        batch.call("recvmsg", arch.NR_recvmsg, self._channel_fd, header, 0x40000000)  # MSG_CMSG_CLOEXEC
        answer = self.run(self.pid, batch).read(control, size)
        count = (struct.unpack_from("<Q", answer)[0] - 16) // 4
        if count != len(fds):
            raise RuntimeError(f"{count} of {len(fds)} descriptors arrived in the shadow")
        return list(struct.unpack_from(f"<{count}i", answer, 16))

    def place(self, received: Sequence[int], wanted: Sequence[tuple[tuple[int, bool], ...]]) -> None:
        """Move received descriptors to the numbers that the process knows them by (dup3(2))."""
        numbers = {number for group in wanted for number, _ in group}
        base = max([*numbers, *received, self._channel_fd], default=0) + 1
        batch = self.batch()
        highs = []
        for fd in received:
            highs.append(batch.call(f"dup descriptor {fd}", arch.NR_fcntl, fd, 1030, base))  # F_DUPFD_CLOEXEC
            batch.call("close", arch.NR_close, fd)
        if self._channel_fd in numbers:
            highs.append(batch.call("dup channel", arch.NR_fcntl, self._channel_fd, 1030, base))
        results = self.run(self.pid, batch).results
        places = [results[index] for index in highs]
        if self._channel_fd in numbers:
            self._channel_fd = places.pop()
        batch = self.batch()
        for high, group in zip(places, wanted, strict=True):
            for number, cloexec in group:
                batch.call(f"dup3 {number}", arch.NR_dup3, high, number, os.O_CLOEXEC if cloexec else 0)
            batch.call("close", arch.NR_close, high)
        self.run(self.pid, batch)

    # --- address space ---

    def follow(self, wanted: list[Mapping], open_file: Callable[[int], int]) -> None:
        """Make the mappings the source's; `open_file` gives our descriptor for an index of the files."""
        operations = layout.difference(self.layout, wanted)
        if not operations:
            return
        self._keep_scratch_clear(wanted)
        files = sorted(
            {o.mapping.file for o in operations if isinstance(o, layout.Map) and o.mapping.file >= 0}
        )
        received = dict(zip(files, self.receive([open_file(f) for f in files]), strict=True))
        for first in range(0, len(operations), 256):
            batch = self.batch()
            self._locking.clear()
            for operation in operations[first : first + 256]:
                self._apply(batch, operation, received)
            self._check_locked(self.run(self.pid, batch))
        batch = self.batch()
        for fd in received.values():
            batch.call("close", arch.NR_close, fd)
        self.run(self.pid, batch)
        self.layout = wanted

    def _keep_scratch_clear(self, wanted: list[Mapping]) -> None:
        start, end = self.scratch, self.scratch + SCRATCH_SIZE
        if not any(m.start < end and start < m.end for m in wanted):
            return
        there = [Mapping(m.start, m.end, 0) for m in procfs.maps(self.pid)]
        self._move_scratch(layout.find_gap([there, wanted], SCRATCH_SIZE, _LOW, arch.TASK_SIZE))
        batch = self.batch()
        batch.call("unmap old scratch", arch.NR_munmap, start, SCRATCH_SIZE)
        self.run(self.pid, batch)

    def _apply(self, batch: Batch, operation: layout.Operation, files: dict[int, int]) -> None:
        match operation:
            case layout.Unmap(start, end):
                batch.call(f"munmap {start:#x}", arch.NR_munmap, start, end - start)
            case layout.Map(mapping):
                self._map(batch, mapping, files)
            case layout.Protect(start, end, protection):
                batch.call(f"mprotect {start:#x}", arch.NR_mprotect, start, end - start, protection)
            case layout.Advise(start, end, before, after):
                self._advise(batch, start, end, Flag(before), Flag(after))

    def _map(self, batch: Batch, m: Mapping, files: dict[int, int]) -> None:
        flags = MAP_FIXED_NOREPLACE | (MAP_SHARED if m.flags & Flag.SHARED else MAP_PRIVATE)
        flags |= MAP_ANONYMOUS if m.anonymous else 0
        flags |= MAP_GROWSDOWN if m.flags & Flag.GROWSDOWN else 0
        flags |= MAP_NORESERVE if m.flags & Flag.NORESERVE else 0
        fd = -1 if m.anonymous else files[m.file]
        offset = 0 if m.anonymous else m.offset
        batch.call(
            f"mmap {m.start:#x}", arch.NR_mmap, m.start, m.end - m.start, m.protection, flags, fd, offset
        )
        self._advise(batch, m.start, m.end, Flag(0), Flag(m.flags) & ~layout.IDENTITY)

    def _advise(self, batch: Batch, start: int, end: int, before: Flag, after: Flag) -> None:
        changed = before ^ after
        cleared = [clearing for flag, (_, clearing) in ADVICE.items() if changed & before & flag]
        set_ = [setting for flag, (setting, _) in ADVICE.items() if changed & after & flag]
        for advice in (*cleared, *set_):  # what clears one may clear another too (MADV_NORMAL)
            batch.call(f"madvise {start:#x}", arch.NR_madvise, start, end - start, advice, optional=True)
        if changed & (Flag.LOCKED | Flag.LOCKONFAULT):
            if after & Flag.LOCKED:
                on_fault = 1 if after & Flag.LOCKONFAULT else 0
                call = batch.call(
                    f"mlock {start:#x}", arch.NR_mlock2, start, end - start, on_fault, optional=True
                )
                self._locking.append((call, start, end))
            else:
                batch.call(f"munlock {start:#x}", arch.NR_munlock, start, end - start)

    def _check_locked(self, outcome: Outcome) -> None:
        """mlock2(2) says ENOMEM also where it has locked what cannot be touched, like a PROT_NONE guard."""
        failed = [
            (outcome.results[call], start, end) for call, start, end in self._locking if outcome.results[call]
        ]
        if not failed:
            return
        locked = PageSet([(m.start, m.end) for m in procfs.smaps(self.pid) if "lo" in m.vmflags])
        for result, start, end in failed:
            if result != -errno.ENOMEM or PageSet([(start, end)]).without(locked).ranges():
                limit, _ = resource.prlimit(self.pid, resource.RLIMIT_MEMLOCK)
                why = f"{os.strerror(-result)}; without CAP_IPC_LOCK, {limit} bytes may be locked"
                raise Refusal("memory-lock", f"memory at {start:#x}-{end:#x} cannot be locked: {why}")

    # --- pages ---

    def write_pages(self, ranges: Sequence[Range], data: bytes | memoryview) -> None:
        """Write `data` to `ranges` one after another; through protections where a mapping is not writable."""
        address = address_of(data)
        done = 0
        rest = list(ranges)
        while rest:
            part = rest[:IOV_MAX]
            try:
                self.memory.write_from(address + done, part)
            except MemoryFault as fault:
                rest = self._write_protected(rest, memoryview(data)[done:], fault.done)
                done = len(data) - sum(e - s for s, e in rest)
                continue
            done += sum(end - start for start, end in part)
            rest = rest[IOV_MAX:]

    def _write_protected(self, ranges: list[Range], data: memoryview, done: int) -> list[Range]:
        """Write the range in which the fast way failed after `done` bytes; the ranges after it."""
        position = 0
        for index, (start, end) in enumerate(ranges):
            size = end - start
            if position + size > done:
                self.memory.write(start, data[position : position + size])
                return ranges[index + 1 :]
            position += size
        raise AssertionError("a fault behind the last range")

    def discard_pages(self, ranges: Sequence[Range]) -> None:
        """Forget pages that the source no longer has: zero again, or the file's (MADV_DONTNEED)."""
        for first in range(0, len(ranges), 512):
            batch = self.batch()
            for start, end in ranges[first : first + 512]:
                batch.call(f"discard {start:#x}", arch.NR_madvise, start, end - start, MADV_DONTNEED_LOCKED)
            self.run(self.pid, batch)

    def install_guards(self, ranges: Sequence[Range]) -> None:
        batch = self.batch()
        for start, end in ranges:
            batch.call(f"guard {start:#x}", arch.NR_madvise, start, end - start, MADV_GUARD_INSTALL)
        self.run(self.pid, batch)

    # --- threads ---

    def make_threads(self, wanted: Sequence[int]) -> None:
        """Threads under their numbers, with nothing to do yet; those not wanted any more are ended."""
        ptrace.set_sigmask(self.pid, _BLOCKED)  # which they inherit
        for tid in set(self.threads) - set(wanted):
            self._end_thread(tid)
        missing = [tid for tid in wanted if tid not in self.threads]
        for first in range(0, len(missing), 256):
            self._clone(missing[first : first + 256])

    def _clone(self, missing: Sequence[int]) -> None:
        batch = self.batch()
        for tid in missing:
            number = batch.put(struct.pack("<i", tid))
            arguments = batch.put(clone.clone_args(clone.THREAD, number))
            batch.call(f"clone3 {tid}", arch.NR_clone3, arguments, clone.CLONE_ARGS_SIZE)
        self._born = []
        try:
            self.run(self.pid, batch)
        except InjectedCallFailed as error:
            raise clone.limit_of(error) or error from None
        for tid, seen_as in zip(missing, self._born, strict=True):
            wait_event_stop(seen_as, time.monotonic() + 5)
            self.threads[tid] = seen_as

    def on_event(self, tid: int, status: int) -> None:
        if ptrace.event(status) == ptrace.PTRACE_EVENT_CLONE:
            self._born.append(ptrace.get_event_message(tid))

    def _end_thread(self, tid: int) -> None:
        seen_as = self.threads.pop(tid)
        registers = ptrace.get_registers(seen_as)
        at = self.code + arch.find_syscall_offset(self.runner_code())
        ptrace.set_registers(seen_as, arch.syscall_registers(registers, at, arch.NR_exit, (0,)))
        ptrace.cont(seen_as)
        os.waitpid(seen_as, ptrace.WALL)

    # --- the end of construction ---

    def interrupted_calls(
        self, batch: Batch, calls: Sequence[tuple[int, tuple[int, ...]]], registers: Registers
    ) -> list[int]:
        """Let threads make calls that would wait, interrupted from their entry on; the results.

        `calls`: the thread, and number and arguments of its call; `batch` has the data that they point to.
        All other `registers` are any; the threads' own are lost.
        """
        self.load_data(batch)
        at = self.code + arch.find_syscall_offset(self.runner_code())
        for tid, (number, *arguments) in calls:
            ptrace.set_registers(tid, arch.syscall_registers(registers, at, number, tuple(arguments)))
            ptrace.to_syscall(tid)
        for tid, _ in calls:
            ptrace.wait(tid)
            ptrace.interrupt(tid)
            ptrace.cont(tid)
        results = []
        for tid, _ in calls:
            wait_event_stop(tid, time.monotonic() + 5)
            results.append(ptrace.get_registers(tid).result)
        return results

    def leave_scratch(self) -> None:
        """Close the channel and unmap the scratch: from here on the process has nothing of ours."""
        batch = self.batch()
        batch.call("close channel", arch.NR_close, self._channel_fd)
        self.run(self.pid, batch)
        self.single_syscall(
            self.pid, self._syscall_at(), "unmap scratch", arch.NR_munmap, self.scratch, SCRATCH_SIZE
        )
        self.scratch = self.code = 0
        self._channel.close()

    def _syscall_at(self) -> int:
        """A syscall instruction outside the scratch."""
        lines = sorted(procfs.maps(self.pid), key=lambda m: m.name != "[vdso]")
        for line in lines:
            if (
                line.protection & procfs.PROT_EXEC
                and line.start != self.scratch
                and line.name != "[vsyscall]"
            ):
                found = arch.find_syscall(self.memory.read(line.start, line.end - line.start))
                if found is not None:
                    return line.start + found
        raise RuntimeError("the shadow has no syscall instruction")

    def queue_signals(self, queue: Sequence[tuple[int, bytes]]) -> list[Notice]:
        """Signals since the state was captured: (thread, 0: the process; siginfo). The scratch is gone."""
        if not queue:
            return []
        at = self._syscall_at()
        own_pid = next(own for own, seen_as in self.threads.items() if seen_as == self.pid)
        return [n for own, siginfo in queue for n in self._queue(at, own_pid, own, siginfo)]

    def _queue(self, at: int, own_pid: int, own: int, siginfo: bytes) -> list[Notice]:
        """The task queues it to itself, as only it may (rt_sigqueueinfo(2)).

        The siginfo lies on its stack meanwhile.
        """
        number = signals.number_of(siginfo)
        try:
            tid = self.threads[own or own_pid]
            place = (ptrace.get_registers(tid).rsp - 1) // PAGE * PAGE
            before = self.memory.read(place, len(siginfo))
            self.memory.write(place, siginfo)
            try:
                if own:
                    arguments = (own_pid, own, number, place)
                    self.single_syscall(tid, at, "rt_tgsigqueueinfo", arch.NR_rt_tgsigqueueinfo, *arguments)
                else:
                    self.single_syscall(
                        tid, at, "rt_sigqueueinfo", arch.NR_rt_sigqueueinfo, own_pid, number, place
                    )
            finally:
                self.memory.write(place, before)
        except (OSError, KeyError) as error:
            return [_signal_lost(number, error)]
        return []

    def send_signals(self, queue: Sequence[tuple[int, bytes]]) -> list[Notice]:
        """Signals that came even later, to the living process: their sender is shown as this agent."""
        lost: list[Notice] = []
        for own, siginfo in queue:
            number = signals.number_of(siginfo)
            try:
                signals.send(self._process, self.pid, self.threads[own] if own else 0, siginfo)
            except (OSError, KeyError) as error:
                lost.append(_signal_lost(number, error))
        return lost

    def outlive_us(self) -> bool:
        """From now on our death does not kill it, but leaves it stopped. Whether it is to go on when it is
        let go.
        """
        goes_on = hold.put(self.pid)
        for tid in self.threads.values():
            ptrace.set_options(tid, 0)
        return goes_on

    def release(self, leave_stopped: bool) -> None:
        """Let it live: all threads are detached. With `leave_stopped` it is stopped as by SIGSTOP."""
        if not leave_stopped:
            hold.lift(self.pid)
        for tid in self.threads.values():
            ptrace.detach(tid)
        self.memory.close()

    def forget(self) -> None:
        """Nothing more is to be sent to it. Idempotent."""
        if self._process >= 0:
            os.close(self._process)
            self._process = -1

    def destroy(self) -> None:
        """Roll back: kill it and wait until it is gone."""
        self.forget()
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        others = {*self.threads.values(), *self._born} - {self.pid}
        for tid in [*others, self.pid]:  # the last one ends when the others have been waited for
            try:
                while True:
                    _, status = os.waitpid(tid, ptrace.WALL)
                    if not os.WIFSTOPPED(status):
                        break
            except ChildProcessError:
                continue
        self.memory.close()
        self._channel.close()


def _signal_lost(number: int, error: Exception) -> Notice:
    return Notice(
        kind="signal-lost", message=f"signal {number}, sent in the pause, could not be delivered: {error}"
    )
