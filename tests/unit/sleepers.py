"""Processes that do nothing, under names of their own: for tests that look for processes by name."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from unit.stand_in_service import until


class Sleepers:
    """`start` starts one; all have ended after `close`."""

    def __init__(self, here: Path) -> None:
        self._here = here
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> int:
        """The number of a new process of this name."""
        program = self._here / name
        if not program.exists():
            shutil.copy("/bin/sleep", program)
        self._running.append(subprocess.Popen([str(program), "300"]))
        pid = self._running[-1].pid
        # Popen is back once the kernel has closed its pipe, which is before the new arguments are in place
        until(lambda: Path(f"/proc/{pid}/cmdline").read_bytes().startswith(str(program).encode()))
        return pid

    def end(self, pid: int) -> None:
        """Now; its number is free then."""
        (process,) = (each for each in self._running if each.pid == pid)
        process.kill()
        process.wait()

    def close(self) -> None:
        for each in self._running:
            each.kill()
            each.wait()
