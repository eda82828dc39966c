"""`migrate-agent connect` and `serve`: one service however many ask at once, nothing left when it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from unit.stand_in_service import DEADLINE, STAND_IN, Service, until

from agent.server.connect import EXIT_LOCKED, MARK
from agent.server.places import (
    LOG_BYTES,
    RUNTIME_VARIABLE,
    SOCKET_VARIABLE,
    STATE_VARIABLE,
    Places,
    default,
    open_log,
)

ASK = b"GET /v1/health HTTP/1.1\r\nHost: agent\r\n\r\n"


@pytest.fixture
def places(tmp_path: Path) -> Iterator[Places]:
    """Of a service that a test starts on demand; it has ended by itself when the test is over."""
    found = Places(tmp_path / "run" / "agent.sock", tmp_path / "state")
    yield found
    until(lambda: not found.lock.exists() and not found.socket.exists(), "the service ends by itself")


def connect(
    places: Places, scenario: str = "migrated", ends: int = subprocess.PIPE, **environment: str
) -> subprocess.Popen[bytes]:
    """`ends`: its standard input and output."""
    return subprocess.Popen(
        [sys.executable, str(STAND_IN), scenario, "connect"],
        env={
            **os.environ,
            SOCKET_VARIABLE: str(places.socket),
            STATE_VARIABLE: str(places.state),
            "PYTHONPATH": str(STAND_IN.parents[2]),
            **environment,
        },
        stdin=ends,
        stdout=ends,
        stderr=subprocess.PIPE,
    )


def hello(process: subprocess.Popen[bytes]) -> dict[str, object]:
    """What a `connect` says first; an error tells what it said instead."""
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line.startswith(MARK), (line, process.stderr.read())
    found: dict[str, object] = json.loads(line.removeprefix(MARK))
    return found


def close(process: subprocess.Popen[bytes]) -> bytes:
    """Hang up; what came until the end."""
    rest, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    return rest


def pid_of(said: dict[str, object]) -> int:
    health = said["health"]
    assert isinstance(health, dict)
    return int(health["pid"])


def test_many_at_once_get_one_service(places: Places) -> None:
    processes = [connect(places) for _ in range(8)]
    assert len({pid_of(hello(process)) for process in processes}) == 1
    for process in processes:
        close(process)


def test_bytes_pass_both_ways(places: Places) -> None:
    process = connect(places)
    said = hello(process)
    assert process.stdin is not None and process.stdout is not None
    for _ in range(2):
        process.stdin.write(ASK)
        process.stdin.flush()
        head = b"".join(iter(process.stdout.readline, b"\r\n"))
        length = int(
            next(line.split()[1] for line in head.splitlines() if line.startswith(b"Content-Length"))
        )
        assert json.loads(process.stdout.read(length)) == said["health"]
    assert close(process) == b""


def test_it_ends_with_a_peer_that_dies_and_has_not_read_the_answer(places: Places) -> None:
    """Long before the service closes a connection on which nothing more is asked."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = connect(places, ends=theirs.fileno())
        ours.sendall(ASK)
        until(lambda: b"HTTP/1.1 200" in ours.recv(65536, socket.MSG_PEEK), "the answer")
    process.communicate(timeout=DEADLINE)
    assert process.returncode == 0


def test_the_address_of_the_ssh_connection_is_told(places: Places) -> None:
    process = connect(places, SSH_CONNECTION="192.0.2.1 50000 192.0.2.2 22")
    assert hello(process)["reached_at"] == "192.0.2.2"
    close(process)


def test_the_service_knows_nothing_of_the_session_that_started_it(places: Places) -> None:
    process = connect(places, SSH_CONNECTION="192.0.2.1 50000 192.0.2.2 22", SSH_AUTH_SOCK="/tmp/agent")
    pid = pid_of(hello(process))
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert not [word for word in words if word.startswith(b"SSH_")]
    assert os.readlink(f"/proc/{pid}/cwd") == "/" and os.getsid(pid) == pid
    assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in (1, 2)} == {str(places.log)}
    close(process)


