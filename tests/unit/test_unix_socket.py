"""Unix sockets: pairs within the process with what waits in them, and clients of a service of the host."""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.descriptor_case import Case, Make

from agent import kinds
from agent.descriptors import Refusal
from agent.kernel import unix_diag
from agent.resources import unix_socket
from agent.unmovable import Unmovable

STREAM, DATAGRAM, SEQUENCE = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
KINDS = pytest.mark.parametrize("kind", [STREAM, DATAGRAM, SEQUENCE], ids=["stream", "datagram", "seqpacket"])
FORTH = (b"one", b"x" * 70_000, b"\0three\n")
BACK = (b"answer",)


def pair(make: Make, kind: int, *steps: str) -> Case:
    """A child with a pair; what it does to it before it is captured: "forth", "back", "close", "shut-..."."""
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        here, there = socket.socketpair(socket.AF_UNIX, kind)
        kept.extend((here, there))
        for step in steps:
            match step:
                case "forth":
                    for message in FORTH:
                        here.sendall(message)
                case "back":
                    for message in BACK:
                        there.sendall(message)
                case "close":
                    there.close()
                case "shut-write":
                    here.shutdown(socket.SHUT_WR)
                case "shut-read":
                    here.shutdown(socket.SHUT_RD)
        return [one.fileno() for one in (here, there) if one.fileno() >= 0]

    return make(setup)


