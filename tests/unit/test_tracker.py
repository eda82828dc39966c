"""Dirty tracking on a live process: what `scan` tells, against what was done to the memory.

A destination that believes the scans has the same memory in the end; and the scans do not tell more than they
must. The same tests for whichever way this kernel has (tests/kernel runs them on one that has the other).
Where they differ: write-protection tells what is new twice, for it is protected only by the second scan;
soft-dirty tells a mapping that does not begin or end where one did as a whole.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.children import DEADLINE, PAGE, Puppet, compiled, puppet

from agent.descriptors import SourceProcess
from agent.dirty_tracking import Mechanism, mechanism, tracker
from agent.halt import Halt
from agent.kernel import pidfd, procfs, userfaultfd
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.resources.mappings import FileTable
from agent.rounds import Rounds
from agent.soft_dirty import SoftDirty
from agent.tracking import Scan

PAGES = 32
EXAMPLES = int(os.environ.get("MIGRATE_TEST_EXAMPLES", "200"))
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
        self.tracker.watch(procfs.maps(self.puppet.pid))
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


@pytest.fixture
def watched() -> Iterator[Watched]:
    with puppet() as target:
        found = Watched(target)
        yield found
        found.close()


class Arena:
    """Some pages at a fixed place in it, by number."""

    def __init__(self, watched: Watched, size: int = PAGES) -> None:
        self.watched, self.puppet = watched, watched.puppet
        self.size = size
        # with a hole of the same size behind it, to move things to
        self.base = self.puppet.map(3 * size * PAGE)
        self.puppet.call(arch.NR_munmap, self.base, 3 * size * PAGE)
        self.puppet.map(size * PAGE, self.base)
        watched.tracker.watch(procfs.maps(self.puppet.pid))

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


# --- one thing at a time ---


def test_writes(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(1, 2, 3, 9)
    assert arena.scan() == ({1, 2, 3, 9}, {1, 2, 3, 9}, set())  # watched, but not protected before
    assert arena.scan() == ({1, 2, 3, 9}, set(), set())
    arena.write(2, 20)
    assert arena.scan() == ({1, 2, 3, 9, 20}, {2, 20}, set())
    arena.write(20)
    assert arena.scan(protect=False) == ({1, 2, 3, 9, 20}, {20}, set())
    assert arena.scan(protect=False)[1] == {20}  # such a scan takes nothing back
    assert arena.scan()[1] == {20}
    assert arena.scan()[1] == set()


def test_a_page_given_back_is_gone_and_may_come_again(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    arena.puppet.call(arch.NR_madvise, arena.page(2), 3 * PAGE, MADV_DONTNEED)
    assert arena.scan() == ({0, 1, 5, 6, 7}, set(), set())
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 5, 6, 7}, {3}, set())


def touch(arena: Arena, first: int, last: int) -> None:
    """It reads pages: a hole shows the zero page from then on. madvise(2) MADV_POPULATE_READ."""
    arena.puppet.call(arch.NR_madvise, arena.page(first), (last - first) * PAGE, 22)


def test_reading_is_not_writing(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(4))
    arena.scan()
    touch(arena, 0, 4)
    assert arena.scan() == ({0, 1, 2, 3}, set(), set())


def test_zero_pages(watched: Watched) -> None:
    """Read, never written: holes are not protected, so such pages are told, once; the sender skips zeros."""
    arena = Arena(watched)
    arena.write(0)
    arena.scan()
    touch(arena, 8, 12)
    arena.write(9)
    _, written, _ = arena.scan()
    assert written == {8, 9, 10, 11}
    touch(arena, 8, 14)
    assert arena.scan()[1] == {12, 13}
    arena.write(10)
    assert arena.scan()[1] == {10}


def test_a_mapping_that_moves(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(4))
    arena.scan()
    arena.puppet.call(arch.NR_mremap, arena.base, 4 * PAGE, 4 * PAGE, MAYMOVE_FIXED, arena.page(PAGES))
    moved = {PAGES + n for n in range(4)}
    assert arena.scan() == (moved, moved, set())
    if TOLD_TWICE:
        assert arena.scan() == (moved, moved, set())  # watched since the scan before, protected only now
    assert arena.scan() == (moved, set(), set())
    arena.write(PAGES + 1)
    assert arena.scan() == (moved, {PAGES + 1}, set())


def test_a_new_mapping_at_an_old_address(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    arena.puppet.call(arch.NR_munmap, arena.page(2), 4 * PAGE)
    arena.puppet.map(4 * PAGE, arena.page(2))
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 6, 7}, {0, 1, 3, 6, 7} if TOLD_WHOLE else {3}, set())
    arena.write(4)
    assert arena.scan() == ({0, 1, 3, 4, 6, 7}, {3, 4} if TOLD_TWICE else {4}, set())
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 4, 6, 7}, {3}, set())


def test_what_is_unmapped(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    arena.puppet.call(arch.NR_munmap, arena.page(2), 4 * PAGE)
    assert arena.scan() == ({0, 1, 6, 7}, {0, 1, 6, 7} if TOLD_WHOLE else set(), set())
    assert arena.scan() == ({0, 1, 6, 7}, set(), set())


@pytest.mark.parametrize("protection", [0, 1])
def test_what_may_not_be_written_any_more_was_still_written(watched: Watched, protection: int) -> None:
    arena = Arena(watched)
    arena.write(*range(4))
    arena.scan()
    arena.write(1)
    arena.puppet.call(arch.NR_mprotect, arena.base, 4 * PAGE, protection)
    assert arena.scan() == ({0, 1, 2, 3}, {0, 1, 2, 3} if TOLD_WHOLE else {1}, set())
    arena.puppet.call(arch.NR_mprotect, arena.base, 4 * PAGE, 3)
    arena.write(2)
    assert arena.scan() == ({0, 1, 2, 3}, {0, 1, 2, 3} if TOLD_WHOLE else {2}, set())
    arena.puppet.call(arch.NR_mprotect, arena.base, arena.size * PAGE, protection)
    assert arena.scan() == ({0, 1, 2, 3}, set(), set())


def test_guard_pages(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(*range(8))
    arena.scan()
    try:
        arena.puppet.call(arch.NR_madvise, arena.page(2), 2 * PAGE, MADV_GUARD_INSTALL)
    except OSError:  # there are none before Linux 6.13
        assert arena.scan() == (set(range(8)), set(), set())
        return
    arena.puppet.call(arch.NR_madvise, arena.page(20), PAGE, MADV_GUARD_INSTALL)
    assert arena.scan() == ({0, 1, 4, 5, 6, 7}, set(), {2, 3, 20})
    arena.puppet.call(arch.NR_madvise, arena.page(3), PAGE, MADV_GUARD_REMOVE)
    arena.write(3)
    assert arena.scan() == ({0, 1, 3, 4, 5, 6, 7}, {3}, {2, 20})


def test_private_file_mappings_have_only_their_own_pages(watched: Watched, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"f" * 8 * PAGE)
    arena = Arena(watched)
    name = arena.page(30)
    for number, letter in enumerate(str(file).encode()):
        arena.puppet.fill(name + number, letter)
    fd = arena.puppet.call(2, name, os.O_RDONLY)
    arena.puppet.call(arch.NR_munmap, arena.base, 8 * PAGE)
    arena.puppet.map(8 * PAGE, arena.base, 3, 0x02, fd)
    watched.tracker.watch(procfs.maps(arena.puppet.pid))
    touch(arena, 0, 6)
    arena.write(1, 2)
    assert arena.scan() == ({1, 2, 30}, {1, 2, 30}, set())
    arena.write(2, 5, 7)
    assert arena.scan() == ({1, 2, 5, 7, 30}, {2, 5, 7}, set())
    assert arena.scan() == ({1, 2, 5, 7, 30}, set(), set())
    arena.puppet.call(arch.NR_madvise, arena.page(2), PAGE, MADV_DONTNEED)  # the file's again
    touch(arena, 2, 3)
    assert arena.scan() == ({1, 5, 7, 30}, set(), set())
    assert watched.actual(arena.page(2)) == b"f" * PAGE


def test_huge_pages(watched: Watched) -> None:
    """However the kernel splits them: what was written is told, and at first all of it."""
    target = watched.puppet
    whole = target.map(4 * HUGE)
    base = -(-whole // HUGE) * HUGE
    target.call(arch.NR_madvise, base, 2 * HUGE, MADV_HUGEPAGE)
    watched.tracker.watch(procfs.maps(target.pid))
    target.fill(base, 1, 2 * HUGE)
    found = watched.scan()
    assert pages(found.written, base, base + 2 * HUGE) == set(range(base, base + 2 * HUGE, PAGE))
    assert not pages(watched.scan().written, base, base + 2 * HUGE)
    target.fill(base + HUGE + 5 * PAGE, 2)
    written = pages(watched.scan().written, base, base + 2 * HUGE)
    assert base + HUGE + 5 * PAGE in written
    assert not pages([(base, base + HUGE)], base, base + HUGE) & written
    target.call(arch.NR_madvise, base, HUGE, MADV_DONTNEED)
    assert pages(watched.scan().present, base, base + HUGE) == set()


def plain_area(watched: Watched, size: int) -> int:
    """Memory at a multiple of what one page table maps, without huge pages; every page differs."""
    target = watched.puppet
    base = -(-target.map(size + HUGE) // HUGE) * HUGE
    target.call(arch.NR_madvise, base, size, MADV_NOHUGEPAGE)
    for page in range(base, base + size, 16 * PAGE):
        target.fill(page + 9, 1 + page // PAGE % 251)
    return base


def test_a_page_table_that_moves_to_where_other_pages_were(watched: Watched) -> None:
    """mremap(2) hangs a whole page table somewhere else, and touches no entry in it."""
    first, second = plain_area(watched, HUGE), plain_area(watched, HUGE)
    for _ in range(3):
        watched.follow(first, first + HUGE)
    assert not pages(watched.follow(first, first + HUGE).written, first, first + HUGE)
    watched.puppet.call(arch.NR_mremap, second, HUGE, HUGE, MAYMOVE_FIXED, first)
    moved = set(range(first, first + HUGE, 16 * PAGE))
    found = watched.follow(first, first + HUGE)
    assert pages(found.present, first, first + HUGE) == pages(found.written, first, first + HUGE) == moved
    assert all(watched.held[page] == watched.actual(page) for page in moved)
    assert watched.held[first][9] == 1 + second // PAGE % 251


def test_given_back_and_read_again(watched: Watched) -> None:
    """A zero page is where another page was; nothing was written."""
    arena = Arena(watched)
    arena.write(*range(8))
    for _ in range(2):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.call(arch.NR_madvise, arena.page(2), 3 * PAGE, MADV_DONTNEED)
    touch(arena, 2, 4)
    watched.follow(arena.base, arena.page(PAGES))
    assert all(watched.held.get(p, bytes(PAGE)) == watched.actual(p) for p in map(arena.page, range(8)))
    assert watched.actual(arena.page(3)) == bytes(PAGE) != watched.actual(arena.page(1))


def test_a_mapping_made_anew_that_joins_its_neighbour(watched: Watched) -> None:
    """As malloc does it: reserved without rights, then opened up, by which the two become one."""
    arena = Arena(watched)
    arena.write(*range(8))
    for _ in range(2):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.call(arch.NR_munmap, arena.page(4), 4 * PAGE)
    arena.puppet.map(4 * PAGE, arena.page(4), 0)
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 4 * PAGE, 3)
    touch(arena, 4, 6)
    arena.write(6, byte=0x66)
    watched.follow(arena.base, arena.page(PAGES))
    assert all(watched.held.get(p, bytes(PAGE)) == watched.actual(p) for p in map(arena.page, range(8)))


def test_a_mapping_that_grew_and_became_part_of_its_neighbour(watched: Watched) -> None:
    """While a mapping is new, mprotect(2) makes its pages writable and leaves no mark; merging ends that."""
    arena = Arena(watched)
    arena.puppet.call(arch.NR_munmap, arena.page(12), (PAGES - 12) * PAGE)
    arena.write(*range(12))
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 2 * PAGE, 0)
    for _ in range(3):
        watched.follow(arena.base, arena.page(PAGES))
    arena.puppet.map(2 * PAGE, arena.page(12))
    for protection in (1, 3):
        arena.puppet.call(arch.NR_mprotect, arena.page(6), 8 * PAGE, protection)
    arena.write(8, byte=0x88)
    arena.puppet.call(arch.NR_mprotect, arena.page(4), 2 * PAGE, 3)
    watched.follow(arena.base, arena.page(PAGES))
    assert watched.held[arena.page(8)] == watched.actual(arena.page(8))
    arena.write(9, byte=0x99)
    watched.follow(arena.base, arena.page(PAGES))
    assert watched.held[arena.page(9)] == watched.actual(arena.page(9))


def test_a_large_empty_mapping(watched: Watched) -> None:
    """Address space costs nothing; and a page in the middle of it is found."""
    size = 1 << 40
    arena = Arena(watched)
    start = watched.puppet.map(size, flags=0x4022)  # MAP_NORESERVE
    arena.write(1)
    assert arena.scan()[1] == {1}
    watched.puppet.call(arch.NR_mprotect, start + size // 2, PAGE, 3)
    watched.puppet.call(arch.NR_munmap, start, size // 2 - (1 << 30))
    watched.puppet.call(arch.NR_munmap, start + size // 2 + (1 << 30), size // 2 - (1 << 30))
    middle = start + size // 2
    watched.puppet.fill(middle, 5)
    assert middle in pages(watched.scan().written, middle, middle + PAGE)


def test_closing_leaves_nothing(watched: Watched) -> None:
    before = procfs.fds(watched.puppet.pid)
    watched.scan()
    assert any("uw" in m.vmflags for m in procfs.smaps(watched.puppet.pid)) == TOLD_TWICE
    watched.close()
    assert not any("uw" in m.vmflags for m in procfs.smaps(watched.puppet.pid))
    assert procfs.fds(watched.puppet.pid) == before
    assert "userfaultfd" not in str(before)


def test_without_both_everything_counts_as_written(watched: Watched) -> None:
    arena = Arena(watched)
    arena.write(1, 5)
    plain = SoftDirty(watched.puppet.pid, None)
    assert not plain.incremental
    for _ in range(2):
        found = plain.scan([], watched.special(), protect=True)
        assert arena.numbers(found.written) == {1, 5} == arena.numbers(found.present)
    plain.close()


# --- while it runs ---

# Threads that write every page once, all within two seconds: a write that is not told is never made good.
WRITER = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
#define PAGES 16384ul
static unsigned char *area;
static void *writer(void *argument)
{
    unsigned long number = (unsigned long)argument, n = 0;
    struct timespec began, now;
    clock_gettime(CLOCK_MONOTONIC, &began);
    while (n < PAGES) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        long elapsed = (now.tv_sec - began.tv_sec) * 1000000 + (now.tv_nsec - began.tv_nsec) / 1000;
        for (; n < PAGES && n < PAGES * elapsed / 2000000; n++)
            *(volatile unsigned long *)(area + n * 2654435761ul % PAGES * 4096 + 8 * number) = n + 1;
        usleep(100);
    }
    __sync_fetch_and_add(area + PAGES * 4096, 1);
    return NULL;
}
int main(void)
{
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, 9);
    area = mmap(0, (PAGES + 1) * 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(area, (PAGES + 1) * 4096, MADV_NOHUGEPAGE);
    memset(area, 0x77, PAGES * 4096);
    printf("%lx\n", (unsigned long)area);
    fflush(stdout);
    getchar();
    for (unsigned long n = 0; n < 2; n++)
        pthread_create(&thread, NULL, writer, (void *)n);
    for (;;)
        pause();
}
"""


