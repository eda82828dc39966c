"""Files that both hosts must have: executables, libraries, mapped and opened regular files.

A file is the same on the other host if its path, size and content hash are the same there. The build id makes
the message better, and stands for the content of what is mapped so late that only the pause is left to
describe it. Nothing is ever overwritten: a file that is missing may be copied (`--copy-files`), one that
differs is refused by name.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from agent.api import Blocker
from agent.kernel import elf
from agent.unmovable import Unmovable

_CHUNK: Final = 1 << 20
HURRIED_SIZE: Final = 4 << 20  # whose digest takes a few milliseconds


class FileRef(msgspec.Struct, frozen=True):
    """A regular file by what is in it: digest, or build id alone; neither where only the size matters."""

    path: str
    size: int
    mode: int
    digest: bytes = b""  # SHA-256
    build_id: str = ""
    # file system id and inode: equal on two hosts only if the file system is shared
    identity: tuple[int, int] = (0, 0)
    # size, st_mtime and st_ctime in nanoseconds: whether it was written since
    stamp: tuple[int, int, int] = (0, 0, 0)


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
        return FileRef(path, info.st_size, mode, content, build_id=name, identity=its, stamp=_stamp(info))
    finally:
        os.close(fd)


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
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return identity(fd, os.fstat(fd)) == file.identity
    finally:
        os.close(fd)


def compare_opened(file: FileRef, copy_files: bool) -> Blocker | None:
    """The same for a file that the process may be writing: on a shared file system it may differ by now."""
    return None if shared(file) else compare(file, copy_files)


def compare(file: FileRef, copy_files: bool) -> Blocker | None:
    """What stands in the way of using our own `file.path`; None if nothing."""
    try:
        fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None if copy_files else _missing(file)
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
    if not stat.S_ISREG(info.st_mode):
        return "it is no regular file there"
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
    return not file.build_id or elf.build_id(fd) == file.build_id


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


def read_chunks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while data := file.read(_CHUNK):
            yield data


class IncomingFile:
    """A missing file on its way in: written beside its place, checked, and only then given its name."""

    def __init__(self, file: FileRef) -> None:
        self.file = file
        target = Path(file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(target.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)

    def write(self, data: bytes) -> None:
        os.write(self._fd, data)

    def finish(self) -> None:
        """Give it its name; OSError if the content is not what was announced or the name is taken by now."""
        try:
            if self.file.digest and digest(self._fd) != self.file.digest:
                raise OSError(5, "the copied content does not match", self.file.path)
            os.fchmod(self._fd, self.file.mode)
            # some directory must be named, or Python calls link(2), which does not follow
            os.link(f"/proc/self/fd/{self._fd}", self.file.path, src_dir_fd=self._fd, follow_symlinks=True)
        finally:
            os.close(self._fd)