def received(fd: int, kind: int) -> list[bytes]:
    """All that waits in it, by messages; of a stream in one."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.setblocking(False)
        found: list[bytes] = []
        try:
            while data := sock.recv(1 << 20):
                found.append(data)
        except BlockingIOError:
            pass
    return [b"".join(found)] if kind == STREAM and found else found


def sent(messages: tuple[bytes, ...], kind: int) -> list[bytes]:
    return [b"".join(messages)] if kind == STREAM else list(messages)


@KINDS
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_pair_with_what_waits_in_it(make: Make, kind: int, order: tuple[int, int]) -> None:
    case = pair(make, kind, "forth", "back")
    assert all(not kinds.blockers(file, case.process) for file in case.files())
    captured = [case.capture(0), case.capture(1)]
    assert [case.capture(0), case.capture(1)] == captured, "looking takes nothing out"
    made = dict(zip(order, case.rebuild(*(captured[i] for i in order)), strict=True))
    assert received(made[1], kind) == sent(FORTH, kind)
    assert received(made[0], kind) == sent(BACK, kind)
    os.write(made[0], b"more")
    os.write(made[1], b"and back")
    assert (os.read(made[1], 100), os.read(made[0], 100)) == (b"more", b"and back")


@pytest.mark.parametrize("kind", [STREAM, SEQUENCE])
@pytest.mark.parametrize("steps", [("shut-write",), ("shut-read",), ("shut-write", "shut-read")])
def test_directions_that_are_shut(make: Make, kind: int, steps: tuple[str, ...]) -> None:
    case = pair(make, kind, "forth", *steps)
    captured = [case.capture(0), case.capture(1)]
    before = [unix_diag.look(file.inode).shutdown for file in case.files()]
    made = case.rebuild(*captured)
    assert [unix_diag.look(os.fstat(fd).st_ino).shutdown for fd in made] == before != [0, 0]
    if steps == ("shut-write",):
        assert received(made[1], kind) == sent(FORTH, kind)
        assert os.read(made[1], 10) == b""
        with pytest.raises(BrokenPipeError):
            os.write(made[0], b"x")


@KINDS
def test_the_other_end_is_closed(make: Make, kind: int) -> None:
    made = pair(make, kind, "back", "close").move()
    assert received(made, kind) == sent(BACK, kind)
    with pytest.raises(OSError) as failed:
        os.write(made, b"x")
    assert failed.value.errno in (errno.EPIPE, errno.ECONNREFUSED)


def test_the_other_end_was_closed_with_something_unread(make: Make) -> None:
    case = pair(make, STREAM, "forth", "close")
    made = case.move()
    with pytest.raises(ConnectionResetError):  # said once, as there
        os.read(made, 10)
    assert os.read(made, 10) == b""


def test_options_and_flags(make: Make) -> None:
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        here, there = socket.socketpair()
        here.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 7, 500_000))
        here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 20_000)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        there.setblocking(False)
        kept.extend((here, there))
        return [here.fileno(), there.fileno()]

    case = make(setup)
    here, there = case.rebuild(case.capture(0), case.capture(1))
    with socket.socket(fileno=os.dup(here)) as sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16) == struct.pack("qq", 7, 500_000)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 40_000
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == 1
    assert (os.get_blocking(here), os.get_blocking(there)) == (True, False)


def test_one_that_was_never_connected(make: Make) -> None:
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        kept.append(socket.socket(socket.AF_UNIX, DATAGRAM))
        return [kept[0].fileno()]

    case = make(setup)
    assert not kinds.blockers(case.files()[0], case.process)
    made = case.move()
    found = unix_diag.look(os.fstat(made).st_ino)
    assert (found.kind, found.peer, found.name) == (DATAGRAM, None, b"")


def test_descriptors_on_their_way(make: Make) -> None:
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        here, there = socket.socketpair()
        here.send(b"before")
        here.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
        kept.extend((here, there))
        return [there.fileno()]

    case = make(setup)
    with pytest.raises(Unmovable, match="SCM_RIGHTS"):
        case.capture()
    (blocker,) = kinds.blockers(case.files()[0], case.process)
    assert blocker.kind == "unix-message" and "SCM_RIGHTS" in blocker.why


def test_a_message_with_its_senders_credentials(make: Make) -> None:
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        here, there = socket.socketpair(socket.AF_UNIX, DATAGRAM)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        here.send(b"signed")
        kept.extend((here, there))
        return [there.fileno()]

    with pytest.raises(Unmovable, match="credentials"):
        make(setup).capture()


@pytest.mark.parametrize("what", ["listens", "is bound", "whose other end", "has too"])
def test_what_stays_is_refused(make: Make, tmp_path: Path, what: str) -> None:
    kept: list[socket.socket] = []
    strangers: list[subprocess.Popen[bytes]] = []
    ours, theirs = socket.socketpair()
    if what == "has too":
        strangers.append(subprocess.Popen(["sleep", "1000"], pass_fds=[ours.fileno()]))

    def setup() -> list[int]:
        match what:
            case "whose other end":
                ours.close()
                kept.append(theirs)
            case "has too":
                kept.extend((ours, theirs))
            case _:
                kept.append(socket.socket(socket.AF_UNIX))
                kept[0].bind(str(tmp_path / "socket"))
                if what == "listens":
                    kept[0].listen()
        return [kept[0].fileno()]

    case = make(setup)
    found = kinds.blockers(case.files()[0], case.process)
    for stranger in strangers:
        stranger.kill()
        stranger.wait()
    (blocker,) = found
    assert blocker.kind == "unix-socket" and what in blocker.why
    if what in ("has too", "whose other end"):
        assert "pid " in blocker.why
    ours.close()
    theirs.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, DATAGRAM) as found:
        found.bind(str(tmp_path / "log"))
        os.chmod(tmp_path / "log", 0o666)
        found.settimeout(10)
        yield found


def test_a_client_of_a_service(make: Make, service: socket.socket) -> None:
    path = service.getsockname()
    kept: list[socket.socket] = []

    def setup() -> list[int]:
        kept.append(socket.socket(socket.AF_UNIX, DATAGRAM))
        kept[0].connect(path)
        return [kept[0].fileno()]

    case = make(setup)
    assert not kinds.blockers(case.files()[0], case.process)
    assert unix_socket.services(case.files()) == (path,)
    assert unix_socket.compare(path) is None
    captured = case.capture()
    with pytest.raises(Refusal, match="not part of what was agreed"):
        kinds.rebuild(captured, case.context)
    case.context.services = frozenset({path})
    os.chmod(path, 0o600)  # since the offer
    with pytest.raises(Refusal, match="anybody may send to"):
        kinds.rebuild(captured, case.context)
    os.chmod(path, 0o666)
    (made,) = case.rebuild(captured)
    os.write(made, b"a line of a log")
    assert service.recv(100) == b"a line of a log"


@pytest.mark.parametrize("mode", [0o600, None])
def test_a_service_that_the_destination_does_not_offer(service: socket.socket, mode: int | None) -> None:
    path = service.getsockname()
    if mode is None:
        os.unlink(path)
    else:
        os.chmod(path, mode)
    blocker = unix_socket.compare(path)
    assert blocker is not None and blocker.kind == "unix-service"
