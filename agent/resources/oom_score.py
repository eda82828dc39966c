"""Who is killed first when a host runs out of memory: oom_score_adj, proc_pid_oom_score_adj(5)."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from agent.api import Notice

_FIRST: Final = 1000


def go_first(pid: int) -> int:
    """It is killed before all others from now on: nobody works with it yet. What it had before."""
    before = int(_file(pid).read_text())
    with contextlib.suppress(PermissionError):
        _file(pid).write_text(str(_FIRST))
    return before


def restore(pid: int, wanted: int, before: int) -> list[Notice]:
    """`before`: what `go_first` has found, which may always be had again. What could not be kept."""
    try:
        _file(pid).write_text(str(wanted))
    except PermissionError:
        with contextlib.suppress(PermissionError):
            _file(pid).write_text(str(before))
        now = _file(pid).read_text().strip()
        message = f"oom_score_adj {wanted} needs CAP_SYS_RESOURCE here; it is {now}"
        return [Notice(kind="oom-score", message=message)]
    return []


def _file(pid: int) -> Path:
    return Path(f"/proc/{pid}/oom_score_adj")
