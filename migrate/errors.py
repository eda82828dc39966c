"""How a command ends: its exit codes, in one place, and the failure that carries one.

The codes say what became of the process, so that a script knows what to do next without parsing anything.
"""

from __future__ import annotations

import enum
from typing import Final, Literal

from agent.api import CheckResult, Endpoint, ErrorInfo, Outcome, Report
from transport import link_errors
from transport.link_errors import LinkError


class ExitCode(enum.IntEnum):
    """Exit codes are never reused for something else."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    REFUSED = 3
    ROLLED_BACK = 4
    IN_DOUBT = 5
    UNREACHABLE = 6


MEANING: Final = {
    ExitCode.DONE: "done; for check: nothing stands in the way",
    ExitCode.INTERNAL: "an error of migrate itself",
    ExitCode.USAGE: "the command line is wrong; nothing was touched",
    ExitCode.REFUSED: "refused, nothing was touched; for check: something stands in the way",
    ExitCode.ROLLED_BACK: "rolled back: the process runs on where it was",
    ExitCode.IN_DOUBT: "in doubt: contact was lost in the commit, and the destination cannot be asked yet",
    ExitCode.UNREACHABLE: "a host or its agent could not be reached; nothing was touched",
}

_OF_OUTCOME: Final = {
    Outcome.MIGRATED: ExitCode.DONE,
    Outcome.REFUSED: ExitCode.REFUSED,
    Outcome.ROLLED_BACK: ExitCode.ROLLED_BACK,
    Outcome.IN_DOUBT: ExitCode.IN_DOUBT,
}
LINK_KINDS: Final = frozenset(
    value.kind
    for value in vars(link_errors).values()
    if isinstance(value, type) and issubclass(value, LinkError)
)

Where = Literal["coordinator", "source", "destination", "link"]


def of_report(report: Report) -> ExitCode:
    """The exit code of a move, or of a check that ended without a result."""
    if report.outcome is Outcome.REFUSED and report.error is not None and report.error.kind in LINK_KINDS:
        return ExitCode.UNREACHABLE
    return _OF_OUTCOME[report.outcome]


def of_check(result: CheckResult) -> ExitCode:
    return ExitCode.REFUSED if result.blockers else ExitCode.DONE


class Failure(Exception):
    """A command cannot be carried out, and nothing was touched. The message is for a person."""

    def __init__(self, kind: str, message: str, where: Where, code: ExitCode) -> None:
        super().__init__(message)
        self.info = ErrorInfo(kind=kind, message=message, where=where)
        self.code = code

    @classmethod
    def of_link(cls, error: LinkError) -> Failure:
        return cls(error.kind, str(error), "link", ExitCode.UNREACHABLE)

    def report(self) -> Report:
        """The same as a report, for those who read JSON."""
        nowhere = Endpoint(host="")
        return Report(outcome=Outcome.REFUSED, source=nowhere, destination=nowhere, error=self.info)
