"""The one place where a kernel call's failure becomes a Python exception, always with its subject."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, subject: str) -> int:
    """Return `result`; if it is negative, OSError with errno and `subject` ("pid 12", "fd 3", an address)."""
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), subject)
    return result


@contextlib.contextmanager
def about(subject: str) -> Iterator[None]:
    """An OSError in it has this subject: read(2) and write(2) in Python have none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, subject) from error
