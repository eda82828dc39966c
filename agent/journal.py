"""What outlives an agent: for each migration and role a file whose name says how far it is.

    /run/migrate/outgoing/ID.open -> .frozen -> .committed -> .live -> removed   on the source
    /run/migrate/incoming/ID.held -> .committed -> .released -> .live     on the destination
                            `----------`--> .void

A step is one rename(2), so of two who want to make different steps one finds nothing to rename: what
becomes of a shadow is decided by who comes first, its agent (`committed`) or whoever asks after a lost link
(`void`). Nothing has to be on a disk: a host that goes down takes the process with it. `agent/states.py`
has all steps.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar

import msgspec

from agent import states
from agent.api import SshOptions
from agent.bounds import MALFORMED, Pid
from agent.kernel import procfs
from agent.kernel.errors import about
from agent.resources.service_address import ServiceAddress
from agent.resources.tcp import TcpConnection, TcpListener
from agent.server.places import make_private, runtime
from agent.server.store import ID
from agent.states import Steps

Role = Literal["outgoing", "incoming"]
_NO_STATES: Final = ("new", "lock", "rest")
_log = logging.getLogger(__name__)
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Overtaken(Exception):
    """Somebody else has made another step; the message says which."""


class Task(msgspec.Struct, frozen=True):
    """A process that has this number only as long as it lives."""

    pid: Pid
    born: int  # procfs.born

    @classmethod
    def of(cls, pid: int) -> Task:
        """ProcessLookupError."""
        born = procfs.born(pid)
        if born is None:
            raise ProcessLookupError(3, "no such process", f"pid {pid}")
        return cls(pid, born)

    def lives(self) -> bool:
        """A zombie does not: what the kernel does at its end is done."""
        return procfs.born(self.pid) == self.born


class Departure(msgspec.Struct, frozen=True, kw_only=True):
    """A process of this host that is being moved away."""

    process: Task
    agent: Task  # the engine
    destination: str
    ssh: SshOptions
    boot: str = ""  # boot id of the destination's host, once it has said it
    awaited: bool = False  # there, if the link breaks
    addresses: tuple[ServiceAddress, ...]


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """A process that is being moved here."""

    process: Task
    agent: Task


class Socket(msgspec.Struct, frozen=True):
    """A rebuilt socket that is still held."""

    fd: int  # the process's descriptor
    state: TcpConnection | TcpListener


class Rest(msgspec.Struct, frozen=True, kw_only=True):
    """What is left to do for an incoming process once it is committed.

    Its sockets may have data in their queues: the file is for root alone.
    """

    leave_stopped: bool
    sockets: tuple[Socket, ...]
    addresses: tuple[tuple[ServiceAddress, str], ...]  # and on which interface


C = TypeVar("C", Departure, Arrival)
S = TypeVar("S", bound=msgspec.Struct)
_TABLES: Final[dict[type, Mapping[Any, Mapping[Any, str]]]] = {
    Departure: states.DEPARTURE,
    Arrival: states.DESTINATION,
}
_STATES: Final[dict[type, Any]] = {Departure: states.Departure, Arrival: states.Destination}
_ROLES: Final[dict[type, Role]] = {Departure: "outgoing", Arrival: "incoming"}


class Entry(Generic[C]):
    """One migration's file."""

    def __init__(self, migration: str, state: Any, content: C) -> None:
        self.migration = migration
        self.content: C = content
        self._steps: Steps[Any] = Steps(_TABLES[type(content)], state)
        self._directory = directory(_ROLES[type(content)])

    @classmethod
    def begin(cls, migration: str, state: Any, content: C) -> Entry[C]:
        """Write it. OSError."""
        entry = cls(migration, state, content)
        for parent in (entry._directory.parent, entry._directory):
            make_private(parent)
        _write(entry.path, content)
        return entry

    @property
    def state(self) -> Any:
        """states.Destination or states.Departure."""
        return self._steps.state

    @property
    def path(self) -> Path:
        return self._directory / f"{self.migration}.{self.state}"

    def to(self, state: states.Destination | states.Departure) -> None:
        """One step; Overtaken if it is not where we believe it to be."""
        before = self.path
        self._steps.to(state)
        try:
            os.rename(before, self.path)
        except FileNotFoundError:
            found = state_of(_ROLES[type(self.content)], self.migration)
            raise Overtaken(
                f"migration {self.migration} is {found or 'unknown'} here, not {before.suffix[1:]}"
            ) from None

    def rewrite(self, content: C) -> None:
        """Whoever reads it finds one or the other. OSError."""
        _write(self.path, content)
        self.content = content

    def age(self) -> float:
        """Seconds since it was written."""
        return time.time() - self.path.stat().st_mtime

    def put_rest(self, rest: Rest) -> None:
        _write(self._rest, rest)

    def rest(self) -> Rest | None:
        """None: it never was whole. ValueError: it is damaged."""
        try:
            return decoded(Rest, self._rest.read_bytes())
        except FileNotFoundError:
            return None

    @property
    def _rest(self) -> Path:
        return self._directory / f"{self.migration}.rest"

    def remove(self) -> None:
        self._rest.unlink(missing_ok=True)
        _new(self._rest).unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def _write(path: Path, content: msgspec.Struct) -> None:
    """In one step, for us alone. Whoever dies before it leaves no file, unless there was one already."""
    fd = os.open(path.parent, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    with about(str(path)), open(fd, "wb") as file:
        file.write(msgspec.msgpack.encode(content))
        file.flush()
        try:
            _name(fd, path)
        except FileExistsError:
            _new(path).unlink(missing_ok=True)
            _name(fd, _new(path))
            _new(path).rename(path)


def _new(path: Path) -> Path:
    return path.with_suffix(".new")


def _name(fd: int, path: Path) -> None:
    # some directory must be named, or Python calls link(2), which does not follow
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def directory(role: Role) -> Path:
    return runtime() / role


def state_of(role: Role, migration: str) -> str | None:
    return next((state for id, state in _names(role) if id == migration), None)


def find(kind: type[C], migration: str) -> Entry[C] | None:
    """As it is now; None if there is none, also if it is removed while we look. ValueError: it is damaged."""
    while (state := state_of(_ROLES[kind], migration)) is not None:
        path = directory(_ROLES[kind]) / f"{migration}.{state}"
        with contextlib.suppress(FileNotFoundError):  # it has just become another one
            return Entry(migration, _STATES[kind](state), decoded(kind, path.read_bytes()))
    return None


def decoded(kind: type[S], data: bytes) -> S:
    """ValueError: it is damaged, or another version's."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except MALFORMED as error:
        raise ValueError(f"the journal is damaged: {error}") from None


def every(kind: type[C]) -> Iterator[Entry[C]]:
    """All that are there, the oldest first. One that is damaged is named in the log, and left out."""
    for migration in sorted({id for id, _ in _names(_ROLES[kind])}):
        try:
            entry = find(kind, migration)
        except ValueError as error:
            _log.warning("%s/%s: %s", directory(_ROLES[kind]), migration, error)
            continue
        if entry is not None:
            yield entry


def sweep_locks(role: Role) -> None:
    """Remove those of migrations that are over: who held one was killed. OSError."""
    place = directory(role)
    for path in place.glob("*.lock") if place.is_dir() else ():
        if state_of(role, path.stem) is None:
            path.unlink(missing_ok=True)


def _names(role: Role) -> Iterator[tuple[str, str]]:
    try:
        names = os.listdir(directory(role))
    except FileNotFoundError:
        return
    for name in names:
        migration, _, state = name.partition(".")
        if ID.fullmatch(migration) and state not in _NO_STATES:
            yield migration, state


@contextlib.contextmanager
def put_in_order(role: Role, migration: str) -> Iterator[None]:
    """Be the only one who does; waits for another one."""
    if state_of(role, migration) is None:
        yield
        return
    place = directory(role) / f"{migration}.lock"
    fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        if state_of(role, migration) is None:
            place.unlink(missing_ok=True)
    finally:
        os.close(fd)


def boot_id() -> str:
    return _BOOT_ID.read_text().strip()
