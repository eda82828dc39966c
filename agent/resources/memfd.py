"""Memory files: memfd_create(2), with content and seals. One that is mapped shared is a mapping's matter."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.api import Blocker
from agent.bounds import U31, U32, U63, U64, Mode
from agent.descriptors import REOPEN_FLAGS, OpenFile, Rebuilding, Refusal, SourceProcess
from agent.unmovable import Unmovable

NAME: Final = "memfd"
MAX_CONTENT: Final = 64 << 20  # bytes: it travels in the pause
MAX_SIZE: Final = 1 << 40  # holes are free
_PREFIX: Final = "/memfd:"
_DELETED: Final = " (deleted)"
_F_ADD_SEALS: Final = 1033
_F_GET_SEALS: Final = 1034
_SEALS: Final = 0x3F  # SEAL, SHRINK, GROW, WRITE, FUTURE_WRITE, EXEC
_MFD_ALLOW_SEALING: Final = 0x2
_MFD_CLOEXEC: Final = 0x1


class Piece(msgspec.Struct, frozen=True):
    """Content between two holes."""

    offset: U63
    data: Annotated[bytes, Meta(max_length=MAX_CONTENT)]


class State(msgspec.Struct, frozen=True):
    inode: U64  # on the source: descriptions of one file have it in common
    name: Annotated[str, Meta(max_length=249)]
    size: Annotated[int, Meta(ge=0, le=MAX_SIZE)]
    pieces: Annotated[tuple[Piece, ...], Meta(max_length=1 << 16)]
    seals: Annotated[int, Meta(ge=0, le=_SEALS)]
    mode: Mode
    owner: tuple[U32, U32]
    flags: U31
    position: U63


def validate(state: State) -> None:
    """ValueError for a received state that is none."""
    if state.flags & ~REOPEN_FLAGS or "\0" in state.name:
        raise ValueError(f"flags {state.flags:#o}, name {state.name!r}")
    if any(piece.offset + len(piece.data) > state.size for piece in state.pieces):
        raise ValueError(f"content beyond the end of {state.size} bytes")


def recognise(file: OpenFile) -> bool:
    return file.link.startswith(_PREFIX) and stat.S_ISREG(file.mode)


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    found: list[Blocker] = []
    if holder := process.holders.other(file.fd, file.link):
        why = f"a memory file that {holder} has too, which stays"
        found.append(Blocker(kind="memfd", what=file.name, why=why, hint="close it there"))
    if os.stat(f"/proc/{process.pid}/fd/{file.fd}").st_blksize > os.sysconf("SC_PAGE_SIZE"):
        why = "a memory file of huge pages (MFD_HUGETLB)"
        found.append(Blocker(kind="memfd", what=file.name, why=why, hint="close it before moving"))
    elif (size := _allocated(file, process)) > MAX_CONTENT:
        why = f"a memory file with {size} bytes in it: they would travel in the pause"
        hint = f"make it smaller than {MAX_CONTENT >> 20} MiB"
        found.append(Blocker(kind="memfd", what=file.name, why=why, hint=hint))
    return found


def _allocated(file: OpenFile, process: SourceProcess) -> int:
    return 512 * os.stat(f"/proc/{process.pid}/fd/{file.fd}").st_blocks


def capture(file: OpenFile, process: SourceProcess) -> State:
    if _allocated(file, process) > MAX_CONTENT:
        raise Unmovable("memfd", f"{file.name}: a memory file with more than {MAX_CONTENT} bytes in it")
    fd = os.open(f"/proc/{process.pid}/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return State(
            inode=file.inode,
            name=file.link.removeprefix(_PREFIX).removesuffix(_DELETED),
            size=file.size,
            pieces=tuple(_pieces(fd, file.size)),
            seals=fcntl.fcntl(fd, _F_GET_SEALS),
            mode=stat.S_IMODE(file.mode),
            owner=file.owner,
            flags=file.flags & REOPEN_FLAGS,
            position=file.position,
        )
    finally:
        os.close(fd)


def _pieces(fd: int, size: int) -> Iterator[Piece]:
    """What is not a hole (lseek(2), SEEK_DATA)."""
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield Piece(start, os.pread(fd, position - start, start))


def rebuild(state: State, context: Rebuilding) -> int:
    """A description of it; the file is made by the first of them to come by."""
    key = (NAME, state.inode)
    if key not in context.shared:
        context.shared[key] = (_create(state),)
    fd = os.open(f"/proc/self/fd/{context.shared[key][0]}", state.flags | os.O_CLOEXEC)
    if not state.flags & os.O_PATH:
        os.lseek(fd, state.position, os.SEEK_SET)
    return fd


def _create(state: State) -> int:
    fd = os.memfd_create(state.name, _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, state.size)
        for piece in state.pieces:
            _write(fd, piece)
        os.fchmod(fd, state.mode & 0o777)
        if os.geteuid() == 0:
            os.fchown(fd, *state.owner)
        fcntl.fcntl(fd, _F_ADD_SEALS, state.seals)
    except OSError as error:
        os.close(fd)
        raise Refusal("memfd", f"memory file {state.name}: {error.strerror}") from error
    return fd


def _write(fd: int, piece: Piece) -> None:
    view, offset = memoryview(piece.data), piece.offset
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
