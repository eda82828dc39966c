"""A process made to measure: number, clocks, session, mappings, descriptors, threads; no trace after."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.children import PAGE, ended, free_number, wait_for

from agent.kernel import pidfd, procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.layout import Flag, Mapping, merge
from agent.resources import mappings
from agent.shadow import Shadow, Special
from agent.spawn import Spawned, SpawnFailed, Wanted, spawn
from agent.tracee import SCRATCH_SIZE, InjectedCallFailed

CHANNEL = 900
SEED_AT = 0x1_0000_0000
SECOND = 1_000_000_000
NR_GETPID, NR_CLOCK_GETTIME, NR_GETTID = 39, 228, 186
BASE = 0x2000_0000_0000


def taken() -> int:
    """A number that somebody has."""
    return os.getpid()


def specials() -> list[Special]:
    """Other places than the shadow's own for the vDSO and its data, in the same order without gaps."""
    ours = mappings.specials(procfs.maps(os.getpid()))
    shift = BASE + 0x1000_0000 - ours[0].start
    return [Special(s.name, s.start + shift, s.end + shift) for s in ours]


@contextlib.contextmanager
def shadow(
    pid: int | None = None,
    leader: bool = True,
    deltas: tuple[int, int] = (0, 0),
    planned: Sequence[Mapping] = (),
    others: frozenset[int] = frozenset(),
) -> Iterator[Shadow]:
    """A settled shadow; destroyed and really gone at the end."""
    number = free_number() if pid is None else pid
    before = os.listdir("/proc/self/fd")
    seed, code = arch.seed_elf(SEED_AT, SCRATCH_SIZE - PAGE)
    made: Spawned = spawn(Wanted(number, leader, *deltas, others), seed, CHANNEL)
    found = Shadow(made)
    parent = procfs.stat(found.pid).ppid
    try:
        found.settle(number, code, SEED_AT, specials(), list(planned))
        yield found
    finally:
        found.destroy()
        assert ended(found.pid)
        if made.new_pid_namespace:
            wait_for(lambda: ended(parent), "the reaper to end")
        assert os.listdir("/proc/self/fd") == before
    found.destroy()


def call(target: Shadow, number: int, *arguments: int, tid: int | None = None) -> int:
    batch = target.batch()
    batch.call(f"call {number}", number, *arguments)
    return target.run(target.pid if tid is None else tid, batch).results[0]


# --- birth ---


def test_its_number_is_the_wanted_one() -> None:
    wanted = free_number()
    with shadow(wanted) as target:
        assert target.pid == wanted == call(target, NR_GETPID)
        assert not target.new_pid_namespace
        assert procfs.namespace(target.pid, "pid") == procfs.namespace(os.getpid(), "pid")


@pytest.mark.parametrize("by_thread", [False, True])
def test_a_number_that_is_taken_is_had_in_a_namespace_of_its_own(by_thread: bool) -> None:
    wanted = free_number() if by_thread else taken()
    with shadow(wanted, others=frozenset({taken()})) as target:
        assert target.new_pid_namespace
        assert target.pid != wanted
        assert call(target, NR_GETPID) == wanted
        assert procfs.status(target.pid)["NSpid"].split()[-1] == str(wanted)
        assert os.listdir(f"/proc/{target.pid}/root/proc")
        with open(f"/proc/{target.pid}/mounts") as file:
            assert sum(line.split()[1] == "/proc" for line in file) >= 1


def test_the_number_of_a_zombie_is_taken() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    wait_for(lambda: procfs.stat(child).state == "Z", "the zombie")
    with shadow(child) as target:
        assert target.new_pid_namespace and call(target, NR_GETPID) == child
    os.waitpid(child, 0)


@pytest.mark.parametrize("leader", [False, True])
def test_session(leader: bool) -> None:
    with shadow(leader=leader) as target:
        assert procfs.stat(target.pid).session == (target.pid if leader else os.getsid(0))


