"""/proc/PID: each file parsed once, into typed values. Formats: proc(5), Documentation/filesystems/proc.rst.

A process that is gone is ProcessLookupError, from every function here. Paths are any bytes; they are decoded
as Python does it (`os.fsdecode`).
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeVar

import msgspec

from agent.bounds import I32, U31, U64

T = TypeVar("T")

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
_READ_SIZE: Final = 1 << 16  # the kernel gives a page at a time anyway
_RECORD_SIZE: Final = 1 << 13
_COMMAND_SIZE: Final = 1 << 17
_READINGS: Final = 100


def is_text(path: str) -> bool:
    """Whether a path, as the kernel has it, is UTF-8. One that is not has surrogates in it (PEP 383)."""
    return path == printable(path)


def printable(path: str) -> str:
    """For messages: what is not UTF-8 as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class MapsLine(msgspec.Struct, frozen=True):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    protection: int
    shared: bool
    offset: int
    device: tuple[int, int]
    inode: int
    name: str  # path, "[heap]", "" ...
    vmflags: frozenset[str] = frozenset()  # smaps only


def read(path: str) -> bytes:
    """A whole /proc file; ProcessLookupError if the process is gone."""
    fd = _open(path)
    try:
        return b"".join(iter(lambda: os.read(fd, _READ_SIZE), b""))
    finally:
        os.close(fd)


def command_line(pid: int) -> bytes:
    """Its arguments, each with a zero byte behind it; cut, since a process says where they begin and end."""
    fd = _open(f"/proc/{pid}/cmdline")
    try:
        return os.read(fd, _COMMAND_SIZE)
    finally:
        os.close(fd)


def read_record(path: str) -> bytes:
    """A /proc file of one record, which the kernel gives out whole (single_open): in one read."""
    fd = _open(path)
    try:
        data = os.read(fd, _RECORD_SIZE)
        if len(data) == _RECORD_SIZE:
            data += b"".join(iter(lambda: os.read(fd, _READ_SIZE), b""))
        return data
    finally:
        os.close(fd)


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", path) from None


def _maps_line(line: str) -> MapsLine:
    fields = line.split(None, 5)
    start, _, end = fields[0].partition("-")
    permissions = fields[1]
    protection = (
        (PROT_READ if permissions[0] == "r" else 0)
        | (PROT_WRITE if permissions[1] == "w" else 0)
        | (PROT_EXEC if permissions[2] == "x" else 0)
    )
    major, _, minor = fields[3].partition(":")
    name = fields[5].rstrip("\n") if len(fields) > 5 else ""
    return MapsLine(
        int(start, 16),
        int(end, 16),
        protection,
        permissions[3] == "s",
        int(fields[2], 16),
        (int(major, 16), int(minor, 16)),
        int(fields[4]),
        name.replace("\\012", "\n"),
    )


def maps(pid: int) -> list[MapsLine]:
    """/proc/PID/maps in address order, without `vmflags`: cheap, no page table walk."""
    return _in_order(lambda: parse_maps(read(f"/proc/{pid}/maps")))


def parse_maps(text: bytes) -> list[MapsLine]:
    return [_maps_line(line) for line in text.decode("utf-8", "surrogateescape").split("\n") if line]


def smaps(pid: int) -> list[MapsLine]:
    """/proc/PID/smaps with `vmflags`: walks the page tables, a dozen milliseconds a GiB."""
    return _in_order(lambda: parse_smaps(read_smaps(pid)))


def _in_order(look: Callable[[], list[MapsLine]]) -> list[MapsLine]:
    """Of a process that runs: the kernel lets it go on between two lines, and may show a mapping behind a
    part of itself that was another one a moment ago (seen on 6.18, once in 200 times of a process that maps
    without end).

    BlockingIOError if that is so each time.
    """
    for _ in range(_READINGS):
        lines = look()
        if all(before.end <= line.start for before, line in itertools.pairwise(lines)):
            return lines
    raise BlockingIOError(errno.EAGAIN, "its mappings change all the time", "/proc/PID/maps")


