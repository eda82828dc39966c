"""The strict redis client against a real server: quiet when all is well, and nothing wrong escapes it."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import redis_load
from programs.redis_load import Decoder, Failure, Link, State, encode, key_name, value_of

PROGRAM = Path(redis_load.__file__)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def connected(port: int) -> Link:
    deadline = time.monotonic() + 20
    while True:
        try:
            return Link(("127.0.0.1", port))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[int]:
    """A redis-server's port."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    command += ["--enable-debug-command", "yes", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            connected(port)
            yield port
        finally:
            process.terminate()


class Session:
    """One server, one state file, and the client's commands on them."""

    def __init__(self, port: int, directory: Path) -> None:
        self.port, self.state, self.directory = port, directory / "state", directory

    def __call__(self, command: str, *options: str) -> tuple[int, dict[str, Any]]:
        words = [str(PROGRAM), command, f"127.0.0.1:{self.port}", "--state", str(self.state), *options]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)

    def run_while(self, act: Callable[[Link], object], stopped: bool = True) -> tuple[int, dict[str, Any]]:
        """The result of `run`, with `act` done once all clients are connected and at work.

        Then it is stopped; or not: it ends by itself when a client notices something.
        """
        ready, stop = self.directory / "ready", self.directory / "stop"
        result: list[tuple[int, dict[str, Any]]] = []
        options = ("--until-file", str(stop), "--ready-file", str(ready), "--rate", "5")
        thread = threading.Thread(target=lambda: result.append(self("run", *options)))
        thread.start()
        deadline = time.monotonic() + 20
        while not ready.exists():
            assert time.monotonic() < deadline, "the clients do not connect"
            time.sleep(0.01)
        act(connected(self.port))
        if not stopped:
            thread.join(20)
        stop.touch()
        thread.join(60)
        return result[0]


@pytest.fixture
def session(server: int, tmp_path: Path) -> Session:
    made = Session(server, tmp_path)
    code, result = made("fill", "--megabytes", "4")
    assert code == 0 and result["bytes"] >= 4 << 20
    return made


def test_all_well(session: Session) -> None:
    before = session("digest")[1]
    code, result = session("run", "--seconds", "1.5")
    assert code == 0, result
    assert result["clients"] == 10 and result["requests"] > 100 and result["written_bytes"] > 0
    assert all(stall["ms"] > 0 for stall in result["stalls"]), "a client that had nothing to do"
    assert result["longest_stall"]["ms"] == max(stall["ms"] for stall in result["stalls"])
    code, verdict = session("verify")
    assert code == 0 and verdict["increments"] > 0 and verdict["rewritten"] > 0
    assert session("digest")[1] == before


def test_a_stall_is_measured(session: Session) -> None:
    code, result = session.run_while(lambda link: link.ask([encode(b"DEBUG", b"SLEEP", b"0.4")]))
    assert code == 0
    assert 390 < result["longest_stall"]["ms"] < 60_000
    assert abs(time.time() - result["longest_stall"]["at"]) < 60


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        ((b"CLIENT", b"KILL", b"TYPE", b"normal", b"SKIPME", b"yes"), "connection lost"),
        ((b"SET", b"counter:3", b"100000"), "INCR"),
        ((b"CONFIG", b"SET", b"maxmemory", b"1"), "the server answered"),
    ],
)
def test_run_notices(session: Session, damage: tuple[bytes, ...], complaint: str) -> None:
    code, result = session.run_while(lambda link: link.ask([encode(*damage)]), stopped=False)
    assert code == 1
    assert complaint in result["failures"][0]


@pytest.mark.parametrize(
    "damage",
    [
        (b"DEL", key_name(1)),
        (b"SET", key_name(1500), value_of(1500, 1)),
        (b"APPEND", key_name(7), b"x"),
        (b"INCR", b"counter:0"),
        (b"SET", b"another", b"key"),
    ],
)
def test_verify_notices(session: Session, damage: tuple[bytes, ...]) -> None:
    session("run", "--seconds", "0.5")
    connected(session.port).ask([encode(*damage)])
    code, result = session("verify")
    assert code == 1 and result["failures"]


def test_verify_notices_a_lost_write(session: Session) -> None:
    """An acknowledged write that is undone: the state knows of one more than the server has."""
    state = State.load(session.state)
    state.generations[5] = 1
    state.save(session.state)
    code, result = session("verify")
    assert code == 1 and "key 5" in result["failures"][0]


def test_digest_notices_one_byte(session: Session) -> None:
    before = session("digest")[1]["digest"]
    last = State.load(session.state).keys - 1
    connected(session.port).ask([encode(b"SETRANGE", key_name(last), b"900", b"\x00\x01")])
    assert session("digest")[1]["digest"] != before


def test_no_server(tmp_path: Path) -> None:
    code, result = Session(free_port(), tmp_path)("fill")
    assert code == 1 and "ConnectionRefusedError" in result["failures"][0]


STREAM = b"+OK\r\n:42\r\n$5\r\na\r\nbc\r\n$-1\r\n*2\r\n$1\r\nx\r\n:7\r\n$0\r\n\r\n"
ANSWERS = [b"OK", 42, b"a\r\nbc", None, [b"x", 7], b""]


@given(st.lists(st.integers(0, len(STREAM)), max_size=10))
def test_decoder_however_the_stream_is_cut(cuts: list[int]) -> None:
    decoder, answers, edges = Decoder(), [], [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        answers += list(decoder.feed(STREAM[start:end]))
    assert answers == ANSWERS
    assert not decoder.buffer


def test_decoder_refuses_errors() -> None:
    with pytest.raises(Failure, match="OOM"):
        list(Decoder().feed(b"-OOM command not allowed\r\n"))


def test_values_differ_and_come_again() -> None:
    values = {value_of(key, generation) for key in range(50) for generation in range(4)}
    assert len(values) == 200
    assert all(redis_load.SMALLEST <= len(value) <= redis_load.LARGEST for value in values)
    assert value_of(3, 2) in values