@contextlib.contextmanager
def writer() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The process, and where it writes."""
    program = subprocess.Popen(
        [compiled(WRITER, "-pthread")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert program.stdin is not None and program.stdout is not None
    try:
        yield program, int(program.stdout.readline(), 16)
    finally:
        program.kill()
        program.wait()
        program.stdin.close()
        program.stdout.close()


def test_no_write_is_lost_between_two_scans() -> None:
    size = 16384 * PAGE
    with writer() as (program, area):
        process = SourceProcess(program.pid)
        rounds = Rounds(process, None, None, FileTable(program.pid))  # type: ignore[arg-type]
        memory, held = rounds.memory, bytearray(size)

        def copy(written: list[Range]) -> None:
            for start, end in written:
                low, high = max(start, area), min(end, area + size)
                if low < high:
                    held[low - area : high - area] = memory.read(low, high - low)

        rounds.start_tracking()
        rounds.watch()
        copy(rounds.written())
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
        scans = 0
        deadline = time.monotonic() + DEADLINE
        while memory.read(area + size, 1) != b"\2":
            copy(rounds.written())
            scans += 1
            assert time.monotonic() < deadline
        copy(rounds.written())
        rounds.remove_scratch()
        wrong = [n for n in range(0, size, PAGE) if held[n : n + PAGE] != memory.read(area + n, PAGE)]
        rounds.close()
        process.close()
    assert scans > 3
    assert not wrong


# --- anything, in any order ---

NUMBER = st.integers(0, PAGES - 1)
SPAN = st.tuples(NUMBER, st.integers(1, 6))
STEP = st.one_of(
    st.tuples(st.just("write"), SPAN),
    st.tuples(st.just("write"), SPAN),
    st.tuples(st.just("give back"), SPAN),
    st.tuples(st.just("read"), SPAN),
    st.tuples(st.just("replace"), SPAN),
    st.tuples(st.just("move"), SPAN),
    st.tuples(st.just("unmap"), SPAN),
    st.tuples(st.just("guard"), SPAN),
    st.tuples(st.just("unguard"), SPAN),
    st.tuples(st.just("protect"), SPAN),
    st.tuples(st.just("follow"), SPAN),
    st.tuples(st.just("follow"), SPAN),
)


def do(arena: Arena, what: str, first: int, count: int, byte: int) -> None:
    """One step; what the memory as it is does not allow is left out."""
    target, start, size = arena.puppet, arena.page(first), min(count, PAGES - first) * PAGE
    if what == "write":
        # one byte of each page through the kernel: it says EFAULT where a write of its own would be a signal
        for page in range(start, start + size, PAGE):
            with contextlib.suppress(OSError):
                target.call(318, page + byte, 1, 0)  # getrandom(2)
    elif what == "replace":
        with contextlib.suppress(OSError):
            target.call(arch.NR_mmap, start, size, 3, 0x32, -1, 0)  # MAP_FIXED
    elif what == "move":
        with contextlib.suppress(OSError):
            there = arena.page((first * 7 + count) % (PAGES - 6))
            target.call(arch.NR_mremap, start, size, size, MAYMOVE_FIXED, there)
    else:
        number, *arguments = {
            "give back": (arch.NR_madvise, MADV_DONTNEED),
            "read": (arch.NR_madvise, 22),
            "guard": (arch.NR_madvise, MADV_GUARD_INSTALL),
            "unguard": (arch.NR_madvise, MADV_GUARD_REMOVE),
            "unmap": (arch.NR_munmap,),
            "protect": (arch.NR_mprotect, (0, 1, 3, 3)[byte % 4]),
        }[what]
        with contextlib.suppress(OSError):
            target.call(number, start, size, *arguments)


@pytest.fixture(scope="module")
def lasting() -> Iterator[Watched]:
    with puppet() as target:
        found = Watched(target)
        yield found
        found.close()


@given(st.lists(STEP, min_size=3, max_size=40), st.integers(0, 255))
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_destination_that_believes_the_scans_has_the_same(
    lasting: Watched, steps: list[tuple[str, tuple[int, int]]], byte: int
) -> None:
    arena = Arena(lasting)
    lasting.held = {}
    low, high = arena.base, arena.page(PAGES)
    touched, fresh, fresher, resized = set[int](), set[int](), set[int](), True
    for number, (what, (first, count)) in enumerate([*steps, ("last", (0, 1))]):
        if what in ("follow", "last"):
            found = lasting.follow(low, high, protect=what == "follow")
            # what nothing was done to since the scan before is not told again
            assert pages(found.written, low, high) <= touched | fresh or (TOLD_WHOLE and resized)
            touched, fresh, fresher = (fresher, fresher, set()) if TOLD_TWICE else (set(), set(), set())
            resized = resized and what == "last"
            continue
        do(arena, what, first, count, (byte + number) % 256)
        reach = range(PAGES) if what == "move" else range(first, min(first + count, PAGES))
        touched |= {arena.page(n) for n in reach}
        if what in ("move", "replace", "unmap", "protect"):
            resized = True
        if what in ("move", "replace"):
            fresher |= {arena.page(n) for n in reach}
    guards = pages(found.guards, low, high)
    for page in range(low, high, PAGE):
        if page not in guards:
            assert lasting.held.get(page, bytes(PAGE)) == lasting.actual(page), f"page {(page - low) // PAGE}"
        else:
            assert page not in lasting.held
    with contextlib.suppress(OSError):
        arena.puppet.call(arch.NR_munmap, low, PAGES * PAGE)
