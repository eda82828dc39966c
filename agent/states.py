"""The states of a migration, who may go from which to which, and what is decided when contact is lost. No
I/O.

The engines go by these tables (`Steps`), the front and the service judge by them what a silent engine may
have done, `agent.settle` and `agent.recovery` do what `settled` and `recovered` say, docs/architecture.md
shows them, and tests/model explores everything that can come of them.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Generic, TypeVar


class Source(enum.StrEnum):
    """What a person sees of a migration."""

    EXAMINING = "examining"
    OFFERING = "offering"
    COPYING = "copying"
    PREPARING = "preparing"
    PRE_COPY = "pre-copy"
    RECONNECTING = "reconnecting"
    FREEZING = "freezing"
    COMMITTING = "committing"
    COMMITTED = "committed"
    LIVE = "live"
    MIGRATED = "migrated"
    REFUSED = "refused"
    ROLLED_BACK = "rolled-back"
    IN_DOUBT = "in-doubt"


class Destination(enum.StrEnum):
    """How far the shadow is; from HELD on its journal says so."""

    OFFERED = "offered"
    ANSWERED = "answered"
    HELD = "held"  # by an agent whose death kills it
    COMMITTED = "committed"  # still
    RELEASED = "released"  # stopped, whoever dies
    LIVE = "live"
    VOID = "void"
    GONE = "gone"


class Departure(enum.StrEnum):
    """The source's journal."""

    OPEN = "open"
    FROZEN = "frozen"  # and stopped, whoever dies
    COMMITTED = "committed"
    LIVE = "live"


S, D = Source, Destination
_ENDS: Final = {S.ROLLED_BACK: "any failure"}

SOURCE: Final[Mapping[Source, Mapping[Source, str]]] = {
    S.EXAMINING: {S.OFFERING: "", S.REFUSED: "blockers, any failure"},
    S.OFFERING: {S.COPYING: "files are missing", S.PREPARING: "", S.REFUSED: "blockers, any failure"},
    S.COPYING: {S.COPYING: "the next file", S.PREPARING: "", S.REFUSED: "any failure"},
    S.PREPARING: {S.PRE_COPY: "", **_ENDS},
    S.PRE_COPY: {
        S.FREEZING: "short enough, or no longer getting shorter",
        S.RECONNECTING: "the link broke",
        **_ENDS,
    },
    S.RECONNECTING: {S.PRE_COPY: "over a new link", S.RECONNECTING: "it broke again", **_ENDS},
    S.FREEZING: {S.COMMITTING: "Ready, verified", **_ENDS},
    S.COMMITTING: {
        S.COMMITTED: "Live",
        S.ROLLED_BACK: "Commit never left this host",
        S.IN_DOUBT: "no answer",
    },
    S.COMMITTED: {S.LIVE: ""},
    S.LIVE: {S.MIGRATED: "the copy here is gone"},
    S.IN_DOUBT: {
        S.MIGRATED: "the destination: live",
        S.ROLLED_BACK: "the destination: void",
        S.IN_DOUBT: "the destination cannot be asked",
    },
    S.MIGRATED: {},
    S.REFUSED: {},
    S.ROLLED_BACK: {},
}

DESTINATION: Final[Mapping[Destination, Mapping[Destination, str]]] = {
    D.OFFERED: {D.ANSWERED: "Offer", D.GONE: "any failure"},
    D.ANSWERED: {D.HELD: "Prepare: the shadow is born", D.GONE: "any failure"},
    D.HELD: {
        D.COMMITTED: "Commit",
        D.VOID: "any failure; or the source asks, and nothing is committed",
    },
    D.COMMITTED: {
        D.RELEASED: "our death no longer kills it",
        D.VOID: "its agent died, and the shadow with it",
    },
    D.RELEASED: {D.LIVE: "let go, by its agent or by whoever finds it"},
    D.LIVE: {D.GONE: "the source knows"},
    D.VOID: {D.GONE: "the source knows"},
    D.GONE: {},
}

