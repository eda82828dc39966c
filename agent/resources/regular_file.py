"""Regular files and directories, by path: open(2), lseek(2), with their locks.
Open-and-deleted files come with their content.
"""

from __future__ import annotations

import os
import stat
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from agent.api import Blocker
from agent.bounds import U31, U32, U63, U64, Mode, PathText
from agent.descriptors import (
    REOPEN_FLAGS,
    OpenFile,
    Rebuilding,
    Refusal,
    SourceProcess,
    not_agreed,
)
from agent.resources import file_locks
from agent.resources.file_locks import Lock
from agent.resources.files import FileRef, describe, identity, wider
from agent.unmovable import Unmovable

NAME: Final = "regular-file"
KEEPS_LOCKS: Final = True
MAX_DELETED: Final = 64 * 1024 * 1024
_DELETED: Final = " (deleted)"


class State(msgspec.Struct, frozen=True):
    path: PathText
    flags: U31
    position: U63
    size: U63
    inode: U64
    mode: Mode = 0o600
    content: Annotated[bytes, Meta(max_length=MAX_DELETED)] | None = None  # of a file without a name
    identity: tuple[U64, U64] = (0, 0)  # of one that has, as in FileRef
    owner: tuple[U32, U32] = (0, 0)
    locks: Annotated[tuple[Lock, ...], Meta(max_length=1 << 16)] = ()


def validate(state: State) -> None:
    """ValueError for a received state that is none: open(2) must not be told to create or cut a file."""
    if state.flags & ~REOPEN_FLAGS:
        raise ValueError(f"flags {state.flags:#o}")
    if any(lock.end is not None and lock.end < lock.start for lock in state.locks):
        raise ValueError("a lock that ends before it begins")


def recognise(file: OpenFile) -> bool:
    on_disk = file.link.startswith("/") and not file.link.startswith("/memfd:")  # a namespace is "net:[...]"
    return on_disk and (stat.S_ISREG(file.mode) or stat.S_ISDIR(file.mode))


def _deleted(file: OpenFile) -> bool:
    return file.links == 0 and file.link.endswith(_DELETED)


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    if _deleted(file):
        if stat.S_ISDIR(file.mode):
            return [_refusal("deleted-directory", file, "the directory was removed", "close it")]
        if file.size > MAX_DELETED:
            why = f"a deleted file of {file.size} bytes has no path to find it by"
            return [_refusal("deleted-file", file, why, "close it, or make it smaller than 64 MiB")]
        return []
    if not _path_leads_here(file, process):
        why = "its path does not lead to it any more (renamed, replaced, or under another mount)"
        return [_refusal("file-moved", file, why, "reopen it")]
    return []


def _refusal(kind: str, file: OpenFile, why: str, hint: str) -> Blocker:
    return Blocker(kind=kind, what=file.name, why=why, hint=hint)


def _path_leads_here(file: OpenFile, process: SourceProcess) -> bool:
    try:
        there = os.stat(f"/proc/{process.pid}/root{file.link}")
        here = os.stat(f"/proc/{process.pid}/fd/{file.fd}")
    except OSError:
        return False
    return (there.st_ino, there.st_dev) == (here.st_ino, here.st_dev)


def reference(file: OpenFile, process: SourceProcess) -> FileRef | None:
    """What the destination must have, compared by size and content; None for a directory or deleted file."""
    if _deleted(file) or not stat.S_ISREG(file.mode) or file_locks.has_lease(file):
        return None  # opening it would break the lease
    found = describe(file.link, f"/proc/{process.pid}/fd/{file.fd}")
    return msgspec.structs.replace(found, locked=bool(file_locks.held(file)))


def capture(file: OpenFile, process: SourceProcess) -> State:
    deleted = _deleted(file)
    content = None
    if deleted:
        with open(f"/proc/{process.pid}/fd/{file.fd}", "rb") as source:
            content = source.read(MAX_DELETED + 1)
        if len(content) > MAX_DELETED:  # somebody else, who has it too, has made it longer since
            raise Unmovable("deleted-file", f"{file.name}: a deleted file of more than {MAX_DELETED} bytes")
    path = file.link.removesuffix(_DELETED) if deleted else file.link
    identity = (os.statvfs(f"/proc/{process.pid}/fd/{file.fd}").f_fsid, file.inode)
    return State(
        path,
        file.flags & REOPEN_FLAGS,
        file.position,
        file.size,
        file.inode,
        stat.S_IMODE(file.mode),
        content,
        identity,
        file.owner,
        file_locks.held(file),
    )


def rebuild(state: State, context: Rebuilding) -> int:
    fd = _recreate(state) if state.content is not None else _open(state, context)
    try:
        file_locks.take(fd, state.path, state.locks)
    except BaseException:
        os.close(fd)
        raise
    if not state.flags & os.O_PATH:
        os.lseek(fd, state.position, os.SEEK_SET)
    return fd


def _open(state: State, context: Rebuilding) -> int:
    """Looked at first: nothing but a file or directory that it may have is opened."""
    if state.path in context.refused and state.path not in context.agreed:
        raise context.not_agreed(state.path, state.path)
    try:
        looked = os.open(state.path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        why = "the process has it open, and the destination does not have it (any more)"
        raise Refusal("file-missing", f"{state.path}: {why}") from None
    try:
        found = os.fstat(looked)
        if stat.S_ISREG(found.st_mode):
            _compare(state, context, looked, found)
        elif not stat.S_ISDIR(found.st_mode):
            raise not_agreed(f"{state.path} is neither file nor directory")
        elif state.path not in context.directories:
            _compare_owner(state, found)
        return os.open(f"/proc/self/fd/{looked}", state.flags | os.O_CLOEXEC)
    finally:
        os.close(looked)


def _compare(state: State, context: Rebuilding, fd: int, found: os.stat_result) -> None:
    """The file whose content was compared at the offer; or opened later: then only the very same will do."""
    if found.st_size != state.size:
        raise Refusal("file-differs", f"{state.path}: {state.size} bytes on the source, {found.st_size} here")
    _compare_owner(state, found)
    if state.locks and identity(fd, found) == state.identity:
        raise Refusal.by(file_locks.shared_blocker(state.path))
    compared = context.agreed.get(state.path) == (found.st_dev, found.st_ino)
    if not compared and identity(fd, found) != state.identity:
        raise Refusal(
            "file-differs", f"{state.path} was opened during the migration and is another file here"
        )


def _compare_owner(state: State, found: os.stat_result) -> None:
    why = wider(state.owner, state.mode, found)
    if why:
        raise Refusal("file-owner", f"{state.path}: {why}")


def _recreate(state: State) -> int:
    """The process's own again, and never setuid: it was its owner's to run as, and would be ours."""
    directory = os.path.dirname(state.path)
    if not os.path.isdir(directory):
        directory = "/tmp"
    nameless = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, state.mode & 0o777)
    try:
        view = memoryview(state.content or b"")
        while view:
            view = view[os.write(nameless, view) :]
        if os.geteuid() == 0:
            os.fchown(nameless, *state.owner)
        return os.open(f"/proc/self/fd/{nameless}", state.flags | os.O_CLOEXEC)
    finally:
        os.close(nameless)
