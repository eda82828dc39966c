"""What a person's tool and an agent say to each other: requests, events, reports.

They travel over the agent's HTTP API (`agent/server`), whose document is made from the structs here: a
request goes in, events come until a `Finished` one. Every struct here is also what `--json` prints, so a
field, once published, keeps its name and unit. Sizes are bytes, durations are milliseconds where the name
ends in `_ms` and seconds where it ends in `_s`, times are UTC.
"""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.bounds import U63 as Count
from agent.bounds import Finite, PathText, Pid, Word

PROTOCOL_VERSION = 2

Milliseconds = Annotated[float, Meta(ge=0, le=24 * 3600 * 1000)]


class Outcome(enum.StrEnum):
    """How a migration ended."""

    MIGRATED = "migrated"
    REFUSED = "refused"  # nothing was touched
    ROLLED_BACK = "rolled-back"  # the source runs on
    IN_DOUBT = "in-doubt"  # contact was lost in the commit: the copy here is stopped until it is settled


class SshOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How hosts are reached; what is not given comes from ssh_config and its defaults."""

    identity: tuple[PathText, ...] = ()
    config: tuple[PathText, ...] = ()
    agent_command: PathText = "migrate-agent"
    auth_socket: PathText | None = None  # ssh-agent's socket (SSH_AUTH_SOCK), a path on the source


class MoveOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may be chosen for one migration."""

    downtime_limit_ms: Milliseconds = 50.0
    max_rounds: Annotated[int, Meta(ge=0, le=1_000_000)] = 30
    freeze_timeout_ms: Milliseconds = 2000.0
    reconnect_ms: Milliseconds = 20000.0  # how long to try, if the link breaks in pre-copy; 0: not at all
    # bytes per second on the link during pre-copy; None: no limit
    bandwidth: Annotated[int, Meta(ge=1, le=1 << 50)] | None = None
    compression: Literal["zstd", "none"] = "zstd"
    compression_level: Annotated[int, Meta(ge=-50, le=22)] = -3  # zstd; negative ones are faster
    addresses: tuple[Word, ...] | None = None  # to take over; None: the service addresses its connections use
    verify: bool = False
    leave_stopped: bool = False
    copy_files: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One check or move. `on_disconnect`: what becomes of a move that nobody watches any more."""

    operation: Literal["check", "move"]
    pid: Pid
    destination: Annotated[str, Meta(max_length=4096)]  # [user@]host[:port], as seen from the source
    options: MoveOptions = MoveOptions()
    ssh: SshOptions = SshOptions()
    on_disconnect: Literal["abort", "continue"] = "abort"
    reached_at: Word | None = None  # the source's address that the tool came by: it must not move
    owner: Count | None = None  # user id: only if it is wholly theirs; the service says so of all but root
    version: Count = PROTOCOL_VERSION


class Blocker(msgspec.Struct, frozen=True, kw_only=True):
    """One reason why a process cannot be moved."""

    kind: str  # stable, lower case with dashes: "unix-socket", "child-processes", "file-differs" ...
    what: str  # the thing, by its own name: "fd 7 (socket:[4711], unix stream)"
    why: str
    hint: str = ""  # what to do about it


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that will not be exactly as it was, said before it happens."""

    kind: str
    message: str


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    kind: str
    message: str
    where: Literal["coordinator", "source", "destination", "link"]


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One pass of pre-copy. The last entry of a report's list is the freeze's."""

    number: Count
    pages_sent: Count
    pages_discarded: Count
    bytes: Count  # on the link
    seconds: Finite
    dirty_rate: Finite  # bytes per second that the process wrote while the round before ran


class Phase(msgspec.Struct, frozen=True, kw_only=True):
    """One step inside the pause."""

    name: str
    ms: Finite
    where: Literal["source", "destination"]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    host: str
    pid: Count | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """How one migration went; what `migrate move --json` prints."""

    outcome: Outcome
    source: Endpoint
    destination: Endpoint
    pause_ms: Finite | None = None  # source frozen -> destination running
    longest_stop_ms: Finite | None = None  # the longest stop before the freeze
    total_s: Finite = 0.0
    memory_bytes: Count = 0
    bytes_sent: Count = 0
    rounds: tuple[Round, ...] = ()
    reconnects: Count = 0
    phases: tuple[Phase, ...] = ()
    address_moved: tuple[str, ...] = ()
    verified_pages: Count | None = None
    blockers: tuple[Blocker, ...] = ()
    notices: tuple[Notice, ...] = ()
    error: ErrorInfo | None = None


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """What `migrate check` prints: the process, what would happen, and everything that stands in the way."""

    source: Endpoint
    destination: Endpoint
    command: str
    memory_bytes: Count
    threads: Count
    mappings: Count
    descriptors: Count
    connections: Count
    dirty_tracking: str  # "userfaultfd", "soft-dirty", "none"
    addresses: tuple[str, ...] = ()
    blockers: tuple[Blocker, ...] = ()
    notices: tuple[Notice, ...] = ()


class ProcessInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `migrate ps`."""

    pid: Count
    command: str
    user: str
    memory_bytes: Count
    threads: Count
    sockets: Count
    dirty_rate: Finite | None  # bytes per second; None: not measured
    blockers: tuple[Blocker, ...]


