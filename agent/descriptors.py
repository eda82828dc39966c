"""A process's descriptors as open file descriptions, and what is common to all kinds that can be moved.

Several descriptors may be one description (dup(2)): they share offset and flags, and are rebuilt as one. Each
kind is one module in `agent.resources` with the functions of `Kind`; what none recognises is refused by name.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import socket
import stat
from typing import Annotated, Any, Final, Protocol

import msgspec
from msgspec import Meta

from agent.api import Blocker
from agent.bounds import MAX_DUPLICATES, U32, FileDescriptor, Word
from agent.holders import Holders
from agent.kernel import pidfd, procfs

# open(2) flags that a description keeps and open(2) takes again
REOPEN_FLAGS: Final = (
    os.O_ACCMODE
    | os.O_APPEND
    | os.O_NONBLOCK
    | os.O_SYNC
    | os.O_DSYNC
    | os.O_DIRECT
    | os.O_NOATIME
    | os.O_DIRECTORY
    | os.O_PATH
    | 0o100000  # O_LARGEFILE
)
O_CLOEXEC: Final = os.O_CLOEXEC
_SOCKET: Final = "socket:["  # how their links begin
_ATTEMPTS: Final = 5  # to list descriptors while they change


class OpenFile(msgspec.Struct):
    """One open file description of the process, as /proc shows it."""

    numbers: tuple[tuple[int, bool], ...]  # descriptor, close-on-exec
    link: str
    flags: int  # F_GETFL's
    position: int
    mode: int  # st_mode
    device: int  # st_rdev
    inode: int
    size: int
    links: int
    owner: tuple[int, int]  # user, group
    info: list[tuple[str, str]]
    socket: tuple[int, int, int] | None = None  # family, type, protocol

    @property
    def fd(self) -> int:
        return self.numbers[0][0]

    @property
    def name(self) -> str:
        """How an error message calls it."""
        shown = self.numbers[0][0] if len(self.numbers) == 1 else ", ".join(str(n) for n, _ in self.numbers)
        return f"fd {shown} ({procfs.printable(self.link)})"


class SourceProcess:
    """What capturing a description needs to know of its process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pidfd = pidfd.open_process(pid)
        self.holders = Holders(pid)
        self._duplicates: dict[int, int] = {}

    def duplicate(self, fd: int) -> int:
        """Our duplicate of one of its descriptors; kept until `close`."""
        if fd not in self._duplicates:
            self._duplicates[fd] = pidfd.getfd(self.pidfd, fd)
        return self._duplicates[fd]

    def forget_duplicates(self) -> None:
        for ours in self._duplicates.values():
            os.close(ours)
        self._duplicates.clear()

    def close(self) -> None:
        self.forget_duplicates()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Refusal(Exception):
    """Something that the destination cannot or will not do, with the kind that the report shows."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    @classmethod
    def by(cls, blocker: Blocker) -> Refusal:
        """What would have been in the way of a check, but appeared after it."""
        hint = f" ({blocker.hint})" if blocker.hint else ""
        return cls(blocker.kind, f"{blocker.what}: {blocker.why}{hint}")


def not_agreed(what: str) -> Refusal:
    return Refusal("not-agreed", f"{what}: not part of what was agreed before the move")


class Rebuilding:
    """What rebuilding descriptions share: objects that several of them are ends of, by the source's inode."""

    def __init__(self) -> None:
        self.shared: dict[tuple[str, int], tuple[int, ...]] = {}
        self.elapsed_ns = 0  # since the capture, as far as known
        # what was agreed before anything was touched: opened files as they are here (device, inode) by path,
        # directories, FIFOs by path, what listens (family, address, port), local addresses of connections
        self.agreed: dict[str, tuple[int, int]] = {}
        self.directories: frozenset[str] = frozenset()
        self.fifos: dict[str, Any] = {}
        self.listening: frozenset[tuple[int, str, int]] = frozenset()
        self.addresses: frozenset[str] = frozenset()
        self.services: frozenset[str] = frozenset()  # paths of unix sockets
        self.ends: dict[tuple[str, int], Any] = {}  # of pairs of sockets, the first that came
        # what the process has opened in pre-copy and cannot have here: by path, or as in `listening`
        self.refused: dict[object, Blocker] = {}
        self.filled: set[tuple[str, int]] = set()
        self.sockets: list[tuple[int, Any]] = []  # rebuilt TCP sockets, locked, with their states
        self.placed: dict[int, int] = {}  # their descriptors in the process

    def not_agreed(self, key: object, what: str) -> Refusal:
        """Of what the process has opened since the check."""
        return Refusal.by(self.refused[key]) if key in self.refused else not_agreed(what)

    def close(self) -> None:
        for fds in self.shared.values():
            for fd in fds:
                os.close(fd)
        self.shared.clear()


class Kind(Protocol):
    """What a module under agent.resources offers for one kind of description.

    One whose State can be wrong where each field is right has `validate(state)` too: ValueError.
    """

    State: type[msgspec.Struct]

    def recognise(self, file: OpenFile) -> bool: ...
    def blockers(self, file: OpenFile, process: SourceProcess) -> list[Blocker]: ...
    def capture(self, file: OpenFile, process: SourceProcess) -> Any: ...
    def rebuild(self, state: Any, context: Rebuilding) -> int: ...


