"""The steps of a run: a move that succeeds, one that fails, and so on; what fails, and where, by a seed."""

from __future__ import annotations

import errno
import itertools
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from faults.fault import ENGINES, Action, Case, Fail, Fault, Hold, Point, Send, Side, Spoil

MOVED, STAYED, REFUSED = "migrated, moved", "rolled-back, stayed", "refused, stayed"
FREEZE_TIMEOUT: Final = 0.5  # seconds
_HELD: Final = 3 * FREEZE_TIMEOUT
# Pre-copy takes so long that what comes in it is never too late.
_SLOW: Final = ("--bandwidth", "100mbit")
# A destination that waits for its source to come back, and is not told that it will not, waits no longer.
_BRIEF: Final = (*_SLOW, "--reconnect", "5s")
_FRAMES: Final = 16  # of pages, so many at least in a pre-copy
_SENT_FROZEN: Final = ("Rebuild", "Descriptors", "Threads", "Complete")

Draw: TypeAlias = Callable[[random.Random], Case]
Where: TypeAlias = Callable[[random.Random], Point]


@dataclass(frozen=True)
class Kind:
    """Steps that are alike but for the point at which something fails."""

    name: str
    outcome: str  # as `faults.verdict.Verdict` has it
    draw: Draw


@dataclass(frozen=True)
class Step:
    number: int  # from 1
    kind: Kind
    case: Case


def steps(seed: int, count: int) -> list[Step]:
    """Each second one fails; each kind of failure comes once before any comes again."""
    chance = random.Random(seed)
    failures = _in_turn(chance)
    kinds = itertools.chain.from_iterable((SUCCESS, failure) for failure in failures)
    return [_step(number, kind, chance) for number, kind in enumerate(itertools.islice(kinds, count), 1)]


def _in_turn(chance: random.Random) -> Iterator[Kind]:
    while True:
        yield from chance.sample(FAILURES, len(FAILURES))


def _step(number: int, kind: Kind, chance: random.Random) -> Step:
    return Step(number, kind, replace(kind.draw(chance), name=f"{number}: {kind.name}", outcome=kind.outcome))


# --- where ---


def _in_precopy(chance: random.Random) -> Point:
    """While the process runs."""
    moment = chance.choice(("before-send", "mid-send", "after-send"))
    return Point("source", "engine", f"{moment}:Pages", chance.randint(1, _FRAMES))


def _arriving(chance: random.Random) -> Point:
    return Point("destination", "destination", "after-receive:Pages", chance.randint(1, _FRAMES))


def _in_freeze(chance: random.Random) -> Point:
    """While the process stands still, before the point of no return."""
    places = [f"{moment}:{name}" for name in _SENT_FROZEN for moment in ("before-send", "after-send")]
    return Point("source", "engine", chance.choice([*places, "after-receive:Ready"]))


def _rebuilding(chance: random.Random) -> Point:
    name = chance.choice((*(f"after-receive:{name}" for name in _SENT_FROZEN), "before-send:Ready"))
    return Point("destination", "destination", name)


def _verifying(_: random.Random) -> Point:
    return Point("destination", "destination", "after-receive:Verify")


# --- what ---


def _always(*options: str, file_missing: bool = False) -> Draw:
    """No fault: the options, or what the destination has, decide."""
    return lambda _: Case("", (), options, file_missing)


def _once(where: Where, action: Action, *options: str) -> Draw:
    return lambda chance: Case("", (Fault(where(chance), (action,)),), options)


def _call(chance: random.Random) -> Point:
    """For one of the threads, while the process stands still."""
    end: Side = chance.choice(("source", "destination"))
    call, since = _CALLS[end]
    return Point(end, ENGINES[end], f"call:agent.kernel.ptrace:{call}", chance.randint(1, 4), since)


_CALLS: Final[dict[Side, tuple[str, str]]] = {
    "source": ("get_registers", "state:freezing"),
    "destination": ("set_registers", "after-receive:Rebuild"),
}
_ENGINE: Final = Send("source", ("engine",))
_FRONT: Final = Send("source", ("front",))
_AGENT: Final = Send("destination", ("destination",))
_SESSION: Final = Send("destination", ("session",))
_INTERRUPT: Final = Send("source", ("coordinator",), signal.SIGINT)
_LIMIT: Final = f"{FREEZE_TIMEOUT * 1000:.0f}ms"

SUCCESS: Final = Kind("move", MOVED, _always())
FAILURES: Final = (
    Kind("refused by the source", REFUSED, _always("--address", "none")),
    Kind("refused by the destination", REFUSED, _always(file_missing=True)),
    Kind("aborted in pre-copy", STAYED, _once(_in_precopy, _INTERRUPT, *_SLOW)),
    Kind("source's engine killed in pre-copy", STAYED, _once(_in_precopy, _ENGINE, *_BRIEF)),
    Kind("source's front killed in pre-copy", STAYED, _once(_in_precopy, _FRONT, *_BRIEF)),
    Kind("destination's agent killed in pre-copy", STAYED, _once(_arriving, _AGENT, *_SLOW)),
    Kind(
        "link broken for good in pre-copy", STAYED, _once(_in_precopy, _SESSION, "--reconnect", "0s", *_SLOW)
    ),
    Kind("link broken in pre-copy, opened again", MOVED, _once(_in_precopy, _SESSION, *_SLOW)),
    Kind("source's engine killed in the freeze", STAYED, _once(_in_freeze, _ENGINE)),
    Kind("destination's agent killed in the freeze", STAYED, _once(_in_freeze, _AGENT)),
    Kind("a call fails in the freeze", STAYED, _once(_call, Fail(errno.EIO))),
    Kind(
        f"freeze timeout ({_LIMIT})",
        STAYED,
        _once(_rebuilding, Hold("destination", ("destination",), _HELD), "--freeze-timeout", _LIMIT),
    ),
    Kind("--verify finds a difference", STAYED, _once(_verifying, Spoil("destination"), "--verify")),
)
