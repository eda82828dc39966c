"""userfaultfd(2), asynchronous write-protect mode: the kernel notes writes itself, nobody waits for a fault.

Commits d61ea1cb0095 (UFFD_FEATURE_WP_ASYNC, Linux 6.7) and 2bad466cc9d9 (UFFD_FEATURE_WP_UNPOPULATED, 6.4).
The descriptor belongs to the process whose memory it watches; closing the last duplicate ends the watching.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import Final

UFFD_USER_MODE_ONLY: Final = 1
UFFD_API: Final = 0xAA
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1

UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_WRITEPROTECT: Final = 0xC018AA06

WANTED_FEATURES: Final = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM


def handshake(fd: int) -> None:
    """Agree on the features; OSError EINVAL where the kernel has no asynchronous write-protection."""
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("<QQQ", UFFD_API, WANTED_FEATURES, 0)))


def register(fd: int, start: int, end: int) -> bool:
    """Watch writes to [start, end). False where the mapping cannot be watched (it is then copied whole)."""
    argument = bytearray(struct.pack("<QQQQ", start, end - start, UFFDIO_REGISTER_MODE_WP, 0))
    try:
        fcntl.ioctl(fd, UFFDIO_REGISTER, argument)
    except OSError as error:
        # EBUSY: the process watches it; EINVAL: not mapped (any more) or not watchable; EPERM: never writable
        if error.errno in (errno.EBUSY, errno.EINVAL, errno.EPERM, errno.ENOMEM):
            return False
        raise
    return True


def unprotect(fd: int, start: int, end: int) -> bool:
    """Take every mark off [start, end): its pages count as written. False if not all of it is watched."""
    try:
        fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(struct.pack("<QQQ", start, end - start, 0)))
    except OSError as error:
        # ENOENT: a mapping in it is not watched (any more), and those behind it are as they were
        if error.errno in (errno.ENOENT, errno.EINVAL, errno.EAGAIN):
            return False
        raise
    return True


def available() -> bool:
    """Whether this kernel watches writes asynchronously."""
    from agent.kernel.arch.x86_64 import NR_userfaultfd
    from agent.kernel.errors import libc

    fd = libc.syscall(NR_userfaultfd, os.O_CLOEXEC)
    if fd < 0:
        return False
    try:
        handshake(fd)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
