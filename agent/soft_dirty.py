"""Pages a running process wrote, by the soft-dirty bits of /proc/PID/pagemap: for want of PAGEMAP_SCAN.

The bits of all pages are cleared at once, and cannot be read and cleared in one step: what is written between
the two would be lost. So the process is stopped for as long as it takes the kernel to copy out the entries
and to clear the bits; the entries are looked at when it runs again.

The bit alone misses changes. So a page only counts as unwritten if besides

- its entry names the same page frame as in the scan before: mremap(2) moves whole page tables and sets no
  bit in them, MADV_DONTNEED and a read put the zero page there, KSM another page. That is why frame
  numbers must be shown (CAP_SYS_ADMIN), and why a page that the scan before did not see counts as written
  whatever its bit says;
- it is in a mapping that begins and ends where one did then. The kernel marks one that is new or grows as a
  whole, and as long as it has that mark mprotect(2) makes its pages writable without a fault that would set
  their bits; but the mark is lost when the mapping becomes part of a neighbour.

What is still missed: both undone between two scans, so that frames and mappings are as they were.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Final

from agent.kernel import pagemap, procfs
from agent.kernel.arch.x86_64 import PAGE, TASK_SIZE
from agent.kernel.clear_refs import ClearRefs
from agent.kernel.pagemap import Pagemap
from agent.kernel.procfs import MapsLine
from agent.tracking import Range, Scan, intersection, merged, without

BLOCK: Final = 1 << 25  # read at a time
_SPARSE: Final = 1 << 34  # bytes of address space: from here on it pays to ask which mappings are empty
_CHUNK: Final = 4096
_EXTENT: Final = re.compile(rb"(?m)^([0-9a-f]+)-([0-9a-f]+) ")
_POPULATED: Final = re.compile(rb"(?m)^(?:Rss|Swap): +[1-9]")
_SET: Final = re.compile(rb"\x01+")
Words = tuple[int, bytes]  # entries, 8 bytes a page, and the address of the first page


def available() -> bool:
    """Whether this kernel keeps soft-dirty bits and shows frame numbers, tried on a page of our own."""
    try:
        own, bits = Pagemap(os.getpid()), ClearRefs(os.getpid())
    except OSError:
        return False
    try:
        return any(_kept(own, bits) for _ in range(3))
    finally:
        own.close()
        bits.close()


def _kept(own: Pagemap, bits: ClearRefs) -> bool:
    """Whether a write is seen; once in a while it is not, if another thread changes the mapping meanwhile."""
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        at = ctypes.addressof(ctypes.c_char.from_buffer(page))

        def entry() -> int:
            return int.from_bytes(own.entries(at, at + PAGE), "little")

        page[0] = 1
        frame = entry() & pagemap.PM_PFN_MASK
        bits.clear_soft_dirty()
        clear = entry() & pagemap.PM_SOFT_DIRTY == 0
        page[0] = 2
        return frame != 0 and clear and entry() & pagemap.PM_SOFT_DIRTY != 0


class SoftDirty:
    """A `tracking.Tracker` by soft-dirty bits; without a `halt`, one that cannot tell what was written.

    `halt` stops the process while it is entered. BlockingIOError if somebody else follows the same process.
    """

    def __init__(self, pid: int, halt: AbstractContextManager[None] | None) -> None:
        self._pid = pid
        self._halt = halt
        self._bits = _locked(pid) if halt is not None else None
        self._pagemap = Pagemap(pid)
        self._maps = b""
        self._mapped_before: frozenset[Range] = frozenset()
        self._blocks: list[Range] = []
        self._before = Snapshot([])

    @property
    def incremental(self) -> bool:
        return self._bits is not None

    def watch(self, lines: Sequence[MapsLine]) -> None:
        """Bits are kept for every page; what is no longer mapped is forgotten, so new if it comes back."""
        self._before = self._before.cut_to([(m.start, m.end) for m in lines])

    def scan(self, files: Sequence[Range], excluded: Sequence[Range], protect: bool) -> Scan:
        """As `Tracker.scan`; which pages are a file's is seen in the entries themselves."""
        words = self._read(protect)
        now = Snapshot([(start, identity(entries)) for start, entries in words])
        present, written, guards = list[Range](), list[Range](), list[Range]()
        for (start, entries), (_, who) in zip(words, now.words, strict=True):
            own = own_pages(entries)
            append(present, start, own)
            if self.incremental:
                differing = differences(who, self._before.entries(start, len(who)))
                append(written, start, both(own, either(dirty_pages(entries), differing)))
            append(guards, start, guard_pages(entries))
        mapped = extents(self._maps)
        anew = merged([extent for extent in mapped if extent not in self._mapped_before])
        written = merged([*written, *intersection(present, anew)]) if self.incremental else present
        if protect:
            self._before, self._mapped_before = now, frozenset(mapped)
        return Scan(*(without(ranges, excluded) for ranges in (present, written, guards)))

    def _read(self, protect: bool) -> list[Words]:
        """All entries; with `protect` the bits are cleared in the same moment of the process's life."""
        self._plan(anew=True)
        if not protect or self._bits is None or self._halt is None:
            return self._entries()
        with self._halt:
            self._plan(anew=False)
            words = self._entries()
            self._bits.clear_soft_dirty()
        return words

    def _plan(self, anew: bool) -> None:
        """Which blocks to read; thought over only if mappings changed, or `anew` where they may be empty."""
        maps = procfs.read(f"/proc/{self._pid}/maps")
        ranges = extents(maps)
        sparse = sum(end - start for start, end in ranges) > _SPARSE
        if maps == self._maps and not (sparse and anew):
            return
        if sparse:
            # what is populated after this look is told by the next scan, as what this one did not see
            ranges = populated(procfs.read(f"/proc/{self._pid}/smaps"))
        self._maps, self._blocks = maps, list(blocks(ranges))

    def _entries(self) -> list[Words]:
        """Of all blocks in which there is anything."""
        read = self._pagemap.entries
        found = ((start, read(start, end)) for start, end in self._blocks)
        return [(start, entries) for start, entries in found if entries[7::8].strip(b"\0")]

    def close(self) -> None:
        self._pagemap.close()
        if self._bits is not None:
            self._bits.close()


