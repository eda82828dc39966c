"""Classic BPF on a socket (socket(7), linux/filter.h): what holds incoming packets back while a socket moves.

A filter of ours is a marker, an instruction that drops or not, and then the application's own program. So
whoever finds a socket under our filter (a guardian, a restarted agent) can put everything back from the
socket alone: the application's program and the SO_REUSEADDR that leaving repair forgets.
"""

from __future__ import annotations

import ctypes
import enum
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from agent.kernel.errors import check, libc

SO_ATTACH_FILTER = 26
SO_DETACH_FILTER = 27
SO_GET_FILTER = SO_ATTACH_FILTER
SO_LOCK_FILTER = 44

BPF_MAXINSNS = 4096
BPF_LD_W_IMM = 0x00
BPF_LD_W_ABS = 0x20
BPF_LD_B_ABS = 0x30
BPF_JMP_JEQ_K = 0x15
BPF_RET_K = 0x06
ACCEPT = 0xFFFFFFFF

_INSTRUCTION = struct.Struct("=HBBI")  # struct sock_filter: code, jump if true, jump if false, k
_PROGRAM = struct.Struct("@HP")  # struct sock_fprog: instructions, pointer to them
_MARKER = 0x4D4F5645
_NOTE_OFFSET = _INSTRUCTION.size + 4  # the lowest byte of the second instruction's k


class Kind(enum.IntEnum):
    """Whose filter it is, and what it does."""

    APPLICATION = 0
    LOCK = 1  # drops everything
    OPEN = 3  # drops nothing: a socket that is being let go


class Filter(NamedTuple):
    """A filter on a socket. `program` is the application's (empty: none), `note` the byte in ours."""

    kind: Kind
    program: bytes
    note: int


def assemble(instructions: Sequence[tuple[int, int, int, int]]) -> bytes:
    """A program from (code, jump if true, jump if false, k)."""
    return b"".join(_INSTRUCTION.pack(*one) for one in instructions)


_DROP = {
    Kind.LOCK: assemble([(BPF_RET_K, 0, 0, 0)]),
    Kind.OPEN: assemble([(BPF_LD_W_IMM, 0, 0, 0)]),
}
_ACCEPT_ALL = assemble([(BPF_RET_K, 0, 0, ACCEPT)])


def _prefix(kind: Kind, note: int) -> bytes:
    head = [(BPF_LD_W_IMM, 0, 0, _MARKER), (BPF_LD_W_IMM, 0, 0, kind << 8 | note)]
    return assemble(head) + _DROP[kind]


def attach(sock: socket.socket, program: bytes) -> None:
    """SO_ATTACH_FILTER, in place of what was there. EPERM if it was locked (SO_LOCK_FILTER)."""
    buffer = ctypes.create_string_buffer(program, len(program))
    packed = _PROGRAM.pack(len(program) // _INSTRUCTION.size, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, packed)


def detach(sock: socket.socket) -> None:
    """SO_DETACH_FILTER. ENOENT if there is none."""
    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def read(sock: socket.socket) -> Filter | None:
    """The filter on the socket, or None. OSError EACCES: it is extended BPF, which cannot be read."""
    program = _read_program(sock)
    return understand(program) if program else None


def understand(program: bytes) -> Filter:
    """Whose program it is."""
    for kind in _DROP:
        note = program[_NOTE_OFFSET] if len(program) > _NOTE_OFFSET else 0
        prefix = _prefix(kind, note)
        if len(program) > len(prefix) and program.startswith(prefix):
            own = program[len(prefix) :]
            return Filter(kind, b"" if own == _ACCEPT_ALL else own, note)
    return Filter(Kind.APPLICATION, program, 0)


def _read_program(sock: socket.socket) -> bytes:
    # SO_GET_FILTER counts in instructions, not bytes: never to be asked through socket.getsockopt
    size = ctypes.c_uint(0)
    fd, subject = sock.fileno(), f"fd {sock.fileno()}"
    check(libc.getsockopt(fd, socket.SOL_SOCKET, SO_GET_FILTER, None, ctypes.byref(size)), subject)
    if not size.value:
        return b""
    buffer = ctypes.create_string_buffer(size.value * _INSTRUCTION.size)
    check(libc.getsockopt(fd, socket.SOL_SOCKET, SO_GET_FILTER, buffer, ctypes.byref(size)), subject)
    return buffer.raw


def hold(sock: socket.socket, kind: Kind, program: bytes, note: int) -> None:
    """Put a filter of ours on the socket that keeps `program` (the application's, may be empty) and `note` (a
    byte).

    Effect on success: what `kind` says is dropped from now on. On failure: the filter is as before. EINVAL if
    `program` is so long (more than 4088 instructions) that ours does not fit before it.
    """
    attach(sock, _prefix(kind, note) + (program or _ACCEPT_ALL))


def let_go(sock: socket.socket, program: bytes) -> None:
    """Put `program` back, or no filter at all if it is empty."""
    if program:
        attach(sock, program)
    else:
        detach(sock)
