"""What a hostile end of the link may say: refused where it is decoded, or compared with what came before.

Each case begins with a message as it should be, and changes one thing in it.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import os
import struct
import time
import tracemalloc
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from fuzz import streams
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect
from unit.children import gone, wait_for
from unit.moving import Destination, Program
from unit.tapped import Frame, Tap

from agent import kinds, layout, protocol, source
from agent.api import Event, Finished, MoveOptions, Outcome, Report, Request
from agent.descriptors import Descriptor, Rebuilding, Refusal
from agent.kernel.arch.x86_64 import TASK_SIZE
from agent.resources import regular_file
from agent.resources.files import FileRef, IncomingFile
from agent.verify import Masks
from transport import frames
from transport.frames import Kind, LinkClosed, ProtocolError

PAGE = 4096
Tree = Any  # a message as msgpack has it


def recorded(tag: str) -> Tree:
    """A message of this kind that a real migration had, or with more in it."""
    for body in [*map(msgspec.msgpack.encode, streams.MESSAGES), *streams.messages()[::-1]]:
        tree = msgspec.msgpack.decode(body)
        if tree["type"] == tag:
            return tree
    raise AssertionError(tag)


def decode(tree: Tree) -> protocol.Message:
    return protocol.decode(msgspec.msgpack.encode(tree))


def at(*path: str | int) -> Callable[[Tree, Any], None]:
    """Puts a value there."""

    def put(tree: Tree, value: Any) -> None:
        for step in path[:-1]:
            tree = tree[step]
        tree[path[-1]] = value

    return put


MAPPING = [0x10000, 0x20000, 3, 0, -1, 0]
FIRST = ("process", "threads", 0)
CASES: list[tuple[str, Callable[[Tree, Any], None], Any]] = [
    ("layout", at("mappings"), [MAPPING, MAPPING]),
    ("layout", at("mappings"), [[0x20000, 0x30000, 3], MAPPING]),
    ("layout", at("mappings"), [[0x10000, 0x10000, 3]]),
    ("layout", at("mappings"), [[0x10001, 0x20000, 3]]),
    ("layout", at("mappings"), [[0x10000, 0x20800, 3]]),
    ("layout", at("mappings"), [[0x10000, TASK_SIZE + PAGE, 3]]),
    ("layout", at("mappings"), [[0x7FFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000, 3]]),
    ("layout", at("mappings"), [[0, TASK_SIZE, 0]]),
    ("layout", at("mappings"), [[-PAGE, PAGE, 3]]),
    ("layout", at("mappings"), [[0x10000, 0x20000, 8]]),
    ("layout", at("mappings"), [[0x10000, 0x20000, 3, 1 << 20]]),
    ("layout", at("mappings"), [[0x10000, 0x20000, 3, 0, -2, 0]]),
    ("layout", at("mappings"), [[0x10000, 0x20000, 3, 0, 0, 1]]),
    ("layout", at("mappings"), [[0x10000, 0x20000, 3, 0, -1, PAGE]]),
    ("prepare", at("layout"), [MAPPING, MAPPING]),
    ("prepare", at("monotonic_delta"), 1 << 63),
    ("discard", at("ranges"), [[PAGE, 2 * PAGE], [PAGE, 2 * PAGE]]),
    ("discard", at("ranges"), [[2 * PAGE, PAGE]]),
    ("discard", at("ranges"), [[1, PAGE]]),
    ("discard", at("ranges"), [[0, 1 << 63]]),
    ("guards", at("ranges"), [[2 * PAGE, PAGE]]),
    ("offer", at("tids"), []),
    ("offer", at("tids"), [12, 12]),
    ("offer", at("tids"), [13]),
    ("offer", at("pid"), 0),
    ("offer", at("migration"), "../../etc/cron.d/x"),
    ("prepared", at("boot"), "-o ProxyCommand=x"),
    ("offer", at("pid"), 1 << 23),
    ("offer", at("limits"), [[0, 0]] * 17),
    ("offer", at("limits"), [[0, 1 << 63]]),
    ("offer", at("specials", 0, "name"), "[heap]"),
    ("offer", at("specials", 0, "end"), 0),
    ("offer", at("listeners", 0, "local", "host"), "example.org"),
    ("offer", at("listeners", 0, "local", "host"), "192.0.2.1"),
    ("offer", at("listeners", 0, "local", "host"), "fe80::1%eth0"),
    ("offer", at("listeners", 0, "backlog"), 1 << 31),
    ("offer", at("listeners", 0, "filter"), b"1234567"),
    ("offer", at("listeners", 0, "options"), {"SO_NOVEL": b""}),
    ("offer", at("listeners", 0, "options"), {"SO_MARK": bytes(5)}),
    ("offer", at("connections", 0, "peer", "host"), "::1"),
    ("offer", at("connections", 0, "captured_at"), float("nan")),
    ("offer", at("addresses", 0, "address"), "beta"),
    ("offer", at("addresses", 0, "prefix_length"), 33),
    ("offer", at("addresses", 0, "broadcast"), "::"),
    ("offer", at("files", 0, "path"), "/etc/passwd\0"),
    ("offer", at("files", 0, "size"), -1),
    ("rebuild", at("process", "threads"), []),
    ("rebuild", at("process", "tids"), [7]),
    ("rebuild", at("process", "actions"), [[65, bytes(32)]]),
    ("rebuild", at("process", "actions"), [[9, bytes(31)]]),
    ("rebuild", at("process", "itimers", 0), bytes(31)),
    ("rebuild", at("process", "itimers", 0), struct.pack("<4q", 0, 0, -1, 0)),
    ("rebuild", at("process", "timers", 0, "setting"), struct.pack("<4q", 1 << 60, 0, 1, 0)),
    ("rebuild", at("process", "credentials", "uids"), [0, 0, 0, 1 << 32]),
    ("rebuild", at("process", "memory", "start_brk"), 1 << 48),
    ("rebuild", at("process", "cwd"), "/a\0b"),
    ("rebuild", at("process", "umask"), -1),
    ("rebuild", at(*FIRST, "registers"), [-1] * 27),
    ("rebuild", at(*FIRST, "comm"), "caf\u20ac"),
    ("rebuild", at(*FIRST, "altstack"), b""),
    ("rebuild", at(*FIRST, "xstate"), b""),
    ("rebuild", at(*FIRST, "pending"), [bytes(128)]),
    ("rebuild", at(*FIRST, "pending"), [struct.pack("<i", 10)]),
    ("rebuild", at(*FIRST, "scheduling", "attributes"), b""),
    ("threads", at("threads", 0, "remaining_ns"), -1),
    ("threads", at("threads", 0, "tid"), 0),
    ("descriptors", at("descriptors", 0, "numbers"), []),
    ("descriptors", at("descriptors", 0, "numbers"), [[-1, False]]),
    ("descriptors", at("captured_at"), (1 << 64) - 1),
    ("verify", at("pieces"), [[0, 1 << 40, bytes(16)]]),
    ("verify", at("pieces"), [[PAGE, PAGE, bytes(16)]]),
    ("verify", at("present"), [[2 * PAGE, PAGE]]),
    ("commit", at("signals"), [[0, bytes(128)]]),
    ("commit", at("signals"), [[-1, struct.pack("<i", 10).ljust(128)]]),
    ("late", at("packets"), [bytes(1 << 18)]),
    ("complete", at("lock_future"), 8),
    ("ready", at("phases"), [{"name": "x", "ms": float("nan"), "where": "source"}]),
    ("pong", at("monotonic"), 1 << 63),
]


@pytest.mark.parametrize(("tag", "put", "value"), CASES)
def test_one_thing_that_cannot_be_meant(tag: str, put: Callable[[Tree, Any], None], value: Any) -> None:
    tree = copy.deepcopy(recorded(tag))
    decode(tree)
    put(tree, value)
    with pytest.raises(ProtocolError, match="not understood"):
        decode(tree)


def test_a_wait_that_no_call_could_have_left() -> None:
    """A shadow's thread would be made to enter whatever call it names."""
    tree = copy.deepcopy(recorded("threads"))
    thread = tree["threads"][0]
    thread["remaining_ns"] = 5
    thread["registers"][10] = (1 << 64) - 516  # rax: -ERESTART_RESTARTBLOCK
    thread["registers"][15] = 35  # orig_rax: nanosleep
    decode(tree)
    thread["registers"][15] = 58  # vfork
    with pytest.raises(ProtocolError, match="call 58"):
        decode(tree)


