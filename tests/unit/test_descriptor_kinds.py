"""Each kind of descriptor: captured from a child and rebuilt here it is the same, by its state and by what it does."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.children import forked

from agent import kinds
from agent.descriptors import Descriptor, OpenFile, Rebuilding, SourceProcess, open_files
from agent.kernel.errors import check, libc
from agent.resources import char_device, epoll, eventfd, pipe, regular_file, signalfd, timerfd
from agent.tracee import Batch

SECOND = 1_000_000_000


class Case:
    """What `setup` opens in a child (it returns the descriptors), captured; and rebuilt here."""

    def __init__(self, setup: Callable[[], list[int]]) -> None:
        self.context = Rebuilding()
        self.numbers: list[int] = []
        reading, writing = os.pipe()

        def tell() -> None:
            os.close(reading)
            fds = setup()
            os.write(writing, struct.pack(f"<{len(fds)}i", *fds).ljust(400, b"\xff"))
            os.close(writing)

        self._child = forked(tell)
        self.pid = self._child.__enter__()
        words = struct.unpack("<100i", os.read(reading, 400))
        os.close(reading)
        os.close(writing)
        self.numbers = [n for n in words if n >= 0]
        self.process = SourceProcess(self.pid)
        self.ours: list[int] = []

    def file(self, number: int) -> OpenFile:
        return next(f for f in open_files(self.process) if number in dict(f.numbers))

    def files(self) -> list[OpenFile]:
        return [self.file(n) for n in self.numbers]

    def capture(self, index: int = 0) -> Descriptor:
        return kinds.capture(self.file(self.numbers[index]), self.process)

    def state(self, index: int = 0) -> Any:
        return kinds.decode(self.capture(index))

    def rebuild(self, *descriptors: Descriptor) -> list[int]:
        """Our own copies; what they shared while they were made is closed."""
        made = [kinds.rebuild(d, self.context) for d in descriptors]
        self.ours += made
        self.context.close()
        return made

    def move(self, index: int = 0) -> int:
        return self.rebuild(self.capture(index))[0]

    def close(self) -> None:
        self.context.close()
        for fd in self.ours:
            os.close(fd)
        self.process.close()
        self._child.__exit__(None, None, None)


@pytest.fixture
def make() -> Iterator[Callable[[Callable[[], list[int]]], Case]]:
    cases: list[Case] = []

    def made(setup: Callable[[], list[int]]) -> Case:
        cases.append(Case(setup))
        return cases[-1]

    before = len(os.listdir("/proc/self/fd"))
    yield made
    for case in cases:
        case.close()
    assert len(os.listdir("/proc/self/fd")) == before


Make = Callable[[Callable[[], list[int]]], Case]


def captured_here(fd: int) -> Any:
    """The state of a descriptor of our own, as the engine would capture it."""
    process = SourceProcess(os.getpid())
    try:
        file = next(f for f in open_files(process) if fd in dict(f.numbers))
        return kinds.decode(kinds.capture(file, process))
    finally:
        process.close()


def status_flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


# --- eventfd, signalfd ---


@pytest.mark.parametrize("count", [0, 1, 77, (1 << 64) - 2])
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK, os.EFD_SEMAPHORE, os.EFD_SEMAPHORE | os.EFD_NONBLOCK])
def test_eventfd(make: Make, count: int, flags: int) -> None:
    def setup() -> list[int]:
        fd = os.eventfd(0, flags)
        if count:
            os.eventfd_write(fd, count)
        return [fd]

    case = make(setup)
    assert kinds.kind_of(case.files()[0]) is eventfd
    assert case.state() == eventfd.State(count, bool(flags & os.EFD_SEMAPHORE), flags & os.EFD_NONBLOCK)
    ours = case.move()
    assert captured_here(ours) == case.state()
    os.set_blocking(ours, False)
    if not count:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ours)
    else:
        assert os.eventfd_read(ours) == (1 if flags & os.EFD_SEMAPHORE else count)


def test_signalfd(make: Make) -> None:
    wanted = {signal.SIGUSR2, signal.SIGCHLD, signal.SIGRTMAX, signal.SIGHUP}
    mask = sum(1 << (n - 1) for n in wanted)

    def setup() -> list[int]:
        words = ctypes.c_uint64(mask)
        return [
            check(libc.syscall(289, -1, ctypes.byref(words), 8, flags), "signalfd")
            for flags in (0, os.O_NONBLOCK)
        ]

    case = make(setup)
    assert [kinds.kind_of(f) for f in case.files()] == [signalfd, signalfd]
    for index, flags in enumerate((0, os.O_NONBLOCK)):
        assert case.state(index) == signalfd.State(mask, flags)
        ours = case.move(index)
        assert captured_here(ours) == case.state(index)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    os.kill(os.getpid(), signal.SIGUSR2)
    assert struct.unpack_from("<I", os.read(case.ours[1], 128))[0] == signal.SIGUSR2
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


# --- timerfd ---


def timer(clock: int, value: int, interval: int, flags: int = 0, how: int = 0) -> int:
    fd = check(libc.timerfd_create(clock, flags), "timerfd")
    setting = struct.pack("<4q", interval // SECOND, interval % SECOND, value // SECOND, value % SECOND)
    check(libc.timerfd_settime(fd, how, ctypes.create_string_buffer(setting, 32), None), "timerfd")
    return int(fd)


@pytest.mark.parametrize("clock", [time.CLOCK_REALTIME, time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME])
@pytest.mark.parametrize("interval", [0, 250 * SECOND + 17])
def test_a_timer_under_way(make: Make, clock: int, interval: int) -> None:
    case = make(lambda: [timer(clock, 1000 * SECOND, interval, os.O_NONBLOCK)])
    state = case.state()
    assert (state.clock, state.ticks, state.flags, state.interval_ns) == (clock, 0, os.O_NONBLOCK, interval)
    assert 900 * SECOND < state.remaining_ns <= 1000 * SECOND
    case.context.elapsed_ns = 400 * SECOND
    found = captured_here(case.move())
    assert (found.clock, found.ticks, found.flags, found.interval_ns) == (clock, 0, os.O_NONBLOCK, interval)
    left = state.remaining_ns - 400 * SECOND
    assert left - 100 * SECOND < found.remaining_ns <= left


def test_a_timer_that_ran_out_unread(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 1, 0)])
    assert case.state() == timerfd.State(time.CLOCK_MONOTONIC, 1, 0, 0, 0, 0)
    ours = case.move()
    assert select.select([ours], [], [], 0)[0]
    assert int.from_bytes(os.read(ours, 8), "little") == 1
    assert captured_here(ours) == timerfd.State(time.CLOCK_MONOTONIC, 0, 0, 0, 0, 0)


def test_a_disarmed_timer(make: Make) -> None:
    case = make(lambda: [check(libc.timerfd_create(time.CLOCK_BOOTTIME, 0), "timerfd")])
    assert captured_here(case.move()) == case.state() == timerfd.State(time.CLOCK_BOOTTIME, 0, 0, 0, 0, 0)


def test_a_timer_that_expires_in_the_pause(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 100 * SECOND, 60 * SECOND)])
    case.context.elapsed_ns = 230 * SECOND  # 100, 160, 220, and ten into the fourth
    ours = case.move()
    assert int.from_bytes(os.read(ours, 8), "little") == 3
    assert 0 < captured_here(ours).remaining_ns <= 50 * SECOND


def test_a_periodic_timer_that_nobody_reads_goes_on(make: Make) -> None:
    case = make(lambda: [timer(time.CLOCK_MONOTONIC, 1, 200 * SECOND)])
    state = case.state()
    assert state.ticks == 1
    assert 100 * SECOND < state.remaining_ns <= 200 * SECOND
    case.context.elapsed_ns = 450 * SECOND
    assert int.from_bytes(os.read(case.move(), 8), "little") == 3


def test_a_timer_that_a_clock_change_cancels(make: Make) -> None:
    absolute_and_cancelled = 3

    def setup() -> list[int]:
        then = time.clock_gettime_ns(time.CLOCK_REALTIME) + 1000 * SECOND
        return [timer(time.CLOCK_REALTIME, then, 0, how=absolute_and_cancelled)]

    case = make(setup)
    found = captured_here(case.move())
    assert found.settime_flags & timerfd.TFD_TIMER_CANCEL_ON_SET
    assert 900 * SECOND < found.remaining_ns <= 1000 * SECOND


# --- pipes ---


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
    """Pieces that came through splice(2) take a slot each: the pipe is full of 160 bytes, and all are found."""

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


# --- files ---


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
    with pytest.raises(OSError, match="10 bytes on the source, 5 here"):
        case.rebuild(captured)


def test_a_file_whose_name_leads_elsewhere_is_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "other name")
    case = make(lambda: [os.open(path, os.O_RDONLY)])
    path.unlink()
    path.write_bytes(b"new")
    assert [b.kind for b in kinds.blockers(case.files()[0], case.process)] == ["file-moved"]


def test_locks_are_refused(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")

    def setup() -> list[int]:
        fd = os.open(path, os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return [fd]

    case = make(setup)
    assert [b.kind for b in kinds.blockers(case.files()[0], case.process)] == ["file-lock"]


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
def test_memory_devices(make: Make, name: str) -> None:
    case = make(lambda: [os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK)])
    assert kinds.kind_of(case.files()[0]) is char_device
    ours = case.move()
    assert captured_here(ours) == case.state()
    assert os.fstat(ours).st_rdev == os.stat(f"/dev/{name}").st_rdev
    assert status_flags(ours) & os.O_NONBLOCK


# --- epoll ---


class Here(Batch):
    """A batch that is done at once, by this very process."""

    def __init__(self) -> None:
        super().__init__(0)
        self._kept: list[ctypes.Array[ctypes.c_char]] = []

    def put(self, data: bytes) -> int:
        self._kept.append(ctypes.create_string_buffer(data, len(data)))
        return ctypes.addressof(self._kept[-1])

    def call(self, what: str, number: int, *arguments: int, optional: bool = False) -> int:
        return check(libc.syscall(number, *(ctypes.c_long(a) for a in arguments)), what)


def test_epoll(make: Make) -> None:
    events = select.EPOLLIN | select.EPOLLET

    def setup() -> list[int]:
        watch = select.epoll()
        first, second = os.eventfd(3), os.eventfd(0)
        watch.register(first, events)
        watch.register(second, select.EPOLLIN | select.EPOLLONESHOT)
        keep.append(watch)
        return [watch.fileno(), first, second]

    keep: list[object] = []
    case = make(setup)
    assert kinds.kind_of(case.files()[0]) is epoll
    assert kinds.blockers(case.files()[0], case.process) == []
    state = case.state()
    _watch, first, second = case.numbers
    # the kernel adds EPOLLERR and EPOLLHUP (epoll_ctl(2)); Python's data is the descriptor
    always = select.EPOLLERR | select.EPOLLHUP
    assert {(e.fd, e.events & ~always, e.data & 0xFFFFFFFF) for e in state.entries} == {
        (first, events, first),
        (second, select.EPOLLIN | select.EPOLLONESHOT, second),
    }
    ours = case.move(0)
    for fd in (first, second):  # under their own numbers, as in the process
        made = kinds.rebuild(kinds.capture(case.file(fd), case.process), case.context)
        os.dup2(made, fd) if made != fd else None
        case.ours.append(fd)
        if made != fd:
            os.close(made)
    epoll.add_entries(Here(), ours, state)
    assert set(captured_here(ours).entries) == set(state.entries)
    with select.epoll.fromfd(os.dup(ours)) as copy:
        assert copy.poll(0) == [(first, select.EPOLLIN)]


def test_an_entry_whose_descriptor_was_closed_is_refused(make: Make) -> None:
    def setup() -> list[int]:
        watch = select.epoll()
        first = os.eventfd(3)
        other = os.dup(first)
        watch.register(first, select.EPOLLIN)
        os.close(first)
        keep.append(watch)
        return [watch.fileno(), other]

    keep: list[object] = []
    case = make(setup)
    (blocker,) = kinds.blockers(case.files()[0], case.process)
    assert blocker.kind == "epoll-stale-entry"
    assert epoll.stale(open_files(case.process), case.pid) == [case.files()[0].name]


# --- what is common ---


def test_descriptors_of_one_description_are_one(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")

    def setup() -> list[int]:
        first = os.open(path, os.O_RDONLY)
        second = os.open(path, os.O_RDONLY)  # the same file, another description
        copy = os.dup(first)
        os.set_inheritable(copy, True)
        return [first, second, copy]

    case = make(setup)
    first, second, copy = case.numbers
    assert dict(case.file(first).numbers) == {first: True, copy: False}
    assert dict(case.file(second).numbers) == {second: True}
    assert case.file(first).name == f"fd {first}, {copy} ({path})"


def test_what_no_kind_knows_is_refused_by_name(make: Make) -> None:
    def setup() -> list[int]:
        ours, theirs = socket.socketpair()
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        keep.extend((ours, theirs, datagram))
        memory = os.memfd_create("m")
        fds = [ours.fileno(), datagram.fileno(), memory, os.pidfd_open(os.getpid())]
        return [*fds, os.open("/proc/self/ns/net", os.O_RDONLY), os.open("/dev/tty0", os.O_PATH)]

    keep: list[socket.socket] = []
    case = make(setup)
    found = [kinds.blockers(f, case.process)[0].kind for f in case.files()]
    assert found == ["unix-socket", "udp-socket", "memfd", "pidfd", "namespace", "terminal"]
    assert all(kinds.kind_of(f) is None for f in case.files())
    with pytest.raises(ValueError, match="socket"):
        case.capture(0)


def test_a_kind_that_is_not_known_here() -> None:
    import msgspec

    with pytest.raises(ValueError, match="unknown kind 'door'"):
        kinds.rebuild(Descriptor("door", ((3, False),), 0, msgspec.Raw(b"\xc0")), Rebuilding())
