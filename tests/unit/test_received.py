"""Text and memory from elsewhere: each kind has its one error, and its bound."""

from __future__ import annotations

import asyncio
import os
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.children import puppet, wait_for

from agent import front, scratch
from agent.api import Event, MoveOptions, Progress, Request, SshOptions
from agent.bounds import MALFORMED
from agent.front import BadRequest
from agent.hook_api import Drain
from agent.kernel import elf, procfs
from agent.kernel.arch.x86_64 import Registers
from agent.kernel.memory import RemoteMemory
from agent.recovery import verdict_of
from agent.resources import threads, waits
from agent.server.route import body_of
from agent.server.store import Store, new_id
from migrate import client
from transport.lines import LineBuffer, LineTooLong
from transport.process import TEXT_LIMIT, Lines, run_local

DEEP = b'{"operation": ' + b"[" * 100_000
REQUEST = Request(operation="move", pid=7, destination="beta")


# --- requests ---


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"novel": ' + b'{"a":' * 100_000,
        b'{"operation": "move", "pid": 7, "destination": "\xff"}',
        b"",
        b"1" * 5000,
    ],
    ids=["deep", "deep-unknown", "not-utf-8", "empty", "number"],
)
def test_a_body_that_is_no_request(body: bytes) -> None:
    with pytest.raises(BadRequest, match="not a request"):
        body_of(body, Request)
    with pytest.raises(BadRequest, match="not a request"):
        front.parse_request(body)
    assert front.abort_reason(body) is None


@pytest.mark.parametrize(
    "change",
    [
        {"pid": 10**30},
        {"pid": 0},
        {"pid": -7},
        {"ssh": {"auth_socket": "/tmp/a\0b"}},
        {"ssh": {"identity": ["/root/\0"]}},
        {"options": {"freeze_timeout_ms": 1e300}},
        {"options": {"downtime_limit_ms": -1}},
        {"options": {"bandwidth": 0}},
        {"options": {"bandwidth": 1 << 70}},
        {"options": {"compression_level": 1000}},
        {"options": {"addresses": ["beta"]}},
        {"reached_at": "beta"},
        {"destination": "x" * 5000},
    ],
)
def test_a_request_that_cannot_be_meant(change: dict[str, object]) -> None:
    """Each of them would have come up in the middle of a migration, or ended the service's task of it."""
    front.parse_request(msgspec.json.encode(REQUEST))
    tree = msgspec.to_builtins(REQUEST)
    for name, value in change.items():
        tree[name] = {**tree[name], **value} if isinstance(value, dict) else value
    with pytest.raises(BadRequest, match="not a request"):
        front.parse_request(msgspec.json.encode(tree) if "bandwidth" not in str(change) else _json(tree))


def _json(tree: object) -> bytes:
    import json

    return json.dumps(tree).encode()


def test_a_drain_with_a_zero_byte() -> None:
    with pytest.raises(BadRequest):
        body_of(msgspec.json.encode(Drain(plan={}, auth_socket="/tmp/\0")), Drain)


def test_the_largest_numbers_are_taken() -> None:
    options = MoveOptions(bandwidth=1 << 50, max_rounds=1_000_000, addresses=("192.0.2.1", "2001:db8::1"))
    ssh = SshOptions(identity=("/root/.ssh/café",), auth_socket="/tmp/agent")
    request = msgspec.structs.replace(REQUEST, pid=1 << 22, options=options, ssh=ssh)
    assert front.parse_request(msgspec.json.encode(request)) == request


# --- what an agent says ---


@pytest.mark.parametrize("line", [DEEP, b'{"event": "log", "level": "info", "message": "\xff"}', b"{"])
def test_a_line_that_is_no_event(line: bytes) -> None:
    with pytest.raises(MALFORMED):
        msgspec.json.decode(line, type=Event)
    with pytest.raises(MALFORMED):
        client.failure(500, line)
    with pytest.raises(EOFError, match="not understood"):
        verdict_of(line)


def test_numbers_that_no_event_has() -> None:
    """Python's integers have no end, and its floats have one."""
    event = Progress(round=1, pages_done=1, pages_total=2, bytes_sent=3, rate=4.5, estimated_pause_ms=None)
    tree = msgspec.to_builtins(event) | {"bytes_sent": 10**400}
    with pytest.raises(MALFORMED):
        msgspec.json.decode(_json(tree), type=Event)