STATES = {name: msgspec.to_builtins(state, builtin_types=(bytes,)) for name, state in streams.STATES[::-1]}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("regular-file", "flags", os.O_TRUNC | os.O_WRONLY),
        ("regular-file", "flags", os.O_CREAT),
        ("regular-file", "position", 1 << 63),
        ("regular-file", "path", "/a\0"),
        ("character-device", "minor", 1),
        ("character-device", "flags", os.O_CREAT),
        ("pipe", "capacity", 1 << 31),
        ("pipe", "capacity", 4),
        ("pipe", "flags", os.O_TRUNC),
        ("eventfd", "count", -1),
        ("eventfd", "flags", 1),
        ("timerfd", "ticks", 1 << 63),
        ("timerfd", "interval_ns", -1),
        ("signalfd", "mask", -1),
        ("epoll", "entries", [{"fd": 3, "events": 1 << 32, "data": 0}]),
        ("tcp", "flags", os.O_TRUNC),
        ("novel", "x", 1),
    ],
)
def test_a_descriptor_that_cannot_be_meant(name: str, field: str, value: Any) -> None:
    state = STATES.get(name, {})
    if state:
        kinds.decode(Descriptor(name, ((3, False),), 0, msgspec.Raw(msgspec.msgpack.encode(state))))
    raw = msgspec.Raw(msgspec.msgpack.encode({**state, field: value}))
    with pytest.raises(ProtocolError):
        kinds.decode(Descriptor(name, ((3, False),), 0, raw))


