"""Pre-copy on the source: tracking set up in one short stop, then rounds of scan, layout, pages, discards.

Order inside a round: scan first (protect, then read), the mappings after it. A page that the scan saw and the mappings no
longer have is gone; a mapping that the scan did not see yet is not watched, and its pages count as written next time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import msgspec

from agent import layout as layouts
from agent import protocol
from agent.api import Round
from agent.descriptors import SourceProcess
from agent.kernel import pidfd, procfs, ptrace, userfaultfd
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.kernel.procfs import MapsLine
from agent.layout import Mapping
from agent.pageset import PageSet, Range, pages_in
from agent.protocol import Link
from agent.resources import mappings, signals, threads
from agent.resources.mappings import FileTable
from agent.sender import PageSender
from agent.tracee import SCRATCH_SIZE, Tracee, stop
from agent.tracking import Scan, Tracker, intersection, merged
from transport.codec import Encoder

_STOP_SECONDS: Final = 2.0
_UFFD_FLAGS: Final = os.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY


class Pending(msgspec.Struct):
    """What the next round has to send."""

    written: list[Range]
    present: PageSet
    seconds: float  # since the scan before

    @property
    def pages(self) -> int:
        return pages_in(self.written)


class Rounds:
    """One migration's pre-copy: the process's memory as the destination has it so far."""

    def __init__(self, process: SourceProcess, link: Link, encoder: Encoder, files: FileTable) -> None:
        self.process = process
        self.pid = process.pid
        self.memory = RemoteMemory(self.pid)
        self.tracee = Tracee(self.pid, self.memory, fragile=True)
        self.files = files
        self.sender = PageSender(self.memory, link, encoder)
        self.history: list[Round] = []
        self.pending: Pending | None = None
        self.layout: list[Mapping] = []
        self._announced: list[Mapping] = []
        self._files_sent = len(files.refs)
        self.link = link
        self._tracker: Tracker | None = None
        self._lines: list[MapsLine] = []
        self._known: dict[int, MapsLine] = {}
        self._excluded: list[Range] = []
        self._scanned_at = 0.0
        self.syscall_at = 0
        self.guards: list[Range] = []

    @property
    def incremental(self) -> bool:
        return self._tracker is not None and self._tracker.incremental

    @property
    def tracker(self) -> Tracker:
        assert self._tracker is not None
        return self._tracker

    @property
    def scratch(self) -> Range:
        start = self.tracee.scratch
        return (start, start + SCRATCH_SIZE) if start else (0, 0)

    def close(self) -> None:
        """End the tracking; the process is not watched any more. Idempotent."""
        if self._tracker is not None:
            self._tracker.close()
        self.memory.close()

    # --- the one stop before the freeze ---

    def start_tracking(self) -> float:
        """Map the scratch and get a userfaultfd of the process; milliseconds that its first thread stood still."""
        lines = procfs.maps(self.pid)
        self.syscall_at = self._find_syscall(lines)
        self._excluded = [(s.start, s.end) for s in mappings.specials(lines)]
        began = time.perf_counter()
        ptrace.seize(self.pid)
        uffd = None
        try:
            stop([self.pid], time.monotonic() + _STOP_SECONDS)
            uffd = self._inject()
        finally:
            self._let_go()
            stopped = time.perf_counter() - began
        if uffd is not None:
            userfaultfd.handshake(uffd)
        self._tracker = Tracker(self.pid, uffd)
        self._excluded = sorted([*self._excluded, self.scratch])
        return stopped * 1000

    def _find_syscall(self, lines: list[MapsLine]) -> int:
        """A syscall instruction of the process: the vDSO has one, else some other text."""
        candidates = sorted(lines, key=lambda m: m.name != "[vdso]")
        for line in candidates:
            if line.protection & procfs.PROT_EXEC and line.name != "[vsyscall]":
                found = arch.find_syscall(self.memory.read(line.start, min(line.end - line.start, 1 << 22)))
                if found is not None:
                    return line.start + found
        raise RuntimeError("the process has no syscall instruction")

    def _inject(self) -> int | None:
        self.tracee.map_scratch(self.pid, self.syscall_at)
        batch = self.tracee.batch()
        batch.call("userfaultfd", arch.NR_userfaultfd, _UFFD_FLAGS, optional=True)
        theirs = self.tracee.run(self.pid, batch).results[0]
        if theirs < 0:
            return None
        ours = pidfd.getfd(self.process.pidfd, theirs)
        batch = self.tracee.batch()
        batch.call("close", arch.NR_close, theirs)
        self.tracee.run(self.pid, batch)
        return ours

    def _let_go(self) -> None:
        """Resume the first thread as if nothing had happened."""
        pending = signals.mask_of(signals.pending_of_process(self.pid)) | signals.mask_of(
            signals.pending_of_thread(self.pid)
        )
        ptrace.set_registers(self.pid, threads.settled_registers(self.pid, self.memory, pending))
        ptrace.detach(self.pid)

    def remove_scratch(self) -> None:
        """Roll back what `start_tracking` left in the running process. Nothing if it is gone."""
        if not self.tracee.scratch:
            return
        try:
            ptrace.seize(self.pid)
            try:
                stop([self.pid], time.monotonic() + _STOP_SECONDS)
                self.tracee.unmap_scratch(self.pid, self.syscall_at)
            finally:
                self._let_go()
        except ProcessLookupError:
            self.tracee.scratch = 0

    # --- rounds ---

    def watch(self) -> None:
        """Watch everything that is mapped now."""
        self._look_at_mappings()

    def _file_ranges(self) -> list[Range]:
        return merged([(m.start, m.end) for m in self.layout if not m.anonymous])

    def written(self) -> list[Range]:
        """What was written since the last look, protected again."""
        return self.tracker.scan(self._file_ranges(), self._excluded, protect=True).written

    def first(self) -> Pending:
        """Start watching everything; all there is is to be sent."""
        self.watch()
        self._scanned_at = time.monotonic()
        return self.scan()

    def scan(self) -> Pending:
        """What was written since the last scan, protected again, and the mappings as they are now."""
        found = self.tracker.scan(self._file_ranges(), self._excluded, protect=True)
        now = time.monotonic()
        self._look_at_mappings()
        pending = self._pending(found, now - self._scanned_at)
        self._scanned_at = now
        return pending

    def _look_at_mappings(self) -> None:
        """Follow the mappings; their flags are read again, a page table walk, only if one of them changed."""
        lines = procfs.maps(self.pid)
        if lines != self._lines:
            self._lines = lines
            lines = procfs.smaps(self.pid)
            self.tracker.watch(lines)
            blockers = mappings.blockers(lines, self.scratch)
            if blockers:
                raise RuntimeError(f"{blockers[0].what} appeared: {blockers[0].why}")
            self._known = {line.start: line for line in lines}
            self._set_layout(lines)

    def _set_layout(self, lines: list[MapsLine]) -> None:
        self.layout = layouts.merge(mappings.layout(lines, self.files, self._known, self.scratch))

    def _pending(self, found: Scan, seconds: float) -> Pending:
        mapped = [(m.start, m.end) for m in self.layout]
        return Pending(intersection(found.written, mapped), PageSet(found.present), seconds)

    def send(self, number: int, pending: Pending, dirty_rate: float, paced: Callable[[int, int], None]) -> Round:
        """One round: layout, discards, pages; done when the destination says so."""
        began, bytes_before = time.monotonic(), self.link.bytes_sent
        sent, discarded = self.send_memory(pending, False, paced)
        self.link.send(protocol.RoundEnd(number))
        self.link.expect(protocol.RoundDone)
        round_ = Round(
            number=number,
            pages_sent=sent,
            pages_discarded=discarded,
            bytes=self.link.bytes_sent - bytes_before,
            seconds=round(time.monotonic() - began, 4),
            dirty_rate=round(dirty_rate, 1),
        )
        self.history.append(round_)
        return round_

    def send_memory(self, pending: Pending, frozen: bool, paced: Callable[[int, int], None]) -> tuple[int, int]:
        """Layout, discards and pages; (pages sent, pages discarded)."""
        self.announce_layout()
        gone = self.sender.held.without(pending.present).ranges()
        self._discard(gone)
        held_before = self.sender.held
        sent, zeros = self.sender.send(pending.written, self.layout, frozen, paced)
        became_zero = _held_ranges(held_before, zeros)
        self._discard(became_zero)
        return sent, pages_in(gone) + pages_in(became_zero)

    def _discard(self, ranges: list[Range]) -> None:
        if ranges:
            self.link.send(protocol.Discard(ranges))
            self.sender.held.subtract(ranges)

    def announce_layout(self) -> None:
        """Tell the destination the mappings if they changed, and forget the pages that it loses by that."""
        if len(self.files.refs) > self._files_sent:
            self.link.send(protocol.NewFiles(self.files.refs[self._files_sent :]))
            self._files_sent = len(self.files.refs)
        if self.layout == self._announced:
            return
        for operation in layouts.difference(self._announced, self.layout):
            if isinstance(operation, layouts.Unmap):
                self.sender.held.remove(operation.start, operation.end)
        self.link.send(protocol.Layout(self.layout))
        self._announced = self.layout

    # --- in the freeze ---

    def last(self) -> Pending:
        """What is left to send of a frozen process: the last scan, together with what a round still owed."""
        self._look_at_mappings()
        found = self.tracker.scan(self._file_ranges(), self._excluded, protect=False)
        self.guards = found.guards
        result = Pending(found.written, PageSet(found.present), time.monotonic() - self._scanned_at)
        owed = self.pending.written if self.pending is not None else []
        if owed:
            result.written = merged([*result.written, *intersection(owed, found.present)])
        return result


def _held_ranges(held: PageSet, ranges: list[Range]) -> list[Range]:
    wanted = PageSet(ranges)
    return wanted.without(wanted.without(held)).ranges() if ranges else []
