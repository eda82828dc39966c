"""A process whose memory is followed, and a destination that believes what the scans tell.

The same tests for whichever way this kernel has (tests/kernel runs them on one that has the other). Where
they differ: write-protection tells what is new twice, for it is protected only by the second scan; soft-dirty
tells a mapping that does not begin or end where one did as a whole.
"""

from __future__ import annotations

import contextlib
import os

from unit.children import PAGE, Puppet

from agent.dirty_tracking import Mechanism, mechanism, tracker
from agent.halt import Halt
from agent.kernel import pidfd, procfs, userfaultfd
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.tracking import Scan

PAGES = 32
HUGE = 2 << 20
MADV_DONTNEED, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_GUARD_INSTALL, MADV_GUARD_REMOVE = 4, 14, 15, 102, 103
MAYMOVE_FIXED = 3
Range = tuple[int, int]
TOLD_TWICE = mechanism() is Mechanism.USERFAULTFD
TOLD_WHOLE = mechanism() is Mechanism.SOFT_DIRTY


class Watched:
    """A puppet, its tracker, and a destination that believes it."""

    def __init__(self, target: Puppet) -> None:
        self.puppet = target
        self.memory = RemoteMemory(target.pid)
        uffd = _userfaultfd(target) if mechanism() is Mechanism.USERFAULTFD else None
        self.halt = Halt(target.pid, self.memory)
        self.tracker = tracker(target.pid, uffd, self.halt)
        assert self.tracker.incremental
        self.held: dict[int, bytes] = {}

    def special(self) -> list[Range]:
        names = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")
        return [(m.start, m.end) for m in procfs.maps(self.puppet.pid) if m.name in names]

    def scan(self, protect: bool = True) -> Scan:
        """As a round does it: scan, then watch what is mapped now."""
        files = [(m.start, m.end) for m in procfs.maps(self.puppet.pid) if m.inode]
        found = self.tracker.scan(_joined(files), self.special(), protect)
        self.tracker.watch(procfs.smaps(self.puppet.pid))
        return found

    def follow(self, low: int, high: int, protect: bool = True) -> Scan:
        """A round of the destination for [low, high): it forgets what is gone and gets what was written."""
        found = self.scan(protect)
        present = pages(found.present, low, high)
        self.held = {page: data for page, data in self.held.items() if page in present}
        for page in pages(found.written, low, high):
            with contextlib.suppress(OSError):
                self.held[page] = self.memory.read(page, PAGE)
        return found

    def actual(self, page: int) -> bytes:
        """What the process sees there; zeros where it sees nothing."""
        try:
            return self.memory.read(page, PAGE)
        except OSError:
            return bytes(PAGE)

    def close(self) -> None:
        self.tracker.close()
        self.memory.close()


def _userfaultfd(target: Puppet) -> int:
    handle = pidfd.open_process(target.pid)
    theirs = target.call(arch.NR_userfaultfd, os.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY)
    uffd = pidfd.getfd(handle, theirs)
    os.close(handle)
    target.call(arch.NR_close, theirs)
    userfaultfd.handshake(uffd)
    return uffd


def _joined(ranges: list[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end in ranges:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found


def pages(ranges: list[Range], low: int, high: int) -> set[int]:
    return {page for s, e in ranges for page in range(max(s, low), min(e, high), PAGE)}


class Arena:
    """Some pages at a fixed place in it, by number."""

    def __init__(self, watched: Watched, size: int = PAGES) -> None:
        self.watched, self.puppet = watched, watched.puppet
        self.size = size
        # with a hole of the same size behind it, to move things to
        self.base = self.puppet.map(3 * size * PAGE)
        self.puppet.call(arch.NR_munmap, self.base, 3 * size * PAGE)
        self.puppet.map(size * PAGE, self.base)
        watched.tracker.watch(procfs.smaps(self.puppet.pid))

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def write(self, *numbers: int, byte: int = 0x55) -> None:
        for number in numbers:
            self.puppet.fill(self.page(number) + 17, byte)

    def numbers(self, ranges: list[Range]) -> set[int]:
        return {(p - self.base) // PAGE for p in pages(ranges, self.base, self.page(3 * self.size))}

    def scan(self, protect: bool = True) -> tuple[set[int], set[int], set[int]]:
        """(present, written, guards) in the arena."""
        found = self.watched.scan(protect)
        assert found.present == sorted(found.present)
        written = self.numbers(found.written)
        assert written <= self.numbers(found.present)
        return self.numbers(found.present), written, self.numbers(found.guards)


def touch(arena: Arena, first: int, last: int) -> None:
    """It reads pages: a hole shows the zero page from then on. madvise(2) MADV_POPULATE_READ."""
    arena.puppet.call(arch.NR_madvise, arena.page(first), (last - first) * PAGE, 22)
