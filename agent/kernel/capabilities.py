"""Capabilities of the calling thread: capget(2), capset(2), prctl(2), capabilities(7). Sets are integers."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from agent.kernel.errors import check, libc

NR_capget: Final = 125
NR_capset: Final = 126
PR_CAPBSET_READ: Final = 23
PR_CAPBSET_DROP: Final = 24
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
VERSION_3: Final = 0x20080522

# linux/capability.h, by number
NAMES: Final = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID"),
    *("SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW"),
    *("IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT"),
    *("SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE"),
    *("AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM"),
    *("BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE"),
)


class Sets(NamedTuple):
    effective: int
    permitted: int
    inheritable: int


def numbers(names: Iterable[str]) -> int:
    """The set of these; ValueError for a name that is none."""
    return sum(1 << NAMES.index(name) for name in names)


def packed(sets: Sets) -> bytes:
    """`struct __user_cap_data_struct[2]`."""
    return struct.pack("<6I", *(s & 0xFFFFFFFF for s in sets), *(s >> 32 for s in sets))


def get() -> Sets:
    data = ctypes.create_string_buffer(24)
    check(libc.syscall(NR_capget, _header(), data), "capget")
    words = struct.unpack("<6I", data.raw)
    return Sets(*(low | high << 32 for low, high in zip(words[:3], words[3:], strict=True)))


def put(sets: Sets) -> None:
    check(libc.syscall(NR_capset, _header(), packed(sets)), "capset")


def _header() -> bytes:
    return struct.pack("<Ii", VERSION_3, 0)


def drop_bounding(keep: int) -> None:
    """Take all but `keep` from the bounding set, for good (CAP_SETPCAP)."""
    for number in range(64):
        found = libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0)
        if found < 0:  # the kernel knows no more of them
            return
        if found and not keep >> number & 1:
            check(libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0), f"capability {number}")


def clear_ambient() -> None:
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "ambient capabilities")
