"""/proc/PID/maps of a program that maps and unmaps all the time."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from programs.status import BUILD, wait_for_status

from agent.kernel import procfs
from agent.kernel.procfs import MapsLine

READINGS = 3000


@pytest.mark.parametrize("look", [procfs.maps, procfs.smaps])
def test_mappings_do_not_overlap(look: Callable[[int], list[MapsLine]], tmp_path: Path) -> None:
    """The kernel shows one that does in about one of 200 readings of maps."""
    status = tmp_path / "status"
    files = [word for name in ("churn", "callers", "selfcheck") for word in ("--map", str(BUILD / name))]
    command = [str(BUILD / "heartbeat"), "--unsettled", "--status", str(status), *files]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_status(status)
            for _ in range(READINGS):
                lines = look(process.pid)
                assert all(before.end <= line.start for before, line in itertools.pairwise(lines))
        finally:
            process.kill()
