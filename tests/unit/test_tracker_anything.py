"""Dirty tracking while the process runs, and after anything in any order (Hypothesis)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.children import DEADLINE, PAGE, compiled, puppet
from unit.watched import (
    MADV_DONTNEED,
    MADV_GUARD_INSTALL,
    MADV_GUARD_REMOVE,
    MAYMOVE_FIXED,
    PAGES,
    TOLD_TWICE,
    TOLD_WHOLE,
    Arena,
    Range,
    Watched,
    pages,
)

from agent.descriptors import SourceProcess
from agent.kernel.arch import x86_64 as arch
from agent.resources.mappings import FileTable
from agent.rounds import Rounds

EXAMPLES = int(os.environ.get("MIGRATE_TEST_EXAMPLES", "200"))

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


NUMBER = st.integers(0, PAGES - 1)
SPAN = st.tuples(NUMBER, st.integers(1, 6))
STEP = st.one_of(
    st.tuples(st.just("write"), SPAN),
    st.tuples(st.just("write"), SPAN),
    st.tuples(st.just("give back"), SPAN),
    st.tuples(st.just("read"), SPAN),
    st.tuples(st.just("replace"), SPAN),
    st.tuples(st.just("move"), SPAN),
    st.tuples(st.just("away"), SPAN),
    st.tuples(st.just("back"), SPAN),
    st.tuples(st.just("unmap"), SPAN),
    st.tuples(st.just("guard"), SPAN),
    st.tuples(st.just("unguard"), SPAN),
    st.tuples(st.just("protect"), SPAN),
    st.tuples(st.just("follow"), SPAN),
    st.tuples(st.just("follow"), SPAN),
)


MOVES = ("move", "away", "back")


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
    elif what in MOVES:
        there = {"move": (first * 7 + count) % (PAGES - 6), "away": PAGES + first, "back": first}[what]
        where = start if what != "back" else arena.page(PAGES + first)
        with contextlib.suppress(OSError):
            target.call(arch.NR_mremap, where, size, size, MAYMOVE_FIXED, arena.page(there))
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
        reach = range(PAGES) if what in MOVES else range(first, min(first + count, PAGES))
        touched |= {arena.page(n) for n in reach}
        if what in (*MOVES, "replace", "unmap", "protect"):
            resized = True
        if what in (*MOVES, "replace"):
            fresher |= {arena.page(n) for n in reach}
    guards = pages(found.guards, low, high)
    for page in range(low, high, PAGE):
        if page not in guards:
            assert lasting.held.get(page, bytes(PAGE)) == lasting.actual(page), f"page {(page - low) // PAGE}"
        else:
            assert page not in lasting.held
    with contextlib.suppress(OSError):
        arena.puppet.call(arch.NR_munmap, low, 3 * PAGES * PAGE)
