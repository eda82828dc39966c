"""Limits that the kernel puts on a group of processes: cgroups(7), of either version."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from unit.children import wait_for

ROOT: Final = Path("/sys/fs/cgroup")
# controller -> its limit's file, in version 1 (a hierarchy of its own) and in version 2
_LIMITS: Final = {"memory": ("memory.limit_in_bytes", "memory.max"), "pids": ("pids.max", "pids.max")}
_USAGE: Final = {"memory.limit_in_bytes": "memory.usage_in_bytes", "memory.max": "memory.current"}


class Cgroup:
    """One that was made for a test."""

    def __init__(self, controller: str, limit: int) -> None:
        """Skips the test where there are none to be made."""
        first, second = _LIMITS[controller]
        for parent, name in ((ROOT / controller, first), (ROOT, second)):
            self.path = parent / f"migrate-test-{os.getpid()}"
            with contextlib.suppress(OSError):
                self.path.mkdir()
                self._limit = self.path / name
                if self._limit.exists():
                    self.limit(limit)
                    return
                self.path.rmdir()
        pytest.skip(f"no cgroup with a limit of {controller} can be made here")

    def limit(self, limit: int) -> None:
        self._limit.write_text(str(limit))

    def usage(self) -> int:
        """Bytes of memory."""
        return int((self.path / _USAGE[self._limit.name]).read_text())

    def take(self, pid: int) -> None:
        """This process, and what it starts from then on."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def processes(self) -> list[int]:
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Once its last process has ended."""
        wait_for(lambda: not self.processes(), "the processes of the cgroup to end")
        wait_for(self._removed, "the cgroup to go")

    def _removed(self) -> bool:
        with contextlib.suppress(OSError):  # EBUSY for as long as a process is being taken down
            self.path.rmdir()
        return not self.path.exists()


@contextlib.contextmanager
def limited(controller: str, limit: int) -> Iterator[Cgroup]:
    group = Cgroup(controller, limit)
    try:
        yield group
    finally:
        group.remove()
