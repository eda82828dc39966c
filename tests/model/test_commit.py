"""The commit protocol, explored to the end; each of its rules is missed when it is taken away."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from agent import states
from agent.states import Departure, Destination, Recovering, Settling
from model.commit import Explorer, Rules

FAULTS = 8 if os.environ.get("MIGRATE_TEST_FULL") == "1" else 3


def test_never_two_never_none(record_property: Callable[[str, object], None]) -> None:
    explorer = Explorer(Rules(), FAULTS)
    explorer.run()
    record_property("states", len(explorer.came_from))
    print(f"{len(explorer.came_from)} states with up to {FAULTS} faults")
    assert len(explorer.came_from) > 1000


def without(steps: tuple[str, ...], *names: str) -> tuple[str, ...]:
    assert set(names) <= set(steps)
    return tuple(step for step in steps if step not in names)


def moved(steps: tuple[str, ...], name: str, before: str) -> tuple[str, ...]:
    rest = without(steps, name)
    at = rest.index(before)
    return (*rest[:at], name, *rest[at:])


def void_without_a_word(state: Destination | None, agent: bool, process: bool) -> Settling:
    """Says void, and leaves the journal as it is."""
    found = states.settled(state, agent, process)
    return Settling.VOID if found is Settling.MAKE_VOID else found


def live_as_soon_as_committed(state: Destination | None, agent: bool, process: bool) -> Settling:
    return Settling.LIVE if state is Destination.COMMITTED else states.settled(state, agent, process)


def released_without_an_agent_is_void(state: Destination | None, agent: bool, process: bool) -> Settling:
    if state is Destination.RELEASED and not agent:
        return Settling.MAKE_VOID
    return states.settled(state, agent, process)


def resumes_without_asking(state: Departure, verdict: str | None) -> Recovering:
    found = states.recovered(state, verdict)
    return Recovering.RESUME if found is Recovering.ASK else found


def buries_without_asking(state: Departure, verdict: str | None) -> Recovering:
    found = states.recovered(state, verdict)
    return Recovering.BURY if found is Recovering.ASK else found


def takes_the_unknown_for_void(state: Departure, verdict: str | None) -> Recovering:
    return states.recovered(state, "void" if verdict == "unknown" else verdict)


SOURCE, DESTINATION = states.SOURCE_COMMITS, states.DESTINATION_COMMITS


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param(Rules(source=without(SOURCE, "journal committed")), id="source does not journal"),
        pytest.param(Rules(source=without(SOURCE, "hold")), id="source is not held"),
        pytest.param(Rules(source=moved(SOURCE, "hold", "await Live")), id="source is held too late"),
        pytest.param(
            Rules(source=moved(SOURCE, "journal committed", "await Live")), id="source journals too late"
        ),
        pytest.param(Rules(source=moved(SOURCE, "bury", "await Live")), id="source is buried too early"),
        pytest.param(
            Rules(destination=without(DESTINATION, "journal committed", "journal released", "journal live")),
            id="destination does not journal",
        ),
        pytest.param(
            Rules(destination=moved(DESTINATION, "lift", "journal committed")),
            id="let go before it is journaled",
        ),
        pytest.param(Rules(destination=without(DESTINATION, "hold")), id="destination is not held"),
        pytest.param(Rules(destination=without(DESTINATION, "outlive")), id="killed with its agent"),
        pytest.param(
            Rules(destination=moved(DESTINATION, "forget", "await Late")), id="destination forgets too early"
        ),
        pytest.param(Rules(settled=void_without_a_word), id="void is not journaled"),
        pytest.param(Rules(settled=live_as_soon_as_committed), id="live as soon as committed"),
        pytest.param(Rules(settled=released_without_an_agent_is_void), id="released is void"),
        pytest.param(Rules(recovered=resumes_without_asking), id="resumed without asking"),
        pytest.param(Rules(recovered=buries_without_asking), id="buried without asking"),
    ],
)
def test_each_rule_is_needed(rules: Rules) -> None:
    with pytest.raises(AssertionError):
        Explorer(rules, FAULTS).run()
