"""PageSender on this very process's memory: what is there goes on the link, no needless zero page."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel.errors import check, libc
from agent.kernel.memory import RemoteMemory
from agent.layout import Mapping
from agent.pageset import PageSet
from agent.sender import CHUNK, PageSender, Vanished, _offsets, _split
from transport.codec import Decoder, Encoder
from transport.frames import Kind

PAGE = 4096
PAGES = 24
Range = tuple[int, int]


class Recorder:
    """In the link's place: what the destination has after all frames."""

    def __init__(self) -> None:
        self.bytes_sent = 0
        self.sending_s = 0.0
        self.pages: dict[int, bytes] = {}
        self._decoder = Decoder()

    def send_pages(self, kind: Kind, ranges: Sequence[Range], data: bytes, raw_size: int) -> None:
        plain = bytes(self._decoder.decode(kind, memoryview(data), raw_size))
        for start, end in ranges:
            for address in range(start, end, PAGE):
                assert address not in self.pages, "sent twice"
                self.pages[address], plain = plain[:PAGE], plain[PAGE:]
        assert not plain
        self.bytes_sent += len(data)


class Memory:
    """Some pages of this process, at a fixed place."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.remote = RemoteMemory(os.getpid())

    def fill(self, contents: Sequence[bytes]) -> None:
        for number, content in enumerate(contents):
            self.map[number * PAGE : (number + 1) * PAGE] = content

    def range(self, first: int, last: int) -> Range:
        return self.base + first * PAGE, self.base + last * PAGE


@pytest.fixture(scope="module")
def memory() -> Iterator[Memory]:
    found = Memory()
    yield found
    found.remote.close()


def sender(memory: Memory) -> tuple[PageSender, Recorder]:
    link = Recorder()
    return PageSender(memory.remote, link, Encoder("zstd", -3)), link  # type: ignore[arg-type]


def nothing(pages: int, sent: int) -> None:
    pass


ZERO = bytes(PAGE)
CONTENT = st.one_of(
    st.just(ZERO),
    st.just(b"\1" * PAGE),
    st.just(bytes(PAGE - 1) + b"\1"),  # zero but for the last byte
    st.integers(0, 1 << 30).map(lambda n: n.to_bytes(4, "big") * (PAGE // 4)),
)
EDGES = st.lists(st.integers(0, PAGES), unique=True, max_size=10).map(sorted)


@given(st.lists(CONTENT, min_size=PAGES, max_size=PAGES), EDGES, EDGES)
def test_what_is_sent_is_what_is_there(
    memory: Memory, contents: list[bytes], edges: list[int], files: list[int]
) -> None:
    memory.fill(contents)
    ranges = [memory.range(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)]
    of_files = [memory.range(a, b) for a, b in zip(files[::2], files[1::2], strict=False)]
    layout = [Mapping(s, e, 3, 0, 0, 0) for s, e in of_files]
    pages, link = sender(memory)
    counted: list[int] = []
    sent, zeros = pages.send(ranges, layout, False, lambda n, _: counted.append(n))
    asked, in_files, zero = PageSet(ranges), PageSet(of_files), PageSet(zeros)
    assert sent == len(link.pages) == len(pages.held)
    assert sum(counted) == len(asked)
    for number, content in enumerate(contents):
        address = memory.base + number * PAGE
        wanted = address in asked and (content != ZERO or address in in_files)
        assert (address in link.pages) == wanted
        assert (address in pages.held) == wanted
        assert (address in zero) == (address in asked and not wanted)
        if wanted:
            assert link.pages[address] == content


def test_more_than_one_chunk(memory: Memory) -> None:
    big = mmap.mmap(-1, 3 * CHUNK + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(big))
    for number in range(len(big) // PAGE):
        big[number * PAGE : number * PAGE + 8] = number.to_bytes(8, "little")
    pages, link = sender(memory)
    calls: list[int] = []
    sent, zeros = pages.send([(base, base + len(big))], [], False, lambda n, _: calls.append(n))
    assert calls == [CHUNK // PAGE] * 3 + [1]
    assert zeros == [(base, base + PAGE)]
    assert sent == len(big) // PAGE - 1
    for number in range(1, sent + 1):
        assert link.pages[base + number * PAGE][:8] == number.to_bytes(8, "little")


def test_a_hole_costs_its_own_pages_only(memory: Memory) -> None:
    memory.fill([bytes([n + 1]) * PAGE for n in range(PAGES)])
    hole = [memory.range(3, 5), memory.range(9, 10)]
    with holes(hole):
        pages, link = sender(memory)
        pages.send([memory.range(0, PAGES)], [], False, nothing)
        gone = PageSet(hole)
        assert link.pages.keys() == {
            memory.base + n * PAGE for n in range(PAGES) if memory.base + n * PAGE not in gone
        }
        assert all(
            content == bytes([(a - memory.base) // PAGE + 1]) * PAGE for a, content in link.pages.items()
        )
        pages, _ = sender(memory)
        with pytest.raises(Vanished, match=f"{hole[0][0]:#x}"):
            pages.send([memory.range(0, PAGES)], [], True, nothing)


def test_what_may_not_be_read_is_read_all_the_same(memory: Memory) -> None:
    memory.fill([bytes([n + 1]) * PAGE for n in range(PAGES)])
    start, end = memory.range(2, 4)
    check(libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 0), "mprotect")
    try:
        pages, link = sender(memory)
        sent, _ = pages.send([memory.range(0, 6)], [], True, nothing)
    finally:
        check(libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 3), "mprotect")
    assert sent == 6
    assert link.pages[start] == b"\3" * PAGE


def test_a_dropped_page_is_not_sent(memory: Memory) -> None:
    memory.fill([bytes([n + 1]) * PAGE for n in range(PAGES)])
    pages, link = sender(memory)
    pages.drop = memory.base + 2 * PAGE
    sent, _ = pages.send([memory.range(0, 5)], [], False, nothing)
    assert sent == 4
    assert sorted(link.pages) == [memory.base + n * PAGE for n in (0, 1, 3, 4)]
    assert link.pages[memory.base + 3 * PAGE] == b"\4" * PAGE


class holes:
    """Ranges of our own memory that are not mapped for a while; mapped anew, empty, afterwards."""

    def __init__(self, ranges: Sequence[Range]) -> None:
        self._ranges = ranges

    def __enter__(self) -> None:
        for start, end in self._ranges:
            check(libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(end - start)), "munmap")

    def __exit__(self, *_: object) -> None:
        libc.mmap.restype = ctypes.c_void_p
        for start, end in self._ranges:
            size = ctypes.c_size_t(end - start)
            got = libc.mmap(ctypes.c_void_p(start), size, 3, 0x100022, -1, ctypes.c_long(0))
            assert got == start


@st.composite
def in_order(draw: st.DrawFn) -> list[Range]:
    found, position = [], 0
    for gap, length in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), max_size=6)):
        found.append(((position + gap) * PAGE, (position + gap + length) * PAGE))
        position += gap + length
    return found


@given(in_order(), in_order(), st.lists(st.booleans(), min_size=6, max_size=6))
def test_split(ranges: list[Range], mapped: list[Range], file: list[bool]) -> None:
    layout = [Mapping(s, e, 3, 0, 0 if f else -1, 0) for (s, e), f in zip(mapped, file, strict=False)]
    files, anonymous = _split(ranges, layout)
    in_files = PageSet((m.start, m.end) for m in layout if not m.anonymous)
    assert files == sorted(files) and anonymous == sorted(anonymous)
    both = [page for found in (files, anonymous) for s, e in found for page in range(s, e, PAGE)]
    assert sorted(both) == [page for s, e in ranges for page in range(s, e, PAGE)]
    assert all((page in in_files) == (page in PageSet(files)) for page in both)


@given(in_order())
def test_offsets(ranges: list[Range]) -> None:
    offset = _offsets(ranges)
    addresses = [page for s, e in ranges for page in range(s, e, PAGE)]
    assert [offset(address) for address in addresses] == [n * PAGE for n in range(len(addresses))]
