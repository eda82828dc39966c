"""process_vm_readv(2), process_vm_writev(2) and /proc/PID/mem: another process's memory, without stopping it.

process_vm_* is six times faster but honours protections; /proc/PID/mem goes through FOLL_FORCE and reaches
pages that the process itself may not.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Any, Final

from agent.kernel.errors import libc

IOV_MAX: Final = 1024


class IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("len", ctypes.c_uint64))


_ARGS: Any = [ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong]
_readv = libc.process_vm_readv
_readv.argtypes, _readv.restype = _ARGS, ctypes.c_ssize_t
_writev = libc.process_vm_writev
_writev.argtypes, _writev.restype = _ARGS, ctypes.c_ssize_t

Range = tuple[int, int]  # [start, end)


class MemoryFault(OSError):
    """A range could not be reached; `done` bytes before it were."""

    def __init__(self, pid: int, ranges: Sequence[Range], done: int, number: int) -> None:
        at = _address_at(ranges, done)
        super().__init__(number, os.strerror(number), f"pid {pid}, address {at:#x}")
        self.done = done
        self.address = at


def _address_at(ranges: Sequence[Range], done: int) -> int:
    for start, end in ranges:
        if done < end - start:
            return start + done
        done -= end - start
    return ranges[-1][1] if ranges else 0


class RemoteMemory:
    """One process's memory. Not bound to a thread; `close` it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._mem = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._remote = (IoVec * IOV_MAX)()
        self._local = IoVec()

    def close(self) -> None:
        if self._mem >= 0:
            os.close(self._mem)
            self._mem = -1

    def lasts(self) -> bool:
        """Whether a process still has this memory: not after its end, and not after execve(2)."""
        try:
            return bool(os.pread(self._mem, 1, 0))
        except OSError:  # nothing is mapped there, but something could be
            return True

    def _vector(self, ranges: Sequence[Range]) -> int:
        flat = [x for start, end in ranges for x in (start, end - start)]
        struct.pack_into(f"<{len(flat)}Q", self._remote, 0, *flat)
        return sum(flat[1::2])

    def _transfer(self, function: object, buffer: int, ranges: Sequence[Range]) -> int:
        done = 0
        for first in range(0, len(ranges), IOV_MAX):
            part = ranges[first : first + IOV_MAX]
            total = self._vector(part)
            self._local.base, self._local.len = buffer + done, total
            count = function(  # type: ignore[operator]
                self.pid, ctypes.addressof(self._local), 1, ctypes.addressof(self._remote), len(part), 0
            )
            if count != total:
                number = ctypes.get_errno() if count < 0 else errno.EFAULT
                raise MemoryFault(self.pid, ranges, done + max(count, 0), number)
            done += count
        return done

    def read_into(self, buffer: int, ranges: Sequence[Range]) -> int:
        """Read `ranges` one after another to the address `buffer` in our memory; bytes read. MemoryFault."""
        return self._transfer(_readv, buffer, ranges)

    def write_from(self, buffer: int, ranges: Sequence[Range]) -> int:
        """Write our memory at `buffer` to `ranges`, one after another; bytes written. MemoryFault."""
        return self._transfer(_writev, buffer, ranges)

    def read(self, address: int, size: int) -> bytes:
        """Read through protections; short where what is mapped ends. OSError EIO if nothing is."""
        if address >> 63:  # of a program's own making: no place that pread(2) could be told
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"pid {self.pid}, address {address:#x}")
        return os.pread(self._mem, size, address)

    def read_whole(self, address: int, size: int) -> bytes:
        """The same, but OSError EIO also where not all of it is mapped."""
        data = self.read(address, size)
        if len(data) != size:
            raise OSError(errno.EIO, os.strerror(errno.EIO), f"pid {self.pid}, address {address:#x}")
        return data

    def write(self, address: int, data: bytes | memoryview) -> None:
        """Write through protections (the process gets its own copy of a private page). ProcessLookupError."""
        view = memoryview(data)
        while view:
            count = os.pwrite(self._mem, view, address)
            if not count:  # it has no memory any more
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"pid {self.pid}")
            view, address = view[count:], address + count


def address_of(data: bytes | memoryview) -> int:
    """Where our own `data` lies, as long as it is referenced; a memoryview must be of a bytearray."""
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
