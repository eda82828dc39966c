"""What is common to all kinds of descriptors: shared ones stay shared, and the unknown is refused by name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.descriptor_case import Case, Make

from agent import kinds
from agent.descriptors import Descriptor, Rebuilding, open_files
from agent.kernel import pidfd
from transport.frames import ProtocolError


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


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["open", "eventfd", "dup"]), st.integers(0, 99)), max_size=60))
def test_any_descriptors_are_grouped_as_they_were_made(steps: list[tuple[str, int]]) -> None:
    groups: list[list[int]] = []

    def make() -> list[int]:
        for what, which in steps:
            if what == "dup" and groups:
                group = groups[which % len(groups)]
                group.append(os.dup(group[0]))
            else:
                groups.append([os.eventfd(0) if what == "eventfd" else os.open("/proc/version", os.O_RDONLY)])
        return [fd for group in groups for fd in group]

    case = Case(make)
    try:
        sizes: list[int] = []  # the child tells group by group
        for what, which in steps:
            if what == "dup" and sizes:
                sizes[which % len(sizes)] += 1
            else:
                sizes.append(1)
        numbers = iter(case.numbers)
        expected = {tuple(sorted(next(numbers) for _ in range(size))) for size in sizes}
        found = [tuple(n for n, _ in f.numbers) for f in open_files(case.process)]
        assert {group for group in found if set(group) & set(case.numbers)} == expected
        assert [group[0] for group in found] == sorted(group[0] for group in found)
    finally:
        case.close()


def test_few_descriptors_are_compared(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many that look alike, n log n pairs; of eventfds, which have numbers of their own, none."""
    compared: list[tuple[int, int]] = []
    compare = pidfd.compare_files

    def counted(pid: int, first: int, second: int) -> int:
        compared.append((pid, first))
        return compare(pid, first, second)

    def setup() -> list[int]:
        keep.extend(os.open("/proc/version", os.O_RDONLY) for _ in range(256))
        return keep[:1]

    keep: list[int] = []
    monkeypatch.setattr(pidfd, "compare_files", counted)
    case = make(setup)
    assert len(open_files(case.process)) > 256
    assert 0 < len(compared) < 256 * 10
    others = make(lambda: [os.eventfd(0) for _ in range(50)])
    assert {f.fd for f in open_files(others.process)} >= set(others.numbers)
    assert not {(others.pid, number) for number in others.numbers} & set(compared)


def test_descriptors_that_come_and_go_meanwhile(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(lambda: [os.open("/proc/version", os.O_RDONLY) for _ in range(2)])
    failing = iter([9, 9])  # EBADF, twice
    compare = pidfd.compare_files

    def fails_at_first(pid: int, first: int, second: int) -> int:
        if number := next(failing, 0):
            raise OSError(number, os.strerror(number))
        return compare(pid, first, second)

    monkeypatch.setattr(pidfd, "compare_files", fails_at_first)
    assert {f.fd for f in open_files(case.process)} >= set(case.numbers)
    monkeypatch.setattr(pidfd, "compare_files", lambda *_: (_ for _ in ()).throw(OSError(1, "EPERM")))
    with pytest.raises(PermissionError):
        open_files(case.process)


def test_what_no_kind_knows_is_refused_by_name(make: Make) -> None:
    def setup() -> list[int]:
        raw = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        keep.extend((raw, datagram))
        fds = [raw.fileno(), datagram.fileno(), os.pidfd_open(os.getpid())]
        return [*fds, os.open("/proc/self/ns/net", os.O_RDONLY), os.open("/dev/tty0", os.O_PATH)]

    keep: list[socket.socket] = []
    case = make(setup)
    found = [kinds.blockers(f, case.process)[0].kind for f in case.files()]
    assert found == ["netlink-socket", "udp-socket", "pidfd", "namespace", "terminal"]
    assert all(kinds.kind_of(f) is None for f in case.files())
    with pytest.raises(ValueError, match="socket"):
        case.capture(0)


def test_a_kind_that_is_not_known_here() -> None:
    with pytest.raises(ProtocolError, match="unknown kind 'door'"):
        kinds.rebuild(Descriptor("door", ((3, False),), 0, msgspec.Raw(b"\xc0")), Rebuilding())
