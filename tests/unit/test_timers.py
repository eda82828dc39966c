"""Timers after a pause, against timers simulated step by step."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from agent.resources import timerfd
from agent.resources.timers import later

SECOND = 1_000_000_000
PAIR = struct.Struct("<4q")
UNITS = st.sampled_from((1, 1000))
TIMES = st.one_of(st.integers(0, 5), st.integers(0, 3 * SECOND), st.integers(0, 1 << 50))


def pack(interval: int, value: int, unit: int) -> bytes:
    """struct itimerval (unit 1000) or itimerspec (1), of nanoseconds."""
    return PAIR.pack(interval // SECOND, interval % SECOND // unit, value // SECOND, value % SECOND // unit)


def unpack(setting: bytes, unit: int) -> tuple[int, int]:
    interval_s, interval_f, value_s, value_f = PAIR.unpack(setting)
    assert 0 <= interval_f * unit < SECOND and 0 <= value_f * unit < SECOND  # or setitimer(2) says EINVAL
    return interval_s * SECOND + interval_f * unit, value_s * SECOND + value_f * unit


@given(TIMES, TIMES, TIMES, UNITS)
def test_an_armed_timer_runs_out_when_it_would_have(
    interval: int, value: int, elapsed: int, unit: int
) -> None:
    """At value, value + interval, value + 2 * interval ...: the next of these times after the pause."""
    interval, value = interval // unit * unit, max(unit, value // unit * unit)
    setting, missed = later(pack(interval, value, unit), elapsed, unit)
    found_interval, found = unpack(setting, unit)
    assert found_interval == interval
    assert found > 0, "the time 0 disarms a timer"
    if interval:
        left, passed = simulate_fast(value, interval, elapsed)
        assert missed == passed
        # early by less than a unit, unless a unit is all that is left
        assert found <= max(unit, left) < found + unit
    elif elapsed < value:
        assert missed == 0 and found <= max(unit, value - elapsed) < found + unit
    else:
        assert (missed, found) == (0, unit)  # it runs out at once, by itself


def simulate_fast(value: int, interval: int, elapsed: int) -> tuple[int, int]:
    """(until the next expiration, expirations): those are at value + n * interval."""
    if elapsed < value:
        return value - elapsed, 0
    passed = (elapsed - value) // interval + 1
    return value + passed * interval - elapsed, passed


@given(st.integers(1, 1000), st.integers(1, 50), st.integers(0, 5000))
def test_the_formula(value: int, interval: int, elapsed: int) -> None:
    assert simulate_fast(value, interval, elapsed) == simulate(value, interval, elapsed)


@given(TIMES, TIMES, TIMES, TIMES)
def test_two_pauses_are_like_one_as_long(interval: int, value: int, first: int, second: int) -> None:
    interval, value = max(1, interval), max(1, value)
    middle, early = later(pack(interval, value, 1), first, 1)
    end, late = later(middle, second, 1)
    assert (end, early + late) == later(pack(interval, value, 1), first + second, 1)


@given(TIMES, TIMES, UNITS)
def test_one_that_ran_out_and_waits_for_its_signal_starts_its_interval(
    interval: int, elapsed: int, unit: int
) -> None:
    interval = max(unit, interval // unit * unit)
    assert later(pack(interval, 0, unit), elapsed, unit) == later(
        pack(interval, interval, unit), elapsed, unit
    )


def simulate(remaining: int, interval: int, elapsed: int) -> tuple[int, int]:
    """(what remains, expirations) of a timer, expiration by expiration."""
    count = 0
    while remaining and elapsed >= remaining:
        elapsed -= remaining
        remaining = interval
        count += 1
    return (remaining - elapsed if remaining else 0), count


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(0, 5000), st.sampled_from((0, 3)))
def test_timerfd(remaining: int, interval: int, elapsed: int, ticks: int) -> None:
    state = timerfd.State(1, ticks, 0, 0, remaining, interval)
    found, expired = timerfd.after(state, elapsed)
    # with ticks and nothing left it has just expired: a new interval begins
    began = interval if ticks and not remaining else remaining
    assert (found.remaining_ns, expired) == simulate(began, interval, elapsed)
    assert (found.clock, found.ticks, found.interval_ns) == (1, ticks, interval)


@given(TIMES, TIMES, TIMES, TIMES)
def test_timerfd_in_two_steps_is_the_same_as_in_one(
    remaining: int, interval: int, first: int, second: int
) -> None:
    state = timerfd.State(1, 0, 0, 0, remaining, interval)
    middle, early = timerfd.after(state, first)
    end, late = timerfd.after(middle, second)
    assert (end, early + late) == timerfd.after(state, first + second)
