"""The source's side: holding a socket still, reading all of it, and letting it go on as before."""

from __future__ import annotations

import errno
import os
import socket
import time
from typing import NamedTuple

from agent.kernel import sock_filter, tcp_repair
from agent.kernel.sock_diag import SockDiag
from agent.kernel.sock_filter import Filter, Kind
from agent.kernel.tcp_repair import Queue, TcpInfo, TcpState, borrow
from agent.resources.tcp import options
from agent.resources.tcp.state import (
    FIN_RECEIVED,
    FIN_SENT,
    FIN_UNACKNOWLEDGED,
    MOVABLE_STATES,
    SO_BUF_LOCK,
    Family,
    Queues,
    TcpConnection,
    TcpListener,
    bound_device,
    from_sockaddr,
    held_filter,
)

# The send queue may begin with acknowledged bytes of a segment (at most 64 KiB) that is not wholly so.
_HEAD_SLACK = 128 << 10
_ATTEMPTS = 8
_ANY_SEGMENT_SIZE = 1400


def lock(fd: int) -> None:
    """From now on nothing that arrives reaches the socket. Idempotent.

    Effect on failure (EPERM: the application locked its filter): none.
    """
    with borrow(fd) as sock:
        found = sock_filter.read(sock)
        if found is None or found.kind == Kind.APPLICATION:
            reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            sock_filter.hold(sock, Kind.LOCK, found.program if found else b"", reuse)
        elif found.kind != Kind.LOCK:
            sock_filter.hold(sock, Kind.LOCK, found.program, found.note)


def release(fd: int) -> None:
    """Undo `lock` and `capture`, in whatever state the socket is; nothing to undo is fine.

    An established connection asks its peer for its window, so that both learn what they missed.
    """
    with borrow(fd) as sock:
        held = held_filter(sock)
        if held is None:
            return
        repair = tcp_repair.in_repair(sock)
        if repair or held.kind == Kind.OPEN:
            # the filter goes last: if we die here, it tells the next one that the socket is not let go
            sock_filter.hold(sock, Kind.OPEN, held.program, held.note)
            if repair:
                tcp_repair.repair_off(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, held.note)
        sock_filter.let_go(sock, held.program)


def held(fd: int) -> bool:
    """Whether `release` has something to undo. OSError: EACCES for extended BPF, which is never ours."""
    with borrow(fd) as sock:
        return held_filter(sock) is not None


def unsettled(fd: int, diag: SockDiag) -> bool:
    """Whether it is a connection that has ended, or a listener that has `pending_accepts`."""
    with borrow(fd) as sock:
        info = tcp_repair.tcp_info(sock)
    if info.state == TcpState.CLOSE:
        return bool(info.segs_out or info.segs_in)
    return info.state == TcpState.LISTEN and pending_accepts(fd, diag) > 0


def pending_accepts(fd: int, diag: SockDiag) -> int:
    """Of a listener: connections not accepted yet and handshakes not finished. They cannot be moved: retry.

    `diag` belongs to the listener's network namespace. Any other socket has none.
    """
    with borrow(fd) as sock:
        info = tcp_repair.tcp_info(sock)
        if info.state != TcpState.LISTEN:
            return 0
        return info.unacked + diag.half_open(sock.getsockname()[1], sock.family)


def capture(fd: int) -> TcpConnection | TcpListener:
    """Everything the socket is. A connection must be locked, and is in repair afterwards: it closes silently.

    Raises OSError: EBUSY if it still changes, EPERM if it is not locked, EOPNOTSUPP for a state that does not
    move. On failure the socket may be in repair; `release` undoes that.
    """
    with borrow(fd) as sock:
        info = tcp_repair.tcp_info(sock)
        if info.state in (TcpState.LISTEN, TcpState.CLOSE):
            return _capture_listener(sock, info)
        if info.state not in MOVABLE_STATES:
            state = TcpState(info.state).name
            raise OSError(errno.EOPNOTSUPP, f"a connection in state {state} cannot be captured", f"fd {fd}")
        held = held_filter(sock)
        if held is None or held.kind != Kind.LOCK:
            raise OSError(errno.EPERM, "the connection is not locked", f"fd {fd}")
        return _capture_connection(sock, info, held)


