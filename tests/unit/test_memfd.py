"""Memory files: content, holes, seals, and descriptions that share one."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.descriptor_case import Make

from agent import kinds
from agent.resources import memfd
from agent.unmovable import Unmovable

ADD_SEALS, GET_SEALS = 1033, 1034
SHRINK, GROW, WRITE = 0x2, 0x4, 0x8
MIB = 1 << 20


def test_content_holes_and_position(make: Make) -> None:
    def setup() -> list[int]:
        fd = os.memfd_create("kept", os.MFD_CLOEXEC)
        os.write(fd, b"begin")
        os.pwrite(fd, b"far away", 300 * MIB)
        os.ftruncate(fd, 400 * MIB)
        os.lseek(fd, 3, os.SEEK_SET)
        return [fd]

    case = make(setup)
    (file,) = case.files()
    assert kinds.kind_of(file) is memfd and not kinds.blockers(file, case.process)
    made = case.move()
    assert os.readlink(f"/proc/self/fd/{made}") == "/memfd:kept (deleted)"
    assert os.read(made, 2) == b"in"
    assert os.pread(made, 8, 300 * MIB) == b"far away"
    here, there = os.stat(f"/proc/{case.pid}/fd/{file.fd}"), os.fstat(made)
    assert (there.st_size, there.st_blocks) == (here.st_size, here.st_blocks)
    assert there.st_blocks * 512 < MIB < 400 * MIB == there.st_size


@pytest.mark.parametrize("seals", [SHRINK, GROW | SHRINK, WRITE | GROW | SHRINK])
def test_seals(make: Make, seals: int) -> None:
    def setup() -> list[int]:
        fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
        os.write(fd, b"content")
        fcntl.fcntl(fd, ADD_SEALS, seals)
        return [fd]

    made = make(setup).move()
    assert fcntl.fcntl(made, GET_SEALS) == seals
    assert os.pread(made, 10, 0) == b"content"
    with pytest.raises(PermissionError):
        os.ftruncate(made, 1)
    if seals & WRITE:
        with pytest.raises(PermissionError) as failed:
            os.pwrite(made, b"x", 0)
        assert failed.value.errno == errno.EPERM


def test_one_that_takes_no_seals(make: Make) -> None:
    made = make(lambda: [os.memfd_create("plain", 0)]).move()
    with pytest.raises(PermissionError):
        fcntl.fcntl(made, ADD_SEALS, SHRINK)


def test_two_descriptions_of_one_file(make: Make) -> None:
    def setup() -> list[int]:
        fd = os.memfd_create("twice", os.MFD_CLOEXEC)
        os.write(fd, b"0123456789")
        return [fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)]

    case = make(setup)
    writing, reading = case.rebuild(case.capture(0), case.capture(1))
    os.pwrite(writing, b"new", 4)
    assert os.read(reading, 10) == b"0123new789"
    with pytest.raises(OSError):
        os.write(reading, b"x")


def test_one_that_another_process_has(make: Make) -> None:
    shared = os.memfd_create("shared", 0)
    stranger = subprocess.Popen(["sleep", "1000"], pass_fds=[shared])
    try:
        case = make(lambda: [os.dup(shared)])
        (blocker,) = kinds.blockers(case.files()[0], case.process)
        assert blocker.kind == "memfd" and f"pid {stranger.pid} (sleep)" in blocker.why
    finally:
        stranger.kill()
        stranger.wait()
        os.close(shared)


def test_one_that_is_too_large_for_the_pause(make: Make) -> None:
    def setup() -> list[int]:
        fd = os.memfd_create("large", 0)
        os.posix_fallocate(fd, 0, memfd.MAX_CONTENT + 4096)
        return [fd]

    case = make(setup)
    (blocker,) = kinds.blockers(case.files()[0], case.process)
    assert "travel in the pause" in blocker.why
    with pytest.raises(Unmovable, match="more than"):
        case.capture()


@given(st.binary(max_size=100), st.integers(0, 1 << 20), st.integers(0, 1 << 20))
def test_what_is_received_is_checked(data: bytes, offset: int, size: int) -> None:
    state = memfd.State(1, "x", size, (memfd.Piece(offset, data),), 0, 0o600, (0, 0), os.O_RDWR, 0)
    if offset + len(data) > size:
        with pytest.raises(ValueError, match="beyond the end"):
            memfd.validate(state)
    else:
        memfd.validate(state)
