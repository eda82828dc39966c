"""Two links over connections that break again and again: each frame is dealt with once, and in order."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import protocol
from agent.link import Link, Resumption
from agent.pageset import Range
from agent.protocol import Discard, Failed, Message, Pages, PeerFailed, Resumed, RoundDone, RoundEnd
from transport import frames
from transport.frames import Kind, LinkClosed, ProtocolError

PAGE = 4096
DEADLINE = 20.0


class Breaking:
    """A socket that is broken after so many bytes in either direction, and the other end with it."""

    def __init__(self, sock: socket.socket, out: int, into: int) -> None:
        self._socket, self._out, self._in = sock, out, into

    def fileno(self) -> int:
        return self._socket.fileno()

    def settimeout(self, seconds: float | None) -> None:
        self._socket.settimeout(seconds)

    def sendmsg(self, parts: list[memoryview]) -> int:
        data = b"".join(parts)[: self._out]
        if not data:
            self._break()
            raise BrokenPipeError(32, "Broken pipe")
        sent = self._socket.send(data)
        self._out -= sent
        return sent

    def recv_into(self, buffer: memoryview) -> int:
        if not self._in:
            self._break()
            raise ConnectionResetError(104, "Connection reset by peer")
        count = self._socket.recv_into(buffer[: self._in])
        self._in -= count
        return count

    def _break(self) -> None:
        """What has been sent may still be read at the other end, as after a real break."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class Wire:
    """Makes the connections: whoever comes first to a new one waits for the other."""

    def __init__(self, breaks: list[tuple[int, int]]) -> None:
        self._breaks = iter(breaks)
        self.broken = 0
        self._for_destination: queue.Queue[socket.socket] = queue.Queue()

    def pair(self) -> tuple[Breaking, socket.socket]:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.settimeout(DEADLINE)
        return Breaking(ours, *next(self._breaks, (1 << 60, 1 << 60))), theirs

    def at_source(self, _: LinkClosed) -> Any:
        self.broken += 1
        ours, theirs = self.pair()
        self._for_destination.put(theirs)
        return ours

    def at_destination(self, broken: LinkClosed) -> socket.socket:
        try:
            return self._for_destination.get(timeout=DEADLINE)
        except queue.Empty:
            raise broken from None


