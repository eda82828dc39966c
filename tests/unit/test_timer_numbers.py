"""A program's POSIX timers have the same numbers after a move, also where the kernel only counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
from unit.moving import running

from agent.kernel import procfs
from agent.resources import timers

# Of five timers it deletes three; the last one ticks.
GAPS = r"""
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>
static volatile int ticks;
static void on_signal(int number)
{
    ticks += number == SIGUSR1;
}
int main(void)
{
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
    struct itimerspec time = {{0, 5000000}, {0, 5000000}};
    timer_t timer[5];
    signal(SIGUSR1, on_signal);
    for (int n = 0; n < 5; n++)
        timer_create(CLOCK_MONOTONIC, &event, timer + n);
    timer_delete(timer[0]);
    timer_delete(timer[2]);
    timer_delete(timer[3]);
    timer_settime(timer[4], 0, &time, 0);
    dprintf(1, "ready\n");
    for (int before = 0;; before = ticks) {
        usleep(50000);
        dprintf(1, ticks > before ? "ticks\n" : "silent\n");
    }
}
"""


@pytest.mark.parametrize("counted", [False, True])
def test_gaps_in_the_numbers_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: bool) -> None:
    if counted:
        monkeypatch.setattr(timers, "_numbers_can_be_chosen", lambda: False)
    with running(tmp_path, GAPS) as program:
        program.wait_for("ready")
        program.move()
        assert sorted(t.id for t in procfs.timers(program.pid)) == [1, 4]
        assert "ticks" in program.next_lines(5)