@given(st.lists(st.binary(max_size=20)), st.lists(st.integers(1, 30)))
def test_lines_come_whole_however_they_are_cut(lines: list[bytes], sizes: list[int]) -> None:
    wanted = [line.replace(b"\n", b"") for line in lines]
    stream, found, buffer = b"".join(line + b"\n" for line in wanted), list[bytes](), LineBuffer(20)
    for size in [*sizes, len(stream)]:
        found += buffer.feed(stream[:size])
        stream = stream[size:]
    assert found == wanted


@pytest.mark.parametrize("piece", [1, 7, 21])
def test_a_line_without_an_end(piece: int) -> None:
    buffer = LineBuffer(20)
    with pytest.raises(LineTooLong):
        for _ in range(21):
            assert buffer.feed(b"x" * piece) == []


def test_what_a_host_says_to_a_person_is_cut() -> None:
    said: list[str] = []
    lines = Lines(said.append)
    for _ in range(100):
        lines.feed(b"x" * 1000)
    assert said and all(len(line) <= TEXT_LIMIT + 1000 for line in said)


def test_a_program_that_says_no_lines_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transport.process.LINE_LIMIT", 1 << 12)

    async def listen() -> int | None:
        text = "import sys, time; sys.stdout.write('x' * 100_000); sys.stdout.flush(); time.sleep(60)"
        process = await run_local([sys.executable, "-c", text], dict(os.environ), lambda _: None)
        assert [line async for line in process.lines()] == []
        end = await process.wait()
        return None if end.signal == "KILL" else end.status

    assert asyncio.run(listen()) is None


def test_a_record_that_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "state" / "migrations")
    for content in (DEEP, b"\xff", b'"\xff"', b"{}"):
        name = new_id()
        (tmp_path / "state" / "migrations" / f"{name}.json").write_bytes(content)
        assert store.load(name) is None


# --- what a process decides about ---


def test_a_command_line_without_an_end() -> None:
    """A process says itself where its arguments are (prctl(2), PR_SET_MM); this one has as many as it can."""
    argument = "x" * 100_000
    waiting = ["sh", "-c", "read line", "sh", *[argument] * 10]
    with subprocess.Popen(waiting, stdin=subprocess.PIPE) as process:
        try:
            line = Path(f"/proc/{process.pid}/cmdline")
            wait_for(lambda: len(line.read_bytes()) > 1_000_000, "the program")
            assert len(procfs.command_line(process.pid)) == 1 << 17
        finally:
            process.kill()


def test_a_name_in_fdinfo_that_is_not_text() -> None:
    found = procfs.parse_fdinfo(b"pos:\t0\nflags:\t02\nname:\t\xff\xfe\nlock:\t1\n")
    assert found[:2] == [("pos", "0"), ("flags", "02")]


def test_a_label_that_is_cut_off() -> None:
    """The process has unmapped the rest since."""
    label = struct.pack("<16sQQQ", b"migrate: scratch", (1 << 64) - 1, 5, 6)
    assert scratch.owner_of(label) == scratch.Owner((1 << 64) - 1, 5, 6)
    assert scratch.owner_of(label[:-1]) is None and scratch.owner_of(b"") is None
    assert scratch.userfaultfd_of(bytes(63)) is None


@pytest.mark.parametrize("address", [1 << 63, (1 << 64) - 8, 1 << 62])
def test_a_pointer_to_nowhere(address: int) -> None:
    with puppet() as target:
        memory = RemoteMemory(target.pid)
        try:
            for read in (memory.read, memory.read_whole):
                with pytest.raises(OSError):
                    read(address, 8)
            registers = Registers(rip=0x1000)
            assert threads.abort_rseq(registers, (0x1000, 32, 0), memory, section=address) == registers
        finally:
            memory.close()


def test_a_wait_longer_than_the_kernel_can_count() -> None:
    """As `sleep infinity` asks for: it must fit into 64 bits of nanoseconds on the link."""

    class Memory:
        def read_whole(self, address: int, size: int) -> bytes:
            return struct.pack("<qq", (1 << 63) - 1, 999_999_999)

    asleep = Registers(orig_rax=35, rax=(1 << 64) - 516, rdi=0x1000)
    left = waits.remaining_ns(asleep, Memory(), None, False, None)  # type: ignore[arg-type]
    assert left == (1 << 63) - 1


def test_a_build_id_of_any_length() -> None:
    note = struct.pack("<III4s4096s", 4, 4096, 3, b"GNU\0", b"x" * 4096)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    fd = os.memfd_create("elf")
    try:
        os.pwrite(fd, head + segment + note, 0)
        assert elf.build_id(fd) == ""
    finally:
        os.close(fd)
