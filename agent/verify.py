"""`--verify`: is the shadow what the frozen source is? Every page by digest, every mapping, every register.

The source digests what it has present; the destination the same ranges of the shadow, and it makes sure that
whatever else the shadow has is zero. The kernel writes into a thread's rseq area whenever it returns to user
mode, on either host, and the rest of an interrupted sleep to where the program wants it: those bytes are left
out.
"""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from agent.checks import PIECE
from agent.kernel.arch.x86_64 import PAGE
from agent.kernel.memory import RemoteMemory
from agent.link import Link
from agent.pageset import Range, pages_in
from agent.protocol import Verified, Verify
from agent.resources import waits
from agent.state import ThreadState
from agent.tracking import merged
from transport.frames import ProtocolError

if TYPE_CHECKING:
    from agent.freeze import FrozenProcess
    from agent.rounds import Rounds

_BATCH: Final = 4096


class Mismatch(Exception):
    """The shadow is not what the source is."""


class Masks:
    """Bytes that are left out. A process of many threads has thousands of such ranges."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = merged([(start, end) for start, end in ranges if start < end])
        self._ends = [end for _, end in self._ranges]

    def within(self, start: int, end: int) -> Iterator[Range]:
        """The parts of them in [start, end), in order."""
        index = bisect.bisect_right(self._ends, start)
        while index < len(self._ranges) and self._ranges[index][0] < end:
            low, high = self._ranges[index]
            yield max(low, start), min(high, end)
            index += 1


def digest(memory: RemoteMemory, start: int, end: int, masks: Masks) -> bytes:
    """BLAKE2b-128 of a range, with masked bytes as zeros; b"" if it cannot be read."""
    try:
        data = memory.read(start, end - start)
    except OSError:
        return b""
    if found := list(masks.within(start, end)):
        copy = bytearray(data)
        for low, high in found:
            copy[low - start : high - start] = bytes(high - low)
        data = bytes(copy)
    return hashlib.blake2b(data, digest_size=16).digest()


def pieces(ranges: Sequence[Range]) -> Iterator[Range]:
    for start, end in ranges:
        for position in range(start, end, PIECE):
            yield position, min(position + PIECE, end)


def verify(link: Link, frozen: FrozenProcess, rounds: Rounds) -> int:
    """Compare everything with the shadow; pages compared. Mismatch names the first differences by page."""
    assert frozen.pending is not None and frozen.state is not None
    masked = _written_by_kernel(frozen.state.process.threads)
    masks = Masks(masked)
    present = [r for r in frozen.pending.present.ranges() if _mapped(r, rounds)]

    def compare(ranges: Sequence[Range], last: bool = False) -> Verified:
        digests = [(start, end, digest(rounds.memory, start, end, masks)) for start, end in ranges]
        link.send(Verify(pieces=digests, masked=masked, last=last, present=present if last else []))
        answer = link.expect(Verified)
        if not set(answer.memory) <= set(ranges):
            raise ProtocolError("the destination compared what it was not asked for")
        return answer

    cut = list(pieces(present))
    for first in range(0, len(cut) or 1, _BATCH):
        answer = compare(cut[first : first + _BATCH], last=first + _BATCH >= len(cut))
        if answer.memory:
            pages = [(p, p + PAGE) for start, end in answer.memory[:4] for p in range(start, end, PAGE)]
            names = [_name(start, rounds) for start, _ in compare(pages).memory]
            raise Mismatch(f"the copy differs from the original: {'; '.join(names[:8])}")
        if answer.others:
            raise Mismatch(f"the copy differs from the original: {'; '.join(answer.others[:8])}")
    return pages_in(present)


def _name(page: int, rounds: Rounds) -> str:
    found = next((m for m in rounds.layout if m.start <= page < m.end), None)
    where = f" of mapping {found.start:#x}-{found.end:#x}" if found else ""
    file = f" ({rounds.files.refs[found.file].path})" if found and not found.anonymous else ""
    return f"page {page:#x}{where}{file}"


def _written_by_kernel(threads: Sequence[ThreadState]) -> list[Range]:
    rseq = [(t.rseq[0], t.rseq[0] + t.rseq[1]) for t in threads if t.rseq[0]]
    sleeps = [waits.remainder_at(t.registers) for t in threads]
    return rseq + [s for s in sleeps if s is not None]


def _mapped(found: Range, rounds: Rounds) -> bool:
    return any(m.start < found[1] and found[0] < m.end for m in rounds.layout)