def _locked(pid: int) -> ClearRefs:
    bits = ClearRefs(pid)
    try:
        bits.lock()
    except BlockingIOError:
        bits.close()
        raise
    return bits


# --- what to read ---


def extents(maps: bytes) -> list[Range]:
    """The mappings in a text of /proc/PID/maps or smaps, without the vsyscall page, which has no entries."""
    found = [(int(start, 16), int(end, 16)) for start, end in _EXTENT.findall(maps)]
    return [(start, end) for start, end in found if start < TASK_SIZE]


def populated(smaps: bytes) -> list[Range]:
    """The mappings in which there is any page, present or swapped."""
    heads = [m.start() for m in _EXTENT.finditer(smaps)]
    texts = (smaps[a:b] for a, b in zip(heads, [*heads[1:], len(smaps)], strict=True))
    return [found for text in texts if _POPULATED.search(text) for found in extents(text)]


def blocks(ranges: Sequence[Range]) -> Iterator[Range]:
    """The same pages: neighbours joined, then cut at multiples of BLOCK."""
    for start, end in merged(ranges):
        for low in range(start // BLOCK * BLOCK, end, BLOCK):
            yield max(low, start), min(low + BLOCK, end)


# --- entries, many at a time: marks are a byte a page, 1 or 0 ---


def _marking(test: Callable[[int], bool]) -> bytes:
    """A translation of one byte of each entry to marks."""
    return bytes(test(value) for value in range(256))


def _top(bits: int) -> int:
    """Bits of an entry in its highest byte."""
    return bits >> 56


_OWN: Final = _marking(
    lambda b: bool(b & _top(pagemap.PM_PRESENT | pagemap.PM_SWAP))
    and not b & _top(pagemap.PM_FILE | pagemap.PM_GUARD_REGION)
)
_SWAPPED: Final = _marking(lambda b: bool(b & _top(pagemap.PM_SWAP)))
_GUARD: Final = _marking(lambda b: bool(b & _top(pagemap.PM_GUARD_REGION)))
_DIRTY: Final = _marking(lambda b: bool(b & pagemap.PM_SOFT_DIRTY >> 48))
_NOT_MARKER: Final = _marking(lambda b: b & pagemap.SWAP_TYPE != pagemap.SWP_PTE_MARKER)
_ANY: Final = _marking(bool)
_FRAME: Final = bytes(value & ~(pagemap.PM_SOFT_DIRTY >> 48) for value in range(256))
_KIND: Final = bytes(value & ~_top(pagemap.PM_MMAP_EXCLUSIVE | pagemap.PM_UFFD_WP) for value in range(256))


def both(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") & int.from_bytes(b, "little")).to_bytes(len(a), "little")


def either(a: bytes, b: bytes) -> bytes:
    return (int.from_bytes(a, "little") | int.from_bytes(b, "little")).to_bytes(len(a), "little")


def own_pages(entries: bytes) -> bytes:
    """Pages with content of their own: present or swapped, not a file's, no guard, no mark on a hole."""
    kinds = entries[7::8]
    own, swapped = kinds.translate(_OWN), kinds.translate(_SWAPPED)
    if 1 not in swapped:
        return own
    real = either(_inverted(swapped), entries[::8].translate(_NOT_MARKER))
    return both(own, real)


def _inverted(marks: bytes) -> bytes:
    return marks.translate(bytes([1]) + bytes(255))


def guard_pages(entries: bytes) -> bytes:
    return entries[7::8].translate(_GUARD)


def dirty_pages(entries: bytes) -> bytes:
    return entries[6::8].translate(_DIRTY)


def identity(entries: bytes) -> bytes:
    """The entries without what may change while the page stays the same: which frame, or where in swap."""
    result = bytearray(entries)
    result[6::8] = entries[6::8].translate(_FRAME)
    result[7::8] = entries[7::8].translate(_KIND)
    return bytes(result)


def differences(now: bytes, before: bytes) -> bytes:
    """Pages whose identities are not the same; quick where most are."""
    marks = bytearray(len(now) // 8)
    for at in range(0, len(now), _CHUNK):
        a, b = now[at : at + _CHUNK], before[at : at + _CHUNK]
        if a != b:
            difference = int.from_bytes(a, "little") ^ int.from_bytes(b, "little")
            for shift in (32, 16, 8):  # all bytes of an entry into its lowest one
                difference |= difference >> shift
            marks[at // 8 : (at + len(a)) // 8] = difference.to_bytes(len(a), "little")[::8].translate(_ANY)
    return bytes(marks)


class Snapshot:
    """The identities of one scan, by address; 0 for pages that it did not see."""

    def __init__(self, words: Sequence[Words]) -> None:
        self.words = words  # in order
        self._starts = [start for start, _ in words]

    def entries(self, start: int, size: int) -> bytes:
        """`size` bytes of entries from the page at `start` on."""
        result = bytearray(size)
        first = max(0, bisect.bisect_right(self._starts, start) - 1)
        for at, data in self.words[first:]:
            offset = (at - start) // PAGE * 8  # where it begins in the result
            if offset >= size:
                break
            low, high = max(0, -offset), min(len(data), size - offset)
            if low < high:
                result[offset + low : offset + high] = data[low:high]
        return bytes(result)


    def cut_to(self, ranges: Sequence[Range]) -> Snapshot:
        """Only these ranges of it."""
        return Snapshot(
            [(low, self.entries(low, (high - low) // PAGE * 8)) for low, high in self._within(ranges)]
        )

    def _within(self, ranges: Sequence[Range]) -> list[Range]:
        return intersection([(at, at + len(data) // 8 * PAGE) for at, data in self.words], merged(ranges))


def append(ranges: list[Range], start: int, marks: bytes) -> None:
    """The marks as ranges from `start` on, the first joined with the last that is there already."""
    found = [
        (start + a * PAGE, start + b * PAGE) for a, b in (match.span() for match in _SET.finditer(marks))
    ]
    if ranges and found and ranges[-1][1] == found[0][0]:
        found[0] = (ranges.pop()[0], found[0][1])
    ranges += found
