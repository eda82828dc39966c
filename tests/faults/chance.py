"""Cases by chance: any point, or a time instead of one; any action, or two of them. A seed is a case."""

from __future__ import annotations

import random
import signal
from typing import Final

from faults import matrix
from faults.fault import (
    DESTINATION_ROLES,
    ENGINES,
    GUARDIAN,
    SOURCE_ROLES,
    Action,
    After,
    Case,
    Cut,
    Fail,
    Fault,
    Hold,
    Point,
    Send,
    Side,
    other,
)

_SIDES: Final[tuple[Side, ...]] = ("source", "destination")
_ROLES: Final[dict[Side, tuple[str, ...]]] = {
    "source": SOURCE_ROLES + GUARDIAN,
    "destination": DESTINATION_ROLES + GUARDIAN,
}
_SHORTEST, _LONGEST = 0.01, 6.0  # seconds that something lasts
_MOVE_SECONDS: Final = 1.6  # about how long a move takes here, from the command's start
_MANY: Final = frozenset({"Ping", "Pong", "Pages", "Layout", "Discard", "RoundEnd", "RoundDone", "Late"})
_MOST_CALLS: Final = 60
_FINAL: Final = ("Commit", "Live", "Ready", "Complete", "Late", "Done")  # where most is at stake


def case(seed: int) -> Case:
    """The case of this seed."""
    chance = random.Random(seed)
    faults = tuple(fault for _ in range(chance.choices((1, 2), (3, 2))[0]) for fault in _fault(chance))
    options = tuple(
        word
        for word, odds in (("--verify", 0.3), ("--copy-files", 0.2), ("--reconnect=0s", 0.1))
        if chance.random() < odds
    )
    fresh = any(isinstance(fault.at, Point) and fault.at.role in ("service", "connect") for fault in faults)
    missing = "--copy-files" in options
    return Case(f"chance/{seed}", faults, options, file_missing=missing, new_service=fresh)


def _fault(chance: random.Random) -> tuple[Fault, ...]:
    """With what has to go wrong before it."""
    make = chance.choices((_at_message, _at_state, _at_step, _at_call, _at_time), (5, 1, 2, 3, 3))[0]
    return make(chance)


def _at_message(chance: random.Random) -> tuple[Fault, ...]:
    names = list(matrix.SENDERS) if chance.random() < 0.6 else list(_FINAL)
    message = chance.choice(names)
    sender = chance.choice(matrix.SENDERS[message])
    moment = chance.choice(matrix.MOMENTS)
    side = other(sender) if moment == "after-receive" else sender
    nth = chance.randint(1, 8) if message in _MANY and chance.random() < 0.5 else 1
    fault = Fault(Point(side, ENGINES[side], f"{moment}:{message}", nth), _actions(chance))
    return (*matrix.before_message(message, sender), fault)


def _at_state(chance: random.Random) -> tuple[Fault, ...]:
    state = chance.choice(matrix.STATES)
    fault = Fault(Point("source", "engine", f"state:{state}"), _actions(chance))
    return (*matrix.before_state(state), fault)


def _at_step(chance: random.Random) -> tuple[Fault, ...]:
    role = chance.choice(list(matrix.STEPS))
    moment, step = chance.choice(matrix.STEP_MOMENTS), chance.choice(matrix.STEPS[role])
    side: Side = "destination" if role == "destination" else "source"
    return (Fault(Point(side, role, f"{moment}:{step}"), _actions(chance)),)


def _at_call(chance: random.Random) -> tuple[Fault, ...]:
    """A call fails, or is where something else goes wrong."""
    role = chance.choices(list(matrix.CALLS), (8, 8, 2, 1, 1, 1))[0]
    call, number = chance.choice(list(matrix.CALLS[role].items()))
    since = chance.choice(matrix.PHASES.get(role, (None,)))
    nth = min(_MOST_CALLS, 1 + int(chance.expovariate(0.15)))
    point = Point("destination" if role == "destination" else "source", role, f"call:{call}", nth, since)
    fault = Fault(point, (Fail(number),) if chance.random() < 0.7 else _actions(chance))
    return (*matrix.before_phase(since), fault)


def _at_time(chance: random.Random) -> tuple[Fault, ...]:
    return (Fault(After(chance.uniform(0.3, _MOVE_SECONDS)), _actions(chance)),)


def _actions(chance: random.Random) -> tuple[Action, ...]:
    return tuple(_action(chance) for _ in range(chance.choices((1, 2), (4, 1))[0]))


def _action(chance: random.Random) -> Action:
    side = chance.choice(_SIDES)
    seconds = round(_SHORTEST * (_LONGEST / _SHORTEST) ** chance.random(), 3)
    match chance.choices(("kill", "hold", "cut", "abort"), (5, 3, 3, 1))[0]:
        case "kill":
            return Send(side, _some(chance, side))
        case "hold":
            return Hold(side, _some(chance, side), seconds)
        case "cut":
            way = "device" if chance.random() < 0.3 else "cable"
            return Cut(side, None if chance.random() < 0.15 else seconds, way)  # type: ignore[arg-type]
        case _:
            number = chance.choice((signal.SIGINT, signal.SIGTERM))
            return Send("source", (chance.choice(("coordinator", "service", "front", "engine")),), number)


def _some(chance: random.Random, side: Side) -> tuple[str, ...]:
    roles = _ROLES[side]
    chosen = chance.sample(roles, chance.randint(1, len(roles)))
    return tuple(role for role in roles if role in chosen)
