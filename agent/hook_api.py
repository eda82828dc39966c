"""What is said with a host that is to be emptied: which processes are meant, and what came of each.

Like agent/api.py: what `--json` prints and the agent's HTTP API carries. A field keeps its name and unit.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from agent.api import CheckResult, Endpoint, ErrorInfo, Event, Report
from agent.bounds import U63 as Count
from agent.bounds import PathText, Word

# What became of one process of many. "ready": nothing stands in its way, and nothing else was wanted.
Status = Literal["ready", "migrated", "refused", "rolled-back", "in-doubt", "not-started", "not-covered"]
# And of all of them together: the worst. "migrated": every one that was to move has moved.
Result = Literal["ready", "migrated", "refused", "rolled-back", "in-doubt"]


class Select(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which processes are meant: exactly one of these."""

    pid: Count | None = None
    pidfile: str | None = None  # an absolute path on the process's host
    name: str | None = None  # as `ps -o comm` shows it, or the name of the executable's file

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        return f"pid {self.pid}" if self.pid is not None else str(self.pidfile)


class Selected(msgspec.Struct, frozen=True, kw_only=True):
    """A process of the host.

    `started`: clock ticks since boot, which tell it from a later one with its number.
    """

    pid: Count
    name: str
    command: str
    user: str
    started: Count


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """The processes that are meant; `why` there are none, if there are none."""

    processes: tuple[Selected, ...]
    why: str = ""


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Empty this host by a plan: an object as in docs/plans.md, or a file of this host."""

    plan: dict[str, Any] | None = None
    plan_file: str | None = None  # an absolute path
    # what the plan calls this host, if not by its own name; "local": the caller is here
    host: str | None = None
    # instead of those of the plan's rules, the best first
    destinations: Annotated[tuple[str, ...], msgspec.Meta(max_length=1000)] | None = None
    dry_run: bool = False  # check, and move nothing
    on_disconnect: Literal["abort", "continue"] = "abort"  # what becomes of it if the connection ends
    reached_at: Word | None = None  # this host's address that the tool came by: it must not move
    auth_socket: PathText | None = None  # ssh-agent's socket, a path on this host


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """A destination that was asked: what the check said, or why there was none."""

    destination: str
    check: CheckResult | None = None
    error: ErrorInfo | None = None


class DrainedProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the host. Those that no rule is about are "not-covered", and left alone."""

    process: Selected
    status: Status
    rule: str | None = None
    destination: Endpoint | None = None
    migration: str | None = None  # on the agent's record, see GET /v1/migrations/{id}
    tried: tuple[Tried, ...] = ()
    report: Report | None = None


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it: the worst that came of any process that the plan covers."""

    outcome: Result
    host: str
    processes: tuple[DrainedProcess, ...]
    error: ErrorInfo | None = None


# Events: what POST /v1/hooks/drain answers where lines are accepted.


class DrainStarted(msgspec.Struct, frozen=True, kw_only=True, tag="started", tag_field="event"):
    """What there is to do: each process is "not-started" or "not-covered"."""

    processes: tuple[DrainedProcess, ...]


class DrainProgress(msgspec.Struct, frozen=True, kw_only=True, tag="process", tag_field="event"):
    """Something happens to a process on its way to `destination`."""

    pid: Count
    destination: str
    of: Event


class DrainSettled(msgspec.Struct, frozen=True, kw_only=True, tag="settled", tag_field="event"):
    """Nothing more happens to this one."""

    process: DrainedProcess


class Drained(msgspec.Struct, frozen=True, kw_only=True, tag="drained", tag_field="event"):
    """The last one."""

    report: DrainReport


DrainEvent = DrainStarted | DrainProgress | DrainSettled | Drained
