"""What a destination makes of a message, as far as it needs neither a process nor a socket.

Arithmetic on the received layout, the calls of a rebuild as the bytes that a shadow would be given, packets
that would be replayed: none of that may meet a number that it cannot take.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from agent import kinds, layout, protocol
from agent.api import Endpoint, Outcome, Report
from agent.kernel import packet
from agent.kernel.arch.x86_64 import MMAP_MIN, TASK_SIZE
from agent.kernel.arch.x86_64_features import fitted
from agent.kernel.tcp_repair import RepairWindow
from agent.resources import epoll, identity, signals, switchover, tcp, threads, timerfd, timers, waits
from agent.resources.tcp import destination as tcp_destination
from agent.resources.tcp.state import to_sockaddr
from agent.state import ThreadState
from agent.tracee import ENTRY, NOT_MADE, SCRATCH_SIZE, Batch

_CREDENTIALS = identity.credentials(1)
_ELAPSED = 3_600_000_000_000  # nanoseconds between capture and rebuild
_ADDRESSES = ("192.0.2.10", "2001:db8::10")


class _Discarding:
    """Takes the place of the raw socket that would let packets arrive."""

    def inject(self, whole: bytes) -> None:
        family = socket.AF_INET if whole[0] >> 4 == 4 else socket.AF_INET6
        socket.inet_ntop(family, whole[16:20] if family == socket.AF_INET else whole[24:40])


def use(message: object) -> None:
    """Raises nothing but ProtocolError."""
    action = _USES.get(type(message))
    if action is not None:
        action(message)


def _calls(fill: Callable[[Batch], object]) -> None:
    """Calls to make, packed as they are for a shadow."""
    batch = Batch(0x10_0000)
    try:
        fill(batch)
    except MemoryError as error:  # more than a batch has room for is refused, and says so
        assert "scratch" in str(error), error
        return
    for call in batch.calls:
        ENTRY.pack(*call, NOT_MADE)


def _layout(mappings: list[layout.Mapping]) -> None:
    whole = layout.merge(mappings)
    fresh = layout.difference([], mappings)
    assert [o.mapping for o in fresh if isinstance(o, layout.Map)] == whole
    assert not layout.difference(mappings, mappings)
    assert all(isinstance(o, layout.Unmap) for o in layout.difference(mappings, []))
    layout.difference(mappings, mappings[::2])
    gap = layout.find_gap([mappings], SCRATCH_SIZE, MMAP_MIN, TASK_SIZE)
    assert all(m.end <= gap or gap + SCRATCH_SIZE <= m.start for m in mappings)


def _offer(offer: protocol.Offer) -> None:
    identity.limit_notices(offer.limits)
    for number, (soft, hard) in enumerate(offer.limits):
        assert number < 16
        struct.pack("<qq", identity._rlim(soft), identity._rlim(hard))
    for listener in offer.listeners:
        _socket(listener)
    for connection in offer.connections:
        _socket(connection)


def _also(also: protocol.Also) -> None:
    for listener in also.listeners:
        _socket(listener)


def _socket(state: tcp.TcpSocket) -> None:
    ends = [state.local, state.peer] if isinstance(state, tcp.TcpConnection) else [state.local]
    for end in ends:
        host, port, *_ = to_sockaddr(state.family, msgspec.structs.replace(end, scope=""))
        socket.inet_pton(state.family, host)
        struct.pack(">H", port)
    struct.pack("<iiii", state.backlog or 0 if isinstance(state, tcp.TcpListener) else 0, *state.buffers)
    struct.pack("<i", tcp_destination._captured_transparent(state))
    if isinstance(state, tcp.TcpConnection):
        _connection(state)


def _connection(state: tcp.TcpConnection) -> None:
    window = tcp_destination._window(RepairWindow(*state.window), state.queues.receive_seq)
    struct.pack("<5I", *(word & 0xFFFFFFFF for word in window))
    struct.pack("<ii", state.window_clamp - 1, state.window_clamp)
    if state.timestamp is not None:
        struct.pack("<I", tcp_destination._timestamp_now(state, state.timestamp))
    packet.parse(
        packet.tcp_packet(
            source=(state.peer.address, state.peer.port),
            destination=(state.local.address, state.local.port),
            seq=state.queues.receive_seq + len(state.queues.unread),
            ack=state.queues.send_seq,
            flags=packet.FIN | packet.ACK,
            window=min(state.window[1] >> state.wscale[0], 0xFFFF),
        )
    )


def _rebuild(message: protocol.Rebuild) -> None:
    state = message.process
    leader = state.threads[0]
    m = state.memory
    struct.pack("<11Q", *(getattr(m, name) for name in m.__struct_fields__))
    _calls(lambda batch: signals.restore_actions(batch, state.actions))
    _calls(lambda batch: timers.create_posix(batch, state.timers))
    _calls(lambda batch: signals.requeue_process(batch, leader.tid, state.pending))
    _calls(lambda batch: timers.restore_itimers(batch, state, leader.tid, _ELAPSED))
    _calls(lambda batch: timers.arm_posix(batch, state, leader.tid, _ELAPSED))
    _calls(lambda batch: identity.restore_credentials(batch, state.credentials, _CREDENTIALS))
    _calls(lambda batch: batch.call("personality", 135, state.personality, state.umask, state.thp_disable))
    _threads(state.threads)


def _threads(some: Sequence[ThreadState]) -> None:
    for thread in some:
        thread.registers.pack()
        struct.pack("<Q", thread.sigmask)
        _calls(lambda batch, thread=thread: threads.restore(batch, thread, 1))  # type: ignore[misc]
        _calls(lambda batch, thread=thread: threads.restore_rseq(batch, thread))  # type: ignore[misc]
        if len(thread.xstate) <= 11008:
            fitted(thread.xstate, bytes(11008))
        if thread.remaining_ns is not None:
            waits.timespec(thread.remaining_ns)
            call = waits.call_with(thread.registers, thread.remaining_ns, 0x10_0000)
            _calls(lambda batch, call=call: batch.call("wait", *call))  # type: ignore[misc]


def descriptor(name: str, state: Any) -> None:
    """What is done with the state of one descriptor."""
    match name:
        case "timerfd":
            later, expired = timerfd.after(state, _ELAPSED)
            struct.pack("<QqqQ", later.ticks + expired, later.remaining_ns, later.interval_ns, state.clock)
        case "epoll":
            for fired in (False, True):
                _calls(lambda batch, fired=fired: epoll.add_entries(batch, 5, state, fired))  # type: ignore[misc]
        case "eventfd":
            state.count.to_bytes(8, "little")
        case "tcp":
            _socket(state.tcp)
        case "pipe":
            struct.pack("<i", 2 * state.capacity)
        case "regular-file":
            struct.pack("<q", state.position)


def _descriptors(message: protocol.Descriptors) -> None:
    for one in message.descriptors:
        descriptor(one.kind, kinds.decode(one))
        struct.pack(f"<{len(one.numbers)}i", *(number for number, _ in one.numbers))


def packets(some: list[bytes]) -> int:
    """How many would arrive: all, or none."""
    try:
        return switchover.replay(some, _ADDRESSES, _Discarding())  # type: ignore[arg-type]
    except ValueError:
        return 0


def _late(message: protocol.Late) -> None:
    packets(message.packets)
    for _, siginfo in message.signals:
        assert 1 <= signals.number_of(siginfo) <= 64


def _verify(message: protocol.Verify) -> None:
    assert all(end - start <= 64 * 4096 for start, end, _ in message.pieces)


def _report(message: protocol.Answer | protocol.Ready | protocol.Live | protocol.Done) -> None:
    """What the other end says becomes part of a report, which must be read by others."""
    here = Endpoint(host="alpha", pid=1)
    report = Report(
        outcome=Outcome.REFUSED,
        source=here,
        destination=here,
        blockers=getattr(message, "blockers", ()),
        notices=getattr(message, "notices", ()),
        phases=getattr(message, "phases", ()),
        address_moved=getattr(message, "address_moved", ()),
    )
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


_USES: dict[type[Any], Callable[[Any], None]] = {
    protocol.Offer: _offer,
    protocol.Also: _also,
    protocol.Prepare: lambda message: _layout(message.layout),
    protocol.Layout: lambda message: _layout(message.mappings),
    protocol.Rebuild: _rebuild,
    protocol.Threads: lambda message: _threads(message.threads),
    protocol.Descriptors: _descriptors,
    protocol.Late: _late,
    protocol.Verify: _verify,
    protocol.Answer: _report,
    protocol.Ready: _report,
    protocol.Live: _report,
    protocol.Done: _report,
}
