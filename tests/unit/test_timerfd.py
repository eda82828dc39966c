"""Timer descriptors: what remains, the period and the unread expirations go over, whatever the pause took."""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time

import pytest
from unit.descriptor_case import Make, captured_here

from agent.kernel.errors import check, libc
from agent.resources import timerfd

SECOND = 1_000_000_000


def timer(clock: int, value: int, interval: int, flags: int = 0, how: int = 0) -> int:
    fd = check(libc.timerfd_create(clock, flags), "timerfd")
    setting = struct.pack("<4q", interval // SECOND, interval % SECOND, value // SECOND, value % SECOND)
    check(libc.timerfd_settime(fd, how, ctypes.create_string_buffer(setting, 32), None), "timerfd")
    return int(fd)


@pytest.mark.parametrize("clock", [time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME])
@pytest.mark.parametrize("interval", [0, 250 * SECOND + 17])
def test_a_timer_under_way(make: Make, clock: int, interval: int) -> None:
    case = make(lambda: [timer(clock, 1000 * SECOND, interval, os.O_NONBLOCK)])
    state = case.state()
    assert (state.clock, state.ticks, state.flags, state.interval_ns) == (clock, 0, os.O_NONBLOCK, interval)
    assert 900 * SECOND < state.remaining_ns <= 1000 * SECOND
    case.context.elapsed_ns = 400 * SECOND
    found = captured_here(case.move())
    assert (found.clock, found.ticks, found.flags, found.interval_ns) == (clock, 0, os.O_NONBLOCK, interval)
    left = state.remaining_ns - 400 * SECOND
    assert left - 100 * SECOND < found.remaining_ns <= left


def test_a_timer_that_ran_out_unread(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 1, 0)])
    assert case.state() == timerfd.State(time.CLOCK_MONOTONIC, 1, 0, 0, 0, 0)
    ours = case.move()
    assert select.select([ours], [], [], 0)[0]
    assert int.from_bytes(os.read(ours, 8), "little") == 1
    assert captured_here(ours) == timerfd.State(time.CLOCK_MONOTONIC, 0, 0, 0, 0, 0)


def test_a_disarmed_timer(make: Make) -> None:
    case = make(lambda: [check(libc.timerfd_create(time.CLOCK_BOOTTIME, 0), "timerfd")])
    assert captured_here(case.move()) == case.state() == timerfd.State(time.CLOCK_BOOTTIME, 0, 0, 0, 0, 0)


def test_a_timer_that_expires_in_the_pause(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 100 * SECOND, 60 * SECOND)])
    case.context.elapsed_ns = 230 * SECOND  # 100, 160, 220, and ten into the fourth
    ours = case.move()
    assert int.from_bytes(os.read(ours, 8), "little") == 3
    assert 0 < captured_here(ours).remaining_ns <= 50 * SECOND


def test_a_periodic_timer_that_nobody_reads_goes_on(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 1, 200 * SECOND)])
    state = case.state()
    assert state.ticks == 1
    assert 100 * SECOND < state.remaining_ns <= 200 * SECOND
    case.context.elapsed_ns = 450 * SECOND
    assert int.from_bytes(os.read(case.move(), 8), "little") == 3


def test_a_timer_that_a_clock_change_cancels(make: Make) -> None:
    absolute_and_cancelled = 3

    def setup() -> list[int]:
        then = time.clock_gettime_ns(time.CLOCK_REALTIME) + 1000 * SECOND
        return [timer(time.CLOCK_REALTIME, then, 0, how=absolute_and_cancelled)]

    case = make(setup)
    found = captured_here(case.move())
    assert found.settime_flags & timerfd.TFD_TIMER_CANCEL_ON_SET
    assert 900 * SECOND < found.remaining_ns <= 1000 * SECOND
