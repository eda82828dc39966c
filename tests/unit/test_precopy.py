"""Convergence as a policy: what it decides from the numbers it is fed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.precopy import GAIN, PAGE, SMALL, STUCK_ROUNDS, Convergence, Decision, Measured

RATE = 400e6  # bytes of memory per second
FIXED = 15.0
LIMIT = 50.0
SHORT = int((LIMIT - FIXED) / 1000 * RATE / PAGE)  # pages that just fit into the limit


def simulate(
    memory_pages: int, dirty_per_second: float, limit: float = LIMIT, most: int = 30
) -> list[Decision]:
    """Rounds of a process that writes at a constant rate to all its memory."""
    policy = Convergence(limit, most, FIXED)
    decisions: list[Decision] = []
    pages = memory_pages
    while not decisions or decisions[-1] is Decision.CONTINUE:
        seconds = pages * PAGE / RATE
        dirty = min(memory_pages, int(seconds * dirty_per_second))
        policy.record(Measured(pages * PAGE, seconds, dirty))
        decisions.append(policy.decide())
        pages = dirty
        assert len(decisions) <= most
    return decisions


def fed(dirty: list[int], limit: float = LIMIT, most: int = 30, rate: float = RATE) -> list[Decision]:
    """The decision after each of these counts of dirty pages, at a constant throughput."""
    policy = Convergence(limit, most, FIXED)
    found = []
    for pages in dirty:
        policy.record(Measured(int(rate), 1.0, pages))
        found.append(policy.decide())
    return found


def test_an_idle_process_is_frozen_after_one_round() -> None:
    assert simulate(262_144, 0.0) == [Decision.FREEZE]


def test_rounds_go_on_while_each_is_clearly_shorter() -> None:
    decisions = simulate(262_144, 0.4 * RATE / PAGE)
    assert decisions[-1] is Decision.FREEZE
    # 0.4^n of the memory is left after n rounds: on to where no round is worth it, far beyond short enough
    assert len(decisions) >= 6


def test_a_process_that_writes_faster_than_the_link_is_stuck() -> None:
    decisions = simulate(262_144, 2 * RATE / PAGE)
    assert decisions[-1] is Decision.FREEZE_STUCK
    assert len(decisions) == STUCK_ROUNDS + 1


def test_a_working_set_that_fits_is_frozen_when_it_gains_nothing_more() -> None:
    set_ = SHORT // 2
    assert fed([262_144, set_, set_]) == [Decision.CONTINUE, Decision.CONTINUE, Decision.FREEZE]


def test_small_is_small_enough_at_once() -> None:
    assert fed([SMALL]) == [Decision.FREEZE]
    assert fed([SMALL + 1]) == [Decision.CONTINUE]


def test_the_last_allowed_round_freezes_whatever_is_left() -> None:
    assert fed([10 * SHORT], most=1) == [Decision.FREEZE_STUCK]
    assert fed([SHORT // 2], most=1) == [Decision.FREEZE]
    # without a limit it would have gone on
    assert fed([SHORT // 2]) == [Decision.CONTINUE]


def test_a_small_round_does_not_change_the_throughput() -> None:
    policy = Convergence(LIMIT, 30, FIXED)
    policy.record(Measured(1 << 30, 2.0, 1000))
    policy.record(Measured((1 << 20) - 1, 5.0, 10))
    policy.record(Measured(1 << 24, 0.0, 10))
    assert policy.throughput == (1 << 29)
    assert policy.estimated_pause_ms(1 << 17) == FIXED + 1000.0


@given(st.lists(st.integers(0, 500_000), min_size=1, max_size=12), st.integers(1, 12))
def test_every_decision_has_its_reason(dirty: list[int], most: int) -> None:
    for count, decision in enumerate(fed(dirty, most=most), 1):
        now, short = dirty[count - 1], dirty[count - 1] <= SHORT
        if decision is Decision.FREEZE:
            assert short
            gained = count < 2 or now < GAIN * dirty[count - 2]
            assert count >= most or now <= SMALL or not gained, "frozen before a gain was exhausted"
        elif decision is Decision.FREEZE_STUCK:
            assert not short
            recent, before = (
                dirty[max(0, count - STUCK_ROUNDS) : count],
                dirty[: max(0, count - STUCK_ROUNDS)],
            )
            assert count >= most or (before and min(recent) > GAIN * min(before))
        else:
            assert count < most
            assert not (short and now <= SMALL)


@given(st.lists(st.integers(0, 500_000), min_size=1, max_size=40))
def test_it_always_ends(dirty: list[int]) -> None:
    decisions = fed((dirty * 30)[:30])
    assert any(d is not Decision.CONTINUE for d in decisions)
