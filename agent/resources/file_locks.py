"""Locks on files: flock(2), and fcntl(2)'s of a process (POSIX) or of an open file description (OFD).

On a file that the destination has for itself they are taken there. On one that both hosts see nobody can:
the process here has the lock until its copy lives. Whoever waits for a lock in a system call waits again.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import Final, Literal

import msgspec

from agent.api import Blocker
from agent.bounds import U63
from agent.descriptors import OpenFile, Refusal
from agent.kernel.arch import x86_64 as arch
from agent.tracee import Batch

_F_OFD_SETLK: Final = 37
_FLOCK: Final = struct.Struct("<hhxxxxqqixxxx")  # struct flock: type, whence, start, length, pid


class Lock(msgspec.Struct, frozen=True):
    """`end`: the last byte; None: the end of the file, wherever that is."""

    kind: Literal["FLOCK", "POSIX", "OFDLCK"]
    exclusive: bool
    start: U63 = 0
    end: U63 | None = None


def held(file: OpenFile) -> tuple[Lock, ...]:
    """The locks that were taken by this description.

    "1: POSIX  ADVISORY  WRITE 4711 fe:00:1311 0 EOF" (proc_locks(5)).
    """
    found: list[Lock] = []
    for name, text in file.info:
        if name == "lock":
            _, kind, _, access, _, _, start, end = text.split()
            lock = Lock(kind, access == "WRITE", int(start), None if end == "EOF" else int(end))  # type: ignore[arg-type]
            found.append(lock)
    return tuple(found)


def blockers(file: OpenFile, kept: bool) -> list[Blocker]:
    """What is no lock of these kinds: a lease (F_SETLEASE), say. All of them, where none is `kept`."""
    kinds = {text.split()[1] for name, text in file.info if name == "lock"}
    lost = sorted(kinds - ({"FLOCK", "POSIX", "OFDLCK"} if kept else set()))
    hint = "let the program give it up first"
    return [
        Blocker(kind="file-lock", what=file.name, why=f"it holds a lock ({kind})", hint=hint) for kind in lost
    ]


def has_lease(file: OpenFile) -> bool:
    """Whoever opens the file has to wait then, and the process gets a signal (fcntl(2), F_SETLEASE)."""
    return any(name == "lock" and text.split()[1] == "LEASE" for name, text in file.info)


def shared_blocker(path: str) -> Blocker:
    """For a file that is the very same on both hosts."""
    why = "it holds a lock, and both hosts see the file: the copy here has the lock to the end"
    return Blocker(kind="file-lock", what=path, why=why, hint="let the program give the lock up first")


def take(fd: int, path: str, locks: tuple[Lock, ...]) -> None:
    """Those of the description. Refusal if another process has one in its way."""
    try:
        for lock in locks:
            if lock.kind == "FLOCK":
                fcntl.flock(fd, (fcntl.LOCK_EX if lock.exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            elif lock.kind == "OFDLCK":
                fcntl.fcntl(fd, _F_OFD_SETLK, _structure(lock))
    except BlockingIOError:
        raise Refusal("file-lock", f"{path}: another process has it locked on the destination") from None


def take_in(batch: Batch, fd: int, path: str, locks: tuple[Lock, ...]) -> None:
    """Those of the process, which only it can take; `fd` is its descriptor."""
    for lock in locks:
        if lock.kind == "POSIX":
            place = batch.put(_structure(lock))
            batch.call(f"lock of {path}", arch.NR_fcntl, fd, fcntl.F_SETLK, place)


def _structure(lock: Lock) -> bytes:
    kind = fcntl.F_WRLCK if lock.exclusive else fcntl.F_RDLCK
    length = 0 if lock.end is None else lock.end - lock.start + 1
    return _FLOCK.pack(kind, os.SEEK_SET, lock.start, length, 0)
