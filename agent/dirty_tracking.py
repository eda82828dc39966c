"""Which way of following writes there is on this host: asked of the kernel, never taken from its version."""

from __future__ import annotations

import enum
import functools
from contextlib import AbstractContextManager

from agent import soft_dirty
from agent.kernel import pagemap, userfaultfd
from agent.soft_dirty import SoftDirty
from agent.tracking import Tracker
from agent.write_protection import WriteProtection


class Mechanism(enum.StrEnum):
    """What `migrate check` says, best first."""

    USERFAULTFD = "userfaultfd"  # asynchronous write-protection and PAGEMAP_SCAN
    SOFT_DIRTY = "soft-dirty"  # every scan stops the process for a moment
    NONE = "none"  # one round, and the pause sends everything once more


@functools.cache
def mechanism() -> Mechanism:
    """The best that this kernel has and lets us use."""
    if userfaultfd.available() and pagemap.available():
        return Mechanism.USERFAULTFD
    return Mechanism.SOFT_DIRTY if soft_dirty.available() else Mechanism.NONE


def tracker(pid: int, uffd: int | None, halt: AbstractContextManager[None]) -> Tracker:
    """Follow a process by its own userfaultfd or, where it has none, by the next best means."""
    if uffd is not None:
        return WriteProtection(pid, uffd)
    return SoftDirty(pid, halt if soft_dirty.available() else None)
