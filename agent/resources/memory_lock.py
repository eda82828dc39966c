"""mlockall(2): whether memory that a process maps from now on is locked; what is already is a mapping's flag.

Nothing tells it from outside, and the process itself only by what a new mapping is like: a page of the
scratch is mapped anew. MADV_DONTNEED refuses locked memory, and with MCL_FUTURE alone such a page is there
before it is touched.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE
from agent.tracee import SCRATCH_SIZE, Batch, Outcome

MCL_FUTURE: Final = 2
MCL_ONFAULT: Final = 4
_READ_WRITE: Final = 3
_PRIVATE_ANONYMOUS_FIXED: Final = 0x32
_MADV_DONTNEED: Final = 4


def ask_future(batch: Batch, scratch: int) -> Callable[[Outcome], int]:
    """The flags with which mlockall(2) makes it so again, 0 if new memory is not locked.

    The scratch's last page is overwritten. Mapping it waits for whoever walks the process's page tables.
    """
    page = scratch + SCRATCH_SIZE - PAGE
    there = batch.space(16)
    if batch.room < 2 * PAGE:
        raise MemoryError("no page of the scratch is free")
    mapped = batch.call(
        "map", arch.NR_mmap, page, PAGE, _READ_WRITE, _PRIVATE_ANONYMOUS_FIXED, -1, 0, optional=True
    )
    batch.call("mincore", arch.NR_mincore, page, PAGE, there)
    dropped = batch.call("drop", arch.NR_madvise, page, PAGE, _MADV_DONTNEED, optional=True)

    def answer(outcome: Outcome) -> int:
        if outcome.results[mapped] == -errno.EAGAIN:  # locked, and that is more than it may have
            return MCL_FUTURE
        if outcome.results[dropped] != -errno.EINVAL:
            return 0
        return MCL_FUTURE if outcome.read(there, 1)[0] & 1 else MCL_FUTURE | MCL_ONFAULT

    return answer


def restore_future(batch: Batch, flags: int) -> None:
    if flags:
        batch.call("mlockall", arch.NR_mlockall, flags)
