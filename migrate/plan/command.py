"""What the commands about plans have in common: a file read, hosts reached, many moves watched at once."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn, Self

import msgspec

from agent.api import Checked, ErrorInfo, Event, Finished, SshOptions
from migrate import progress
from migrate.errors import ExitCode, Failure
from migrate.job import print_json
from migrate.logfile import LogFile
from migrate.options import Common
from migrate.plan.model import Plan
from migrate.plan.outcome import PlanProblem, PlanReport
from migrate.plan.parse import InvalidPlan, parse
from migrate.plan.tree import MAX_BYTES
from migrate.progress import Presenter

_UNSAID: Final = SshOptions()


def load(file: Path, common: Common) -> Plan:
    """The plan in a file; says all that is wrong with it and ends if it is none."""
    try:
        with file.open("rb") as opened:
            return parse(opened.read(MAX_BYTES + 1))
    except OSError as error:
        message = f"{file}: {error.strerror}"
        raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error
    except InvalidPlan as error:
        _fail(file, error, common)


def _fail(file: Path, error: InvalidPlan, common: Common) -> NoReturn:
    problems = tuple(
        PlanProblem(file=str(file), message=each.message, **msgspec.structs.asdict(each.place))
        for each in error.problems
    )
    for problem in problems:
        print(problem, file=sys.stderr)
    if common.json:
        said = ErrorInfo(kind="bad-plan", message="\n".join(map(str, problems)), where="coordinator")
        print_json(PlanReport(outcome="refused", problems=problems, error=said))
    sys.exit(ExitCode.USAGE)


def reached_by(plan: Plan, common: Common) -> SshOptions:
    """How hosts are reached from here: by the command line, else the plan, else the person's config.yaml."""
    said = {name for name in plan.ssh.__struct_fields__ if getattr(plan.ssh, name) != getattr(_UNSAID, name)}
    return msgspec.structs.replace(
        common.ssh, **{name: getattr(plan.ssh, name) for name in said - common.typed}
    )


class Audience:
    """Whoever sees what happens to many: the person at standard error, and the log file."""

    def __init__(self, common: Common) -> None:
        """Failure if the log file cannot be written to."""
        self._common = common
        self._shown: dict[str, Presenter] = {}
        try:
            self._log = LogFile(common.log_file)
        except OSError as error:
            message = f"--log-file: {common.log_file}: {error.strerror}"
            raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._shown.values():
            each.close()
        self._log.close()

    def on_event(self, about: str, event: Event) -> None:
        """`event` happens to the one that is called `about`."""
        self._log.write(event, about)
        if not isinstance(event, Finished | Checked):
            self._presenter(about).show(event)

    def _presenter(self, about: str) -> Presenter:
        if about not in self._shown:
            common = self._common
            self._shown[about] = progress.presenter(
                common.verbose, common.quiet, common.log_format, live=False, about=about
            )
        return self._shown[about]