DEPARTURE: Final[Mapping[Departure, Mapping[Departure, str]]] = {
    Departure.OPEN: {Departure.FROZEN: "sockets are in repair"},
    Departure.FROZEN: {Departure.OPEN: "they are not any more", Departure.COMMITTED: ""},
    Departure.COMMITTED: {Departure.LIVE: "Live", Departure.FROZEN: "Commit never left this host"},
    Departure.LIVE: {},
}

# what can have been done to the process when this was the last state that was heard of
UNTOUCHED: Final = frozenset({"", S.EXAMINING, S.OFFERING, S.COPYING, S.REFUSED})
NO_RETURN: Final = frozenset({S.COMMITTING, S.COMMITTED, S.IN_DOUBT})
LIVE: Final = frozenset({S.LIVE, S.MIGRATED})
FROZEN: Final = frozenset({S.FREEZING})

# The order in which either end commits. Each step is one that others can see, or see the lack of.
SOURCE_COMMITS: Final = (
    "journal frozen",
    "hold",
    "journal committed",
    "send Commit",
    "await Live",
    "journal live",
    "bury",
    "send Late",
    "forget",
)
DESTINATION_COMMITS: Final = (
    "await Commit",
    "journal committed",
    "hold",
    "outlive",
    "journal released",
    "activate",
    "lift",
    "journal live",
    "send Live",
    "await Late",
    "forget",
    "send Done",
)

T = TypeVar("T", Source, Destination, Departure)


class WrongStep(Exception):
    """A step that the table does not have: a mistake of ours."""


class Steps(Generic[T]):
    """Where one role is; goes only as its table says."""

    def __init__(self, table: Mapping[T, Mapping[T, str]], start: T) -> None:
        self._table: Mapping[T, Mapping[T, str]] = table
        self.state: T = start

    def to(self, state: T) -> None:
        if state not in self._table[self.state]:
            raise WrongStep(f"from {self.state} to {state}")
        self.state = state


class Settling(enum.Enum):
    """What the destination does when it is asked what became of a migration."""

    VOID = enum.auto()  # say that it is void; see to it that nothing is left
    MAKE_VOID = enum.auto()  # journal that first, if nobody has made another step
    WAIT = enum.auto()  # for its agent, which is about to make a step; in the end it is killed
    FINISH = enum.auto()  # let it go in its agent's place
    LIVE = enum.auto()


def settled(state: Destination | None, agent: bool, process: bool) -> Settling:
    """By the journal, None if there is nothing in it, and whether the agent and the process live."""
    match state:
        case None | D.VOID:
            return Settling.VOID
        case D.HELD:
            return Settling.MAKE_VOID
        case D.COMMITTED | D.RELEASED if agent:
            return Settling.WAIT
        case D.COMMITTED if not process:
            return Settling.MAKE_VOID
        case D.COMMITTED | D.RELEASED:
            return Settling.FINISH
        case _:
            return Settling.LIVE


class Recovering(enum.Enum):
    """What is done on the source's host when an engine has ended and left a journal."""

    RESUME = enum.auto()
    BURY = enum.auto()
    ASK = enum.auto()
    WAIT = enum.auto()  # in doubt


def recovered(state: Departure, verdict: str | None) -> Recovering:
    """By the journal, and the destination's word: "live", "void", "unknown"; None if it was not asked yet."""
    match state, verdict:
        case (Departure.OPEN | Departure.FROZEN), _:
            return Recovering.RESUME
        case _, None:
            return Recovering.ASK
        case Departure.LIVE, _:
            return Recovering.BURY
        case _, "void":
            return Recovering.RESUME
        case _, "live":
            return Recovering.BURY
        case _:
            return Recovering.WAIT


def diagram(table: Mapping[T, Mapping[T, str]]) -> str:
    """As mermaid draws it."""
    lines = ["stateDiagram-v2"]
    lines.append(f"    [*] --> {_id(next(iter(table)))}")
    for state, steps in table.items():
        for to, why in steps.items():
            lines.append(f"    {_id(state)} --> {_id(to)}{f' : {why}' if why else ''}")
        if not steps:
            lines.append(f"    {_id(state)} --> [*]")
    return "\n".join(lines)


def _id(state: str) -> str:
    return state.replace("-", "_")