def read_smaps(pid: int) -> bytes:
    return read(f"/proc/{pid}/smaps")


def locked(pid: int) -> bytes:
    """How much memory is locked (mlock(2)), as status says it."""
    return read_record(f"/proc/{pid}/status").partition(b"\nVmLck:")[2].partition(b"\n")[0].strip()


def parse_smaps(text: bytes) -> list[MapsLine]:
    """Of each mapping's block only the first line, as in maps, and the last are of use."""
    blocks = text.split(b"\nVmFlags: ")
    found: list[MapsLine] = []
    for number, block in enumerate(blocks[:-1]):
        begin = 0 if number == 0 else block.index(b"\n") + 1
        head = block[begin : block.index(b"\n", begin)].decode("utf-8", "surrogateescape")
        flags = blocks[number + 1].partition(b"\n")[0]
        found.append(msgspec.structs.replace(_maps_line(head), vmflags=_vmflags(flags)))
    return found


@functools.lru_cache(maxsize=256)
def _vmflags(text: bytes) -> frozenset[str]:
    return frozenset(text.decode().split())


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status (or a thread's) as name to text."""
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    return parse_status(read(path))


def parse_status(text: bytes) -> dict[str, str]:
    # a program chooses its name: it must not look like lines of its own
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").split("\n"))
    return {name: value.strip() for name, _, value in pairs}


class Settings(msgspec.Struct, frozen=True):
    """The part of a thread's status that all threads of a process should have in common."""

    credentials: bytes  # the lines Uid to Groups, CapInh to NoNewPrivs, as they are
    seccomp: bool


def settings(pid: int, tid: int) -> Settings:
    """Cheaper than `status`: asked of each thread in the freeze."""
    return parse_settings(read_record(f"/proc/{pid}/task/{tid}/status"))


def parse_settings(text: bytes) -> Settings:
    ids = text[text.index(b"\nUid:") : text.index(b"\nFDSize:")]
    ids += text[text.index(b"\nGroups:") : text.index(b"\nNStgid:")]
    capabilities, seccomp, rest = text[text.index(b"\nCapInh:") :].partition(b"\nSeccomp:")
    return Settings(ids + capabilities, bool(seccomp) and rest.split(None, 1)[0] != b"0")


class Stat(msgspec.Struct, frozen=True):
    """The fields of /proc/PID/stat that are used, under proc(5)'s names."""

    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    tty_nr: int
    nice: int
    starttime: int
    policy: int
    rt_priority: int
    start_code: int
    end_code: int
    start_stack: int
    start_data: int
    end_data: int
    start_brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int


def stat(pid: int, tid: int | None = None) -> Stat:
    path = f"/proc/{pid}/stat" if tid is None else f"/proc/{pid}/task/{tid}/stat"
    return parse_stat(read_record(path))


def parse_stat(record: bytes) -> Stat:
    text = record.decode("utf-8", "replace")
    comm = text[text.index("(") + 1 : text.rindex(")")]
    f = text[text.rindex(")") + 2 :].split()  # f[0] is field 3 of proc(5)
    number = [0, 0, 0] + [int(x) if x.lstrip("-").isdigit() else 0 for x in f]
    return Stat(
        comm,
        f[0],
        *(number[n] for n in (4, 5, 6, 7, 19, 22, 41, 40, 26, 27, 28, 45, 46, 47, 48, 49, 50, 51)),
    )


def born(pid: int) -> int | None:
    """What tells this process from another one with its number; None if it is dead."""
    try:
        found = stat(pid)
    except (ProcessLookupError, ValueError):
        return None
    return None if found.state in "ZXx" else found.starttime


def threads(pid: int) -> list[int]:
    """Thread ids, in the reader's pid namespace."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", f"pid {pid}") from None


def each_thread(pid: int, look: Callable[[int], T], tids: list[int] | None = None) -> list[T]:
    """`look(tid)` for each thread (or for those `tids`); those that end meanwhile are left out."""
    found: list[T] = []
    for tid in threads(pid) if tids is None else tids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            found.append(look(tid))
    return found


@functools.cache
def _lists_children() -> bool:
    """Whether this kernel has lists of children (CONFIG_PROC_CHILDREN)."""
    return os.path.exists("/proc/thread-self/children")


def children(pid: int) -> list[int]:
    """Child processes, of any of its threads, zombies too."""
    if not _lists_children():
        return [child for child in processes() if _parent(child) == pid]
    lists = each_thread(pid, lambda tid: read(f"/proc/{pid}/task/{tid}/children").split())
    return [int(x) for found in lists for x in found]


def _parent(pid: int) -> int:
    try:
        return stat(pid).ppid
    except ProcessLookupError:  # ended since the listing
        return 0


def fds(pid: int) -> dict[int, str]:
    """Descriptor numbers and what their links in /proc/PID/fd say."""
    found: dict[int, str] = {}
    try:
        names = os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", f"pid {pid}") from None
    for name in names:
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue  # closed since the listing
    return dict(sorted(found.items()))


def fdinfo(pid: int, fd: int) -> list[tuple[str, str]]:
    """/proc/PID/fdinfo/FD as (name, text) pairs in order; names repeat (an epoll has one "tfd" per entry)."""
    return parse_fdinfo(read_record(f"/proc/{pid}/fdinfo/{fd}"))


def parse_fdinfo(text: bytes) -> list[tuple[str, str]]:
    # a dma-buf shows a name that a program chose, any bytes
    pairs = (line.partition(":") for line in text.decode("utf-8", "replace").split("\n"))
    return [(name.strip(), value.strip()) for name, _, value in pairs if name]


def limits(pid: int) -> list[tuple[int, int]]:
    """The sixteen (soft, hard) pairs of /proc/PID/limits by RLIMIT_ number; unlimited is 2**64 - 1."""
    lines = read(f"/proc/{pid}/limits").decode().splitlines()[1:]
    return [(_limit(words[0]), _limit(words[1])) for words in (line[26:].split() for line in lines)]


def _limit(text: str) -> int:
    return (1 << 64) - 1 if text == "unlimited" else int(text)


class PosixTimer(msgspec.Struct, frozen=True):
    """One timer of /proc/PID/timers (CONFIG_POSIX_TIMERS, CONFIG_CHECKPOINT_RESTORE)."""

    id: U31
    signal: U31
    value: U64
    notify: U31  # SIGEV_*
    thread: U31  # for SIGEV_THREAD_ID; in the numbers of the reader's pid namespace
    clock: I32


def timers(pid: int) -> list[PosixTimer]:
    fields: dict[str, str] = {}
    found: list[PosixTimer] = []
    for line in read(f"/proc/{pid}/timers").decode().splitlines():
        name, _, value = line.partition(":")
        fields[name] = value.strip()
        if name == "ClockID":
            found.append(_timer(fields))
            fields = {}
    return found


_SIGEV: Final = {"signal": 0, "none": 1, "thread": 2}


def _timer(fields: dict[str, str]) -> PosixTimer:
    signal, _, value = fields["signal"].partition("/")
    kind, _, target = fields["notify"].partition("/")
    whose, _, number = target.partition(".")
    notify = _SIGEV[kind] | (4 if whose == "tid" else 0)
    return PosixTimer(
        int(fields["ID"]), int(signal), int(value, 16), notify, int(number), int(fields["ClockID"])
    )


def processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def namespace(pid: int, kind: str) -> str:
    """The identity of a namespace: "net:[4026531840]"."""
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", f"pid {pid}") from None


def auxv(pid: int) -> bytes:
    return read(f"/proc/{pid}/auxv")


class InSyscall(NamedTuple):
    """A thread off its CPU: the syscall it is in, None if it is in none, stack and instruction pointer."""

    number: int | None
    stack: int
    instruction: int


def in_syscall(pid: int, tid: int) -> InSyscall | None:
    """/proc/PID/task/TID/syscall; None if the thread runs."""
    words = read_record(f"/proc/{pid}/task/{tid}/syscall").split()
    if words == [b"running"]:
        return None
    number = int(words[0])
    return InSyscall(number if number >= 0 else None, int(words[-2], 16), int(words[-1], 16))
