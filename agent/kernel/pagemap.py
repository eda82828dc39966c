"""/proc/PID/pagemap and its PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst): pages there, written.

The file is one 64-bit entry a page. PAGEMAP_SCAN (linux/fs.h), introduced by commit 52526ca7fdb9 (Linux 6.7),
answers in ranges; with `write_protect` it gets-and-clears: pages reported as written are write-protected
again in the same step, so no write between two scans is lost. Protect first, then read.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final

PAGE_IS_WPALLOWED: Final = 1 << 0
PAGE_IS_WRITTEN: Final = 1 << 1
PAGE_IS_FILE: Final = 1 << 2
PAGE_IS_PRESENT: Final = 1 << 3
PAGE_IS_SWAPPED: Final = 1 << 4
PAGE_IS_PFNZERO: Final = 1 << 5
PAGE_IS_HUGE: Final = 1 << 6
PAGE_IS_SOFT_DIRTY: Final = 1 << 7
PAGE_IS_GUARD: Final = 1 << 8  # Linux 6.15

PM_SCAN_WP_MATCHING: Final = 1 << 0
PM_SCAN_CHECK_WPASYNC: Final = 1 << 1

PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_VECTOR: Final = 16384

# an entry: bits 0-54 are the page frame's number (0 for readers without CAP_SYS_ADMIN), or the place in swap
PM_SOFT_DIRTY: Final = 1 << 55
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_UFFD_WP: Final = 1 << 57
PM_GUARD_REGION: Final = 1 << 58  # Linux 6.15
PM_FILE: Final = 1 << 61
PM_SWAP: Final = 1 << 62
PM_PRESENT: Final = 1 << 63
PM_PFN_MASK: Final = (1 << 55) - 1
SWAP_TYPE: Final = 31
SWP_PTE_MARKER: Final = 31  # the last of all swap types (include/linux/swap.h): no page, a mark on a hole

Region = tuple[int, int, int]  # start, end, categories


class PmScanArg(ctypes.Structure):
    """`struct pm_scan_arg`, 96 bytes."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    )


def available() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    own = Pagemap(os.getpid())
    try:
        list(own.scan(0, 4096, any_of=PAGE_IS_PRESENT, returned=PAGE_IS_PRESENT))
    except OSError:
        return False
    finally:
        own.close()
    return True


class Pagemap:
    """An open /proc/PID/pagemap. Scanning does not stop the process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._vector = (ctypes.c_uint64 * (3 * _VECTOR))()
        self._argument = PmScanArg(size=96, vec=ctypes.addressof(self._vector), vec_len=_VECTOR)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def markers(self, start: int, end: int) -> list[tuple[int, int]]:
        """Pages of [start, end) that are no pages but userfaultfd's marks on a hole in a file mapping.

        PAGEMAP_SCAN calls them swapped.
        """
        words = struct.unpack(f"<{(end - start) // 4096}Q", self.entries(start, end))
        return [
            (start + 4096 * n, start + 4096 * (n + 1))
            for n, word in enumerate(words)
            if word & PM_SWAP and word & SWAP_TYPE == SWP_PTE_MARKER
        ]

    def entries(self, start: int, end: int) -> bytes:
        """The entries of [start, end), 8 bytes a page; short if that reaches beyond the address space."""
        return os.pread(self._fd, (end - start) // 512, start // 512)

    def scan(
        self,
        start: int,
        end: int,
        *,
        any_of: int,
        returned: int,
        required: int = 0,
        inverted: int = 0,
        write_protect: bool = False,
    ) -> Iterator[Region]:
        """Ranges of [start, end): pages with all of `required` (those in `inverted`: clear), one of `any_of`.

        With `write_protect`, mappings without asynchronous write-protection are passed over in silence.
        """
        argument = self._argument
        argument.flags = PM_SCAN_WP_MATCHING if write_protect else 0
        argument.category_mask = required
        argument.category_inverted = inverted
        argument.category_anyof_mask = any_of
        argument.return_mask = returned
        argument.end = end
        while start < end:
            argument.start = start
            count = fcntl.ioctl(self._fd, PAGEMAP_SCAN, argument)
            words = self._vector[: 3 * count]
            # the kernel walks on after its own buffer of 512 ranges was full, but may say that it has not
            # (walk_end is only set at ENOSPC, do_pagemap_scan)
            start = max(argument.walk_end, words[-2] if words else 0)
            yield from zip(words[::3], words[1::3], words[2::3], strict=True)
