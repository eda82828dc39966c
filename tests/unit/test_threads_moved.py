"""Threads whose memory changes all the time: what is done for them there finds the memory of the freeze."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from unit.moving import running, try_to_move

from agent import capture
from agent.api import Outcome
from agent.freeze import FrozenProcess
from agent.kernel.arch.x86_64 import PAGE
from agent.tracee import PARK_SECONDS, SCRATCH_SIZE

MOVES = 3

# Each wait is for something at another place of a stack that is full of garbage otherwise.
WAITS = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int ends[2];
static void *aligned(char *place) { return (void *)(((unsigned long)place + 15) & ~15ul); }
static void *poller(void *number)
{
    unsigned seed = (unsigned)(long)number;
    for (;;) {
        size_t size = 64 + rand_r(&seed) % 30000;
        char place[size];
        struct pollfd *entry = aligned(place);
        memset(place, 0x33, size);
        *entry = (struct pollfd){ends[0], POLLIN, 0};
        if (poll(entry, 1, 9))
            dprintf(1, "wrong poll\n");
        memset(place, 0x33, size);
    }
    return 0;
}
static void *waiter(void *number)
{
    unsigned seed = (unsigned)(long)number + 99, value = 1;
    for (;;) {
        struct timespec time = {0, 9000000};
        size_t size = 64 + rand_r(&seed) % 30000;
        char place[size];
        unsigned *word = aligned(place);
        memset(place, 0x33, size);
        *word = ++value;
        if (!syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, &time, 0, 0) || errno != ETIMEDOUT)
            dprintf(1, "wrong futex\n");
        memset(place, 0x33, size);
    }
    return 0;
}
int main(void)
{
    pthread_t thread;
    if (pipe(ends))
        return 1;
    for (long number = 0; number < 8; number++) {
        pthread_create(&thread, 0, poller, (void *)number);
        pthread_create(&thread, 0, waiter, (void *)number);
    }
    dprintf(1, "ready\n");
    for (;;) {
        usleep(20000);
        dprintf(1, "on\n");
    }
}
"""

# Threads of some milliseconds, each on memory that was never mapped before, where its rseq area is, too.
SHORT_LIVED = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static void *work(void *nothing)
{
    struct timespec time = {0, 3000000};
    usleep(4000);
    if (nanosleep(&time, 0))
        dprintf(1, "wrong nanosleep\n");
    return nothing;
}
int main(void)
{
    char *at = (char *)0x300000000000;
    long size = 1 << 18, step = 1 << 20;
    pthread_t threads[8];
    dprintf(1, "ready\n");
    for (;;) {
        for (int n = 0; n < 8; n++) {
            pthread_attr_t attributes;
            at += step;
            mmap(at, size, 3, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
            pthread_attr_init(&attributes);
            pthread_attr_setstack(&attributes, at, size);
            if (pthread_create(&threads[n], &attributes, work, 0))
                dprintf(1, "wrong thread\n");
        }
        for (int n = 0; n < 8; n++)
            pthread_join(threads[n], 0);
        munmap(at - 7 * step, 7 * step + size);
        dprintf(1, "on\n");
    }
}
"""


def test_waits_find_what_they_wait_for(tmp_path: Path) -> None:
    with running(tmp_path, WAITS) as program:
        program.next_lines(3)
        assert program.move().outcome is Outcome.MIGRATED
        program.next_lines(3)
        assert set(program.lines()) <= {"ready", "on"}


def test_threads_on_memory_that_came_last(tmp_path: Path) -> None:
    for number in range(MOVES):
        directory = tmp_path / str(number)
        directory.mkdir()
        with running(directory, SHORT_LIVED) as program:
            program.next_lines(3)
            assert program.move().outcome is Outcome.MIGRATED
            program.next_lines(3)
            assert set(program.lines()) <= {"ready", "on"}


@pytest.mark.parametrize("step", ["capture_last", "late_signals"])
def test_the_engine_is_killed_when_all_threads_were_asked(tmp_path: Path, step: str) -> None:
    """Each was asked in a slot that others, and what is asked last, overwrite: it needs that no more."""

    def engine(pid: int) -> None:
        for place in (capture, FrozenProcess):
            if hasattr(place, step):
                setattr(place, step, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        waves = FrozenProcess.capture_threads

        def overwrite(frozen: FrozenProcess) -> None:
            waves(frozen)
            list(frozen._states)  # all of them
            start = frozen._rounds.tracee.scratch + PAGE
            frozen._rounds.memory.write(start, bytes(SCRATCH_SIZE - PAGE))

        FrozenProcess.capture_threads = overwrite  # type: ignore[assignment, method-assign]
        try_to_move(pid)

    with running(tmp_path, WAITS) as program:
        program.next_lines(3)
        child = os.fork()
        if child == 0:
            try:
                engine(program.pid)
            finally:
                os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        count = int(1.5 * PARK_SECONDS / 0.02)  # longer than one that waits for its tracer would
        assert len(program.next_lines(count)) == count
        assert set(program.lines()) <= {"ready", "on"}