def _unbounded(info: inspect.Type, path: str) -> Iterator[str]:
    """Collections below a type that may have any length."""
    match info:
        case inspect.UnionType():
            for one in info.types:
                yield from _unbounded(one, path)
        case inspect.StructType():
            for field in info.fields:
                yield from _unbounded(field.type, f"{path} {info.cls.__name__}.{field.name}")
        case inspect.TupleType():
            for one in info.item_types:
                yield from _unbounded(one, path)
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType() | inspect.FrozenSetType():
            if info.max_length is None:
                yield path
            yield from _unbounded(info.item_type, path)
        case inspect.DictType():
            if info.max_length is None:
                yield path
        case inspect.AnyType():
            yield path


def test_every_list_of_the_protocol_has_a_bound() -> None:
    types = [*typing.get_args(protocol.Message), *(kind.State for kind in kinds.KINDS)]
    assert [path for info in inspect.multi_type_info(types) for path in _unbounded(info, "")] == []


# --- whoever is in the middle of a real migration ---

PROGRAM = r"""
#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
#include <time.h>
#include <pthread.h>
static void *sleeper(void *unused) { while (1) pause(); return unused; }
int main(void)
{
    struct timespec time = {0, 5000000};
    pthread_t thread;
    int ends[2];
    pipe(ends);
    open("/dev/null", O_RDONLY);
    pthread_create(&thread, 0, sleeper, 0);
    dprintf(1, "ready\n");
    for (long round = 0;; round++) {
        dprintf(1, "%ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    found = Program(tmp_path, PROGRAM)
    found.wait_for("ready")
    yield found
    found.close()


def meddled(program: Program, tag: str, change: Callable[[Tree], Sequence[Tree]]) -> Report:
    """Move it while somebody changes the first message of a kind into others."""
    done: list[bool] = []

    def on_frame(who: str, frame: Frame) -> Sequence[Frame]:
        if frame[0] is not Kind.MESSAGE or done:
            return [frame]
        tree = msgspec.msgpack.decode(frame[1])
        if tree["type"] != tag:
            return [frame]
        done.append(True)
        return [(Kind.MESSAGE, msgspec.msgpack.encode(one), 0) for one in change(tree)]

    destination = Destination()
    events: list[Event] = []
    request = Request(operation="move", pid=program.pid, destination="beta", options=MoveOptions(verify=True))
    try:
        source.run(request, Tap(destination.link, on_frame).near, events.append, lambda: False)
    finally:
        gc.enable()
        gc.unfreeze()
        destination.close()
        destination.link.close()
    assert done
    last = events[-1]
    assert isinstance(last, Finished)
    if last.report.destination.pid:
        program.copies.append(last.report.destination.pid)
    return last.report


def put(*path: str | int, value: Any) -> Callable[[Tree], list[Tree]]:
    def change(tree: Tree) -> list[Tree]:
        at(*path)(tree, value)
        return [tree]

    return change


def _numbers_twice(tree: Tree) -> list[Tree]:
    tree["descriptors"][1]["numbers"] = tree["descriptors"][0]["numbers"]
    return [tree]


def _over_the_vdso(tree: Tree) -> list[Tree]:
    tree["specials"][-1]["start"] = tree["specials"][-1]["end"] - PAGE
    return [tree]


def _first_is_another(tree: Tree) -> list[Tree]:
    process = tree["process"]
    process["tids"].reverse()
    process["threads"][0]["tid"] = process["tids"][0]
    return [tree]


@pytest.mark.parametrize(
    ("tag", "change", "said"),
    [
        ("threads", put("threads", 0, "tid", value=4_000_000), "which was not announced"),
        ("threads", lambda tree: [tree, tree], "or was here already"),
        ("threads", lambda tree: [], "1 of 2 threads did not come"),
        ("rebuild", _first_is_another, "another first thread than was offered"),
        ("descriptors", _numbers_twice, "twice"),
        ("descriptors", put("descriptors", 0, "kind", value="novel"), "of unknown kind"),
        ("descriptors", lambda tree: [tree, tree], "after the last ones"),
        ("rebuild", put("process", "executable", value=77), "file number 77"),
        ("prepare", put("layout", value=[[0x10000, 0x20000, 3], [0x10000, 0x20000, 3]]), "out of order"),
        ("round-end", lambda _: [{"type": "discard", "ranges": [[0, PAGE]]}], "outside the declared layout"),
        ("round-end", lambda _: [{"type": "guards", "ranges": [[0, PAGE]]}], "outside the declared layout"),
        ("verified", put("memory", value=[[0, 1 << 46]]), "what it was not asked for"),
        ("answer", put("missing", value=["/etc/shadow"]), "was not offered"),
    ],
)
def test_a_meddler(program: Program, tag: str, change: Callable[[Tree], Sequence[Tree]], said: str) -> None:
    """The move is off, the program runs on, and nothing stays on the destination."""
    report = meddled(program, tag, change)
    assert report.error is not None
    expected = Outcome.REFUSED if tag == "answer" else Outcome.ROLLED_BACK
    assert (report.outcome, said in report.error.message) == (expected, True), report.error
    assert report.error.kind in ("protocolerror", "protocol")
    program.progress()
    for pid in program.copies:
        wait_for(lambda pid=pid: gone(pid), "the shadow to end")  # type: ignore[misc]


def test_a_mapping_where_the_vdso_is_to_be(program: Program) -> None:
    def change(tree: Tree) -> list[Tree]:
        tree["layout"] = [[0x7000_0000_0000, TASK_SIZE, 0]]
        return [tree]

    report = meddled(program, "prepare", change)
    assert report.error is not None and "over [v" in report.error.message, report.error
    program.progress()


# --- lengths ---


def test_a_length_is_believed_as_data_comes() -> None:
    claim = frames.HEADER.pack(frames.MAGIC, Kind.MESSAGE, 0, frames.MAX_MESSAGE, 0, 0)
    tracemalloc.start()
    try:
        with pytest.raises(LinkClosed):
            streams.link(claim + bytes(1000)).receive()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_message_larger_than_any_frame_of_pages() -> None:
    message = protocol.FileData(path="/x", data=os.urandom(9 << 20), last=True)
    data = frames.encode(Kind.MESSAGE, msgspec.msgpack.encode(message))
    assert streams.link(data).receive() == message


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12)


@given(RANGES, st.integers(0, 60), st.integers(0, 60))
def test_masks(ranges: list[tuple[int, int]], start: int, end: int) -> None:
    """They may overlap, be empty, or end before they begin."""
    inside = {byte for low, high in Masks(ranges).within(start, end) for byte in range(low, high)}
    assert inside == {byte for low, high in ranges for byte in range(low, high)} & set(range(start, end))


def test_a_lot_of_masks_and_a_lot_of_pieces() -> None:
    masks = Masks([(64 * n, 64 * n + 32) for n in range(1 << 17)])
    began = time.monotonic()
    assert sum(len(list(masks.within(n * 512, n * 512 + 512))) for n in range(1 << 14)) == 1 << 17
    assert time.monotonic() - began < 20


# --- files ---


def test_more_of_a_file_than_was_announced(tmp_path: Path) -> None:
    digest = hashlib.sha256(bytes(10)).digest()
    incoming = IncomingFile(FileRef(str(tmp_path / "x"), 10, 0o600, digest))
    incoming.write(bytes(10))
    with pytest.raises(OSError, match="more than the 10 bytes announced"):
        incoming.write(b"1")
    with pytest.raises(OSError, match="does not match"):
        incoming.finish()
    assert list(tmp_path.iterdir()) == []


def test_a_fifo_where_a_file_was(tmp_path: Path) -> None:
    """Nobody is waited for."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    began = time.monotonic()
    with pytest.raises(Refusal, match="neither file nor directory"):
        regular_file.rebuild(regular_file.State(str(path), os.O_RDONLY, 0, 0, 0), Rebuilding())
    assert time.monotonic() - began < 5


def test_the_largest_layout_is_checked_in_time() -> None:
    count = 1 << 16
    tree = {"type": "layout", "mappings": [[n * 2 * PAGE, n * 2 * PAGE + PAGE, 3] for n in range(1, count)]}
    body = msgspec.msgpack.encode(tree)
    began = time.monotonic()
    message = protocol.decode(body)
    assert isinstance(message, protocol.Layout) and len(message.mappings) == count - 1
    assert len(layout.difference([], message.mappings)) == count - 1
    assert time.monotonic() - began < 20
