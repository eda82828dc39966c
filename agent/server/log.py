"""What the service says on standard error: a line for each state of each migration, as text or as JSON."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Final

import msgspec

from agent.api import Event, Finished, Log, StateChanged

FORMATS: Final = ("text", "json")
_log = logging.getLogger(__name__)


def set_up(verbose: int, form: str) -> None:
    """Lines of the chosen format; with `verbose` also what engines and agents say."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Text())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _log.setLevel(logging.DEBUG if verbose else logging.INFO)


def write(id: str, event: Event) -> None:
    """One event of the migration `id`; what happens within a state is for those who watch it."""
    if isinstance(event, StateChanged):
        _log.info("%s", f"{event.state} {event.detail}".rstrip(), extra={"migration": id})
    elif isinstance(event, Log):
        level = {"warning": logging.WARNING, "error": logging.ERROR}.get(event.level, logging.DEBUG)
        _log.log(level, "%s", event.message, extra={"migration": id})
    elif isinstance(event, Finished):
        error = event.report.error
        words = f"{event.report.outcome}: {error.message}" if error else str(event.report.outcome)
        _log.info("%s", words, extra={"migration": id})


def _when(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        id = getattr(record, "migration", "")
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        line = f"{_when(record)} {id}{' ' if id else ''}{level}{_on_one_line(record.getMessage())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _when(record), "level": record.levelname.lower(), "message": record.getMessage()}
        if id := getattr(record, "migration", None):
            line["migration"] = id
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
