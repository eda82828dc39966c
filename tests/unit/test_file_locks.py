"""Locks: seen, taken on a file of the destination's own, and never on one that both hosts see."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.descriptor_case import Case, Make, captured_here

from agent import kinds
from agent.descriptors import Descriptor, Refusal
from agent.resources import file_locks, regular_file
from agent.resources.file_locks import Lock

OFD_SETLK = 37
WHOLE = Lock("FLOCK", True)


def ofd(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, OFD_SETLK, struct.pack("<hhxxxxqqixxxx", kind, os.SEEK_SET, start, length, 0))


TAKEN: dict[str, tuple[Callable[[int], object], Lock]] = {
    "flock": (lambda fd: fcntl.flock(fd, fcntl.LOCK_EX), WHOLE),
    "flock-shared": (lambda fd: fcntl.flock(fd, fcntl.LOCK_SH), Lock("FLOCK", False)),
    "ofd": (lambda fd: ofd(fd, fcntl.F_WRLCK, 3, 4), Lock("OFDLCK", True, 3, 6)),
    "ofd-to-the-end": (lambda fd: ofd(fd, fcntl.F_RDLCK, 3, 0), Lock("OFDLCK", False, 3)),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "file"
    found.write_bytes(b"0123456789")
    return found


def opened(make: Make, path: Path, *takes: Callable[[int], object]) -> Case:
    def setup() -> list[int]:
        fd = os.open(path, os.O_RDWR)
        for take in takes:
            take(fd)
        return [fd]

    return make(setup)


def another(path: Path, case: Case) -> None:
    """The destination's own file of that name, as compared."""
    path.rename(path.with_suffix(".there"))
    path.write_bytes(b"0123456789")
    found = path.stat()
    case.context.agreed[str(path)] = (found.st_dev, found.st_ino)


def rebuilt(case: Case, captured: Descriptor, path: Path) -> int:
    another(path, case)
    return case.rebuild(captured)[0]


@pytest.mark.parametrize("name", TAKEN)
def test_locks_of_a_description(make: Make, path: Path, name: str) -> None:
    take, lock = TAKEN[name]
    case = opened(make, path, take)
    assert not kinds.blockers(case.files()[0], case.process)
    assert case.state().locks == (lock,)
    made = rebuilt(case, case.capture(), path)
    assert captured_here(made).locks == (lock,)
    with path.open("r+b") as stranger, pytest.raises(BlockingIOError):
        if lock.kind == "FLOCK":
            fcntl.flock(stranger, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            ofd(stranger.fileno(), fcntl.F_WRLCK, 5, 1)


def test_those_of_the_process_belong_to_the_descriptions_that_took_them(make: Make, path: Path) -> None:
    def setup() -> list[int]:
        writing, reading = os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)
        fcntl.lockf(writing, fcntl.LOCK_EX, 2, 1)
        fcntl.lockf(reading, fcntl.LOCK_SH, 2, 5)
        return [writing, reading]

    case = make(setup)
    exclusive, common = Lock("POSIX", True, 1, 2), Lock("POSIX", False, 5, 6)
    assert case.state(0).locks == (exclusive,)
    assert case.state(1).locks == (common,)


def test_never_on_a_file_that_both_hosts_see(make: Make, path: Path) -> None:
    case = opened(make, path, TAKEN["flock"][0])
    with pytest.raises(Refusal, match="both hosts see the file") as refused:
        case.move()
    assert refused.value.kind == "file-lock"
    reference = regular_file.reference(case.files()[0], case.process)
    assert reference is not None and reference.locked


def test_one_that_another_process_has_there(make: Make, path: Path) -> None:
    case = opened(make, path, TAKEN["flock"][0])
    captured = case.capture()
    another(path, case)
    with path.open() as stranger:
        fcntl.flock(stranger, fcntl.LOCK_SH)
        with pytest.raises(Refusal, match="another process has it locked on the destination"):
            case.rebuild(captured)


def test_a_lease_is_refused_and_not_broken(make: Make, path: Path) -> None:
    def setup() -> list[int]:
        fd = os.open(path, os.O_RDONLY)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        return [fd]

    case = make(setup)
    blocker = kinds.blockers(case.files()[0], case.process)[0]
    assert blocker.kind == "file-lock" and "LEASE" in blocker.why
    assert regular_file.reference(case.files()[0], case.process) is None
    assert file_locks.has_lease(case.files()[0])


def test_where_no_lock_is_kept_all_are_refused(make: Make) -> None:
    def setup() -> list[int]:
        fd = os.memfd_create("locked")
        fcntl.flock(fd, fcntl.LOCK_EX)
        return [fd]

    case = make(setup)
    (blocker,) = kinds.blockers(case.files()[0], case.process)
    assert blocker.kind == "file-lock" and "FLOCK" in blocker.why
