"""Our scratch mapping in a living process: where it lies, whose it is, and how anybody recognises it later.

An agent may die at any moment, so what it leaves must be known for ours by itself, from its first moment:

- Its address is one of few (_STRIDE apart, _OFFSET from a multiple) and its size is SCRATCH_SIZE.
- Then it is either as mmap(2) made it, one private anonymous mapping of which no page was ever touched,
- or it begins with a label, which also names its owner: the engine, by pid, start time and pid namespace.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable
from typing import Final

import msgspec

from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE
from agent.kernel.memory import RemoteMemory
from agent.kernel.procfs import MapsLine
from agent.pageset import Range
from agent.tracee import ALL_SIGNALS, CODE, ENTRY, NOT_MADE, SCRATCH_SIZE, TABLE, Tracee
from agent.visit import NoFoothold, untouched

_STRIDE: Final = 1 << 32
_OFFSET: Final = 0x6D69_6000
_MAGIC: Final = b"migrate: scratch"
_LABEL: Final = struct.Struct("<16sQQQ")
MAP_PRIVATE: Final = 0x02
MAP_ANONYMOUS: Final = 0x20
MAP_FIXED_NOREPLACE: Final = 0x10_0000
_PARTS: Final = 8  # mappings that it may be split into by what is tried out in it
_READ_WRITE: Final = procfs.PROT_READ | procfs.PROT_WRITE
_READ_EXECUTE: Final = procfs.PROT_READ | procfs.PROT_EXEC
USERFAULTFD: Final = "anon_inode:[userfaultfd]"

# (what, number, *arguments) -> result: one call of a stopped thread, `visit.Caller.call`
Call = Callable[..., int]


class Owner(msgspec.Struct, frozen=True):
    """A process, whatever becomes of its number."""

    pid: int
    born: int  # procfs.stat's starttime
    namespace: int  # inode of its pid namespace: where the number means it

    def alive(self) -> bool:
        """Whether it is there. ForeignOwner if that cannot be told from here."""
        if self.namespace != os.stat("/proc/self/ns/pid").st_ino:
            raise ForeignOwner(f"it belongs to an agent in another pid namespace (pid {self.pid} there)")
        return procfs.born(self.pid) == self.born


class ForeignOwner(RuntimeError):
    """The owner is where nobody here can look."""


class Found(msgspec.Struct, frozen=True):
    """A scratch mapping in a process; no owner if it was not labelled yet."""

    start: int
    owner: Owner | None

    @property
    def range(self) -> Range:
        return (self.start, self.start + SCRATCH_SIZE)


def _ourselves() -> Owner:
    return Owner(os.getpid(), procfs.born(os.getpid()) or 0, os.stat("/proc/self/ns/pid").st_ino)


# --- coming and going ---


def choose(lines: list[MapsLine]) -> int:
    """An address in the middle of the largest gap, far from all that grows. NoFoothold if there is none."""
    edges = [(0, arch.MMAP_MIN), *((m.start, m.end) for m in lines if m.start < arch.TASK_SIZE)]
    edges.append((arch.TASK_SIZE, arch.TASK_SIZE))
    gaps = [(before[1], after[0]) for before, after in itertools.pairwise(edges)]
    for low, high in sorted(gaps, key=lambda gap: gap[0] - gap[1]):
        middle = (low + high) // 2 // _STRIDE * _STRIDE + _OFFSET
        for address in (middle, middle - _STRIDE):
            # never next to a mapping, so never merged with one
            if low < address and address + SCRATCH_SIZE < high:
                return address
    raise NoFoothold("the address space is full")


def install(tracee: Tracee, call: Call, address: int) -> None:
    """Map and fill the scratch at an address that was chosen. On failure it may be there: `remove`."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    call("map scratch", arch.NR_mmap, address, SCRATCH_SIZE, _READ_WRITE, flags, -1 & ALL_SIGNALS, 0)
    owner = _ourselves()
    label = _LABEL.pack(_MAGIC, owner.pid, owner.born, owner.namespace)
    tracee.memory.write(address, label.ljust(CODE, b"\0") + tracee.runner_code())
    call("protect scratch", arch.NR_mprotect, address, PAGE, _READ_EXECUTE)
    tracee.adopt_scratch(address)


def remove(pid: int, memory: RemoteMemory, call: Call) -> bool:
    """Unmap ours, labelled or not yet; False if there is none. No thread may be in it."""
    ours = [found for found in find(pid, memory) if found.owner in (None, _ourselves())]
    for found in ours:
        unmap(found, call)
    return bool(ours)


def unmap(found: Found, call: Call) -> None:
    call("unmap scratch", arch.NR_munmap, found.start, SCRATCH_SIZE)


# --- recognising ---


def find(pid: int, memory: RemoteMemory) -> list[Found]:
    """Scratch mappings in a process, whoever made them.

    Touches nothing, and reads no page that was never touched.
    """
    lines = procfs.maps(pid)
    starts = (position for position, line in enumerate(lines) if line.start % _STRIDE == _OFFSET)
    found = (_recognise(pid, memory, lines[position : position + _PARTS]) for position in starts)
    return [one for one in found if one is not None]


def _recognise(pid: int, memory: RemoteMemory, lines: list[MapsLine]) -> Found | None:
    start, end = lines[0].start, lines[0].start + SCRATCH_SIZE
    ours = [m for m in lines if m.start < end and not m.shared and not m.inode and not m.name]
    if not ours or ours[-1].end < end:
        return None
    if untouched(pid, start, start + PAGE):
        blank = ours[0].end == end and ours[0].protection == _READ_WRITE and untouched(pid, start, end)
        return Found(start, None) if blank else None
    owner = owner_of(memory.read(start, _LABEL.size))
    return Found(start, owner) if owner is not None else None


def owner_of(label: bytes) -> Owner | None:
    """Who wrote it; None if it is no label.

    The process may write there what it wants, and unmap it at any time.
    """
    if len(label) != _LABEL.size:
        return None
    magic, pid, born, namespace = _LABEL.unpack(label)
    return Owner(pid, born, namespace) if magic == _MAGIC else None


def left_open(pid: int, memory: RemoteMemory, found: Found) -> int | None:
    """The process's userfaultfd that was made for us and not closed again.

    By what the batches in the scratch say.
    """
    at = found.start + TABLE
    if found.owner is None or untouched(pid, at, at + PAGE):
        return None
    entry = memory.read(at, ENTRY.size)
    fd = userfaultfd_of(entry)
    return fd if fd is not None and procfs.fds(pid).get(fd) == USERFAULTFD else None


def userfaultfd_of(entry: bytes) -> int | None:
    """The descriptor that a batch's first call has made, or was about to close."""
    if len(entry) != ENTRY.size:
        return None
    number, first, *_, result = ENTRY.unpack(entry)
    if number == arch.NR_userfaultfd:
        return int(result)
    return int(first) if number == arch.NR_close and result == NOT_MADE else None
