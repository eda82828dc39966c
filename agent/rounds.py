"""Pre-copy on the source: tracking set up in one short stop, then rounds of scan, layout, pages, discards.

Order inside a round: scan first (protect, then read), the mappings after it. A page that the scan saw and
the mappings no longer have is gone; a mapping that the scan did not see yet is not watched, and its pages
count as written next time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final

import msgspec

from agent import cleanup, protocol, scratch
from agent import layout as layouts
from agent.api import Round
from agent.bounds import MAX_RANGES
from agent.descriptors import SourceProcess
from agent.dirty_tracking import Mechanism, mechanism, tracker
from agent.halt import Halt
from agent.kernel import pidfd, procfs, userfaultfd
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.kernel.procfs import MapsLine
from agent.layout import Mapping
from agent.link import Link
from agent.pageset import PageSet, Range, pages_in
from agent.resources import mappings
from agent.resources.mappings import FileTable
from agent.resources.waits import History
from agent.sender import PageSender
from agent.tracee import SCRATCH_SIZE, Tracee
from agent.tracking import Scan, Tracker, intersection, merged
from agent.unmovable import Unmovable
from agent.visit import Caller, visit
from transport.codec import Encoder

_MADV_DONTNEED: Final = 4
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
        self.encoder = encoder
        self.sender = PageSender(self.memory, link, encoder)
        self.history: list[Round] = []
        self.pending: Pending | None = None
        self.layout: list[Mapping] = []
        self._announced: list[Mapping] = []
        self._files_sent = len(files.refs)
        self.link = link
        self._tracker: Tracker | None = None
        self._halt = Halt(self.pid, self.memory)
        self._first_stop_ms = 0.0
        self._lines: list[MapsLine] = []
        self._known: dict[int, MapsLine] = {}
        self._excluded: list[Range] = []
        self._scanned_at = 0.0
        self.guards: list[Range] = []
        self._present: list[Range] = []
        self._background = ThreadPoolExecutor(2)
        self._look: Future[Pending] | None = None
        self._executed = False
        self._locked = b""
        self._flags: Future[bytes] | None = None

    @property
    def incremental(self) -> bool:
        return self._tracker is not None and self._tracker.incremental

    @property
    def longest_stop_ms(self) -> float:
        """The longest time that it stood still for us in pre-copy."""
        return max(self._first_stop_ms, self._halt.longest_ms)

    @property
    def waits(self) -> History:
        """Waits of its threads that stops in pre-copy interrupted."""
        return self._halt.waits

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
        self._background.shutdown()
        self.memory.close()

    # --- the one stop before the freeze ---

    def start_tracking(self) -> None:
        """Map the scratch; get a userfaultfd of the process where that is the way to follow its writes."""
        lines = procfs.maps(self.pid)
        self._excluded = [(m.start, m.end) for m in mappings.specials(lines)]
        address = scratch.choose(lines)
        caller = Caller(self.pid, self.memory, self.tracee.adrift)
        began = time.perf_counter()
        uffd = None
        try:
            with visit(caller) as tid:
                scratch.install(self.tracee, partial(caller.call, tid), address)
                uffd = self._inject(tid, caller.place or (0, 0))
        finally:
            self._first_stop_ms = (time.perf_counter() - began) * 1000
        if uffd is not None:
            userfaultfd.handshake(uffd)
        self._tracker = tracker(self.pid, uffd, self._halt)
        self._excluded = sorted([*self._excluded, self.scratch])

    def _inject(self, tid: int, frame: Range) -> int | None:
        """Our duplicate of a userfaultfd of the process; `frame`, not needed any more, is given back."""
        batch = self.tracee.batch()
        if mechanism() is Mechanism.USERFAULTFD:
            batch.call("userfaultfd", arch.NR_userfaultfd, _UFFD_FLAGS, optional=True)
        batch.call("madvise", arch.NR_madvise, frame[0], frame[1] - frame[0], _MADV_DONTNEED, optional=True)
        theirs, *others = self.tracee.run(tid, batch).results
        if not others or theirs < 0:
            return None
        ours = pidfd.getfd(self.process.pidfd, theirs)
        batch = self.tracee.batch()
        batch.call("close", arch.NR_close, theirs)
        self.tracee.run(tid, batch)
        return ours

    def remove_scratch(self) -> None:
        """Roll back what `start_tracking` left in the running process. Nothing if it is gone. Busy."""
        try:
            if not scratch.find(self.pid, self.memory):
                return
            cleanup.await_threads(self.pid, self.memory, self.tracee.adrift, [self.scratch])
            caller = Caller(self.pid, self.memory, self.tracee.adrift)
            with visit(caller) as tid:
                scratch.remove(self.pid, self.memory, partial(caller.call, tid))
        except ProcessLookupError:
            pass
        self.tracee.scratch = self.tracee.code = 0

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
        """Follow the mappings: where one of them has changed, all are read."""
        if self._mapped() != self._lines:
            lines = procfs.smaps(self.pid)
            self.tracker.watch(lines)
            self._set_layout(lines)

    def _read_flags(self) -> tuple[bytes, bytes]:
        """smaps, a walk of all page tables: 10 ms a GiB; and how much was locked before."""
        locked = procfs.locked(self.pid)
        return procfs.read_smaps(self.pid), locked

    def _note_flags(self, smaps: bytes, locked: bytes) -> None:
        """At the end of each round, since flags may change where no line of maps does."""
        lines = procfs.parse_smaps(smaps)
        if self._bare(lines) == self._lines:
            self._set_layout(lines)
            self._locked = locked

    def _mapped(self) -> list[MapsLine]:
        """The process's own mappings, without the scratch, of which a batch may map a page anew."""
        return mappings.ordinary(procfs.maps(self.pid), self.scratch)

    def _set_layout(self, lines: list[MapsLine]) -> None:
        """The mappings as smaps shows them; Unmovable if one came that cannot be moved."""
        for blocker in mappings.blockers(lines, self.scratch):
            raise Unmovable(blocker.kind, f"{blocker.what}: {blocker.why}")
        self._known = {line.start: line for line in lines}
        # of the same reading as the layout: between two, mappings may change, and change back later
        self._lines = self._bare(lines)
        self._describe_layout(lines)

    def _bare(self, lines: list[MapsLine]) -> list[MapsLine]:
        """Lines of smaps as `_mapped` has them."""
        bare = [msgspec.structs.replace(line, vmflags=frozenset()) for line in lines]
        return mappings.ordinary(bare, self.scratch)

    def _describe_layout(self, lines: list[MapsLine]) -> None:
        self.layout = layouts.merge(mappings.layout(lines, self.files, self._known, self.scratch))

    def _pending(self, found: Scan, seconds: float) -> Pending:
        written = intersection(found.written, self._mapped_ranges())
        return Pending(written, PageSet(found.present), seconds)

    def _mapped_ranges(self) -> list[Range]:
        return [(m.start, m.end) for m in self.layout]

    def send(
        self, number: int, pending: Pending, dirty_rate: float, paced: Callable[[int, int], None]
    ) -> Round:
        """One round: layout, discards, pages; done when the destination says so."""
        began, bytes_before = time.monotonic(), self.link.bytes_sent
        sending_before = self.link.sending_s
        sent, discarded = self.send_memory(pending, False, paced)
        sent_at, sending = time.monotonic(), self.link.sending_s - sending_before
        flags = self._background.submit(self._read_flags)
        self.link.send(protocol.RoundEnd(number))
        self.link.expect(protocol.RoundDone)
        self.link.arrived()
        done_at = time.monotonic()
        # what was in buffers when all was sent counts too: it is the time until the last byte was dealt with
        self.encoder.observe(self.link.bytes_sent - bytes_before, sending + done_at - sent_at)
        self._note_flags(*flags.result())
        round_ = Round(
            number=number,
            pages_sent=sent,
            pages_discarded=discarded,
            bytes=self.link.bytes_sent - bytes_before,
            seconds=round(done_at - began, 4),
            dirty_rate=round(dirty_rate, 1),
        )
        self.history.append(round_)
        return round_

    def send_memory(
        self, pending: Pending, frozen: bool, paced: Callable[[int, int], None]
    ) -> tuple[int, int]:
        """Layout, discards and pages; (pages sent, pages discarded)."""
        lost = intersection(_common(pending.present, self.announce_layout()), self._mapped_ranges())
        gone = self.sender.held.without(pending.present).ranges()
        self._discard(gone)
        held_before = self.sender.held
        wanted = merged([*pending.written, *lost]) if lost else pending.written
        sent, zeros = self.sender.send(wanted, self.layout, frozen, paced)
        became_zero = _common(held_before, zeros)
        self._discard(became_zero)
        return sent, pages_in(gone) + pages_in(became_zero)

    def _discard(self, ranges: list[Range]) -> None:
        for first in range(0, len(ranges), MAX_RANGES):
            self.link.send(protocol.Discard(ranges[first : first + MAX_RANGES]))
        self.sender.held.subtract(ranges)

    def announce_layout(self) -> list[Range]:
        """Tell the destination the mappings if they changed; where it loses all pages by that.

        Pages there need not have been written: a mapping may be another only by its flags.
        """
        if len(self.files.refs) > self._files_sent:
            self.link.send(protocol.NewFiles(self.files.refs[self._files_sent :]))
            self._files_sent = len(self.files.refs)
        operations = layouts.difference(self._announced, self.layout)
        if not operations:
            return []
        lost = [(o.start, o.end) for o in operations if isinstance(o, layouts.Unmap)]
        self.sender.held.subtract(lost)
        self.link.send(protocol.Layout(self.layout))
        self._announced = self.layout
        return lost

    # --- in the freeze ---

    def program_changed(self) -> bool:
        """Whether execve(2) has replaced the address space that we watched; nothing of ours is in it then.

        An open /proc/PID/mem stays with the old one, where our code was, and reads nothing once that is gone.
        """
        if self.tracee.code and not self._code_is_there():
            self._executed = True
            self.memory.close()
            self.tracee.scratch = self.tracee.code = 0
            with contextlib.suppress(OSError):  # it has ended
                self.memory = self.tracee.memory = RemoteMemory(self.pid)
        return self._executed

    def _code_is_there(self) -> bool:
        code = self.tracee.runner_code()
        try:
            return self.memory.read(self.tracee.code, len(code)) == code
        except OSError:
            return False

    def look(self) -> None:
        """Have the last scan made beside what the freeze does first: a walk over all page tables, 5 ms a GiB.

        Nothing may be mapped or unmapped in the process until `last` has it: that would wait for the walk.
        """
        self.forget_look()
        self.files.hurried = True
        self._look = self._background.submit(self._last)

    def forget_look(self) -> None:
        """It goes on: what was seen of the frozen process, and is still being read, is old."""
        if self._look is not None:
            self._look.exception()
            self._look = None
        if self._flags is not None:
            self._flags = None
            self._lines = []
        self.files.hurried = False

    def last(self) -> Pending:
        """What is left to send of a frozen process: the scan, together with what a round still owed."""
        if self._look is None:
            self.look()
        assert self._look is not None
        return self._look.result()

    def _last(self) -> Pending:
        lines = self._mapped()
        if lines != self._lines or procfs.locked(self.pid) != self._locked:
            self._flags = self._background.submit(procfs.read_smaps, self.pid)
            self._describe_layout(lines)
            self._lines = lines
        found = self.tracker.scan(self._file_ranges(), self._excluded, protect=False)
        self._present = found.present
        self.guards = found.guards
        result = Pending(found.written, PageSet(found.present), time.monotonic() - self._scanned_at)
        owed = self.pending.written if self.pending is not None else []
        if owed:
            result.written = merged([*result.written, *intersection(owed, found.present)])
        return result

    def settle_flags(self) -> int:
        """After the pages: where mappings changed since the last round, flags are only known by now.

        What turns out to be another kind of mapping is made anew, and its pages are sent again; how many.
        """
        if self._flags is None:
            return 0
        self._set_layout(procfs.parse_smaps(self._flags.result()))
        self._flags = None
        lost = self.announce_layout()
        sent, _ = self.sender.send(intersection(self._present, lost), self.layout, True, unpaced)
        return sent


def unpaced(pages: int, sent: int) -> None:
    """Nothing paces the freeze."""


def _common(pages: PageSet, ranges: list[Range]) -> list[Range]:
    wanted = PageSet(ranges)
    return wanted.without(wanted.without(pages)).ranges() if ranges else []
