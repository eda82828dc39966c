"""What came of each of many, and what that is all together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from agent.api import CheckResult, ErrorInfo, Outcome, Report
from agent.hook_api import DrainReport, Result, Select, Selected, Status
from migrate.errors import LINK_KINDS, ExitCode

_CODES: Final[dict[Result, ExitCode]] = {
    "ready": ExitCode.DONE,
    "migrated": ExitCode.DONE,
    "refused": ExitCode.REFUSED,
    "rolled-back": ExitCode.ROLLED_BACK,
    "in-doubt": ExitCode.IN_DOUBT,
}
_OF_OUTCOME: Final[dict[Outcome, Status]] = {
    Outcome.MIGRATED: "migrated",
    Outcome.REFUSED: "refused",
    Outcome.ROLLED_BACK: "rolled-back",
    Outcome.IN_DOUBT: "in-doubt",
}


class MoveResult(msgspec.Struct, frozen=True, kw_only=True):
    """One move of a plan. `check`, if one was made and answered; `report`, of the move, or of why not."""

    name: str
    select: Select
    source: str
    destination: str
    status: Status
    process: Selected | None = None
    check: CheckResult | None = None
    report: Report | None = None


class PlanProblem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a plan's file, and where."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.message}"


class PlanReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `migrate plan … --json` prints.

    Moves in the plan's order; `problems` if there is no plan to speak of.
    """

    outcome: Result
    moves: tuple[MoveResult, ...] = ()
    problems: tuple[PlanProblem, ...] = ()
    error: ErrorInfo | None = None


def of_outcome(outcome: Outcome) -> Status:
    return _OF_OUTCOME[outcome]


def worst(statuses: Iterable[Status], without: Result = "migrated") -> Result:
    """In doubt before rolled back before refused; not started counts as refused. `without` any: `without`."""
    found = set(statuses) - {"not-covered"}
    if "in-doubt" in found:
        return "in-doubt"
    if "rolled-back" in found:
        return "rolled-back"
    if found & {"refused", "not-started"}:
        return "refused"
    return "ready" if "ready" in found else "migrated" if found else without


def exit_code(result: Result, errors: Iterable[ErrorInfo | None]) -> ExitCode:
    """`errors`: of each that was refused, None for one with blockers. Nobody reached is a code of its own."""
    kinds = [error.kind if error is not None else "" for error in errors]
    if result == "refused" and kinds and all(kind in LINK_KINDS for kind in kinds):
        return ExitCode.UNREACHABLE
    return _CODES[result]


def of_plan(report: PlanReport) -> ExitCode:
    refused = (each for each in report.moves if each.status == "refused")
    return exit_code(
        report.outcome, (each.report.error if each.report is not None else None for each in refused)
    )


def of_drain(report: DrainReport) -> ExitCode:
    refused = (each for each in report.processes if each.status == "refused")
    return exit_code(report.outcome, (tried.error for each in refused for tried in each.tried))
