"""The list of cases is complete by the protocol, and what it names is there. Nothing is moved here."""

from __future__ import annotations

import functools
import importlib
import re
from collections import Counter
from typing import get_args

import pytest

from agent import protocol, states
from faults import chance, cli, matrix
from faults.fault import ENGINES, ROLES, After, Case, Fail, Point, other

CASES = matrix.matrix()
MESSAGES = {message.__name__ for message in get_args(protocol.Message)} | {protocol.Pages.__name__}


def points(cases: list[Case]) -> set[Point]:
    return {fault.at for case in cases for fault in case.faults if isinstance(fault.at, Point)}


def test_every_message_has_a_sender() -> None:
    """A new message of the protocol needs its cases, and so its place in this table."""
    assert set(matrix.SENDERS) == MESSAGES


def test_every_state_of_the_source_has_cases() -> None:
    """But for those in which there is no engine: the front says that it is in doubt."""
    assert set(matrix.STATES) == set(states.Source) - {states.Source.REFUSED, states.Source.IN_DOUBT}


def test_every_step_of_a_journal_has_cases() -> None:
    """What comes before the first step, or after the last one, is no file."""
    assert set(matrix.STEPS["engine"]) == set(states.Departure)
    no_files = {states.Destination.OFFERED, states.Destination.ANSWERED, states.Destination.GONE}
    assert set(matrix.STEPS["destination"]) == {*states.Destination} - no_files | {"rest"}


@pytest.mark.parametrize("message", sorted(matrix.SENDERS))
def test_each_moment_of_a_message_has_each_action(message: str) -> None:
    for sender in matrix.SENDERS[message]:
        for moment in matrix.MOMENTS:
            side = other(sender) if moment == "after-receive" else sender
            point = Point(side, ENGINES[side], f"{moment}:{message}")
            done = [case.faults[-1].actions for case in CASES if case.faults[-1].at == point]
            assert set(done) == set(matrix.actions(side).values())


def test_names_are_unique() -> None:
    twice = [name for name, count in Counter(case.name for case in CASES).items() if count > 1]
    assert not twice


def test_points_that_begin_a_phase_are_points() -> None:
    for point in points(CASES):
        for name in filter(None, (point.name, point.since)):
            kind, _, rest = name.partition(":")
            assert kind in (*matrix.MOMENTS, *matrix.STEP_MOMENTS, "state", "call")
            if kind in matrix.MOMENTS:
                assert rest in MESSAGES
            elif kind == "state":
                assert rest in matrix.STATES
            elif kind in matrix.STEP_MOMENTS:
                assert rest in matrix.STEPS[point.role]


@pytest.mark.parametrize("call", sorted({call for calls in matrix.CALLS.values() for call in calls}))
def test_every_call_that_fails_is_there(call: str) -> None:
    module, _, name = call.partition(":")
    assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


def test_roles_are_told_apart() -> None:
    """By command lines as `ps` shows them."""
    lines = {
        "coordinator": "/opt/migrate/.venv/bin/python /opt/migrate/.venv/bin/migrate move 12 beta",
        "connect": "/opt/python /usr/local/bin/migrate-agent connect",
        "service": "/opt/python -P -m agent.main serve --idle-exit 30",
        "front": "/opt/python -P -m agent.main source",
        "engine": "/opt/python -P -m agent.worker 5 9 01M80AN",
        "guardian": "[migrate-guard]",
        "recovery": "/opt/python -P -m agent.main recover 01M80AN",
        "destination": "/opt/python /usr/local/bin/migrate-agent destination",
        "resuming": "/opt/python /usr/local/bin/migrate-agent destination --resume 01M80AN",
        "settling": "/opt/python /usr/local/bin/migrate-agent settle 01M80AN --boot 5",
        "session": "sshd: root@notty",
    }
    assert lines.keys() == ROLES.keys()
    for role, pattern in ROLES.items():
        assert [name for name, line in lines.items() if re.search(pattern, line)] == [role]


def test_a_seed_is_a_case() -> None:
    assert chance.case(5) == chance.case(5)
    assert cli.mixed(3, 40) == cli.mixed(3, 40)
    assert cli.mixed(3, 40) != cli.mixed(4, 40)


def test_a_case_by_chance_is_found_by_its_name() -> None:
    assert list(cli.named(["chance/17"])) == [chance.case(17)]
    assert [case.name for case in cli.named(["Live/*/after-send/kill-self"])] == [
        "Live/destination/after-send/kill-self"
    ]


def test_chance_reaches_everything() -> None:
    """Every message at every moment, every state, times, and failing calls."""
    cases = [chance.case(seed) for seed in range(3000)]
    names = {point.name for point in points(cases)}
    assert names >= {point.name for point in points(CASES) if not point.name.startswith("call:")}
    faults = [fault for case in cases for fault in case.faults]
    assert any(isinstance(fault.at, After) for fault in faults)
    assert any(isinstance(action, Fail) for fault in faults for action in fault.actions)


def test_a_sample_has_every_stratum_before_any_twice() -> None:
    strata = {matrix.stratum(case) for case in CASES}
    assert {matrix.stratum(case) for case in cli.sample(1, len(strata))} == strata


def test_quick_cases_are_some_of_the_mixed() -> None:
    """So many as are asked for, none of them a long one."""
    found = cli.quick(1, 20)
    assert len(found) == 20
    assert all(case.quick for case in found)
    assert not all(case.quick for case in cli.mixed(1, 20))
