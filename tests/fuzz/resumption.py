"""A target: the other end of a link that breaks and comes back, over connection after connection."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from fuzz import rebuilding
from fuzz.mutate import mutate_bytes, mutate_stream
from fuzz.target import ROOM_FOR_PAGES, Target

from agent import protocol
from agent.link import Link, Resumption
from agent.pageset import Range
from agent.protocol import PeerFailed, Resumed, RoundDone, RoundEnd
from transport import frames
from transport.frames import Kind, LinkClosed, ProtocolError

_PAGE = 4096
_SENT = 5  # frames, before anything breaks
_ANSWERED = 2
_CONNECTIONS = 4
_CUTS = _CONNECTIONS  # bytes of an input before what is said: where each connection ends
_STEP = 8  # what they count in


class Connection:
    """One that is here already, with the few methods of a socket that a Link uses; what is sent is kept."""

    def __init__(self, incoming: bytes) -> None:
        self._rest = memoryview(incoming)
        self.sent = bytearray()

    def recv_into(self, buffer: memoryview) -> int:
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def sendmsg(self, parts: list[memoryview]) -> int:
        for part in parts:
            self.sent += part
        return sum(map(len, parts))

    def settimeout(self, seconds: float | None) -> None: ...

    def close(self) -> None: ...


def _run(data: bytes) -> bool:
    """A source in pre-copy; the first bytes of the input say where its connections break."""
    if len(data) < _CUTS:
        return False
    made: list[Connection] = [Connection(b"")]
    rest = _connections(data[_CUTS:], data[:_CUTS])

    def renew(broken: LinkClosed) -> Connection:
        incoming = next(rest, None)
        if incoming is None:
            raise broken
        made.append(Connection(incoming))
        return made[-1]

    link = Link(made[0])  # type: ignore[arg-type]
    link.make_resumable(Resumption(renew, _reread))  # type: ignore[arg-type]
    for number in range(_SENT):
        if number % 2:
            link.send_pages(Kind.PAGES_RAW, [(0, _PAGE)], bytes(_PAGE), _PAGE)
        else:
            link.send(RoundEnd(number))
        if number + 1 == _ANSWERED:
            link.arrived()
    understood = _receive(link)
    for connection in made[1:]:
        _look(bytes(connection.sent))
    return understood


def _connections(data: bytes, cuts: bytes) -> Iterator[bytes]:
    for cut in cuts[:-1]:
        yield data[: _STEP * cut]
        data = data[_STEP * cut :]
    yield data


def _receive(link: Link) -> bool:
    count = 0
    try:
        while True:
            rebuilding.use(link.receive())
            count += 1
    except (LinkClosed, ProtocolError, PeerFailed):
        return count > 0


def _reread(ranges: list[Range]) -> tuple[list[Range], bytearray]:
    return ranges, bytearray(sum(end - start for start, end in ranges))


def _look(sent: bytes) -> None:
    """What we say on a new connection is the protocol, and never more than may be missing."""
    theirs, frames_seen = Link(Connection(sent)), 0  # type: ignore[arg-type]
    if not sent:
        return
    assert isinstance(theirs.receive(), Resumed)
    try:
        while True:
            assert not isinstance(theirs.receive(), Resumed)
            frames_seen += 1
    except LinkClosed:
        assert frames_seen <= _SENT - _ANSWERED


def _said(*messages: protocol.Message) -> bytes:
    return b"".join(frames.encode(Kind.MESSAGE, protocol.encode(one)) for one in messages)


def _seeds() -> list[bytes]:
    once = _said(Resumed(3), RoundDone(1), RoundDone(2))
    first, second = _said(Resumed(_ANSWERED), RoundDone(1)), _said(Resumed(_SENT), RoundDone(2))
    padded = first + bytes(-len(first) % _STEP)  # whole frames, and a piece of one
    return [
        bytes(_CUTS - 1) + b"\0" + once,
        bytes([255]) + bytes(_CUTS - 1) + once,
        bytes([len(padded) // _STEP, 255]) + bytes(_CUTS - 2) + padded + second,
    ]


def _mutate(data: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return mutate_bytes(data[:_CUTS], random)[:_CUTS].ljust(_CUTS, b"\0") + data[_CUTS:]
    return data[:_CUTS] + mutate_stream(data[_CUTS:], random)


TARGETS = (Target("resumption", _run, _seeds, _mutate, ROOM_FOR_PAGES),)
