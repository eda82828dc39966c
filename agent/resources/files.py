"""Files that both hosts must have: executables, libraries, mapped and opened regular files.

A file is the same on the other host if its path, size and content hash are the same there. The build id makes
the message better, and stands for the content of what is mapped so late that only the pause is left to
describe it. Nothing is ever overwritten: a file that is missing may be copied (`--copy-files`), one that
differs is refused by name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Final

import msgspec

from agent.api import Blocker
from agent.bounds import I64, U32, U63, U64, Digest, Mode, PathText, Word
from agent.kernel import elf
from agent.kernel.errors import about
from agent.resources import file_locks
from agent.unmovable import Unmovable

_CHUNK: Final = 1 << 20
HURRIED_SIZE: Final = 4 << 20  # whose digest takes a few milliseconds


class FileRef(msgspec.Struct, frozen=True):
    """A regular file by what is in it: digest, or build id alone."""

    path: PathText
    size: U63
    mode: Mode
    digest: Digest = b""  # SHA-256
    build_id: Word = ""
    # file system id and inode: equal on two hosts only if the file system is shared
    identity: tuple[U64, U64] = (0, 0)
    # size, st_mtime and st_ctime in nanoseconds: whether it was written since
    stamp: tuple[I64, I64, I64] = (0, 0, 0)
    owner: tuple[U32, U32] = (0, 0)  # user and group
    locked: bool = False  # by the process


def digest(fd: int) -> bytes:
    """SHA-256 of a whole file, through an open descriptor; its offset is not used."""
    result = hashlib.sha256()
    position = 0
    while data := os.pread(fd, _CHUNK, position):
        result.update(data)
        position += len(data)
    return result.digest()


def build_id(path: str) -> str:
    """The GNU build id of an ELF file, "" if there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return ""
    try:
        return elf.build_id(fd)
    finally:
        os.close(fd)


def describe(path: str, through: str, hurried: bool = False) -> FileRef:
    """The file `path`, read through `through` (a /proc link that leads to the very inode).

    `hurried`, in a pause: its build id will do, and what has none must be small; Unmovable if it is not.
    """
    fd = os.open(through, os.O_RDONLY | os.O_CLOEXEC)
    try:
        info = os.fstat(fd)
        mode, its = stat.S_IMODE(info.st_mode), identity(fd, info)
        name = elf.build_id(fd) if hurried else ""
        if hurried and not name and info.st_size > HURRIED_SIZE:
            why = f"{path} ({info.st_size} bytes) was mapped too late to be compared before the pause"
            raise Unmovable("file-new", why)
        content = b"" if name else digest(fd)
        stamp, owner = _stamp(info), (info.st_uid, info.st_gid)
        return FileRef(path, info.st_size, mode, content, name, identity=its, stamp=stamp, owner=owner)
    finally:
        os.close(fd)


def open_regular(path: str, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; NotRegular, OSError. Opening a device, or a FIFO, may do something."""
    looked = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(looked).st_mode):
            raise NotRegular(errno.EINVAL, "it is no regular file", path)
        return os.open(f"/proc/self/fd/{looked}", flags | os.O_CLOEXEC)
    finally:
        os.close(looked)


class NotRegular(OSError):
    """Something else has this name."""


def wider(owner: tuple[int, int], mode: int, here: os.stat_result) -> str:
    """Why a descriptor of theirs would give more of this file than it did of their own; "" if it would not.

    It is opened with the agent's rights, if those are root's: a name may lead to somebody else's file (a
    symbolic link).
    """
    if os.geteuid() != 0:
        return ""
    if (here.st_uid, here.st_gid) != owner:
        return f"owner {owner[0]}:{owner[1]} on the source, {here.st_uid}:{here.st_gid} on the destination"
    if mode & 0o777 & ~here.st_mode:
        return f"mode {mode & 0o777:04o} on the source, {here.st_mode & 0o777:04o} on the destination"
    return ""


def identity(fd: int, info: os.stat_result) -> tuple[int, int]:
    return os.fstatvfs(fd).f_fsid, info.st_ino


def stamp(path: str) -> tuple[int, int, int] | None:
    """By which one sees whether a file was written since it was described; None if it is gone."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(info: os.stat_result) -> tuple[int, int, int]:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns


