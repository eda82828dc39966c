"""Reading dirty pages and putting them on the link: zero pages never, the rest compressed where it pays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from agent.kernel.arch.x86_64 import PAGE
from agent.kernel.memory import MemoryFault, RemoteMemory
from agent.layout import Mapping
from agent.link import Link
from agent.pageset import PageSet, Range, chunks, pages_in
from agent.tracking import without
from transport.codec import Encoder

CHUNK: Final = 512 * 1024
_ZERO: Final = bytes(PAGE)
_WINDOW: Final = 8 * 1024 * 1024


class Vanished(Exception):
    """A page that was there a moment ago could not be read from a frozen process."""


class PageSender:
    """One migration's outgoing pages, and what the destination has of them."""

    def __init__(self, memory: RemoteMemory, link: Link, encoder: Encoder) -> None:
        self._memory = memory
        self._link = link
        self._encoder = encoder
        self._buffer = bytearray(CHUNK)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self.held = PageSet()  # pages that the destination has with content
        self._observed = (0, 0.0)  # bytes and seconds of the link, at the last look
        self.last = False
        self.drop: int | None = None  # for the test that proves --verify able to fail

    def send(
        self,
        ranges: Sequence[Range],
        layout: Sequence[Mapping],
        frozen: bool,
        paced: Callable[[int, int], None],
    ) -> tuple[int, list[Range]]:
        """Send the pages of `ranges`; (pages sent, ranges found to be zero).

        `paced(pages, bytes)` is called after each chunk with what it was. While the process runs, a page may
        be gone when it is read: it is skipped, the next scan tells. From a frozen one that is Vanished.
        """
        sent, zeros = 0, PageSet()
        self._observed = (self._link.bytes_sent, self._link.sending_s)
        self.last = frozen
        files, anonymous = _split(ranges, layout)
        for group, keep_zeros in ((anonymous, False), (files, True)):
            for part in chunks(group, CHUNK):
                before = self._link.bytes_sent
                found = self._send_chunk(self._read(part, frozen), keep_zeros, zeros)
                sent += found
                self._observe()
                paced(pages_in(part), self._link.bytes_sent - before)
        return sent, zeros.ranges()

    def _observe(self) -> None:
        """In a long round: how fast the link is by now."""
        sent, seconds = self._link.bytes_sent - self._observed[0], self._link.sending_s - self._observed[1]
        if sent >= _WINDOW:
            self._encoder.observe(sent, seconds)
            self._observed = (self._link.bytes_sent, self._link.sending_s)

    def _read(self, part: list[Range], frozen: bool) -> list[Range]:
        """Read what can be read into the buffer; the ranges that were."""
        try:
            self._memory.read_into(self._address, part)
            return part
        except MemoryFault:
            return self._read_singly(part, frozen)

    def _read_singly(self, part: list[Range], frozen: bool) -> list[Range]:
        done, data = self.reread(part)
        if frozen and (gone := without(part, done)):
            raise Vanished(f"the page at {gone[0][0]:#x} cannot be read")
        self._buffer[: len(data)] = data
        return done

    def reread(self, ranges: Sequence[Range]) -> tuple[list[Range], bytearray]:
        """What of them can be read, and its content.

        Range by range, through protections; a hole costs its own pages only, not what lies behind it.
        """
        done, content = list[Range](), bytearray()
        for begin, end in ranges:
            start = begin
            while start < end:
                data = self._read_some(start, end)
                if not data:
                    start += PAGE
                    continue
                content += data
                done.append((start, start + len(data)))
                start += len(data)
        return done, content

    def _read_some(self, start: int, end: int) -> bytes:
        """Whole pages from `start` on, as many as can be read; none if it is not mapped."""
        try:
            data = self._memory.read(start, end - start)
        except OSError:
            return b""
        return data[: len(data) // PAGE * PAGE]

    def _send_chunk(self, part: list[Range], keep_zeros: bool, zeros: PageSet) -> int:
        if keep_zeros:
            kept, data = part, memoryview(self._buffer)[: _size(part)]
        else:
            kept, data = self._without_zeros(part, zeros)
        if self.drop is not None:
            kept, data = _without_page(kept, data, self.drop)
        if not kept:
            return 0
        kind, body = self._encoder.encode(data)
        self._link.send_pages(kind, kept, body, len(data))
        if not self.last:  # nobody asks any more afterwards
            self.held.update(kept)
        return len(data) // PAGE

    def _without_zeros(self, part: list[Range], zeros: PageSet) -> tuple[list[Range], memoryview]:
        """The ranges without their zero pages, and their content, moved together."""
        buffer, kept, position, target = self._buffer, list[Range](), 0, 0
        starts_with = buffer.startswith
        for start, end in part:
            run = start
            for address in range(start, end, PAGE):
                offset = position + address - start
                if buffer[offset] == 0 and starts_with(_ZERO, offset):
                    zeros.add(address, address + PAGE)
                    if run < address:
                        kept.append((run, address))
                    run = address + PAGE
            if run < end:
                kept.append((run, end))
            position += end - start
        if not kept or _size(kept) == position:
            return kept, memoryview(buffer)[: _size(kept)]
        offsets = _offsets(part)
        for start, end in kept:
            source = offsets(start)
            buffer[target : target + end - start] = buffer[source : source + end - start]
            target += end - start
        return kept, memoryview(buffer)[:target]


def _offsets(part: list[Range]) -> Callable[[int], int]:
    """Where an address of the ranges is in their concatenation; asked in order."""
    state = [0, 0]  # index, position of that range

    def offset(address: int) -> int:
        while address >= part[state[0]][1]:
            state[1] += part[state[0]][1] - part[state[0]][0]
            state[0] += 1
        return state[1] + address - part[state[0]][0]

    return offset


def _size(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


def _without_page(kept: list[Range], data: memoryview, page: int) -> tuple[list[Range], memoryview]:
    """The same without one page: what a lost page looks like."""
    left = without(kept, [(page, page + PAGE)])
    offset = _offsets(kept)
    return left, memoryview(bytearray().join(data[offset(s) : offset(s) + e - s] for s, e in left))


def _split(ranges: Sequence[Range], layout: Sequence[Mapping]) -> tuple[list[Range], list[Range]]:
    """(in file mappings, in anonymous ones): a zero page of the former must be written, not left out."""
    files, anonymous = list[Range](), list[Range]()
    mappings = iter(layout)
    mapping = next(mappings, None)
    for begin, end in ranges:
        start = begin
        while start < end:
            while mapping is not None and mapping.end <= start:
                mapping = next(mappings, None)
            if mapping is None or mapping.start >= end:
                anonymous.append((start, end))  # not in the layout read before: the next one has it
                break
            stop = min(end, mapping.end) if mapping.start <= start else mapping.start
            in_file = mapping.start <= start and not mapping.anonymous
            (files if in_file else anonymous).append((start, stop))
            start = stop
    return files, anonymous
