"""Pipes and FIFOs whose ends are all inside the process, with what is in them: pipe(7), fifo(7), tee(2)."""

from __future__ import annotations

import ctypes
import fcntl
import os
import stat
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from agent.api import Blocker
from agent.bounds import U31, U32, U64, Mode, PathText
from agent.descriptors import OpenFile, Rebuilding, Refusal, SourceProcess, not_agreed
from agent.kernel.errors import check, libc
from agent.resources.files import wider
from agent.tracee import Tracee

NAME: Final = "pipe"
_SPLICE_F_NONBLOCK: Final = 2
_FLAGS: Final = os.O_ACCMODE | os.O_NONBLOCK | os.O_DIRECT


class Fifo(msgspec.Struct, frozen=True):
    """A FIFO that the process has open, for the offer."""

    path: PathText
    mode: Mode
    owner: tuple[U32, U32]


class State(msgspec.Struct, frozen=True):
    inode: U64  # on the source: the ends of one pipe have it in common
    path: PathText  # of a FIFO; "" for a pipe
    mode: Mode  # of a FIFO
    flags: U31
    capacity: Annotated[int, msgspec.Meta(ge=1, le=1 << 29)]
    content: bytes
    owner: tuple[U32, U32] = (0, 0)  # of a FIFO


def validate(state: State) -> None:
    """ValueError for a received state that is none."""
    if state.flags & ~_FLAGS or len(state.content) > state.capacity:
        raise ValueError(f"flags {state.flags:#o}, {len(state.content)} bytes in {state.capacity}")


def recognise(file: OpenFile) -> bool:
    return stat.S_ISFIFO(file.mode)


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    found: list[Blocker] = []
    others = process.holders.other(file.fd, file.link)
    if others:
        found.append(
            Blocker(
                kind="external-pipe",
                what=file.name,
                why=f"its other end is held by {others}, which stays",
                hint="redirect it to a file, or start the program detached",
            )
        )
    if file.flags & os.O_DIRECT:
        found.append(
            Blocker(kind="packet-pipe", what=file.name, why="a pipe in packet mode (O_DIRECT)", hint="")
        )
    return found


def fifo(file: OpenFile) -> Fifo | None:
    """None for a pipe, which has no name."""
    if not recognise(file) or file.link.startswith("pipe:["):
        return None
    return Fifo(file.link, stat.S_IMODE(file.mode), file.owner)


def compare(one: Fifo) -> Blocker | None:
    """On the destination: what stands in the way of that FIFO, which is made if it is missing."""
    kind, hint = "file-differs", "remove what has that name there"
    try:
        found = os.stat(one.path)
    except OSError:
        directory = os.path.dirname(one.path)
        why = _foreign_place(one, directory)
        kind, hint = "directory-missing", f"create {directory} there"
    else:
        why = "it is no FIFO there" if not stat.S_ISFIFO(found.st_mode) else ""
        if not why:
            why = wider(one.owner, one.mode, found)
            kind, hint = "file-owner", "give it the same owner and mode on both hosts"
    return Blocker(kind=kind, what=one.path, why=why, hint=hint) if why else None


def _foreign_place(one: Fifo, directory: str) -> str:
    try:
        found = os.stat(directory)
    except OSError as error:
        return f"the destination cannot make it: {error.strerror}"
    mine = one.owner[0] in (0, found.st_uid) or found.st_mode & 0o002
    return "" if mine else f"{directory} is not a directory of user {one.owner[0]} on the destination"


def capture(file: OpenFile, process: SourceProcess) -> State:
    fd = process.duplicate(file.fd)
    readable = file.flags & os.O_ACCMODE != os.O_WRONLY
    path = "" if file.link.startswith("pipe:[") else file.link
    capacity = fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)
    mode = stat.S_IMODE(file.mode)
    return State(
        file.inode,
        path,
        mode,
        file.flags & _FLAGS,
        capacity,
        _peek(fd, capacity) if readable else b"",
        file.owner,
    )


def _peek(fd: int, capacity: int) -> bytes:
    """What is in a pipe, without taking it out: tee(2) into a pipe of ours of the same capacity."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, capacity)
        count = libc.tee(fd, writing, ctypes.c_size_t(capacity), _SPLICE_F_NONBLOCK)
        if count < 0 and ctypes.get_errno() == 11:  # EAGAIN: empty
            return b""
        check(count, f"pipe {fd}")
        parts = b""
        while len(parts) < count:
            parts += os.read(reading, count - len(parts))
        return parts
    finally:
        os.close(reading)
        os.close(writing)


def rebuild(state: State, context: Rebuilding) -> int:
    """One end; the pipe itself is made by the first of its ends to come by, and filled by a readable one."""
    if state.flags & ~_FLAGS:
        raise not_agreed(f"flags {state.flags:#o} of a pipe")
    key = ("pipe", state.inode)
    if key not in context.shared:
        context.shared[key] = _create(state, context)
    ends = context.shared[key]
    if state.content and key not in context.filled:
        context.filled.add(key)
        _fill(ends[1], state.content)
    mode = state.flags & os.O_ACCMODE
    end = ends[0] if mode == os.O_RDONLY else ends[1]
    # non-blocking while opening: an end must not wait for the other one
    fd = os.open(f"/proc/self/fd/{end}", state.flags | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(fd, fcntl.F_SETFL, state.flags & ~os.O_ACCMODE)
    return fd


def rouse(state: State, fd: int, process: Tracee) -> Callable[[], None]:
    """Let an end have an event (see `agent.silencing`): a byte in an empty pipe, or room in a full one."""
    other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    readable = state.flags & os.O_ACCMODE != os.O_WRONLY
    if readable:
        os.write(other, b"\0")
    else:
        fcntl.fcntl(other, fcntl.F_SETPIPE_SZ, 2 * state.capacity)

    def calm() -> None:
        if readable:
            os.read(other, 1)
        else:
            fcntl.fcntl(other, fcntl.F_SETPIPE_SZ, state.capacity)
        os.close(other)

    return calm


def _create(state: State, context: Rebuilding) -> tuple[int, int]:
    if state.path:
        if state.path in context.refused and state.path not in context.fifos:
            raise context.not_agreed(state.path, state.path)
        if state.path in context.fifos:
            _make(context.fifos[state.path])
        reading, writing = _open_fifo(state)
    else:
        reading, writing = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, state.capacity)
    return reading, writing


def _make(one: Fifo) -> None:
    """A FIFO is only a name: one that is missing is made."""
    mask = os.umask(0)
    try:
        os.mkfifo(one.path, one.mode & 0o777)
    except FileExistsError:
        return
    finally:
        os.umask(mask)
    made = os.open(one.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.geteuid() == 0 and stat.S_ISFIFO(os.fstat(made).st_mode):
            os.chown(f"/proc/self/fd/{made}", *one.owner)
    finally:
        os.close(made)


def _open_fifo(state: State) -> tuple[int, int]:
    """Both ends of what is one, and the process's to have; anything else of that name is not opened."""
    looked = os.open(state.path, os.O_PATH | os.O_CLOEXEC)
    try:
        found = os.fstat(looked)
        if not stat.S_ISFIFO(found.st_mode):
            raise not_agreed(f"{state.path} is no FIFO")
        if why := wider(state.owner, state.mode, found):
            raise Refusal("file-owner", f"{state.path}: {why}")
        place = f"/proc/self/fd/{looked}"
        reading = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return reading, os.open(place, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(looked)


def _fill(fd: int, content: bytes) -> None:
    """The agent's own end never blocks on a full pipe: the content fits, it was in one of this capacity."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
