"""Whether a run ended as it must: one live copy, which is well, clean hosts, a truthful command."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from e2e.support import DONE, IN_DOUBT, REFUSED, ROLLED_BACK, UNREACHABLE

from faults.fault import Case, Side
from faults.hosts import Host, Process, first
from faults.referee import Fired
from faults.subject import Subject

_UNTOUCHED: Final = {1: "an error of migrate", 2: "usage", REFUSED: "refused", UNREACHABLE: "unreachable"}
_OUTCOMES: Final = {DONE: "migrated", ROLLED_BACK: "rolled-back", IN_DOUBT: "in-doubt", **_UNTOUCHED}


class Kind(enum.StrEnum):
    """What was violated."""

    COPIES = "copies"  # none, or more than one
    DOUBT = "doubt"  # one, stopped in doubt, and nothing settles it
    UNWELL = "unwell"  # the process or its client has something to complain about
    UNCLEAN = "unclean"  # something of the migration is left on a host
    UNTRUE = "untrue"  # the command said something else than what became of it
    ENDLESS = "endless"  # the command did not end
    LATE = "late"  # all is well, but only after somebody came who is needed for nothing here
    OTHER = "other"  # the case was to come to something else


@dataclass(frozen=True)
class Problem:
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(frozen=True)
class Ended:
    """How the command ended."""

    code: int | None  # None: it was killed, it took too long
    output: str
    errors: str
    seconds: float

    @property
    def report(self) -> dict[str, Any]:
        try:
            found = json.loads(self.output)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def outcome(self) -> str:
        if self.code is None:
            return "endless"
        return _OUTCOMES.get(self.code, f"killed ({self.code})" if self.code > 128 else f"code {self.code}")


@dataclass
class Verdict:
    """Of one run."""

    case: Case
    source: str  # the host
    ended: Ended
    fired: list[Fired]
    problems: list[Problem] = field(default_factory=list)
    where: str = ""  # the host that it lives on now
    gap_ms: float = 0.0
    wait_ms: float = 0.0  # of the client for an answer, at the longest
    settled_s: float = 0.0
    recovered: bool = False  # it took a service's start, or its next look
    evidence: str = ""

    @property
    def outcome(self) -> str:
        """As in the table: what the command said, and where the process is."""
        lives = "nowhere" if not self.where else "stayed" if self.where == self.source else "moved"
        return f"{self.ended.outcome}, {lives}"


class Judge:
    """Looks until all is well, or for long enough."""

    def __init__(self, subject: Subject, hosts: dict[Side, Host]) -> None:
        self._subject = subject
        self._hosts = hosts

    def wait(self, verdict: Verdict, seconds: float) -> None:
        """Fill in what is wrong in the end."""
        self._subject.ask()
        first(lambda: self._look(verdict), seconds)
        if not verdict.problems:
            verdict.problems += [Problem(Kind.OTHER, text) for text in _unexpected(verdict)]

    def blame_for_time(self, verdict: Verdict) -> None:
        """It was not as it should be at once: a problem, unless those are dead who see to that."""
        if not verdict.problems and not verdict.case.may_take_time:
            text = f"settled only after {verdict.ended.seconds:.0f} s and the start of services"
            verdict.problems.append(Problem(Kind.LATE, text))

    def _look(self, verdict: Verdict) -> list[Problem]:
        verdict.problems = [*self._truth(verdict), *self._copies(verdict)]
        if not verdict.problems or verdict.problems[0].kind is Kind.UNTRUE:
            verdict.problems += [Problem(Kind.UNWELL, text) for text in self._unwell(verdict)]
        verdict.problems += [Problem(Kind.UNCLEAN, text) for text in self._left(verdict)]
        return verdict.problems

    # --- copies ---

    def _copies(self, verdict: Verdict) -> Iterator[Problem]:
        copies = self._subject.copies()
        live = [(host, one) for host, one in copies if one.runs]
        verdict.where = live[0][0] if len(live) == 1 else ""
        if len(copies) == 1 and live:
            self._subject.where, self._subject.pid = live[0][0], live[0][1].pid
            yield from self._place(verdict)
        elif not copies and verdict.case.kills_process and verdict.ended.code != DONE:
            return
        else:
            yield self._wrong_copies(verdict, copies, live)

    def _wrong_copies(
        self, verdict: Verdict, copies: list[tuple[str, Process]], live: list[tuple[str, Process]]
    ) -> Problem:
        words = "; ".join(f"{host}: {one}" for host, one in copies) or "none at all"
        stopped = [host for host, one in copies if one.state == "T" and not one.tracer]
        doubt = stopped == [verdict.source] and len(live) <= 1 and len(copies) - len(live) == 1
        said = verdict.ended.code == IN_DOUBT or verdict.case.signals("coordinator")
        return Problem(Kind.DOUBT if doubt and said else Kind.COPIES, words)

    def _place(self, verdict: Verdict) -> Iterator[Problem]:
        """Where it lives is what the command said."""
        moved, code = verdict.where != verdict.source, verdict.ended.code
        if moved != (code == DONE) and code in (DONE, ROLLED_BACK, *_UNTOUCHED):
            yield Problem(Kind.UNTRUE, f"the command ended with {code}, and it lives on {verdict.where}")
        for host in self._hosts.values():
            if host.has_service_address() != (host.name == verdict.where):
                yield Problem(Kind.UNCLEAN, f"{host.name}: the service address is in the wrong place")

    def _truth(self, verdict: Verdict) -> Iterator[Problem]:
        """The exit code and the report say the same."""
        ended = verdict.ended
        if ended.code is None:
            yield Problem(Kind.ENDLESS, f"the command did not end within {ended.seconds:.0f} s")
        elif ended.code in (DONE, REFUSED, ROLLED_BACK, IN_DOUBT):
            said = ended.report.get("outcome")
            if said != _OUTCOMES[ended.code]:
                yield Problem(Kind.UNTRUE, f"the command ended with {ended.code}, its report says {said}")
        elif ended.code > 128 and not verdict.case.signals("coordinator"):
            yield Problem(Kind.UNTRUE, f"the command ended with {ended.code}")
        elif ended.code == 1:
            yield Problem(Kind.UNTRUE, f"the command failed by itself: {ended.errors.strip()[-300:]}")

    # --- how they are ---

    def _unwell(self, verdict: Verdict) -> Iterator[str]:
        if verdict.where:
            yield from self._subject.complaints()

    def _left(self, verdict: Verdict) -> Iterator[str]:
        """Not sshd's own session after a link was gone for a minute, when our agent in it has ended: it has
        something to say to a peer that is gone, and its kernel waits as long again before it says it once
        more. (Its connection is as sshd's listener, which is older than the setting for that.)
        """
        copies = [one.pid for _, one in self._subject.copies()]  # of which has been spoken
        sshd = verdict.case.cuts_for_good
        for host in self._hosts.values():
            for one in host.strangers():
                if one.pid in copies or self._subject.is_reaper(one) or (sshd and one.is_session):
                    continue
                yield f"{host.name}: process {one}"
            yield from host.changes(without=("ssh connections",) if sshd else ())


def _unexpected(verdict: Verdict) -> Iterator[str]:
    """Where all is well, and yet not what the case was for."""
    case, ended = verdict.case, verdict.ended
    if not case.outcome:
        return
    if len(verdict.fired) != len(case.faults):
        yield "what was to fail did not"
    if verdict.outcome != case.outcome:
        error = ended.report.get("error") or {}
        yield f"{verdict.outcome} instead of {case.outcome}: {error.get('message', 'no error')}"
