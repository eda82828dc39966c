"""Checks and carries out the moves of a plan.

    find processes -> check all moves -> (all can be made, or the plan says to go on) -> make them, in order

Each check and each move is a `Coordinator`'s, as on the command line. Between a move's check and the
move itself minutes may pass: before it begins its process is looked for again, and it is not made if
that is another one now.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Final

import msgspec

from agent.api import (
    Checked,
    CheckResult,
    Endpoint,
    ErrorInfo,
    Event,
    Finished,
    Log,
    Outcome,
    Report,
    Request,
    SshOptions,
)
from agent.hook_api import Result, Selected, Selection, Status
from migrate.client import Agent, Level
from migrate.coordinator import Coordinator
from migrate.errors import Failure
from migrate.plan.model import LOCAL, Move, Plan
from migrate.plan.outcome import MoveResult, PlanReport, of_outcome, worst
from transport.target import HostTarget, parse_host

CHECKS_AT_ONCE: Final = 4

OnEvent = Callable[[str, Event], None]


class Member:
    """One move of the plan on its way."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.host: HostTarget | None = None if move.source == LOCAL else parse_host(move.source)
        self.status: Status = "not-started"
        self.process: Selected | None = None
        self.check: CheckResult | None = None
        self.report: Report | None = None

    def refuse(self, error: ErrorInfo) -> None:
        host = platform.node() if self.host is None else self.host.host
        pid = self.process.pid if self.process is not None else self.move.select.pid
        self.status = "refused"
        self.report = Report(
            outcome=Outcome.REFUSED,
            source=Endpoint(host=host, pid=pid),
            destination=Endpoint(host=self.move.destination),
            error=error,
        )

    def take_selection(self, found: Selection) -> None:
        """The process that is meant: the only one at first, later the same as before. Refused otherwise."""
        if self.process is None and len(found.processes) == 1:
            self.process = found.processes[0]
        elif self.process is None or self.process not in found.processes:
            kind, message = self._amiss(found)
            self.refuse(ErrorInfo(kind=kind, message=f"{self.move.source}: {message}", where="source"))

    def _amiss(self, found: Selection) -> tuple[str, str]:
        if not found.processes:
            return "no-such-process", found.why
        if self.process is not None:
            return "process-changed", f"process {self.process.pid}, which was checked, is not there any more"
        numbers = ", ".join(str(each.pid) for each in found.processes)
        message = (
            f"several processes are called {self.move.select}: {numbers} "
            "(select one by its pid, or by a pidfile)"
        )
        return "ambiguous", message

    def take_check(self, answer: Finished | Checked) -> None:
        if isinstance(answer, Finished):
            self.take_report(answer.report)
            return
        self.check = answer.result
        self.status = "refused" if answer.result.blockers else "ready"

    def take_report(self, report: Report) -> None:
        self.report = report
        self.status = of_outcome(report.outcome)

    def result(self) -> MoveResult:
        move = self.move
        return MoveResult(
            name=move.label,
            select=move.select,
            source=move.source,
            destination=move.destination,
            status=self.status,
            process=self.process,
            check=self.check,
            report=self.report,
        )


