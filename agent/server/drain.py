"""Emptying this host: what a plan says may leave is checked against one destination after another, and moved
to the first that takes it.

Each move is a migration of this service, on its record like any other. One process that cannot leave does not
hold up the others; what the plan does not cover is left alone, and said.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec

from agent.api import Checked, Endpoint, ErrorInfo, Event, Finished, MoveOptions, Outcome, Report, Request
from agent.hook_api import (
    Drain,
    Drained,
    DrainedProcess,
    DrainEvent,
    DrainProgress,
    DrainReport,
    DrainSettled,
    DrainStarted,
    Selected,
    Tried,
)
from agent.server import selection
from agent.server.front import Front
from agent.server.migration import Stream
from agent.server.registry import Closing, Conflict, Registry
from migrate.plan.model import LOCAL, Move, Plan, Rule
from migrate.plan.outcome import of_outcome, worst
from transport.target import parse_host

_encoder: Final = msgspec.json.Encoder()
_events: Final = msgspec.json.Decoder(Event)


class Member(msgspec.Struct, frozen=True):
    """A process that the plan covers. `problem`: why it must stay, whatever the destinations say."""

    process: Selected
    rule: str
    destinations: tuple[str, ...]
    options: MoveOptions
    problem: ErrorInfo | None = None

    def answer(self, **what: Any) -> DrainedProcess:
        return DrainedProcess(process=self.process, rule=self.rule, **what)


class Draining:
    """One drain from beginning to end. Its events are in `stream`, which ends with it."""

    def __init__(self, registry: Registry, plan: Plan, wanted: Drain) -> None:
        self.stream = Stream()
        self.report: DrainReport | None = None
        self._registry = registry
        self._plan = plan
        self._wanted = wanted
        self._answers: dict[int, DrainedProcess] = {}
        self._aborted = ""
        self._checks: set[Front] = set()
        self._moves: set[str] = set()

    async def run(self) -> None:
        try:
            members = await self._survey()
            waiting = iter(members)
            await asyncio.gather(*(self._work(waiting) for _ in range(self._plan.parallel)))
            self.report = self.snapshot()
            self._emit(Drained(report=self.report))
        finally:
            self.stream.end()

    def abort(self, reason: str) -> None:
        """Roll back what runs, if it is not too late, and start nothing more."""
        self._aborted = self._aborted or reason
        for front in self._checks:
            front.abort(reason)
        for id in self._moves:
            try:
                self._registry.abort(id, reason)
            except Conflict:
                continue  # it is past the point of no return: it goes on to its end

    def snapshot(self) -> DrainReport:
        """How things are now."""
        answers = tuple(self._answers[pid] for pid in sorted(self._answers))
        outcome = worst((each.status for each in answers), "ready" if self._wanted.dry_run else "migrated")
        error = None
        if self._aborted:
            error = ErrorInfo(kind="aborted", message=self._aborted, where="coordinator")
        return DrainReport(outcome=outcome, host=platform.node(), processes=answers, error=error)

    async def _survey(self) -> list[Member]:
        """Who is to move, in the plan's order."""
        everybody, members = await asyncio.to_thread(self._look)
        self._answers = {p.pid: DrainedProcess(process=p, status="not-covered") for p in everybody}
        self._answers |= {m.process.pid: m.answer(status="not-started") for m in members}
        self._emit(DrainStarted(processes=tuple(self._answers[pid] for pid in sorted(self._answers))))
        return members

    def _look(self) -> tuple[list[Selected], list[Member]]:
        found: dict[int, Member] = {}
        for member in self._covered():
            found.setdefault(member.process.pid, member)
        return list(selection.processes()), list(found.values())

    def _covered(self) -> Iterator[Member]:
        for move in self._plan.moves:
            if self._is_here(move.source):
                yield from self._of_move(move)
        for rule in self._plan.drain:
            yield from self._members(selection.find(rule.select).processes, rule, rule.destinations)

    def _of_move(self, move: Move) -> Iterator[Member]:
        found = selection.find(move.select).processes
        problem = None
        if len(found) > 1:
            numbers = ", ".join(str(each.pid) for each in found)
            message = f"the plan's move is for one process, and several are called {move.select}: {numbers}"
            problem = ErrorInfo(kind="ambiguous", message=message, where="source")
        yield from self._members(found, move, (move.destination,), problem)

    def _members(
        self,
        processes: Iterable[Selected],
        rule: Move | Rule,
        destinations: tuple[str, ...],
        problem: ErrorInfo | None = None,
    ) -> Iterator[Member]:
        places = tuple(d for d in self._wanted.destinations or destinations if not self._is_here(d))
        if not places:
            message = f"{rule.label}: all destinations are this host itself"
            problem = ErrorInfo(kind="no-destination", message=message, where="source")
        for process in processes:
            yield Member(process, rule.label, places, rule.options, problem)

    def _is_here(self, name: str) -> bool:
        """Whether a host of the plan is this one, which may have another name there than for itself."""
        if name == LOCAL:
            return self._wanted.plan_file is not None or self._wanted.host == LOCAL
        names = (platform.node(), self._wanted.host or LOCAL)
        return parse_host(name).host in {parse_host(each).host for each in names}

    async def _work(self, waiting: Iterator[Member]) -> None:
        for member in waiting:
            if self._aborted:
                return
            try:
                answer = await self._settle(member)
            except Closing as error:
                self.abort(str(error))
                return
            self._answers[member.process.pid] = answer
            self._emit(DrainSettled(process=answer))

    async def _settle(self, member: Member) -> DrainedProcess:
        if member.problem is not None:
            return member.answer(status="refused", tried=(Tried(destination="", error=member.problem),))
        tried: list[Tried] = []
        for destination in member.destinations:
            tried.append(await self._check(member, destination))
            check = tried[-1].check
            if self._aborted:
                return member.answer(status="not-started", tried=tuple(tried))
            if check is not None and not check.blockers:
                return await self._accepted(member, destination, tuple(tried))
        return member.answer(status="refused", tried=tuple(tried))

    async def _accepted(self, member: Member, destination: str, tried: tuple[Tried, ...]) -> DrainedProcess:
        """It may go there."""
        if self._wanted.dry_run:
            return member.answer(status="ready", tried=tried, destination=Endpoint(host=destination))
        if not selection.is_still(member.process):
            message = f"process {member.process.pid} has ended"
            error = ErrorInfo(kind="no-such-process", message=message, where="source")
            return member.answer(
                status="refused", tried=(*tried, Tried(destination=destination, error=error))
            )
        return await self._move(member, destination, tried)

    async def _check(self, member: Member, destination: str) -> Tried:
        front, stream = self._registry.check(self._request("check", member, destination))
        self._checks.add(front)
        try:
            async for line in stream.follow():
                self._pass_on(member, destination, line)
        finally:
            self._checks.discard(front)
        if isinstance(front.final, Checked):
            return Tried(destination=destination, check=front.final.result)
        report = front.final.report if front.final is not None else None
        return Tried(destination=destination, error=_error(report))

    async def _move(self, member: Member, destination: str, tried: tuple[Tried, ...]) -> DrainedProcess:
        try:
            id = self._registry.create(self._request("move", member, destination)).id
        except Conflict as error:
            why = ErrorInfo(kind="conflict", message=str(error), where="source")
            return member.answer(status="refused", tried=(*tried, Tried(destination=destination, error=why)))
        self._moves.add(id)
        try:
            async for line in self._registry.events(id, 0):
                self._pass_on(member, destination, line)
        finally:
            self._moves.discard(id)
        report = self._registry.get(id).report or _unknown(member, destination)
        return member.answer(
            status=of_outcome(report.outcome),
            tried=tried,
            destination=report.destination,
            migration=id,
            report=report,
        )

    def _request(self, operation: str, member: Member, destination: str) -> Request:
        wanted = {"operation": operation, "pid": member.process.pid, "destination": destination}
        return msgspec.structs.replace(
            msgspec.convert(wanted, Request),
            options=member.options,
            ssh=msgspec.structs.replace(self._plan.ssh, auth_socket=self._wanted.auth_socket),
            reached_at=self._wanted.reached_at,
        )

    def _pass_on(self, member: Member, destination: str, line: bytes) -> None:
        event = _events.decode(line)
        if not isinstance(event, Checked | Finished):
            self._emit(DrainProgress(pid=member.process.pid, destination=destination, of=event))

    def _emit(self, event: DrainEvent) -> None:
        kind = event.of if isinstance(event, DrainProgress) else event
        self.stream.add(kind, _encoder.encode(event))


def _error(report: Report | None) -> ErrorInfo:
    found = report.error if report is not None else None
    return found or ErrorInfo(kind="check-failed", message="the check ended without a result", where="source")


def _unknown(member: Member, destination: str) -> Report:
    """It ended without a report, which a migration never does."""
    return Report(
        outcome=Outcome.IN_DOUBT,
        source=Endpoint(host=platform.node(), pid=member.process.pid),
        destination=Endpoint(host=destination),
        error=ErrorInfo(kind="internal", message="it ended without a report", where="source"),
    )
