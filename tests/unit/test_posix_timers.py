"""POSIX timers of a program that moves: they go on, tell the same thread, and keep their phase."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.children import wait_for
from unit.moving import running

from agent import protocol
from agent.kernel import clone, procfs
from agent.kernel.procfs import PosixTimer
from agent.link import Link
from agent.resources import timers

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID = 0, 1, 4

# A timer that tells the second thread, and one whose thread has ended; who is told is said.
TELLS = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static volatile int told, wrong, second, gone, released;
static void on_signal(int number)
{
    (void)number;
    if (syscall(SYS_gettid) == second)
        told++;
    else
        wrong++;
}
static void *thread(void *which)
{
    *(volatile int *)which = syscall(SYS_gettid);
    while (which == &second || !released)
        usleep(1000);
    return 0;
}
static timer_t make(int tid)
{
    struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN};
    struct itimerspec time = {{0, 5000000}, {0, 5000000}};
    timer_t timer;
    memcpy((char *)&event + 16, &tid, 4); /* sigev_notify_thread_id */
    if (timer_create(CLOCK_MONOTONIC, &event, &timer) || timer_settime(timer, 0, &time, 0))
        dprintf(1, "wrong timer\n");
    return timer;
}
int main(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct timespec time = {0, 10000000};
    pthread_t one, other;
    sigaction(SIGRTMIN, &action, 0);
    pthread_create(&one, 0, thread, (void *)&second);
    pthread_create(&other, 0, thread, (void *)&gone);
    while (!second || !gone)
        nanosleep(&time, 0);
    timer_t deaf = make(gone);
    make(second);
    released = 1;
    pthread_join(other, 0);
    struct itimerspec left;
    wrong = 0;
    dprintf(1, "ready\n");
    for (;;) {
        nanosleep(&time, 0);
        if (timer_gettime(deaf, &left) || left.it_interval.tv_nsec != 5000000 || !left.it_value.tv_nsec)
            dprintf(1, "wrong time\n");
        dprintf(1, "told %d wrong %d\n", told, wrong);
    }
}
"""


def told(lines: list[str]) -> tuple[int, int]:
    words = lines[-1].split()
    return int(words[1]), int(words[3])


@contextlib.contextmanager
def holding(number: int) -> Iterator[None]:
    """Somebody has this number."""
    pid = clone.fork_as(number)
    if pid == 0:
        while True:
            signal.pause()
    try:
        yield
    finally:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)


def test_a_timer_tells_its_thread_wherever_its_number_is_another(tmp_path: Path) -> None:
    with running(tmp_path, TELLS) as program:
        number = program.pid
        program.move()
        with holding(number):  # the original had it until now
            program.move()
        assert procfs.status(program.pid)["NSpid"].split() == [str(program.pid), str(number)]
        before, _ = told(program.next_lines(1))
        wait_for(lambda: told(program.lines())[0] > before + 5, "the timer")
        assert not [line for line in program.lines() if line.startswith("wrong")]
        assert told(program.lines())[1] == 0


@pytest.mark.parametrize(
    ("notify", "thread", "expected"),
    [
        (SIGEV_THREAD_ID, 1001, (SIGEV_THREAD_ID, 11)),
        (SIGEV_THREAD_ID, 1003, (SIGEV_NONE, 0)),  # it has ended
        (SIGEV_SIGNAL, 1000, (SIGEV_SIGNAL, 1000)),
        (SIGEV_NONE, 1000, (SIGEV_NONE, 1000)),
    ],
)
def test_the_thread_in_the_process_own_numbers(notify: int, thread: int, expected: tuple[int, int]) -> None:
    found = timers._own_thread(PosixTimer(3, 34, 0, notify, thread, 1), {1000: 10, 1001: 11})
    assert (found.notify, found.thread) == expected


# Two timers with a beat of 80 ms: how late each signal comes is said, the least of ten; and how many missed.
BEATS = r"""
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#define BEAT 80000000ll
static long long began, late[2], overruns;
static int count[2];
static timer_t timer;
static void on_signal(int number, siginfo_t *info, void *unused)
{
    struct timespec now;
    int which = number == SIGALRM;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &now);
    long long after = (now.tv_sec * 1000000000ll + now.tv_nsec - began) % BEAT;
    if (which ? info->si_code != SI_KERNEL : info->si_code != SI_TIMER || info->si_value.sival_int != 4711)
        dprintf(1, "wrong signal %d\n", info->si_code);
    if (!which)
        overruns += 1 + info->si_overrun;
    if (!count[which] || after < late[which])
        late[which] = after;
    if (++count[which] == 10) {
        dprintf(1, "%s %lld\n", which ? "itimer" : "timer", late[which] / 1000);
        count[which] = 0;
    }
}
int main(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
    struct sigevent event = {
        .sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN, .sigev_value.sival_int = 4711
    };
    struct itimerspec time = {{0, BEAT}, {0, BEAT}};
    struct itimerval same = {{0, BEAT / 1000}, {0, BEAT / 1000}};
    struct timespec now, nap = {1, 0};
    sigaction(SIGRTMIN, &action, 0);
    sigaction(SIGALRM, &action, 0);
    timer_create(CLOCK_MONOTONIC, &event, &timer);
    clock_gettime(CLOCK_MONOTONIC, &now);
    began = now.tv_sec * 1000000000ll + now.tv_nsec;
    timer_settime(timer, 0, &time, 0);
    setitimer(ITIMER_REAL, &same, 0);
    dprintf(1, "ready\n");
    for (;;) {
        nanosleep(&nap, 0);
        clock_gettime(CLOCK_MONOTONIC, &now);
        long long passed = now.tv_sec * 1000000000ll + now.tv_nsec - began;
        dprintf(1, "beats %lld of %lld\n", overruns, passed / BEAT);
    }
}
"""


def a_long_pause() -> None:
    """For the destination: more than one beat goes by before the process lives."""
    send = Link.send

    def late(link: Link, message: protocol.Message) -> None:
        if isinstance(message, protocol.Ready):
            select.select([], [], [], 0.21)
        send(link, message)

    setattr(Link, "send", late)  # noqa: B010


def test_timers_keep_their_beat_over_a_pause_that_is_longer(tmp_path: Path) -> None:
    with running(tmp_path, BEATS) as program:
        report = program.move(a_long_pause)
        assert report.pause_ms is not None and report.pause_ms > 200
        start = len(program.lines())

        def said(what: str) -> list[int]:
            return [int(line.split()[1]) for line in program.lines()[start:] if line.startswith(what + " ")]

        wait_for(
            lambda: bool(said("timer") and said("itimer") and len(said("beats")) > 1), "ten beats of both"
        )
        assert said("timer")[0] < 10_000 and said("itimer")[0] < 10_000
        beats = [line.split() for line in program.lines()[start:] if line.startswith("beats")]
        # none is lost or counted twice
        assert all(abs(int(words[1]) - int(words[3])) <= 1 for words in beats), beats
        assert not [line for line in program.lines() if line.startswith("wrong")]