def loosen(fd: int) -> None:
    """Out of repair, but still locked: what reads it finds it as it was. Nothing is sent."""
    with borrow(fd) as sock:
        if tcp_repair.tcp_info(sock).state in MOVABLE_STATES:
            tcp_repair.repair_off(sock, window_probe=False)


def silence(fd: int) -> None:
    """In repair (again): it closes without a word to its peer."""
    with borrow(fd) as sock:
        if tcp_repair.tcp_info(sock).state in MOVABLE_STATES:
            tcp_repair.repair_on(sock)


def outline(fd: int) -> TcpConnection:
    """A connection with nothing in its queues: what another host needs to say whether it could have it.

    Read while it runs, without disturbing it. OSError: ENOTCONN if it has ended.
    """
    with borrow(fd) as sock:
        found = sock_filter.read(sock)
        return TcpConnection(
            family=_family(sock),
            state=1,
            local=from_sockaddr(sock.getsockname()),
            peer=from_sockaddr(sock.getpeername()),
            queues=Queues(receive_seq=0, unread=b"", send_seq=0, sent=b"", unsent=b""),
            mss_clamp=_ANY_SEGMENT_SIZE,
            wscale=(0, 0),
            sack=False,
            timestamp=None,
            timestamp_usec=False,
            captured_at=0.0,
            window=(0, 0, 0, 0, 0),
            window_clamp=sock.getsockopt(tcp_repair.SOL_TCP, tcp_repair.TCP_WINDOW_CLAMP),
            options=options.capture(sock, listener=False),
            reuse_address=bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)),
            device=bound_device(sock),
            buffers=_buffers(sock),
            filter=found.program if found else b"",
            uid=os.fstat(sock.fileno()).st_uid,
        )


def _family(sock: socket.socket) -> Family:
    return 2 if sock.family == socket.AF_INET else 10


def _buffers(sock: socket.socket) -> tuple[int, int, int]:
    receive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    send = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return receive, send, sock.getsockopt(socket.SOL_SOCKET, SO_BUF_LOCK)


def _capture_listener(sock: socket.socket, info: TcpInfo) -> TcpListener:
    if sock.proto != socket.IPPROTO_TCP:
        raise OSError(errno.EOPNOTSUPP, f"protocol {sock.proto} is not TCP", f"fd {sock.fileno()}")
    if info.state == TcpState.CLOSE and (info.segs_out or info.segs_in):
        raise OSError(errno.EOPNOTSUPP, "the connection has ended", f"fd {sock.fileno()}")
    found = sock_filter.read(sock)
    if found is not None and found.kind != Kind.APPLICATION:
        reuse = found.note
    else:
        reuse = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    return TcpListener(
        family=_family(sock),
        local=from_sockaddr(sock.getsockname()),
        backlog=info.sacked if info.state == TcpState.LISTEN else None,
        options=options.capture(sock, listener=True),
        reuse_address=bool(reuse),
        device=bound_device(sock),
        buffers=_buffers(sock),
        filter=found.program if found else b"",
        uid=os.fstat(sock.fileno()).st_uid,
    )


