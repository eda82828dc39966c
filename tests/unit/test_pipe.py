"""Pipes and FIFOs: what is in them goes over, once, and nothing is taken out of the original."""

from __future__ import annotations

import fcntl
import os
import select
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.children import forked
from unit.descriptor_case import Make, captured_here, status_flags

from agent import kinds
from agent.descriptors import Refusal
from agent.resources import pipe


def piped(content: bytes, capacity: int = 65536, flags: int = 0) -> Callable[[], list[int]]:
    def setup() -> list[int]:
        reading, writing = os.pipe2(flags)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, capacity)
        if content:
            assert os.write(writing, content) == len(content)
        return [reading, writing]

    return setup


CONTENTS = [b"", b"x", os.urandom(4095), os.urandom(4097), os.urandom(65536)]


@pytest.mark.parametrize("content", CONTENTS, ids=len)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_pipe_with_what_is_in_it(make: Make, content: bytes, order: tuple[int, int]) -> None:
    case = make(piped(content))
    assert case.state(0).content == content and case.state(1).content == b""
    ends = dict(zip(order, case.rebuild(*(case.capture(n) for n in order)), strict=True))
    assert os.stat(ends[0]).st_ino == os.stat(ends[1]).st_ino
    os.set_blocking(ends[0], False)
    os.set_blocking(ends[1], False)
    if len(content) < 65536:
        assert os.write(ends[1], b"more") == 4
    found = b""
    while data := os.read(ends[0], 1 << 17) if select.select([ends[0]], [], [], 0)[0] else b"":
        found += data
    assert found == content + (b"more" if len(content) < 65536 else b"")
    # nothing was taken out of the original
    assert case.state(0).content == content


@pytest.mark.parametrize("capacity", [4096, 65536, 1 << 20])
def test_capacity_and_flags(make: Make, capacity: int) -> None:
    case = make(piped(b"abc", capacity, os.O_NONBLOCK))
    ours = case.rebuild(case.capture(0), case.capture(1))
    for index, fd in enumerate(ours):
        assert fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) == capacity
        assert (
            status_flags(fd) & (os.O_ACCMODE | os.O_NONBLOCK)
            == (os.O_RDONLY, os.O_WRONLY)[index] | os.O_NONBLOCK
        )
        before, after = case.state(index), captured_here(fd)
        assert (after.capacity, after.flags, after.content) == (before.capacity, before.flags, before.content)


def test_many_small_pieces_in_a_full_pipe(make: Make) -> None:
    """Pieces that came by splice(2) take a slot each: the pipe is full of 160 bytes, and all are found."""

    def setup() -> list[int]:
        reading, writing = os.pipe2(os.O_NONBLOCK)
        for number in range(16):
            source, sink = os.pipe()
            os.write(sink, bytes([number]) * 10)
            assert os.splice(source, writing, 10) == 10
        assert not select.select([], [writing], [], 0)[1]
        return [reading, writing]

    case = make(setup)
    expected = b"".join(bytes([n]) * 10 for n in range(16))
    assert case.state(0).content == expected
    ours = case.rebuild(case.capture(0), case.capture(1))
    assert os.read(ours[0], 1000) == expected


def test_the_end_of_a_pipe_whose_writer_is_gone(make: Make) -> None:
    def setup() -> list[int]:
        reading, writing = os.pipe()
        os.write(writing, b"last words")
        os.close(writing)
        return [reading]

    ours = make(setup).move()
    assert os.read(ours, 100) == b"last words"
    assert os.read(ours, 100) == b""


def test_a_pipe_whose_reader_is_gone(make: Make) -> None:
    def setup() -> list[int]:
        reading, writing = os.pipe()
        os.close(reading)
        return [writing]

    with pytest.raises(BrokenPipeError):
        os.write(make(setup).move(), b"x")


def test_a_fifo(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path, 0o640)

    def setup() -> list[int]:
        both = os.open(path, os.O_RDWR)
        os.write(both, b"in the fifo")
        return [both]

    case = make(setup)
    state = case.state()
    assert (state.path, state.content, state.mode) == (str(path), b"in the fifo", 0o640)
    captured = case.capture()
    os.rename(path, tmp_path / "away")  # the destination may not have it yet
    (ours,) = case.rebuild(captured)
    assert stat.S_ISFIFO(os.stat(path).st_mode) and stat.S_IMODE(os.stat(path).st_mode) == 0o640
    assert os.stat(path).st_ino == os.fstat(ours).st_ino
    assert os.read(ours, 100) == b"in the fifo"


def test_what_is_in_a_pipe_is_there_once(make: Make, tmp_path: Path) -> None:
    """However many descriptions can read it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)

    def setup() -> list[int]:
        both = os.open(path, os.O_RDWR)
        os.write(both, b"once")
        return [both, os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY)]

    case = make(setup)
    assert [case.state(n).content for n in range(3)] == [b"once", b"once", b""]
    captured = [case.capture(n) for n in range(3)]
    path.unlink()  # or it would be the very same pipe
    ours = case.rebuild(*captured)
    assert os.read(ours[1], 100) == b"once"
    assert not select.select([ours[0], ours[1]], [], [], 0)[0]


def test_pipes_of_others_and_packet_pipes_are_refused(make: Make) -> None:
    case = make(piped(b"", flags=os.O_DIRECT))
    found = kinds.blockers(case.files()[1], case.process)
    assert [b.kind for b in found] == ["packet-pipe"]
    reading, writing = os.pipe()
    case = make(lambda: [reading])
    with forked(lambda: None) as other:
        (blocker,) = pipe.blockers(case.files()[0], case.process)
        assert blocker.kind == "external-pipe" and f"pid {other}" in blocker.why
    os.close(reading)
    os.close(writing)


def test_a_fifo_that_nobody_spoke_of_is_not_made(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    case = make(lambda: [os.open(path, os.O_RDWR)])
    captured = case.capture()
    path.unlink()
    case.context.fifos.clear()
    with pytest.raises(FileNotFoundError):
        case.rebuild(captured)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_fifo_is_its_owner_s(make: Make, tmp_path: Path) -> None:
    """Made again, it is; and one of another user's is not opened, whatever leads to it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    os.chown(path, 64001, 64002)
    case = make(lambda: [os.open(path, os.O_RDWR)])
    captured, offered = case.capture(), pipe.fifo(case.files()[0])
    assert offered is not None
    path.unlink()
    case.rebuild(captured)
    assert (path.stat().st_uid, path.stat().st_gid) == (64001, 64002)
    assert pipe.compare(offered) is None
    os.rename(path, tmp_path / "other")
    os.chown(tmp_path / "other", 0, 0)
    path.symlink_to(tmp_path / "other")
    blocker = pipe.compare(offered)
    assert blocker is not None and blocker.kind == "file-owner"
    with pytest.raises(Refusal, match="owner 64001:64002 on the source, 0:0"):
        case.rebuild(captured)


def test_what_stands_in_the_way_of_a_fifo(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    one = pipe.Fifo(str(path), 0o600, (os.getuid(), os.getgid()))
    assert pipe.compare(one) is None
    path.write_text("")
    blocker = pipe.compare(one)
    assert blocker is not None and blocker.why == "it is no FIFO there"
    blocker = pipe.compare(pipe.Fifo(str(tmp_path / "no" / "where"), 0o600, (0, 0)))
    assert blocker is not None and blocker.kind == "directory-missing"
    tmp_path.chmod(0o755)
    blocker = pipe.compare(pipe.Fifo(str(tmp_path / "absent"), 0o600, (64001, 64001)))
    assert blocker is not None and "is not a directory of user 64001" in blocker.why