# Events: what the source agent writes, one JSON object a line, "event" tells which.


class StateChanged(msgspec.Struct, frozen=True, kw_only=True, tag="state", tag_field="event"):
    """A migration entered a state: "preparing", "pre-copy", "freezing", "ready", "committed", "live" ..."""

    state: str
    detail: str = ""


class Progress(msgspec.Struct, frozen=True, kw_only=True, tag="progress", tag_field="event"):
    """Some ten times a second during pre-copy."""

    round: Count
    pages_done: Count
    pages_total: Count
    bytes_sent: Count  # since the beginning, on the link
    rate: Finite  # bytes of memory per second, now
    estimated_pause_ms: Finite | None


class RoundFinished(msgspec.Struct, frozen=True, kw_only=True, tag="round", tag_field="event"):
    round: Round
    remaining_pages: Count
    estimated_pause_ms: Finite


class Log(msgspec.Struct, frozen=True, kw_only=True, tag="log", tag_field="event"):
    level: Literal["debug", "info", "warning", "error"]
    message: str


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished", tag_field="event"):
    report: Report


class Checked(msgspec.Struct, frozen=True, kw_only=True, tag="checked", tag_field="event"):
    result: CheckResult


Event = StateChanged | Progress | RoundFinished | Log | Finished | Checked


# The service: what surrounds requests and events on its socket.


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers.

    `version` and `protocol` are here in every version, so that a tool of another one can tell.
    """

    version: str
    protocol: Count
    host: str
    pid: Count
    running: Count  # migrations


class Connected(msgspec.Struct, frozen=True, kw_only=True):
    """What `migrate-agent connect` says before it becomes a connection to the service."""

    health: Health
    reached_at: str | None = None  # the address of this host that its ssh connection came to


class MigrationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One migration.

    "lost": the service ended before it did, and nobody has said yet what came of it.
    """

    id: str
    request: Request
    status: Literal["running", "finished", "lost"]
    state: str  # the last one entered; "" before the first
    created: datetime
    finished: datetime | None = None
    report: Report | None = None


class Resolve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a migration that is in doubt has ended, by somebody who knows. None: ask the destination once
    more.
    """

    live: Literal["source", "destination"] | None = None


class MigrationList(msgspec.Struct, frozen=True, kw_only=True):
    """A page of migrations, the newest first. `next`: what to give as `before` for the page after it."""

    migrations: tuple[MigrationRecord, ...]
    next: str | None = None


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer that is an error."""

    error: ErrorInfo