def _capture_connection(sock: socket.socket, info: TcpInfo, held: Filter) -> TcpConnection:
    tcp_repair.repair_on(sock)
    timestamps = bool(info.options & tcp_repair.TCPI_OPT_TIMESTAMPS)
    scaled = bool(info.options & tcp_repair.TCPI_OPT_WSCALE)
    state, queues = _capture_queues(sock)
    return TcpConnection(
        family=_family(sock),
        state=state,  # type: ignore[arg-type]  # one of MOVABLE_STATES
        local=from_sockaddr(sock.getsockname()),
        peer=from_sockaddr(sock.getpeername()),
        queues=queues,
        mss_clamp=tcp_repair.mss_clamp(sock),
        wscale=(info.snd_wscale, info.rcv_wscale) if scaled else (0, 0),
        sack=bool(info.options & tcp_repair.TCPI_OPT_SACK),
        timestamp=tcp_repair.timestamp(sock) if timestamps else None,
        timestamp_usec=bool(info.options & tcp_repair.TCPI_OPT_USEC_TS),
        captured_at=time.time(),
        window=tcp_repair.repair_window(sock),
        window_clamp=sock.getsockopt(tcp_repair.SOL_TCP, tcp_repair.TCP_WINDOW_CLAMP),
        options=options.capture(sock, listener=False),
        reuse_address=bool(held.note),
        device=bound_device(sock),
        buffers=_buffers(sock),
        filter=held.program,
        uid=os.fstat(sock.fileno()).st_uid,
    )


class _Sizes(NamedTuple):
    """While these stand still, so does the connection: the application is frozen."""

    state: int
    unread: int
    unacknowledged: int


def _sizes(sock: socket.socket) -> _Sizes:
    state = tcp_repair.tcp_info(sock).state
    return _Sizes(state, tcp_repair.unread(sock), tcp_repair.unacknowledged(sock))


def _capture_queues(sock: socket.socket) -> tuple[TcpState, Queues]:
    # A packet that passed right before the filter was attached may still be on its way through the kernel on
    # another CPU: read until nothing moves.
    before = _sizes(sock)
    for _ in range(_ATTEMPTS):
        received = _read_receive_queue(sock, before)
        sent = _read_send_queue(sock, before)
        after = _sizes(sock)
        if before == after and received is not None and sent is not None:
            (receive_seq, unread), (send_seq, unacknowledged, unsent) = received, sent
            queues = Queues(
                receive_seq=receive_seq, unread=unread, send_seq=send_seq, sent=unacknowledged, unsent=unsent
            )
            return TcpState(before.state), queues
        before = after
    raise OSError(errno.EBUSY, "the connection changes although it is locked", f"fd {sock.fileno()}")


def _read_receive_queue(sock: socket.socket, sizes: _Sizes) -> tuple[int, bytes] | None:
    """(sequence number, bytes), or None if the queue is not of that size."""
    tcp_repair.select_queue(sock, Queue.RECEIVE)
    end = tcp_repair.queue_seq(sock) - (sizes.state in FIN_RECEIVED)  # a FIN has a number but is no byte
    data = _peek(sock, sizes.unread)
    return ((end - len(data)) & 0xFFFFFFFF, data) if len(data) == sizes.unread else None


def _read_send_queue(sock: socket.socket, sizes: _Sizes) -> tuple[int, bytes, bytes] | None:
    """(sequence number, bytes sent, bytes not sent), or None if the queue is not of that size.

    The send queue stays selected. Until then, pacing and other timers go on sending what is in it; from then
    on they only note it as sent (tcp_write_xmit). A byte that left after it was captured as not sent would
    end the connection: the peer acknowledges it, and the new socket discards acknowledgements of what it has
    not sent.
    """
    tcp_repair.select_queue(sock, Queue.SEND)
    not_sent = tcp_repair.not_sent(sock)
    fin_waits = sizes.state in FIN_UNACKNOWLEDGED
    outstanding = sizes.unacknowledged - fin_waits
    sent = outstanding - max(not_sent - fin_waits, 0)
    end = tcp_repair.queue_seq(sock) - (sizes.state in FIN_SENT)
    data = _peek(sock, outstanding + _HEAD_SLACK) if outstanding else b""
    if sent < 0 or len(data) < outstanding:
        return None
    data = data[len(data) - outstanding :]
    return (end - outstanding) & 0xFFFFFFFF, data[:sent], data[sent:]


def _peek(sock: socket.socket, size: int) -> bytes:
    return sock.recv(size, socket.MSG_PEEK | socket.MSG_DONTWAIT) if size else b""
