"""How much memory a process writes per second, measured by watching it for a moment."""

from __future__ import annotations

import time

from agent.descriptors import SourceProcess
from agent.pageset import pages_in
from agent.rounds import Rounds

_SECONDS = 0.3


def dirty_rate(pid: int) -> float | None:
    """Bytes per second; None if it cannot be watched. The process is stopped a few times, as in pre-copy."""
    from agent.resources.mappings import FileTable

    try:
        process = SourceProcess(pid)
    except ProcessLookupError:
        return None
    rounds = Rounds(process, None, None, FileTable(pid))  # type: ignore[arg-type]
    try:
        rounds.start_tracking()
        if not rounds.incremental:
            return None
        rounds.watch()
        rounds.written()
        began = time.monotonic()
        time.sleep(_SECONDS)
        return pages_in(rounds.written()) * 4096 / (time.monotonic() - began)
    except (OSError, TimeoutError):
        return None
    finally:
        rounds.remove_scratch()
        rounds.close()
        process.close()
