"""Everything that can come of a commit: two engines, a link, a settlement and a recovery, in every order,
with faults.

The engines do the steps of `agent.states.SOURCE_COMMITS` and `DESTINATION_COMMITS` in their order, whoever
settles or recovers does what `settled` and `recovered` say; a test compares the order with what the real
ones do. What is around them is modelled here: the kernel's part (what becomes of a task whose tracer dies),
a link that loses what it carries when it is cut, questions that are lost, repeated, or answered after the
one who asked has died.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from agent import states
from agent.states import Departure, Destination, Recovering, Settling


class Rules(msgspec.Struct, frozen=True):
    """What is explored; a test takes one away and sees that it is missed."""

    source: tuple[str, ...] = states.SOURCE_COMMITS
    destination: tuple[str, ...] = states.DESTINATION_COMMITS
    settled: Callable[[Destination | None, bool, bool], Settling] = states.settled
    recovered: Callable[[Departure, str | None], Recovering] = states.recovered


class State(NamedTuple):
    """One situation. Copies: traced, shadow (dies with its agent), stopped, running, dead."""

    source_at: int = 0  # step of the engine that is next; -1: it has ended
    source_copy: str = "traced"
    source_held: bool = False
    departure: Departure | None = Departure.OPEN
    destination_at: int = 0
    destination_copy: str = "shadow"
    destination_held: bool = False
    active: bool = False  # addresses and sockets are there
    has_run: bool = False  # at the destination
    arrival: Destination | None = Destination.HELD
    guardian: bool = True  # the destination's
    link: bool = True
    to_destination: tuple[str, ...] = ()
    to_source: tuple[str, ...] = ()
    reachable: bool = True  # for a new connection
    recovery: str = ""  # on the source: "asking", or the verdict that came
    settlement: str = ""  # on the destination: "working", "voiding", or the verdict to be sent
    rebooted: bool = False  # the destination's host
    source_died: bool = False  # its host
    faults: int = 0


Move = tuple[str, State]


class Explorer:
    """All states that can be reached with at most `faults` faults."""

    def __init__(self, rules: Rules, faults: int) -> None:
        self._rules = rules
        self._faults = faults
        self.came_from: dict[State, tuple[State | None, str]] = {State(): (None, "")}

    def run(self) -> None:
        """AssertionError with the way to the first state that must not be."""
        waiting = deque(self.came_from)
        while waiting:
            state = waiting.popleft()
            progress = list(self.progress(state))
            self._check(state, bool(progress))
            for name, successor in (*progress, *self.trouble(state)):
                if successor not in self.came_from:
                    self.came_from[successor] = (state, name)
                    waiting.append(successor)

    # --- what must hold ---

    def _check(self, s: State, goes_on: bool) -> None:
        running = (s.source_copy == "running") + (s.destination_copy == "running")
        assert running < 2, self._story(s, "two live copies")
        back = s.has_run and s.source_copy == "running"
        assert not back, self._story(s, "it goes on where it was before it ran elsewhere")
        deaf = s.destination_copy == "running" and not s.active
        assert not deaf, self._story(s, "it runs without its sockets")
        lost = s.source_copy == "dead" and s.destination_copy == "dead"
        assert not lost or s.source_died or s.rebooted, self._story(s, "no copy is left")
        if goes_on:
            return
        doubt = s.rebooted and s.departure is Departure.COMMITTED  # nobody can say what that host did
        ended = s.source_died or s.rebooted
        assert running == 1 or doubt or ended, self._story(s, "nothing more happens, and none runs")
        assert s.departure is None or doubt or s.source_died, self._story(s, "the source's journal is left")
        open_end = s.arrival not in (None, Destination.LIVE, Destination.VOID)
        assert not open_end, self._story(s, "the destination's journal is left")

    def _story(self, state: State | None, what: str) -> str:
        steps: list[str] = []
        end = state
        while state is not None:
            state, name = self.came_from[state]
            steps.append(name)
        return f"{what}: {' / '.join(filter(None, reversed(steps)))}\n{end}"

    # --- what happens by itself ---

    def progress(self, s: State) -> Iterator[Move]:
        if s.source_at >= 0:
            yield from self._source(s)
        elif s.departure is not None and not s.source_died:
            yield from self._recover(s)
        if s.destination_at >= 0:
            yield from self._destination(s)
        elif not s.rebooted and s.arrival not in (None, Destination.LIVE):
            # without a guardian it is the next agent that starts there
            yield from self._settle(s, "guardian" if s.guardian else "successor")
        if s.settlement == "working":
            yield from self._settle(s, "settlement")
        elif s.settlement == "voiding":
            yield "settlement: void", _agent_dies(s)._replace(destination_copy="dead", settlement="void")
        elif s.settlement:
            heard = s._replace(settlement="", recovery=s.settlement)
            yield "answer", heard if s.recovery == "asking" and s.reachable else s._replace(settlement="")
        if not s.reachable:
            yield "heal", s._replace(reachable=True)

    def _source(self, s: State) -> Iterator[Move]:
        step = self._rules.source[s.source_at]
        on = s._replace(source_at=s.source_at + 1)
        if s.source_at < self._rules.source.index("send Commit") and s.departure is not Departure.COMMITTED:
            yield "source gives up", _source_back(_cut(s))
        match step:
            case "journal frozen":
                yield step, on._replace(departure=Departure.FROZEN)
            case "journal committed":
                yield step, on._replace(departure=Departure.COMMITTED)
            case "hold":
                yield "source holds", on._replace(source_held=True)
            case "send Commit" if s.link:
                yield step, on._replace(to_destination=(*s.to_destination, "Commit"))
            case "send Commit":
                yield "Commit cannot be sent", _source_back(s)
            case "await Live" if "Live" in s.to_source:
                yield "Live arrives", on._replace(to_source=_without(s.to_source, "Live"))
                yield "Live comes too late", _source_ends(_cut(s))
            case "await Live":
                yield "no Live", _source_ends(_cut(s))
            case _:
                yield from self._source_afterwards(s, step, on)

    def _source_afterwards(self, s: State, step: str, on: State) -> Iterator[Move]:
        match step:
            case "journal live":
                yield "source journals live", on._replace(departure=Departure.LIVE)
            case "bury":
                yield step, on._replace(source_copy="dead")
            case "send Late" if s.link:
                yield step, on._replace(to_destination=(*s.to_destination, "Late"))
            case "send Late":
                yield "Late cannot be sent", _source_ends(s)
            case "forget" if "Done" in s.to_source:
                yield "source forgets", s._replace(source_at=-1, departure=None, to_source=())
            case "forget" if not s.link:
                yield "no Done", _source_ends(s)

    def _destination(self, s: State) -> Iterator[Move]:
        step = self._rules.destination[s.destination_at]
        on = s._replace(destination_at=s.destination_at + 1)
        match step:
            case "await Commit" if "Commit" in s.to_destination:
                yield "Commit arrives", on._replace(to_destination=_without(s.to_destination, "Commit"))
            case "await Commit" if not s.link:
                yield "no Commit", _shadow_given_up(s)
            case "journal committed" if s.arrival == Destination.HELD:
                yield "destination journals committed", on._replace(arrival=Destination.COMMITTED)
            case "journal committed":
                yield "overtaken", _shadow_given_up(s)
            case "hold":
                yield "destination holds", on._replace(destination_held=True)
            case "outlive":
                yield step, on._replace(destination_copy="stopped")
            case "journal released" if s.arrival == Destination.COMMITTED:
                yield step, on._replace(arrival=Destination.RELEASED)
            case _:
                yield from self._destination_afterwards(s, step, on)

    def _destination_afterwards(self, s: State, step: str, on: State) -> Iterator[Move]:
        match step:
            case "activate":
                yield step, on._replace(active=True)
            case "lift":
                yield step, _runs(on._replace(destination_held=False))
            case "journal live" if s.arrival == Destination.RELEASED:
                yield "destination journals live", on._replace(arrival=Destination.LIVE)
            case "send Live":
                yield step, on._replace(to_source=(*s.to_source, "Live") if s.link else ())
            case "await Late" if "Late" in s.to_destination:
                yield "Late arrives", on._replace(to_destination=_without(s.to_destination, "Late"))
            case "await Late" if not s.link:
                yield "no Late", s._replace(destination_at=-1)
            case "forget":
                yield step, on._replace(arrival=None)
            case "send Done":
                yield step, s._replace(destination_at=-1, to_source=(*s.to_source, "Done") if s.link else ())

    def _recover(self, s: State) -> Iterator[Move]:
        assert s.departure is not None
        verdict = s.recovery if s.recovery not in ("", "asking") else None
        match self._rules.recovered(s.departure, verdict):
            case Recovering.ASK if s.recovery == "" and s.reachable:
                yield "ask", s._replace(recovery="asking", settlement=s.settlement or "working")
            case Recovering.RESUME:
                yield "recovery resumes", _source_back(s._replace(recovery=""))
            case Recovering.BURY:
                forgotten = s.arrival if s.arrival != Destination.LIVE else None
                for arrival in {forgotten, s.arrival}:  # the word that nobody will ask again may be lost
                    buried = s._replace(source_copy="dead", departure=None, recovery="", arrival=arrival)
                    yield "recovery buries", buried

    def _settle(self, s: State, who: str) -> Iterator[Move]:
        if s.rebooted:
            yield f"{who}: another boot", s._replace(settlement="unknown")
            return
        process = s.destination_copy != "dead"
        match self._rules.settled(s.arrival, s.destination_at >= 0, process):
            case Settling.MAKE_VOID:
                yield f"{who} makes void", s._replace(arrival=Destination.VOID)
            case Settling.VOID if s.arrival is None:  # nothing is known of it that could be ended
                yield f"{who}: no trace", s._replace(settlement="void")
            case Settling.VOID if who == "settlement":
                yield "settlement: to be void", s._replace(settlement="voiding")
            case Settling.VOID:
                yield f"{who}: void", s._replace(destination_copy="dead", arrival=None)
            case Settling.WAIT:  # and no longer
                yield f"{who} ends the agent", _agent_dies(s)
            case Settling.FINISH if s.arrival == Destination.COMMITTED:
                yield f"{who} journals released", s._replace(arrival=Destination.RELEASED)
            case Settling.FINISH:
                let_go = s._replace(active=True, arrival=Destination.LIVE)
                yield f"{who} lets it go", let_go if s.destination_copy == "dead" else _runs(let_go)
            case Settling.LIVE if who == "settlement":
                yield f"{who}: live", s._replace(settlement="live")

    # --- what goes wrong ---

    def trouble(self, s: State) -> Iterator[Move]:
        if s.faults == self._faults:
            return
        for name, after in self._accidents(s._replace(faults=s.faults + 1)):
            yield name.upper(), after

    def _accidents(self, s: State) -> Iterator[Move]:
        if s.link:
            yield "link cut", _cut(s)._replace(reachable=False)
            yield "link cut, all lost", _cut(s)._replace(reachable=False, to_destination=(), to_source=())
        if s.source_at >= 0:
            yield "source engine dies", _source_ends(_cut(s))
            lost = _cut(s)._replace(to_destination=())
            yield "source engine dies, what it sent is lost", _source_ends(lost)
        if s.destination_at >= 0:
            yield "destination agent dies", _agent_dies(s)
        if s.guardian:
            yield "guardian dies", s._replace(guardian=False)
        if s.recovery:
            yield "recovery dies", s._replace(recovery="")
        if s.recovery == "asking":
            yield "question lost", s._replace(recovery="", settlement="", reachable=False)
        if s.settlement:
            yield "settlement dies", s._replace(settlement="", recovery="")
        if not s.rebooted:
            dead = _agent_dies(s)._replace(destination_copy="dead", arrival=None, guardian=False)
            yield "destination host dies", dead._replace(rebooted=True, to_destination=())
        if not s.source_died:
            gone: dict[str, Any] = {"source_copy": "dead", "departure": None, "recovery": "", "to_source": ()}
            yield "source host dies", _cut(s)._replace(source_at=-1, source_died=True, **gone)


# --- the kernel's part ---


def _cut(s: State) -> State:
    return s._replace(link=False)


def _source_ends(s: State) -> State:
    """The engine ends, however: its tasks are let go."""
    left = "stopped" if s.source_held else "running"
    return s._replace(source_at=-1, source_copy=left if s.source_copy == "traced" else s.source_copy)


def _source_back(s: State) -> State:
    """Rolled back."""
    copy = s.source_copy if s.source_copy == "dead" else "running"
    return s._replace(source_at=-1, source_copy=copy, source_held=False, departure=None)


def _agent_dies(s: State) -> State:
    """With it the shadow that it holds; one that it holds no more is stopped, or runs."""
    if s.destination_at < 0:
        return s
    left = _cut(s)._replace(destination_at=-1)
    if s.destination_copy == "stopped" and not s.destination_held:
        return _runs(left)
    return left._replace(destination_copy="dead") if s.destination_copy == "shadow" else left


def _runs(s: State) -> State:
    return s._replace(destination_copy="running", has_run=True)


def _shadow_given_up(s: State) -> State:
    """By its agent, which makes it void if nobody has."""
    return _cut(s)._replace(destination_at=-1, destination_copy="dead", arrival=None)


def _without(queue: tuple[str, ...], message: str) -> tuple[str, ...]:
    at = queue.index(message)
    return (*queue[:at], *queue[at + 1 :])
