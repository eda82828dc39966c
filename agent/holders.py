"""Who else has open what a process has: what several processes share cannot be moved with one of them.

Finding out means to read every descriptor of every process of the host, so it is done once for all that the
process has, and not while it stands still.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from agent.kernel import procfs


class Holders:
    """Of one process; as things were at the last `look`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._asked: frozenset[str] = frozenset()
        self._elsewhere: dict[str, list[tuple[int, int]]] = {}  # by link: process, descriptor

    def look(self) -> None:
        """At everything that the process has open by now. ProcessLookupError."""
        self._find(frozenset(procfs.fds(self._pid).values()))

    def _find(self, links: frozenset[str]) -> None:
        self._asked = links
        self._elsewhere = {}
        for pid in procfs.processes():
            if pid not in (self._pid, os.getpid()):
                for fd, link in _descriptors(pid):
                    if link in links:
                        self._elsewhere.setdefault(link, []).append((pid, fd))

    def other(self, fd: int, link: str) -> str:
        """Another process that has what its descriptor `fd` refers to: "pid 12 (bash)"; "" if none has."""
        if link not in self._asked:  # opened since
            self._find(self._asked | {link})
        ours = _identity(self._pid, fd)
        for pid, number in self._elsewhere.get(link, ()):
            if _identity(pid, number) == ours:
                return f"pid {pid} ({_comm(pid)})"
        return ""


def of_socket(inode: int) -> str:
    """A process that has the socket with this inode; "" if none has."""
    for pid in procfs.processes():
        if any(link == f"socket:[{inode}]" for _, link in _descriptors(pid)):
            return f"pid {pid} ({_comm(pid)})"
    return ""


def _descriptors(pid: int) -> Iterable[tuple[int, str]]:
    try:
        return procfs.fds(pid).items()
    except (ProcessLookupError, PermissionError):
        return ()


def _identity(pid: int, fd: int) -> tuple[int, int] | None:
    """A name may lead to different things in different processes' file systems."""
    try:
        found = os.stat(f"/proc/{pid}/fd/{fd}")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _comm(pid: int) -> str:
    try:
        return procfs.stat(pid).comm
    except ProcessLookupError:
        return "?"
