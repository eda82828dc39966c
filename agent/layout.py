"""The address space as data: what is mapped where, and what must be done to turn one layout into another.

Pure: no I/O. Both ends compute with it: the destination, what to map and unmap in the shadow; the source,
from the same operations, which pages the destination has lost by it.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.bounds import U63, Index
from agent.kernel.arch.x86_64 import Address


class Flag(enum.IntFlag):
    """What is true of a mapping besides protection and file (names after VmFlags of smaps)."""

    SHARED = 1
    GROWSDOWN = 2
    NORESERVE = 4
    LOCKED = 8
    HUGEPAGE = 16
    NOHUGEPAGE = 32
    DONTFORK = 64
    DONTDUMP = 128
    WIPEONFORK = 256
    MERGEABLE = 512
    SEQUENTIAL = 1024
    RANDOM = 2048
    LOCKONFAULT = 4096


_ALL_FLAGS: Final = int(~Flag(0))
# flags that say what the mapping is; a change of one of them means another mapping
IDENTITY = Flag.SHARED | Flag.GROWSDOWN | Flag.NORESERVE
# advice that no call takes back (madvise(2)), only turns into the other: what has lost it is another mapping
LASTING = Flag.HUGEPAGE | Flag.NOHUGEPAGE


class Mapping(msgspec.Struct, frozen=True, array_like=True):
    """One mapping of the process. `file` is an index into the migration's table of files; -1: anonymous."""

    start: Address
    end: Address
    protection: Annotated[int, Meta(ge=0, le=7)]  # PROT_READ | PROT_WRITE | PROT_EXEC
    flags: Annotated[int, Meta(ge=0, le=_ALL_FLAGS)] = 0
    file: Index = -1
    offset: U63 = 0  # in the file, of `start`

    @property
    def anonymous(self) -> bool:
        return self.file < 0

    def identity(self) -> tuple[int, int, int]:
        """Equal for two mappings when the same address shows the same thing in both."""
        return (self.file, self.offset - self.start if self.file >= 0 else 0, self.flags & IDENTITY)

    def cut(self, start: int, end: int) -> Mapping:
        """The part of the mapping inside [start, end)."""
        low, high = max(self.start, start), min(self.end, end)
        offset = self.offset + (low - self.start) if self.file >= 0 else 0
        return Mapping(low, high, self.protection, self.flags, self.file, offset)


class Unmap(msgspec.Struct, frozen=True):
    start: int
    end: int


class Map(msgspec.Struct, frozen=True):
    mapping: Mapping


class Protect(msgspec.Struct, frozen=True):
    start: int
    end: int
    protection: int


class Advise(msgspec.Struct, frozen=True):
    start: int
    end: int
    before: int
    after: int


Operation = Unmap | Map | Protect | Advise


def _boundaries(layouts: Iterable[Sequence[Mapping]]) -> list[int]:
    return sorted({edge for layout in layouts for m in layout for edge in (m.start, m.end)})


def _pieces(layout: Sequence[Mapping], edges: list[int]) -> dict[int, Mapping]:
    """The layout cut at every edge, by start address."""
    found: dict[int, Mapping] = {}
    position = 0
    for mapping in layout:
        while edges[position] < mapping.start:
            position += 1
        while position + 1 < len(edges) and edges[position] < mapping.end:
            found[edges[position]] = mapping.cut(edges[position], edges[position + 1])
            position += 1
    return found


def merge(layout: Iterable[Mapping]) -> list[Mapping]:
    """The same layout in its canonical form: neighbours that continue each other are one."""
    merged: list[Mapping] = []
    for mapping in layout:
        last = merged[-1] if merged else None
        if last is not None and _continues(last, mapping):
            merged[-1] = msgspec.structs.replace(last, end=mapping.end)
        else:
            merged.append(mapping)
    return merged


def _continues(first: Mapping, second: Mapping) -> bool:
    return (
        first.end == second.start
        and first.protection == second.protection
        and first.flags == second.flags
        and first.identity() == second.identity()
    )


def difference(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[Operation]:
    """What turns `old` into `new`: unmaps, then the rest in address order. Kept ranges keep their content."""
    if list(old) == list(new):
        return []
    edges = _boundaries((old, new))
    before, after = _pieces(old, edges), _pieces(new, edges)
    unmaps: list[Unmap] = []
    fresh: list[Mapping] = []
    changes: list[Operation] = []
    for start, end in itertools.pairwise(edges):
        was, now = before.get(start), after.get(start)
        if was is not None and (now is None or _replaced(was, now)):
            unmaps.append(Unmap(start, end))
            was = None
        if now is None:
            continue
        if was is None:
            fresh.append(now)
            continue
        if was.protection != now.protection:
            changes.append(Protect(start, end, now.protection))
        if was.flags != now.flags:
            changes.append(Advise(start, end, was.flags, now.flags))
    return [*_join(unmaps), *(Map(m) for m in merge(fresh)), *changes]


def _replaced(was: Mapping, now: Mapping) -> bool:
    return was.identity() != now.identity() or bool(was.flags & LASTING and not now.flags & LASTING)


def _join(unmaps: list[Unmap]) -> list[Unmap]:
    joined: list[Unmap] = []
    for unmap in unmaps:
        if joined and joined[-1].end == unmap.start:
            joined[-1] = Unmap(joined[-1].start, unmap.end)
        else:
            joined.append(unmap)
    return joined


def find_gap(layouts: Iterable[Sequence[Mapping]], size: int, low: int, high: int) -> int:
    """The lowest page in [low, high) at which `size` bytes are free in all layouts. MemoryError if none."""
    position = low
    for mapping in sorted((m for layout in layouts for m in layout), key=lambda m: m.start):
        if mapping.start - position >= size:
            break
        position = max(position, mapping.end)
    if position + size > high:
        raise MemoryError(f"no gap of {size} bytes in the address space")
    return position
