"""Sets of pages as one byte per page and mapping: fast where Python is slow, a quarter of a MiB for a GiB."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from agent.kernel.arch.x86_64 import PAGE

_RUN: Final = re.compile(rb"\x01+")
Range = tuple[int, int]


class PageSet:
    """A set of pages of the address space, kept per block of 64 MiB so that sparse spaces stay small."""

    BLOCK: Final = 1 << 26
    _PAGES: Final = BLOCK // PAGE

    def __init__(self, ranges: Iterable[Range] = ()) -> None:
        self._blocks: dict[int, bytearray] = {}
        for start, end in ranges:
            self.add(start, end)

    def _parts(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(block number, first page in it, end page in it) for a range."""
        while start < end:
            number, offset = divmod(start, self.BLOCK)
            size = min(end - start, self.BLOCK - offset)
            yield number, offset // PAGE, (offset + size) // PAGE
            start += size

    def add(self, start: int, end: int) -> None:
        for number, first, last in self._parts(start, end):
            block = self._blocks.get(number)
            if block is None:
                block = self._blocks[number] = bytearray(self._PAGES)
            block[first:last] = b"\x01" * (last - first)

    def remove(self, start: int, end: int) -> None:
        for number, first, last in self._parts(start, end):
            block = self._blocks.get(number)
            if block is not None:
                block[first:last] = bytes(last - first)

    def update(self, ranges: Iterable[Range]) -> None:
        for start, end in ranges:
            self.add(start, end)

    def subtract(self, ranges: Iterable[Range]) -> None:
        for start, end in ranges:
            self.remove(start, end)

    def without(self, other: PageSet) -> PageSet:
        """The pages that are in this set and not in `other`."""
        result = PageSet()
        for number, block in self._blocks.items():
            theirs = other._blocks.get(number)
            if theirs is None:
                result._blocks[number] = bytearray(block)
                continue
            difference = int.from_bytes(block, "little") & ~int.from_bytes(theirs, "little")
            if difference:
                result._blocks[number] = bytearray(difference.to_bytes(self._PAGES, "little"))
        return result

    def ranges(self) -> list[Range]:
        """Maximal ranges, in order."""
        found: list[Range] = []
        for number in sorted(self._blocks):
            base = number * self.BLOCK
            for match in _RUN.finditer(self._blocks[number]):
                start, end = base + match.start() * PAGE, base + match.end() * PAGE
                if found and found[-1][1] == start:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((start, end))
        return found

    def __len__(self) -> int:
        return sum(block.count(1) for block in self._blocks.values())

    def __contains__(self, address: int) -> bool:
        block = self._blocks.get(address // self.BLOCK)
        return block is not None and block[address % self.BLOCK // PAGE] == 1


def pages_in(ranges: Sequence[Range]) -> int:
    return sum(end - start for start, end in ranges) // PAGE


def chunks(ranges: Iterable[Range], size: int, max_ranges: int = 1024) -> Iterator[list[Range]]:
    """Cut ranges into lists of at most `size` bytes and `max_ranges` ranges, in order."""
    part: list[Range] = []
    room = size
    for begin, end in ranges:
        start = begin
        while start < end:
            stop = min(end, start + room)
            part.append((start, stop))
            room -= stop - start
            start = stop
            if not room or len(part) == max_ranges:
                yield part
                part, room = [], size
    if part:
        yield part