class Descriptor(msgspec.Struct):
    """One rebuilt description and where the process wants it. `state` is the kind's, encoded."""

    kind: Word
    numbers: Annotated[tuple[tuple[FileDescriptor, bool], ...], Meta(min_length=1, max_length=MAX_DUPLICATES)]
    flags: U32
    state: msgspec.Raw


def _fdinfo_value(info: list[tuple[str, str]], name: str) -> str:
    return next(value for key, value in info if key == name)


def open_file(process: SourceProcess, fd: int, link: str) -> OpenFile:
    pid = process.pid
    info = procfs.fdinfo(pid, fd)
    flags = int(_fdinfo_value(info, "flags"), 8)
    if link.startswith(_SOCKET):
        return _open_socket(process, fd, link, flags, info)
    found = os.stat(f"/proc/{pid}/fd/{fd}")
    return OpenFile(
        numbers=((fd, bool(flags & O_CLOEXEC)),),
        link=link,
        flags=flags & ~O_CLOEXEC,
        position=int(_fdinfo_value(info, "pos")),
        mode=found.st_mode,
        device=found.st_rdev,
        inode=found.st_ino,
        size=found.st_size,
        links=found.st_nlink,
        owner=(found.st_uid, found.st_gid),
        info=info,
    )


def _open_socket(
    process: SourceProcess, fd: int, link: str, flags: int, info: list[tuple[str, str]]
) -> OpenFile:
    """A process may have thousands, so nothing is asked that is the same for all."""
    return OpenFile(
        numbers=((fd, bool(flags & O_CLOEXEC)),),
        link=link,
        flags=flags & ~O_CLOEXEC,
        position=0,
        mode=stat.S_IFSOCK | 0o777,
        device=0,
        inode=int(link[len(_SOCKET) : -1]),
        size=0,
        links=1,
        owner=(0, 0),
        info=info,
        socket=_socket_kind(process.duplicate(fd)),
    )


def _socket_kind(ours: int) -> tuple[int, int, int]:
    sock = socket.socket(fileno=ours)
    try:
        return int(sock.family), int(sock.type) & 0xF, sock.proto
    finally:
        sock.detach()


def open_files(process: SourceProcess) -> list[OpenFile]:
    """All descriptions of a process by their first descriptor; those that are one description together."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return _open_files(process)
        except OSError as error:
            if error.errno != errno.EBADF:  # it runs, and has closed one while we looked
                raise
    return _open_files(process)


def _open_files(process: SourceProcess) -> list[OpenFile]:
    alike: dict[tuple[object, ...], list[OpenFile]] = {}
    for fd, link in procfs.fds(process.pid).items():
        try:
            file = open_file(process, fd, link)
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed since the listing
        alike.setdefault(_likeness(file), []).append(file)
    found = [one for files in alike.values() for one in _descriptions(process.pid, files)]
    return sorted(found, key=lambda file: file.fd)


def _likeness(file: OpenFile) -> tuple[object, ...]:
    """What two descriptors of one description have in common for ever: the cheap half of the comparison."""
    eventfd = next((value for name, value in file.info if name == "eventfd-id"), "")
    return file.link, file.inode, file.flags & os.O_ACCMODE, eventfd


def _descriptions(pid: int, files: list[OpenFile]) -> list[OpenFile]:
    """Some descriptors, each its own file, as descriptions. The kernel orders them (kcmp(2)): n log n."""
    if len(files) == 1:
        return files

    def compare(one: OpenFile, other: OpenFile) -> int:
        return pidfd.compare_files(pid, one.fd, other.fd)

    in_order = sorted(files, key=functools.cmp_to_key(compare))
    found = [in_order[0]]
    for file in in_order[1:]:  # a stable sort: equal ones come by number
        if pidfd.same_file(pid, found[-1].fd, file.fd):
            found[-1].numbers += file.numbers
        else:
            found.append(file)
    return found


def path_blockers(path: str, what: str) -> list[Blocker]:
    """Paths are sent as text."""
    if procfs.is_text(path):
        return []
    return [Blocker(kind="path-name", what=what, why="its path is not UTF-8", hint="rename it")]


def common_blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    """What no kind supports: signal-driven I/O, paths that are no text."""
    found = path_blockers(file.link, file.name)
    if file.flags & 0o20000:  # FASYNC
        found.append(
            Blocker(kind="signal-driven-io", what=file.name, why="O_ASYNC is set", hint="clear O_ASYNC")
        )
    if file.flags & os.O_PATH:
        return found
    with_owner = fcntl.fcntl(process.duplicate(file.fd), fcntl.F_GETOWN) if stat.S_ISSOCK(file.mode) else 0
    if with_owner:
        found.append(
            Blocker(kind="signal-driven-io", what=file.name, why="F_SETOWN is set", hint="clear F_SETOWN")
        )
    return found
