"""PAGEMAP_SCAN (linux/fs.h, Documentation/admin-guide/mm/pagemap.rst): which pages are there, which were written.

With `write_protect` the scan gets-and-clears: pages reported as written are write-protected again in the same step, so
no write between two scans is lost. Protect first, then read. Introduced by commit 52526ca7fdb9 (Linux 6.7).
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
_PM_SWAP: Final = 1 << 62
_SWAP_TYPE: Final = 31
_SWP_PTE_MARKER: Final = 31

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

        PAGEMAP_SCAN calls them swapped. Their type is the last of all swap types (include/linux/swap.h, SWP_PTE_MARKER).
        """
        count = (end - start) // 4096
        words = struct.unpack(f"<{count}Q", os.pread(self._fd, 8 * count, start // 4096 * 8))
        return [
            (start + 4096 * n, start + 4096 * (n + 1))
            for n, word in enumerate(words)
            if word & _PM_SWAP and word & _SWAP_TYPE == _SWP_PTE_MARKER
        ]

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
        """Ranges of [start, end) whose pages have all of `required` (bits in `inverted`: cleared) and one of `any_of`.

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
            start = argument.walk_end
            yield from zip(words[::3], words[1::3], words[2::3], strict=True)