@pytest.mark.parametrize("deltas", [(7 * SECOND + 5, 9_000 * SECOND), (-3 * SECOND, -1), (1, 0), (0, 0)])
def test_clocks(deltas: tuple[int, int]) -> None:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME are ahead of ours by exactly what was asked for."""
    with shadow(deltas=deltas) as target:
        for clock, delta in ((time.CLOCK_MONOTONIC, deltas[0]), (time.CLOCK_BOOTTIME, deltas[1])):
            batch = target.batch()
            place = batch.space(16)
            batch.call("clock_gettime", NR_CLOCK_GETTIME, clock, place)
            before = time.clock_gettime_ns(clock)
            seconds, rest = struct.unpack("<qq", target.run(target.pid, batch).read(place, 16))
            after = time.clock_gettime_ns(clock)
            assert before <= seconds * SECOND + rest - delta <= after


def test_a_clock_that_would_be_below_zero_is_said() -> None:
    with pytest.raises(SpawnFailed, match="Numerical result out of range"), shadow(deltas=(-(1 << 61), 0)):
        pass


def test_nothing_is_mapped_in_it_but_what_was_asked_for() -> None:
    with shadow() as target:
        lines = [m for m in procfs.maps(target.pid) if m.name != "[vsyscall]"]
        wanted = {(s.name, s.start, s.end) for s in specials()}
        assert {(m.name, m.start, m.end) for m in lines if m.name.startswith("[v")} == wanted
        rest = merge([Mapping(m.start, m.end, 0) for m in lines if not m.name.startswith("[v")])
        assert rest == [Mapping(target.scratch, target.scratch + SCRATCH_SIZE, 0)]
        assert procfs.fds(target.pid).keys() == {CHANNEL}
        status = procfs.status(target.pid)
        assert [status[n] for n in ("SigBlk", "SigIgn", "SigCgt")] == ["0" * 16] * 3
        assert status["TracerPid"] == str(os.getpid())


def test_it_dies_with_its_tracer() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException), shadow(taken()) as target:
            os.write(writing, struct.pack("<i", target.pid))
            os._exit(0)
        os._exit(1)
    pid = struct.unpack("<i", os.read(reading, 4))[0]
    os.waitpid(child, 0)
    wait_for(lambda: ended(pid), "the shadow to die")
    os.close(reading)
    os.close(writing)


# --- descriptors ---

FDS = st.one_of(
    st.integers(0, 12), st.sampled_from((CHANNEL - 1, CHANNEL, CHANNEL + 1)), st.integers(880, 1100)
)
GROUPS = st.lists(FDS, unique=True, min_size=1, max_size=12).flatmap(
    lambda numbers: st.lists(st.integers(0, 5), min_size=len(numbers), max_size=len(numbers)).map(
        lambda owners: [
            [n for n, o in zip(numbers, owners, strict=True) if o == owner] for owner in sorted(set(owners))
        ]
    )
)


@given(GROUPS, st.data())
@settings(max_examples=40, deadline=None)
def test_descriptors_at_any_numbers(groups: list[list[int]], data: st.DataObject) -> None:
    """Whatever the numbers that they arrive under, and the channel's, and each other's."""
    wanted = [tuple((number, data.draw(st.booleans())) for number in group) for group in groups]
    with shadow() as target, contextlib.ExitStack() as stack:
        ours = [stack.enter_context(tempfile.TemporaryFile()).fileno() for _ in wanted]
        target.place(target.receive(ours), wanted)
        check_descriptors(target, ours, wanted)
        # and once more on top: the channel still works, wherever it is now
        again = target.receive(ours[:1])
        assert os.stat(f"/proc/{target.pid}/fd/{again[0]}").st_ino == os.fstat(ours[0]).st_ino


def check_descriptors(
    target: Shadow, ours: Sequence[int], wanted: Sequence[tuple[tuple[int, bool], ...]]
) -> None:
    there = procfs.fds(target.pid)
    numbers = {number for group in wanted for number, _ in group}
    assert len(there.keys() - numbers) == 1, "the channel, and nothing else"
    for fd, group in zip(ours, wanted, strict=True):
        for number, cloexec in group:
            assert os.stat(f"/proc/{target.pid}/fd/{number}").st_ino == os.fstat(fd).st_ino
            flags = int(dict(procfs.fdinfo(target.pid, number))["flags"], 8)
            assert bool(flags & os.O_CLOEXEC) == cloexec
            assert pidfd.same_file(target.pid, group[0][0], number)


def test_more_descriptors_than_one_message_takes() -> None:
    with shadow() as target, tempfile.TemporaryFile() as file:
        ours = [os.dup(file.fileno()) for _ in range(600)]
        wanted = [((2 * n + 500, False),) for n in reversed(range(600))]
        target.place(target.receive(ours), wanted)
        check_descriptors(target, ours, wanted)
        for fd in ours:
            os.close(fd)


# --- threads ---


def numbers(target: Shadow) -> set[int]:
    return {int(procfs.status(target.pid, tid)["NSpid"].split()[-1]) for tid in procfs.threads(target.pid)}


def test_threads_have_the_wanted_numbers() -> None:
    with shadow(taken()) as target:
        own = call(target, NR_GETPID)
        target.make_threads([own, 70, own + 5, 12])
        assert numbers(target) == {own, 70, own + 5, 12} == set(target.threads)
        for tid, seen_as in target.threads.items():
            assert call(target, NR_GETTID, tid=seen_as) == tid
        target.make_threads([own, 12, 71])
        assert numbers(target) == {own, 12, 71} == set(target.threads)
        target.make_threads([own])
        assert numbers(target) == {own}


def test_hundreds_of_threads() -> None:
    with shadow(taken()) as target:
        own = call(target, NR_GETPID)
        wanted = [own, *(10_000 + 3 * n for n in range(300))]
        target.make_threads(wanted)
        assert numbers(target) == set(wanted)


def test_a_number_that_cannot_be_had_is_said() -> None:
    with shadow() as target, pytest.raises(InjectedCallFailed, match=f"clone3 {taken()}"):
        target.make_threads([target.pid, taken()])


# --- mappings and pages ---

PAGES = 12
ADVICE = st.sampled_from(
    (
        *(0, Flag.DONTFORK, Flag.DONTDUMP | Flag.WIPEONFORK, Flag.HUGEPAGE, Flag.NOHUGEPAGE, Flag.NORESERVE),
        *(Flag.LOCKED, Flag.LOCKED | Flag.LOCKONFAULT, Flag.MERGEABLE, Flag.SEQUENTIAL, Flag.RANDOM),
    )
)


def no_files(index: int) -> int:
    raise AssertionError("no file is mapped here")


@st.composite
def layouts(draw: st.DrawFn) -> list[Mapping]:
    edges = sorted(draw(st.lists(st.integers(0, PAGES), unique=True, max_size=7)))
    found = []
    for first, last in itertools.pairwise(edges):
        if draw(st.booleans()):
            file = draw(st.sampled_from((-1, -1, 0)))
            offset = (first + draw(st.integers(0, 1))) * PAGE if file == 0 else 0
            flags = int(draw(ADVICE)) if file < 0 else 0
            protection = draw(st.sampled_from((1, 3, 5, 7)))
            found.append(Mapping(BASE + first * PAGE, BASE + last * PAGE, protection, flags, file, offset))
    return found


@pytest.fixture(scope="module")
def library() -> Iterator[int]:
    """A file of enough pages to map."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(bytes([65 + n]) * PAGE for n in range(PAGES + 2)))
        file.flush()
        yield file.fileno()


