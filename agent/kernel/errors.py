"""The one place where a kernel call's failure becomes a Python exception, always with its subject."""

from __future__ import annotations

import ctypes
import os

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, subject: str) -> int:
    """Return `result`; if it is negative, OSError with errno and `subject` ("pid 12", "fd 3", an address)."""
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), subject)
    return result
