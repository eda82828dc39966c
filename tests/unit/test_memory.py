"""Another process's memory: what was done is told to the byte when not all of it could be."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator

import pytest
from unit.children import PAGE, Puppet, puppet

from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import IOV_MAX, MemoryFault, RemoteMemory, address_of

PAGES = 16


class Space:
    """A puppet with some pages; page n is full of n + 1."""

    def __init__(self, target: Puppet) -> None:
        self.puppet = target
        self.memory = RemoteMemory(target.pid)
        self.base = target.map((PAGES + 1) * PAGE)
        target.call(arch.NR_munmap, self.base + PAGES * PAGE, PAGE)  # a hole behind
        for number in range(PAGES):
            target.fill(self.page(number), number + 1, PAGE)
        self.buffer = ctypes.create_string_buffer(PAGES * PAGE)
        self.address = ctypes.addressof(self.buffer)

    def page(self, number: int) -> int:
        return self.base + number * PAGE

    def range(self, first: int, last: int) -> tuple[int, int]:
        return self.page(first), self.page(last)

    def protect(self, number: int, protection: int) -> None:
        self.puppet.call(arch.NR_mprotect, self.page(number), PAGE, protection)


@pytest.fixture
def space() -> Iterator[Space]:
    with puppet() as target:
        found = Space(target)
        yield found
        found.memory.close()


def content(*numbers: int) -> bytes:
    return b"".join(bytes([n + 1]) * PAGE for n in numbers)


def test_ranges_are_read_one_after_another(space: Space) -> None:
    assert space.memory.read_into(space.address, [space.range(5, 7), space.range(0, 1)]) == 3 * PAGE
    assert space.buffer.raw[: 3 * PAGE] == content(5, 6, 0)
    part = (space.page(2) + 100, space.page(3) + 1)
    assert space.memory.read_into(space.address, [part]) == PAGE - 99
    assert space.buffer.raw[: PAGE - 99] == content(2)[100:] + b"\4"
    assert space.memory.read_into(space.address, []) == 0


def test_more_ranges_than_one_call_takes(space: Space) -> None:
    ranges = [(space.base + 7 * n, space.base + 7 * n + 2) for n in range(2 * IOV_MAX + 5)]
    assert space.memory.read_into(space.address, ranges) == 2 * len(ranges)
    whole = content(*range(PAGES))
    assert space.buffer.raw[: 2 * len(ranges)] == b"".join(
        whole[7 * n : 7 * n + 2] for n in range(len(ranges))
    )


@pytest.mark.parametrize("hole", [0, 3, 7])
def test_a_hole_is_told_where_it_is(space: Space, hole: int) -> None:
    space.puppet.call(arch.NR_munmap, space.page(hole), PAGE)
    with pytest.raises(MemoryFault) as failed:
        space.memory.read_into(space.address, [space.range(0, 2), space.range(2, 8)])
    assert (failed.value.errno, failed.value.done, failed.value.address) == (
        errno.EFAULT,
        hole * PAGE,
        space.page(hole),
    )
    assert f"{space.page(hole):#x}" in str(failed.value)
    assert space.buffer.raw[: hole * PAGE] == content(*range(hole))


def test_a_hole_behind_many_ranges(space: Space) -> None:
    ranges = [(space.base + n, space.base + n + 1) for n in range(IOV_MAX + 10)]
    with pytest.raises(MemoryFault) as failed:
        space.memory.read_into(space.address, [*ranges, (space.page(PAGES), space.page(PAGES) + 1)])
    assert (failed.value.done, failed.value.address) == (len(ranges), space.page(PAGES))


def test_what_may_not_be_written_is_not(space: Space) -> None:
    space.protect(4, 1)
    data = bytes(8 * PAGE)
    with pytest.raises(MemoryFault) as failed:
        space.memory.write_from(address_of(data), [space.range(2, 8)])
    assert (failed.value.done, failed.value.address) == (2 * PAGE, space.page(4))
    assert space.memory.read(space.page(2), 6 * PAGE) == bytes(2 * PAGE) + content(4, 5, 6, 7)


@pytest.mark.parametrize("protection", [0, 1, 4, 5])
def test_through_protections(space: Space, protection: int) -> None:
    space.protect(4, protection)
    space.memory.write(space.page(3) + 10, b"x" * 2 * PAGE)
    found = space.memory.read(space.page(3), 3 * PAGE)
    assert found == content(3)[:10] + b"x" * 2 * PAGE + content(5)[10:]


def test_reading_ends_where_the_mapping_ends(space: Space) -> None:
    assert space.memory.read(space.page(PAGES - 1), 3 * PAGE) == content(PAGES - 1)
    with pytest.raises(OSError) as failed:
        space.memory.read(space.page(PAGES), PAGE)
    assert failed.value.errno == errno.EIO


def test_writing_many_ranges(space: Space) -> None:
    data = bytes(range(256)) * 5
    ranges = [(space.base + 9 * n, space.base + 9 * n + 1) for n in range(len(data))]
    assert space.memory.write_from(address_of(data), ranges) == len(data)
    found = space.memory.read(space.base, 9 * len(data))
    assert found[::9] == data
    assert found[1::9] == content(*range(PAGES))[1 : 9 * len(data) : 9]


def test_a_process_that_is_gone() -> None:
    with puppet() as target:
        space = Space(target)
    with pytest.raises(MemoryFault) as failed:
        space.memory.read_into(space.address, [space.range(0, 1)])
    assert failed.value.errno == errno.ESRCH
    with pytest.raises(FileNotFoundError):
        RemoteMemory(target.pid)
    space.memory.close()
    space.memory.close()