@given(st.lists(layouts(), min_size=1, max_size=5))
@settings(max_examples=30, deadline=None)
def test_it_follows_any_layouts(library: int, steps: list[list[Mapping]]) -> None:
    with shadow() as target:
        for wanted in steps:
            target.follow(wanted, lambda _: library)
            table = mappings.FileTable(target.pid)
            ours = (target.scratch, target.scratch + SCRATCH_SIZE)
            found = mappings.layout(procfs.smaps(target.pid), table, {}, ours)
            assert merge(found) == merge(wanted)
            for m in wanted:
                content = b"A" if m.anonymous else bytes([65 + m.offset // PAGE])
                assert m.anonymous or target.memory.read(m.start, 1) == content


def test_the_scratch_makes_room() -> None:
    with shadow() as target:
        home = target.scratch
        wanted = [Mapping(home - 4 * PAGE, home + 8 * PAGE, 3)]
        target.follow(wanted, no_files)
        assert not home <= target.scratch < home + 8 * PAGE
        assert call(target, NR_GETPID) == target.pid
        lines = [
            m for m in procfs.maps(target.pid) if m.start < home + SCRATCH_SIZE and m.end > home - 4 * PAGE
        ]
        assert [(m.start, m.end) for m in lines] == [(wanted[0].start, wanted[0].end)]


def test_pages_are_written_whatever_the_protection() -> None:
    layout = [Mapping(BASE + n * PAGE, BASE + (n + 1) * PAGE, p) for n, p in enumerate((3, 0, 1, 3, 5, 3))]
    with shadow(planned=layout) as target:
        target.follow(layout, no_files)
        data = bytearray(b"".join(bytes([n + 1]) * PAGE for n in range(6)))
        target.write_pages([(BASE, BASE + 2 * PAGE), (BASE + 2 * PAGE, BASE + 6 * PAGE)], memoryview(data))
        assert target.memory.read(BASE, 6 * PAGE) == data
        target.discard_pages([(BASE, BASE + PAGE), (BASE + 3 * PAGE, BASE + 4 * PAGE)])
        zero = bytes(PAGE)
        assert target.memory.read(BASE, PAGE) == zero == target.memory.read(BASE + 3 * PAGE, PAGE)
        assert target.memory.read(BASE + PAGE, PAGE) == data[PAGE : 2 * PAGE]


def test_thousands_of_ranges() -> None:
    layout = [Mapping(BASE, BASE + 6000 * PAGE, 3)]
    with shadow(planned=layout) as target:
        target.follow(layout, no_files)
        ranges = [(BASE + 2 * n * PAGE, BASE + (2 * n + 1) * PAGE) for n in range(3000)]
        data = b"".join(struct.pack("<Q", n) * (PAGE // 8) for n in range(3000))
        target.write_pages(ranges, data)
        found = ctypes.create_string_buffer(len(data))
        target.memory.read_into(ctypes.addressof(found), ranges)
        assert found.raw == data
        target.discard_pages(ranges[1::2])
        target.memory.read_into(ctypes.addressof(found), ranges)
        expected = [struct.pack("<Q", 0 if n % 2 else n) * (PAGE // 8) for n in range(3000)]
        assert found.raw == b"".join(expected)


def test_guard_pages() -> None:
    layout = [Mapping(BASE, BASE + 4 * PAGE, 3)]
    with shadow(planned=layout) as target:
        target.follow(layout, no_files)
        target.write_pages([(BASE, BASE + 4 * PAGE)], b"x" * 4 * PAGE)
        target.install_guards([(BASE + PAGE, BASE + 2 * PAGE)])
        with pytest.raises(InjectedCallFailed):
            call(target, 318, BASE + PAGE, 8, 0)  # getrandom(2) into it: EFAULT
        assert call(target, 318, BASE + 2 * PAGE, 8, 0) == 8


# --- out into the world ---


def test_released_it_lives_and_has_nothing_of_ours() -> None:
    """A loop of two bytes as its whole program."""
    layout = [Mapping(BASE, BASE + PAGE, 7)]
    with shadow(planned=layout) as target:
        target.follow(layout, no_files)
        target.write_pages([(BASE, BASE + PAGE)], (b"\xeb\xfe").ljust(PAGE, b"\0"))
        target.leave_scratch()
        registers = ptrace.get_registers(target.pid)
        registers.rip, registers.orig_rax = BASE, (1 << 64) - 1
        ptrace.set_registers(target.pid, registers)
        lines = procfs.maps(target.pid)
        assert [(m.start, m.end) for m in lines if not m.name.startswith("[v")] == [(BASE, BASE + PAGE)]
        assert procfs.fds(target.pid) == {}
        target.outlive_us()
        target.release(leave_stopped=True)
        wait_for(lambda: procfs.stat(target.pid).state == "T", "the stop")
        assert procfs.status(target.pid)["TracerPid"] == "0"
        os.kill(target.pid, 18)
        wait_for(lambda: procfs.stat(target.pid).state == "R", "life")
        os.kill(target.pid, 9)
        wait_for(lambda: ended(target.pid), "its end")