def test_a_connection_keeps_it_alive_and_the_last_lets_it_go(places: Places) -> None:
    """The service ends after 0.4 s unused; a second comes back to the same one long after the first began."""
    first = connect(places)
    pid = pid_of(hello(first))
    second = connect(places)
    assert pid_of(hello(second)) == pid
    close(first)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(1.5)
    third = connect(places)
    assert pid_of(hello(third)) == pid
    close(second)
    close(third)
    until(lambda: list(places.socket.parent.iterdir()) == [], "idle exit")


def test_after_a_killed_service_another_is_started(places: Places) -> None:
    first = connect(places)
    pid = pid_of(hello(first))
    os.kill(pid, 9)
    first.communicate(timeout=DEADLINE)
    assert places.socket.exists() and places.lock.exists()
    second = connect(places)
    assert pid_of(hello(second)) != pid
    close(second)


def test_a_service_that_cannot_start_is_quoted(tmp_path: Path) -> None:
    places = Places(tmp_path / "run" / "agent.sock", tmp_path / "state")
    places.state.mkdir()
    (places.state / "reports").write_text("in the way")
    process = connect(places)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, out) == (1, b"")
    assert b"the service cannot be started" in err and str(places.reports).encode() in err


def test_something_else_at_the_socket_is_told(tmp_path: Path) -> None:
    places = Places(tmp_path / "agent.sock", tmp_path / "state")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(places.socket))
        listening.listen()
        process = connect(places)
        visitor, _ = listening.accept()
        with visitor:
            visitor.recv(4096)
            visitor.sendall(b"220 mail.example ESMTP\r\n\r\n")
            _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1 and b"not this agent" in err


def test_a_directory_that_others_may_write_to_is_not_used(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    process = connect(Places(tmp_path / "agent.sock", tmp_path / "state"))
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1 and b"can be written to by others" in err


def test_a_second_service_leaves_the_first_alone(tmp_path: Path) -> None:
    service = Service.playing("migrated", tmp_path)
    again = subprocess.run(
        service.process.args,
        env=service.environment,
        stderr=subprocess.PIPE,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert again.returncode == EXIT_LOCKED and str(service.places.socket) in again.stderr
    assert service.answers()
    service.close()


def test_a_service_that_is_told_to_end_ends_what_runs(tmp_path: Path) -> None:
    from unit.stand_in_service import MOVE

    service = Service.playing("waits", tmp_path)
    id = service.good("POST", "/v1/migrations", MOVE)["id"]
    with service.stream("GET", f"/v1/migrations/{id}/events") as events:
        assert next(events)["state"] == "pre-copy"
        service.process.terminate()
        report = next(events)["report"]
    assert report["outcome"] == "rolled-back" and "told to end" in report["error"]["message"]
    service.close()
    service.start()
    assert service.good("GET", f"/v1/migrations/{id}")["report"] == report
    service.close()


def test_a_log_does_not_grow_for_ever(tmp_path: Path) -> None:
    places = Places(tmp_path / "agent.sock", tmp_path / "state")
    os.close(open_log(places))
    places.log.write_bytes(b"x" * (LOG_BYTES + 1))
    fd = open_log(places)
    assert os.fstat(fd).st_size == 0
    os.close(fd)
    assert {file.name for file in places.state.iterdir()} == {"agent.log", "agent.log.old"}


def test_where_things_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (SOCKET_VARIABLE, STATE_VARIABLE, RUNTIME_VARIABLE, "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    of_root = tmp_path / "agent.sock"
    monkeypatch.setattr("agent.server.places.HOST_SOCKET", of_root)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default() == Places(Path("/run/migrate/agent.sock"), Path("/var/lib/migrate"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/me")
    assert default() == Places(Path("/tmp/migrate-1000/agent.sock"), Path("/home/me/.local/state/migrate"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default().socket == Path("/run/user/1000/migrate/agent.sock")
    of_root.touch()  # it lets us in
    assert default().socket == of_root
    monkeypatch.setenv(SOCKET_VARIABLE, "/else/where")
    assert default().socket == Path("/else/where")
