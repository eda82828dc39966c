"""`--log-file`: every event as a line, with the time it was seen."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

import msgspec

from agent.api import Event


class LogFile:
    """Appends to a file: on each line a time (UTC, ISO 8601, microseconds) and the event as JSON."""

    def __init__(self, path: Path | None) -> None:
        """OSError if the file cannot be written to."""
        self._file: TextIO | None = None if path is None else path.open("a", encoding="utf-8", buffering=1)

    def write(self, event: Event, about: str = "") -> None:
        """`about`: which one of many it happens to."""
        if self._file is not None:
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            line = {"about": about, **msgspec.to_builtins(event)} if about else event
            self._file.write(f"{now} {msgspec.json.encode(line).decode()}\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
