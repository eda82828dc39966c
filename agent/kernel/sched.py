"""sched_getattr(2), sched_setattr(2), get_robust_list(2), prlimit(2): facts of other tasks without a stop."""

from __future__ import annotations

import ctypes
import struct
from typing import Final

from agent.kernel.errors import check, libc

NR_get_robust_list: Final = 274
NR_sched_setattr: Final = 314
NR_sched_getattr: Final = 315
SCHED_ATTR_SIZE: Final = 56


def get_attributes(tid: int) -> bytes:
    """`struct sched_attr` of a task, 56 bytes."""
    buffer = ctypes.create_string_buffer(SCHED_ATTR_SIZE)
    check(libc.syscall(NR_sched_getattr, tid, buffer, SCHED_ATTR_SIZE, 0), f"task {tid}")
    return buffer.raw


def set_attributes(tid: int, attributes: bytes) -> None:
    buffer = ctypes.create_string_buffer(attributes, SCHED_ATTR_SIZE)
    check(libc.syscall(NR_sched_setattr, tid, buffer, 0), f"task {tid}")


def nice(attributes: bytes) -> int:
    return int(struct.unpack_from("<i", attributes, 16)[0])


def robust_list(tid: int) -> tuple[int, int]:
    """(head, length) of a task's robust futex list."""
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    check(libc.syscall(NR_get_robust_list, tid, ctypes.byref(head), ctypes.byref(length)), f"task {tid}")
    return head.value, length.value
