"""Migrations in files: what was asked, what happened, how it ended. They outlast the service.

One JSON file a migration, named after it, ours alone (0600), replaced in one step. Identifiers begin with the
time (ULID), so the order of names is the order of migrations; all but the newest KEPT are removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from agent.api import Finished, MigrationRecord, Report
from agent.bounds import MALFORMED
from agent.server.places import make_private

KEPT: Final = 1000
MAX_FILE: Final = 256 << 20  # bytes; 20,000 events have some megabytes
ID: Final = re.compile(r"[0-7][0-9A-HJKMNP-TV-Z]{25}")
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32


def new_id() -> str:
    """A ULID: 48 bits of milliseconds since 1970 and 80 random ones, as 26 characters that sort by time."""
    number = time.time_ns() // 1_000_000 << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


class Stored(msgspec.Struct, frozen=True):
    """What is in a file."""

    record: MigrationRecord
    events: tuple[msgspec.Raw, ...] = ()


def stored(data: bytes) -> Stored:
    """What a file says; one of MALFORMED."""
    if len(data) > MAX_FILE:
        raise msgspec.ValidationError("too long for a record")
    return msgspec.json.decode(data, type=Stored)


class Store:
    """The directory of them. Blocking, but for files of some kilobytes."""

    def __init__(self, directory: Path) -> None:
        """OSError, UnsafeDirectory if the directory cannot be had."""
        make_private(directory.parent)
        make_private(directory)
        self._directory = directory

    def save(self, record: MigrationRecord, lines: list[bytes]) -> None:
        """Write it, in the place of what there was of it; OSError, and then nothing has changed."""
        data = msgspec.json.encode(Stored(record, tuple(map(msgspec.Raw, lines))))
        path = self._path(record.id)
        new = path.with_suffix(".new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(fd, "wb") as file:
                file.write(data)
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def finish(self, id: str, report: Report) -> None:
        """How it ended, of a migration that its service cannot follow any more. OSError."""
        stored = self.load(id)
        if stored is None:
            return
        record = msgspec.structs.replace(
            stored.record,
            status="finished",
            state=str(report.outcome),
            finished=stored.record.finished or datetime.now(UTC),
            report=report,
        )
        last = msgspec.json.encode(Finished(report=report))
        self.save(record, [*map(bytes, stored.events), last])

    def load(self, id: str) -> Stored | None:
        """None if there is none of that name, or none that could be read."""
        try:
            with self._path(id).open("rb") as file:
                return stored(file.read(MAX_FILE + 1))
        except (OSError, *MALFORMED):
            return None

    def ids(self) -> list[str]:
        """The newest first."""
        names = (entry.name.removesuffix(".json") for entry in os.scandir(self._directory))
        return sorted(filter(ID.fullmatch, names), reverse=True)

    def prune(self, keep: int = KEPT) -> None:
        for id in self.ids()[keep:]:
            with contextlib.suppress(FileNotFoundError):
                self._path(id).unlink()

    def _path(self, id: str) -> Path:
        if not ID.fullmatch(id):
            raise ValueError(f"{id!r} is not the name of a migration")
        return self._directory / f"{id}.json"