def shared(file: FileRef) -> bool:
    """Whether our file of that name is the very same one, on a file system that both hosts have."""
    try:
        fd = os.open(file.path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return identity(fd, os.fstat(fd)) == file.identity
    finally:
        os.close(fd)


def compare_opened(file: FileRef, copy_files: bool) -> Blocker | None:
    """The same for a file that the process may be writing: on a shared file system it may differ by now."""
    if shared(file):
        found = file_locks.shared_blocker(file.path) if file.locked else None
    else:
        found = compare(file, copy_files)
    if found is not None or not os.path.exists(file.path):
        return found
    why = wider(file.owner, file.mode, os.stat(file.path))
    hint = "give it the same owner and mode on both hosts"
    return Blocker(kind="file-owner", what=file.path, why=why, hint=hint) if why else None


def compare(file: FileRef, copy_files: bool) -> Blocker | None:
    """What stands in the way of using our own `file.path`; None if nothing."""
    try:
        fd = open_regular(file.path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None if copy_files else _missing(file)
    except NotRegular:
        return _differs(file, "it is no regular file there")
    except OSError as error:
        return _differs(file, f"it cannot be opened there: {error.strerror}")
    try:
        how = _difference(file, fd)
    finally:
        os.close(fd)
    return _differs(file, how) if how else None


def _difference(file: FileRef, fd: int) -> str:
    """In what ours is another; "" if it is the same."""
    info = os.fstat(fd)
    if info.st_size != file.size:
        return f"{file.size} bytes here, {info.st_size} there"
    if _same_content(file, fd, info):
        return ""
    theirs = elf.build_id(fd)
    if file.build_id and theirs:
        return f"build id {file.build_id} here, {theirs} there"
    return "same size, other content"


def _same_content(file: FileRef, fd: int, info: os.stat_result) -> bool:
    if identity(fd, info) == file.identity and _stamp(info) == file.stamp:
        return True  # the very same file, or a clone of it that nobody has changed
    if file.digest:
        return digest(fd) == file.digest
    return bool(file.build_id) and elf.build_id(fd) == file.build_id


def _missing(file: FileRef) -> Blocker:
    return Blocker(
        kind="file-missing",
        what=file.path,
        why="the process uses it and the destination does not have it",
        hint="install the same package there, share the file system, or use --copy-files",
    )


def _differs(file: FileRef, how: str) -> Blocker:
    return Blocker(
        kind="file-differs",
        what=file.path,
        why=how,
        hint="install the same version on both hosts",
    )


def missing(files: list[FileRef]) -> list[str]:
    return [f.path for f in files if not os.path.lexists(f.path)]


def read_chunks(file: FileRef) -> Iterator[bytes]:
    """What is in it, if its path still leads to what was described; Unmovable, OSError."""
    with open(open_regular(file.path), "rb") as opened:
        if identity(opened.fileno(), os.fstat(opened.fileno())) != file.identity:
            raise Unmovable("file-changed", f"{file.path} was replaced during the migration")
        while data := opened.read(_CHUNK):
            yield data


class IncomingFile:
    """A missing file on its way in: written beside its place, checked, and only then given its name.

    It belongs to whom it belongs to there, and has their mode without setuid, setgid and sticky.
    """

    def __init__(self, file: FileRef) -> None:
        """OSError; EPERM where its owner may not put files."""
        self.file = file
        self._left = file.size
        directory, self._name = os.path.split(file.path)
        self._directory = _open_directory(directory, file)
        try:
            place = f"/proc/self/fd/{self._directory}"
            self._fd = os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._directory)
            raise

    def write(self, data: bytes) -> None:
        """OSError."""
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EFBIG, f"more than the {self.file.size} bytes announced", self.file.path)
        view = memoryview(data)
        with about(self.file.path):
            while view:
                view = view[os.write(self._fd, view) :]

    def finish(self) -> None:
        """Give it its name; OSError if the content is not what was announced or the name is taken by now."""
        try:
            if self._left or digest(self._fd) != self.file.digest:
                raise OSError(errno.EIO, "the copied content does not match", self.file.path)
            if os.geteuid() == 0:
                os.fchown(self._fd, *self.file.owner)
            os.fchmod(self._fd, self.file.mode & 0o777)
            source = f"/proc/self/fd/{self._fd}"
            os.link(source, self._name, dst_dir_fd=self._directory, follow_symlinks=True)
        finally:
            self.close()

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._directory)


def _open_directory(path: str, file: FileRef) -> int:
    """The directory, made with those above it if need be. OSError."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return _make_directory(path, file)
    found = os.fstat(fd)
    if file.owner[0] in (0, found.st_uid) or found.st_mode & 0o002:
        return fd
    os.close(fd)
    why = f"{path} is not a directory of user {file.owner[0]}, whose file it would be"
    raise OSError(errno.EPERM, why, file.path)


def _make_directory(path: str, file: FileRef) -> int:
    above, name = os.path.split(path)
    parent = _open_directory(above, file)
    try:
        os.mkdir(name, 0o755, dir_fd=parent)
        made = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        if os.geteuid() == 0:
            os.chown(f"/proc/self/fd/{made}", *file.owner)
        return made
    finally:
        os.close(parent)
