"""How a person names a process, `[[user@]host[:port]:]PID`, and a migration, `[HOST] ID`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

import msgspec

from agent.server.store import ID
from transport.target import HostTarget, InvalidTarget, parse_host

PID_MAX: Final = 1 << 22  # PID_MAX_LIMIT of a 64-bit kernel, include/linux/threads.h
_PID: Final = re.compile(r"[1-9][0-9]{0,6}")


class ProcessTarget(msgspec.Struct, frozen=True):
    """A process, on a host or (None) on this one."""

    pid: int
    host: HostTarget | None = None

    def __str__(self) -> str:
        return str(self.pid) if self.host is None else f"{self.host}:{self.pid}"


def parse_process(text: str) -> ProcessTarget:
    """Parse `[[user@]host[:port]:]PID`; InvalidTarget."""
    host, colon, digits = text.rpartition(":")
    if not _PID.fullmatch(digits) or int(digits) > PID_MAX:
        example = "write HOST:PID, as in alpha:1234, or PID alone for a process of this host"
        raise InvalidTarget(f"{text!r}: {digits!r} is not a process number; {example}")
    return ProcessTarget(int(digits), parse_host(host) if colon else None)


class Place(msgspec.Struct, frozen=True):
    """A host, or (None) this one, and perhaps a migration there."""

    host: HostTarget | None = None
    id: str | None = None

    def __str__(self) -> str:
        return " ".join(str(word) for word in (self.id, self.host) if word is not None)


def parse_place(words: Sequence[str]) -> Place:
    """Parse `[[user@]host[:port]] [ID]`, in any order: what looks like an ID is one. InvalidTarget."""
    ids = [word for word in words if ID.fullmatch(word.upper())]
    hosts = [word for word in words if word not in ids]
    if len(ids) > 1 or len(hosts) > 1:
        raise InvalidTarget(f"{' '.join(words)!r}: one host, and one migration there")
    return Place(parse_host(hosts[0]) if hosts else None, ids[0].upper() if ids else None)
