"""/proc/PID: each file parsed once, into typed values. Formats: proc(5), Documentation/filesystems/proc.rst.

A process that is gone is ProcessLookupError, from every function here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Final, TypeVar

import msgspec

T = TypeVar("T")

PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4


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
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
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
    text = read(f"/proc/{pid}/maps").decode("utf-8", "surrogateescape")
    return [_maps_line(line) for line in text.split("\n") if line]


def smaps(pid: int) -> list[MapsLine]:
    """/proc/PID/smaps with `vmflags`: walks the page tables, some milliseconds a GiB."""
    text = read(f"/proc/{pid}/smaps").decode("utf-8", "surrogateescape")
    found: list[MapsLine] = []
    head = ""
    for line in text.split("\n"):
        if line.startswith("VmFlags:"):
            flags = frozenset(line.split()[1:])
            found.append(msgspec.structs.replace(_maps_line(head), vmflags=flags))
        elif line and not line[0].isupper():
            head = line
    return found


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """/proc/PID/status (or a thread's) as name to text."""
    path = f"/proc/{pid}/status" if tid is None else f"/proc/{pid}/task/{tid}/status"
    pairs = (line.partition(":") for line in read(path).decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, _, value in pairs}


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
    text = read(path).decode("utf-8", "replace")
    comm = text[text.index("(") + 1 : text.rindex(")")]
    f = text[text.rindex(")") + 2 :].split()  # f[0] is field 3 of proc(5)
    number = [0, 0, 0] + [int(x) if x.lstrip("-").isdigit() else 0 for x in f]
    return Stat(
        comm,
        f[0],
        *(number[n] for n in (4, 5, 6, 7, 19, 22, 41, 40, 26, 27, 28, 45, 46, 47, 48, 49, 50, 51)),
    )


def threads(pid: int) -> list[int]:
    """Thread ids, in the reader's pid namespace."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", f"pid {pid}") from None


def each_thread(pid: int, look: Callable[[int], T]) -> list[T]:
    """`look(tid)` for each thread; those that end meanwhile are left out."""
    found: list[T] = []
    for tid in threads(pid):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            found.append(look(tid))
    return found


def children(pid: int) -> list[int]:
    lists = each_thread(pid, lambda tid: read(f"/proc/{pid}/task/{tid}/children").split())
    return [int(x) for found in lists for x in found]


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
    pairs = (line.partition(":") for line in read(f"/proc/{pid}/fdinfo/{fd}").decode().splitlines())
    return [(name.strip(), value.strip()) for name, _, value in pairs]


def limits(pid: int) -> list[tuple[int, int]]:
    """The sixteen (soft, hard) pairs of /proc/PID/limits by RLIMIT_ number; unlimited is 2**64 - 1."""
    lines = read(f"/proc/{pid}/limits").decode().splitlines()[1:]
    return [(_limit(words[0]), _limit(words[1])) for words in (line[26:].split() for line in lines)]


def _limit(text: str) -> int:
    return (1 << 64) - 1 if text == "unlimited" else int(text)


class PosixTimer(msgspec.Struct, frozen=True):
    """One timer of /proc/PID/timers (CONFIG_POSIX_TIMERS, CONFIG_CHECKPOINT_RESTORE)."""

    id: int
    signal: int
    value: int
    notify: int  # SIGEV_*
    thread: int  # for SIGEV_THREAD_ID
    clock: int


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
    return PosixTimer(int(fields["ID"]), int(signal), int(value, 16), notify, int(number), int(fields["ClockID"]))


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
