"""/proc/PID/clear_refs (proc(5), Documentation/admin-guide/mm/soft-dirty.rst): forget what was written.

Writing "4" clears the soft-dirty bit of every page of the process, and of its mappings, which all have it
while they are new. A kernel without CONFIG_MEM_SOFT_DIRTY accepts the write just the same, and has no bits.
"""

from __future__ import annotations

import errno
import fcntl
import os


class ClearRefs:
    """An open clear_refs."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)

    def lock(self) -> None:
        """There is one set of bits for all who look: BlockingIOError if somebody else has locked it."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "its written pages are being followed already"
            raise BlockingIOError(errno.EWOULDBLOCK, message, f"pid {self._pid}") from None

    def clear_soft_dirty(self) -> None:
        """A write under way on another CPU may escape: the process must not run (task_mmu.c, TLB flush)."""
        os.write(self._fd, b"4")

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