class PlanRun:
    """A check or application of a plan. `on_event` gets each event with the name of the move it is about."""

    def __init__(self, plan: Plan, ssh: SshOptions, on_event: OnEvent) -> None:
        """`ssh`: how hosts are reached from here."""
        self._plan = plan
        self._ssh = ssh
        self._on_event = on_event
        self._members = [Member(move) for move in plan.moves]
        self._running: set[Coordinator] = set()
        self._selecting: set[asyncio.Task[None]] = set()
        self._leaving: set[asyncio.Task[None]] = set()
        self._interrupts = 0

    async def check(self) -> PlanReport:
        """Ask all sources and destinations; touches nothing."""
        await self._check_all()
        await self._let_go()
        return self._report("ready")

    async def apply(self) -> PlanReport:
        """Check all, then move. With `on_failure: stop` nothing is touched unless every move can be made."""
        await self._check_all()
        ready = [member for member in self._members if member.status == "ready"]
        for member in ready:
            member.status = "not-started"
        if len(ready) == len(self._members) or self._plan.on_failure == "continue":
            waiting = iter(ready)
            await asyncio.gather(*(self._work(waiting) for _ in range(self._plan.parallel)))
        await self._let_go()
        return self._report("migrated")

    def interrupt(self) -> None:
        """A person wants an end: what runs is rolled back, nothing more is started. Again: leave at once."""
        self._interrupts += 1
        for task in self._selecting:
            task.cancel()
        for coordinator in self._running:
            coordinator.interrupt()

    def _report(self, without: Result) -> PlanReport:
        results = tuple(member.result() for member in self._members)
        error = None
        if self._interrupts:
            waiting = sum(each.status == "not-started" for each in results)
            message = f"interrupted; {waiting} of {len(results)} moves were not started"
            error = ErrorInfo(kind="aborted", message=message, where="coordinator")
        return PlanReport(
            outcome=worst((each.status for each in results), without), moves=results, error=error
        )

    async def _check_all(self) -> None:
        by_source: dict[str, list[Member]] = {}
        for member in self._members:
            by_source.setdefault(member.move.source, []).append(member)
        await asyncio.gather(*(self._select(members) for members in by_source.values()))
        found = iter([member for member in self._members if member.status == "not-started"])
        await asyncio.gather(*(self._check(found) for _ in range(CHECKS_AT_ONCE)))

    async def _select(self, members: Sequence[Member]) -> None:
        """Find the processes of moves from one host; those that are not there are refused."""
        task = asyncio.ensure_future(self._ask_for(members))
        self._selecting.add(task)
        try:
            await task
        except asyncio.CancelledError:
            if not self._interrupts:
                raise
        finally:
            self._selecting.discard(task)

    async def _ask_for(self, members: Sequence[Member]) -> None:
        try:
            async with Agent(members[0].host, self._ssh, self._sayer(members[0])) as agent:
                for member in members:
                    member.take_selection(await agent.select(member.move.select))
        except Failure as failure:
            for member in members:
                if member.status != "refused":
                    member.refuse(failure.info)

    async def _check(self, waiting: Iterator[Member]) -> None:
        for member in waiting:
            answer = await self._carry_out(member, "check")
            if answer is not None:
                member.take_check(answer)

    async def _work(self, waiting: Iterator[Member]) -> None:
        for member in waiting:
            if self._plan.on_failure == "stop" and self._has_failed():
                return
            await self._move(member)

    async def _move(self, member: Member) -> None:
        if self._interrupts:
            return
        await self._select([member])
        if member.status == "refused":
            return
        answer = await self._carry_out(member, "move")
        if isinstance(answer, Finished):
            member.take_report(answer.report)

    def _has_failed(self) -> bool:
        return any(member.status not in ("not-started", "migrated") for member in self._members)

    async def _carry_out(self, member: Member, operation: str) -> Finished | Checked | None:
        """None if it was interrupted before it began."""
        if self._interrupts:
            return None
        label = member.move.label if operation == "move" else f"check of {member.move.label}"
        request = self._request(member, operation)
        coordinator = Coordinator(member.host, self._ssh, request, lambda event: self._on_event(label, event))
        self._running.add(coordinator)
        answer = await coordinator.run()
        self._on_event(label, answer)
        self._later(self._close(coordinator))
        if self._interrupts and operation == "check":
            return None
        return answer

    async def _close(self, coordinator: Coordinator) -> None:
        await coordinator.close()
        self._running.discard(coordinator)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _let_go(self) -> None:
        """Until no agent of ours has anything left to say."""
        while self._leaving:
            await asyncio.wait(self._leaving)

    def _request(self, member: Member, operation: str) -> Request:
        assert member.process is not None
        wanted = {"operation": operation, "pid": member.process.pid, "destination": member.move.destination}
        request = msgspec.convert(wanted, Request)
        # a source elsewhere has its own keys and ssh_config
        ssh = self._ssh if member.host is None else SshOptions(agent_command=self._ssh.agent_command)
        return msgspec.structs.replace(request, options=member.move.options, ssh=ssh)

    def _sayer(self, member: Member) -> Callable[[Level, str], None]:
        label = member.move.label
        return lambda level, message: self._on_event(label, Log(level=level, message=message))
