"""The workloads from Python: building them, and reading what they say of themselves (see common/status.h)."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAMS = Path(__file__).resolve().parent
BUILD = PROGRAMS / "build"


def build() -> Path:
    """Bring every program up to date; returns the directory that they are in."""
    done = subprocess.run(["make", "-s", "-C", PROGRAMS], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"make -C {PROGRAMS}:\n{done.stderr}")
    return BUILD


def read_status(path: Path) -> dict[str, Any] | None:
    """The status now; None if there is none yet, or it was being written."""
    try:
        status: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return status if status["seq"] == status["end"] else None


def wait_for_status(path: Path, later_than: int = 0, deadline: float = 30) -> dict[str, Any]:
    """The first whole status numbered above `later_than`; TimeoutError after `deadline` seconds."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        status = read_status(path)
        if status and status["seq"] > later_than:
            return status
        time.sleep(0.02)
    raise TimeoutError(f"{path}: no status after number {later_than} within {deadline} s")
