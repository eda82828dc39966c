"""Streams of this version of the protocol and of the one before are read by the decoders of today.

The streams were recorded from whole migrations (tests/fuzz/record.py). How versions meet is here too.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from fuzz.streams import link
from unit.moving import Destination
from unit.test_protocol import MESSAGES

from agent import kinds, protocol, source
from agent.api import Blocker, Event, Finished, Outcome, Request
from agent.link import Link
from agent.protocol import MIN_VERSION, VERSION, Pages, PeerFailed
from transport import frames
from transport.frames import Kind, LinkClosed, ProtocolError

DATA = Path(__file__).parent / "data"
VERSIONS = sorted({int(file.stem.partition("-")[2]) for file in DATA.glob("stream-*")})
OFFER = MESSAGES[0]
assert isinstance(OFFER, protocol.Offer)


def said(version: int, who: str) -> Iterator[protocol.Message | Pages]:
    reading = link((DATA / f"stream-{version}.{who}").read_bytes())
    try:
        while True:
            yield reading.receive()
    except LinkClosed:
        return


def test_every_version_that_is_understood_was_recorded() -> None:
    """Version 1 was the first."""
    assert set(VERSIONS) >= {v for v in range(MIN_VERSION, VERSION + 1) if v >= 1}


@pytest.mark.parametrize("version", [v for v in VERSIONS if v >= MIN_VERSION])
def test_what_a_source_said(version: int) -> None:
    messages = list(said(version, "source"))
    offer, *_, last = messages
    assert isinstance(offer, protocol.Offer) and offer.version == version and offer.host == "alpha"
    assert isinstance(last, protocol.Late) and last.last
    counts = Counter(type(message) for message in messages)
    assert counts[protocol.Ping] == 8 and counts[Pages] >= 3
    for kind in (protocol.Prepare, protocol.Rebuild, protocol.Complete, protocol.Verify, protocol.Commit):
        assert counts[kind] == 1, kind
    rebuild = next(m for m in messages if isinstance(m, protocol.Rebuild))
    threads = [t for m in messages if isinstance(m, protocol.Threads) for t in m.threads]
    assert len(rebuild.process.threads) + len(threads) == len(rebuild.process.tids) == 2
    assert rebuild.process.timers and rebuild.process.threads[0].pending
    described = [d for m in messages if isinstance(m, protocol.Descriptors) for d in m.descriptors]
    found = {d.kind: kinds.decode(d) for d in described}
    assert {"pipe", "eventfd", "timerfd", "signalfd", "epoll", "tcp", "regular-file"} <= found.keys()
    assert found["eventfd"].count == 7 and found["tcp"].tcp.local.port == 7000


@pytest.mark.parametrize("version", [v for v in VERSIONS if v >= MIN_VERSION])
def test_what_a_destination_said(version: int) -> None:
    messages = list(said(version, "destination"))
    assert isinstance(messages[0], protocol.Answer) and messages[0].version == version
    kinds_said = Counter(type(message) for message in messages)
    assert kinds_said[protocol.Pong] == 8
    for kind in (protocol.Prepared, protocol.Ready, protocol.Verified, protocol.Live, protocol.Done):
        assert kinds_said[kind] == 1, kind


# --- how versions meet ---


@pytest.fixture
def destination() -> Iterator[Destination]:
    found = Destination()
    yield found
    found.link.close()
    found.close()


@pytest.mark.parametrize("version", range(MIN_VERSION, VERSION + 1))
def test_a_source_of_a_version_that_is_understood(destination: Destination, version: int) -> None:
    """It is answered in its own: one before ours insists on that."""
    asking = Link(destination.link)
    asking.send(msgspec.structs.replace(OFFER, version=version))
    assert asking.expect(protocol.Answer).version == version


@pytest.mark.parametrize("version", [VERSION - 2, VERSION + 1, 4_000_000_000])
def test_a_source_of_another_version(destination: Destination, version: int) -> None:
    asking = Link(destination.link)
    asking.send(msgspec.structs.replace(OFFER, version=version))
    answer = asking.expect(protocol.Answer)
    blocker = next(b for b in answer.blockers if b.kind == "version")
    assert blocker.why == f"the source speaks version {version}, this agent {MIN_VERSION} to {VERSION}"
    assert answer.version == VERSION


def test_a_source_whose_first_message_cannot_even_be_read(destination: Destination) -> None:
    body = msgspec.msgpack.encode({"type": "offer", "version": VERSION + 1, "novel": True})
    destination.link.sendall(frames.encode(Kind.MESSAGE, body))
    with pytest.raises(PeerFailed, match=f"version {VERSION + 1} .*{MIN_VERSION} to {VERSION}: ") as gave_up:
        Link(destination.link).expect(protocol.Answer)
    assert gave_up.value.kind == "version"


@pytest.mark.parametrize("tag", ["offer", "answer"])
def test_another_version_that_cannot_even_be_read(tag: str) -> None:
    body = msgspec.msgpack.encode({"type": tag, "version": VERSION + 1, "novel": True})
    with pytest.raises(protocol.OtherVersion, match=f"version {VERSION + 1} .* to {VERSION}"):
        protocol.decode(body)
    body = msgspec.msgpack.encode({"type": tag, "version": VERSION, "novel": True})
    with pytest.raises(ProtocolError, match="not understood"):
        protocol.decode(body)


def answering(answer: protocol.Answer) -> tuple[list[Event], list[str]]:
    """A check of this very process by a destination that answers so: events, and what else it was sent."""
    ours, theirs = socket.socketpair()
    heard: list[str] = []

    def serve() -> None:
        far = Link(theirs)
        far.expect(protocol.Offer)
        far.send(answer)
        try:
            while True:
                heard.append(type(far.receive()).__name__)
        except LinkClosed:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    events: list[Event] = []
    request = Request(operation="move", pid=os.getppid(), destination="beta")
    source.run(request, ours, events.append, lambda: False)
    thread.join()
    return events, heard


ANSWER = protocol.Answer(host="beta", blockers=(), notices=(), missing=(), unshared=())


@pytest.mark.parametrize("version", [VERSION - 2, VERSION + 1])
def test_a_destination_of_another_version(version: int) -> None:
    events, heard = answering(msgspec.structs.replace(ANSWER, version=version))
    last = events[-1]
    assert isinstance(last, Finished) and last.report.error is not None
    assert last.report.outcome is Outcome.REFUSED and heard == ["Failed"]
    assert f"version {version} " in last.report.error.message
    assert f"{MIN_VERSION} to {VERSION}: " in last.report.error.message


def test_a_destination_that_asks_for_a_file_of_ours() -> None:
    """Whatever it names would be read as root, and sent."""
    events, heard = answering(msgspec.structs.replace(ANSWER, missing=("/etc/shadow",)))
    last = events[-1]
    assert isinstance(last, Finished) and last.report.error is not None
    assert last.report.outcome is Outcome.REFUSED and "not offered" in last.report.error.message
    assert heard == ["Failed"]


def test_a_destination_that_says_too_much() -> None:
    """A report is one line to those who read it."""
    blocker = Blocker(kind="x", what="y" * 10_000, why="z")
    body = msgspec.msgpack.encode(msgspec.structs.replace(ANSWER, blockers=(blocker,) * 500))
    with pytest.raises(ProtocolError, match="characters for a report"):
        link(frames.encode(Kind.MESSAGE, body)).receive()
