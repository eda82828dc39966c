"""Dirty tracking on a live process: what `scan` tells, against what was done to the pages.

A destination that believes the scans has the same memory in the end; and the scans do not tell more than they
must.
"""

from __future__ import annotations

import os
from pathlib import Path

from unit.children import PAGE
from unit.watched import (
    HUGE,
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MADV_HUGEPAGE,
    TOLD_TWICE,
    Arena,
    Watched,
    pages,
    touch,
)

from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.soft_dirty import SoftDirty


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
    watched.tracker.watch(procfs.smaps(arena.puppet.pid))
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
    watched.tracker.watch(procfs.smaps(target.pid))
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
