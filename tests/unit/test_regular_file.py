"""Regular files, directories and paths: position, flags, and the content of what has no name any more."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from unit.descriptor_case import Make, captured_here, status_flags

from agent import kinds
from agent.descriptors import Refusal
from agent.resources import regular_file
from agent.unmovable import Unmovable


@pytest.mark.parametrize(
    "flags",
    [
        os.O_RDONLY,
        os.O_WRONLY,
        os.O_RDWR,
        os.O_RDWR | os.O_APPEND | os.O_NONBLOCK,
        os.O_RDONLY | os.O_NOATIME,
    ],
)
def test_regular_files(make: Make, tmp_path: Path, flags: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")

    def setup() -> list[int]:
        fd = os.open(path, flags)
        os.lseek(fd, 7, os.SEEK_SET)
        return [fd]

    case = make(setup)
    assert kinds.kind_of(case.files()[0]) is regular_file
    assert kinds.blockers(case.files()[0], case.process) == []
    ours = case.move()
    assert captured_here(ours) == case.state()
    assert os.lseek(ours, 0, os.SEEK_CUR) == 7
    assert status_flags(ours) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK) == flags & ~os.O_NOATIME
    if flags & os.O_APPEND:
        os.write(ours, b"x")
        assert path.read_bytes() == b"0123456789x"


def test_directories_and_paths(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"abc")

    def setup() -> list[int]:
        return [os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), os.open(file, os.O_PATH)]

    case = make(setup)
    for index, path in enumerate((tmp_path, file)):
        ours = case.move(index)
        assert captured_here(ours) == case.state(index)
        assert os.stat(f"/proc/self/fd/{ours}").st_ino == path.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.read(case.ours[1], 1)


def test_a_file_that_has_no_name_any_more(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"

    def setup() -> list[int]:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o640)
        os.write(fd, b"hidden" * 1000)
        os.lseek(fd, 3, os.SEEK_SET)
        os.unlink(path)
        return [fd]

    case = make(setup)
    assert kinds.blockers(case.files()[0], case.process) == []
    ours = case.move()
    assert os.fstat(ours).st_nlink == 0 and os.fstat(ours).st_dev == tmp_path.stat().st_dev
    assert stat.S_IMODE(os.fstat(ours).st_mode) == 0o640
    assert os.lseek(ours, 0, os.SEEK_CUR) == 3
    assert os.pread(ours, 10_000, 0) == b"hidden" * 1000
    assert status_flags(ours) & os.O_APPEND
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_changed_since_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    case = make(lambda: [os.open(path, os.O_RDONLY)])
    captured = case.capture()
    path.write_bytes(b"short")
    with pytest.raises(Refusal, match="10 bytes on the source, 5 here"):
        case.rebuild(captured)


def test_a_file_whose_name_leads_elsewhere_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "other name")
    case = make(lambda: [os.open(path, os.O_RDONLY)])
    path.unlink()
    path.write_bytes(b"new")
    assert [b.kind for b in kinds.blockers(case.files()[0], case.process)] == ["file-moved"]


def test_a_deleted_file_that_grew_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with path.open("r+b", buffering=0) as ours:

        def setup() -> list[int]:
            fd = os.open(path, os.O_RDONLY)
            path.unlink()
            return [fd]

        case = make(setup)
        file = case.files()[0]
        monkeypatch.setattr(regular_file, "MAX_DELETED", 10)
        assert kinds.blockers(file, case.process) == []
        assert len(regular_file.capture(file, case.process).content or b"") == 10
        ours.seek(0, os.SEEK_END)
        ours.write(b"!")
        with pytest.raises(Unmovable, match="more than 10 bytes") as refused:
            regular_file.capture(file, case.process)
        assert refused.value.kind == "deleted-file"