class Memory:
    """Pages of the source: each has its number and its version."""

    def __init__(self, pages: int) -> None:
        self.versions = [0] * pages
        self.gone: set[int] = set()

    def write(self, page: int) -> None:
        self.versions[page] += 1

    def content(self, page: int) -> bytes:
        return b"%08d%08d" % (page, self.versions[page]) + bytes(PAGE - 16)

    def read(self, ranges: list[Range]) -> tuple[list[Range], bytearray]:
        """As PageSender.reread: what is gone by now is left out."""
        pages = [n for start, end in ranges for n in range(start // PAGE, end // PAGE) if n not in self.gone]
        done = [(n * PAGE, (n + 1) * PAGE) for n in pages]
        return done, bytearray(b"".join(map(self.content, pages)))


def no_pages(_: list[Range]) -> tuple[list[Range], bytearray]:
    raise AssertionError("a destination sends no pages")


class Destination(threading.Thread):
    """The other end: notes what it gets, answers each RoundEnd, ends with the stream."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self.got: list[Message | Pages] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            while True:
                message = self._link.receive()
                if isinstance(message, Failed):  # the source's last word
                    return
                self.got.append(message)
                if isinstance(message, RoundEnd):
                    self._link.send(RoundDone(message.number))
        except Exception as error:
            self.error = error
        finally:
            self._link.close()


class Sent(msgspec.Struct, frozen=True):
    """One frame of pages: which, and in which versions they were when it was made."""

    versions: dict[int, int]


Step = tuple[str, int]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("message"), st.integers(1, 3000)),
        st.tuples(st.just("pages"), st.integers(0, 7)),
        st.tuples(st.just("write"), st.integers(0, 7)),
        st.tuples(st.just("lose"), st.integers(0, 7)),
        st.tuples(st.just("round"), st.integers(0, 0)),
    ),
    max_size=40,
)
# bytes until it breaks: in the first frame, in `Resumed` itself, in the middle of pages
some = st.one_of(st.integers(0, 40), st.integers(0, 20_000))
breaks = st.lists(st.tuples(some, some), max_size=12)


class Source:
    """What is sent, and a note of it."""

    def __init__(self, link: Link, memory: Memory) -> None:
        self._link, self._memory = link, memory
        self.sent: list[Message | Sent] = []
        self.rounds = 0

    def do(self, what: str, size: int) -> None:
        match what:
            case "write":
                self._memory.write(size)
            case "lose":
                self._memory.gone.add(size)
            case "message":
                self._say(Discard([(n * PAGE, (n + 1) * PAGE) for n in range(size)]))
            case "pages":
                self._pages(size)
            case _:
                self.round()

    def round(self) -> None:
        self.rounds += 1
        self._say(RoundEnd(self.rounds))
        assert self._link.expect(RoundDone).number == self.rounds
        self._link.arrived()

    def _pages(self, first: int) -> None:
        ranges, data = self._memory.read([(first * PAGE, 8 * PAGE)])
        if ranges:
            pages = [start // PAGE for start, _ in ranges]
            self.sent.append(Sent({page: self._memory.versions[page] for page in pages}))
            self._link.send_pages(Kind.PAGES_RAW, ranges, memoryview(data), len(data))

    def _say(self, message: Message) -> None:
        self.sent.append(message)
        self._link.send(message)


def assert_same(sent: list[Message | Sent], got: list[Message | Pages], memory: Memory) -> None:
    """One for one. A frame of pages may have come later, with newer pages, or without those that are gone."""
    assert len(got) == len(sent)
    for one, arrived in zip(sent, got, strict=True):
        if not isinstance(one, Sent):
            assert arrived == one
        elif isinstance(arrived, Discard):
            assert arrived.ranges == [] and set(one.versions) <= memory.gone
        else:
            assert isinstance(arrived, Pages)
            found = versions_in(arrived)
            assert set(found) <= set(one.versions)
            assert set(one.versions) - set(found) <= memory.gone
            assert all(
                one.versions[page] <= version <= memory.versions[page] for page, version in found.items()
            )


def versions_in(pages: Pages) -> dict[int, int]:
    found, position = {}, 0
    for start, end in pages.ranges:
        for page in range(start // PAGE, end // PAGE):
            head = bytes(pages.data[position : position + 16])
            assert int(head[:8]) == page
            found[page] = int(head[8:])
            position += PAGE
    return found


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(steps, breaks)
def test_every_frame_is_dealt_with_once_and_in_order(what: list[Step], broken: list[tuple[int, int]]) -> None:
    wire, memory = Wire(broken), Memory(8)
    ours, theirs = wire.pair()
    destination = Destination(resumable(theirs, wire.at_destination, no_pages))
    link = resumable(ours, wire.at_source, memory.read)
    source = Source(link, memory)
    destination.start()
    try:
        for step in what:
            source.do(*step)
        source.round()  # all of it has arrived then
    finally:
        link.send(Failed("", ""))
        link.close()
        destination.join(DEADLINE)
    assert not destination.is_alive()
    assert destination.error is None or isinstance(destination.error, LinkClosed), destination.error
    assert_same(source.sent, destination.got, memory)


def resumable(sock: Any, renew: Callable[[LinkClosed], Any], reread: Any) -> Link:
    link = Link(sock)
    link.set_timeout(DEADLINE)
    link.make_resumable(Resumption(renew, reread))
    return link


def no_link(broken: LinkClosed) -> socket.socket:
    raise broken


# --- a peer that lies ---


def broken_link(sent: int, answered: int) -> tuple[Link, socket.socket]:
    """A link that has sent so many messages, of which so many have been answered; and its next connection."""
    first, old = socket.socketpair()
    second, peer = socket.socketpair()
    for end in (second, peer):
        end.settimeout(DEADLINE)
    link = resumable(first, lambda _: second, no_pages)
    for number in range(sent):
        link.send(RoundEnd(number))
        if number + 1 == answered:
            link.arrived()
    old.close()
    return link, peer


def say(peer: socket.socket, message: Message) -> None:
    peer.sendall(frames.encode(Kind.MESSAGE, protocol.encode(message)))


@pytest.mark.parametrize("received", [0, 2, 6, 1 << 40])
def test_a_peer_that_has_more_than_was_sent_or_lacks_what_it_has_answered(received: int) -> None:
    link, peer = broken_link(sent=5, answered=3)
    say(peer, Resumed(received))
    with pytest.raises(ProtocolError, match=f"it has {received} of 5 frames"):
        link.receive()


@pytest.mark.parametrize(("received", "again"), [(3, [3, 4]), (4, [4]), (5, [])])
def test_a_peer_gets_what_it_lacks(received: int, again: list[int]) -> None:
    link, peer = broken_link(sent=5, answered=3)
    say(peer, Resumed(received))
    say(peer, RoundDone(7))
    assert link.receive() == RoundDone(7)
    theirs = Link(peer)
    assert theirs.receive() == Resumed(0)
    assert [theirs.receive() for _ in again] == [RoundEnd(number) for number in again]
    assert not theirs.readable()


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (RoundDone(1), ProtocolError, "RoundDone where Resumed was due"),
        (Failed("void", "it is void"), PeerFailed, "it is void"),
    ],
)
def test_a_peer_that_does_not_go_on(said: Message, error: type[Exception], words: str) -> None:
    link, peer = broken_link(sent=1, answered=0)
    say(peer, said)
    with pytest.raises(error, match=words):
        link.receive()


def test_resumed_where_nothing_broke_is_not_the_protocol() -> None:
    """It would be counted by neither end."""
    ours, theirs = socket.socketpair()
    link = resumable(ours, no_link, no_pages)
    say(theirs, Resumed(0))
    with pytest.raises(ProtocolError, match="Resumed where RoundDone was due"):
        link.expect(RoundDone)


def test_nothing_is_resumed_once_the_link_is_final() -> None:
    ours, theirs = socket.socketpair()
    asked: list[LinkClosed] = []
    link = resumable(ours, asked.append, no_pages)
    link.make_final()
    theirs.close()
    with pytest.raises(LinkClosed):
        link.receive()
    assert asked == []
