"""The event pipe: never waits for its reader, loses nothing but Progress, notices that nobody reads."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator

import msgspec
import pytest
from unit.children import wait_for

from agent import launch
from agent.api import Event, Log, Progress, StateChanged
from agent.kernel import procfs
from agent.worker import EventPipe

PROGRESS = Progress(round=1, pages_done=1, pages_total=2, bytes_sent=3, rate=4.0, estimated_pause_ms=None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, EventPipe]]:
    reading, writing = os.pipe()
    yield reading, EventPipe(writing)
    os.close(writing)
    os.close(reading)


def drain_raw(fd: int) -> bytes:
    """All that is in the pipe now."""
    os.set_blocking(fd, False)
    data = b""
    try:
        while chunk := os.read(fd, 1 << 20):
            data += chunk
    except BlockingIOError:
        pass
    return data


def drain(fd: int) -> list[Event]:
    """The same, whole lines."""
    data = drain_raw(fd)
    assert data.endswith(b"\n") or not data
    return [msgspec.json.decode(line, type=Event) for line in data.splitlines()]


def fill(events: EventPipe) -> int:
    """Write Progress until the pipe takes no more; how many were taken."""
    line = len(msgspec.json.encode(PROGRESS)) + 1
    for _ in range(2 * (1 << 20) // line):
        events.emit(PROGRESS)
    return (1 << 20) // line


def test_events_arrive_in_order_as_lines(pipe: tuple[int, EventPipe]) -> None:
    reading, events = pipe
    sent: list[Event] = [StateChanged(state="pre-copy"), PROGRESS, Log(level="info", message="two\nlines")]
    for event in sent:
        events.emit(event)
    assert drain(reading) == sent


def test_a_full_pipe_drops_progress_and_waits_for_nobody(pipe: tuple[int, EventPipe]) -> None:
    reading, events = pipe
    taken = fill(events)
    received = drain(reading)
    assert 0 < len(received) <= taken + 1
    assert received[0] == PROGRESS


def test_a_full_pipe_keeps_everything_else(pipe: tuple[int, EventPipe]) -> None:
    reading, events = pipe
    fill(events)
    states: list[Event] = [StateChanged(state=f"state {n}") for n in range(100)]
    for state in states:
        events.emit(state)
    events.emit(PROGRESS)  # must not overtake, nor be kept
    first = drain_raw(reading)
    events.flush()
    rest = drain_raw(reading)
    lines = [msgspec.json.decode(line, type=Event) for line in (first + rest).splitlines()]
    assert [event for event in lines if isinstance(event, StateChanged)] == states
    assert lines[-1] == states[-1]


def test_a_line_longer_than_the_pipe_survives(pipe: tuple[int, EventPipe]) -> None:
    reading, events = pipe
    long = Log(level="info", message="x" * (3 << 20))
    events.emit(long)
    data = b""
    while not data.endswith(b"\n"):
        data += drain_raw(reading)
        events.flush(timeout=0.1)
    assert msgspec.json.decode(data, type=Event) == long


def test_a_reader_that_is_gone_is_noticed_and_harmless() -> None:
    reading, writing = os.pipe()
    events = EventPipe(writing)
    os.close(reading)
    events.emit(StateChanged(state="pre-copy"))
    assert events.broken
    events.emit(StateChanged(state="freezing"))
    events.flush()
    os.close(writing)


@pytest.mark.parametrize("module", [("agent.worker", "3", "4"), ("agent.main", "destination")])
def test_the_engines_may_have_as_many_descriptors_as_anybody(module: tuple[str, ...]) -> None:
    """sshd's sessions often begin with 1,024, and one of a thousand connections has more."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    command, environment = launch.module(module[0])
    reading, writing = os.pipe()
    shell = f'ulimit -S -n 64; exec 3<&{reading} 4>&{writing}; exec "$@"'
    engine = subprocess.Popen(
        ["bash", "-c", shell, "bash", *command, *module[1:]],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(reading, writing),
    )
    try:
        wait_for(lambda: procfs.limits(engine.pid)[resource.RLIMIT_NOFILE] == (hard, hard), "its limit")
    finally:
        engine.communicate()
        os.close(reading)
        os.close(writing)
