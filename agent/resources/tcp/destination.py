"""The destination's side: a socket made equal to a captured one, silent until it is brought to life."""

from __future__ import annotations

import errno
import os
import socket
import time

from agent.kernel import packet, sock_filter, tcp_repair
from agent.kernel.tcp_repair import Queue, RepairWindow, TcpState, borrow
from agent.resources.tcp import options
from agent.resources.tcp.options import When
from agent.resources.tcp.state import (
    FIN_RECEIVED,
    FIN_SENT,
    MOVABLE_STATES,
    SO_BUF_LOCK,
    TcpConnection,
    TcpListener,
    bound_device,
    held_filter,
    to_sockaddr,
)

SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
IP_TRANSPARENT = 19
IPV6_TRANSPARENT = 75

_CHUNK = 256 << 10
_SMALLEST_CHUNK = 1 << 10
_BUFFER_SLACK = 1 << 20
_LARGEST_MAXSEG = 32767  # MAX_TCP_WINDOW
_BUFFER_LIMIT = 0x3FFFFFFF  # twice that is the largest int
_AFTER_FIN = FIN_RECEIVED | {TcpState.TIME_WAIT, TcpState.CLOSE}
_FIN_SECONDS = 0.1  # measured: it is there when the send returns
# A source may still have sent (an acknowledgement, a retransmission) after its timestamp was read. Going on a
# little later than that keeps the peer from taking us for an old duplicate (RFC 7323, PAWS); jumping forward
# does no harm.
_TIMESTAMP_MARGIN_MS = 1000
_TIMESTAMP_MARGIN_MAX_MS = 60_000


def rebuild(state: TcpConnection | TcpListener) -> int:
    """A new socket that is what `state` says, locked, and silent until `activate`. Returns its descriptor.

    The address need not be on this host yet. Listeners must be rebuilt before connections, which may share
    their port. Raises OSError: EADDRINUSE (the port is taken), ENETUNREACH (no route to the peer), ENOENT (a
    congestion control that this kernel lacks), ENODEV (bound to a device that is not here), ENOPROTOOPT (an
    option in use that this kernel lacks), ENOMEM; nothing is left behind then. KeyError: an option that is
    none.
    """
    sock = _new_socket(state)
    try:
        if isinstance(state, TcpConnection):
            _rebuild_connection(sock, state)
        else:
            _rebuild_listener(sock, state)
    except OSError as error:
        sock.close()  # in repair, or never connected: silent
        what = f"{state.local} to {state.peer}" if isinstance(state, TcpConnection) else str(state.local)
        detail = f" ({error.filename})" if error.filename else ""
        raise OSError(error.errno, f"{error.strerror}{detail}", what) from error
    except BaseException:
        sock.close()
        raise
    return sock.detach()


def _new_socket(state: TcpConnection | TcpListener) -> socket.socket:
    sock = socket.socket(state.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        if state.uid != os.fstat(sock.fileno()).st_uid:
            os.fchown(sock.fileno(), state.uid, -1)  # SO_REUSEPORT groups and routing rules ask for the owner
        sock_filter.hold(sock, sock_filter.Kind.LOCK, state.filter, int(state.reuse_address))
    except BaseException:
        sock.close()
        raise
    return sock


def _rebuild_listener(sock: socket.socket, state: TcpListener) -> None:
    # TIME_WAIT sockets of an earlier stay must not be in the way; with this set, listeners still conflict
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    options.apply(sock, state.options, When.EARLY, listener=True)
    _set_device(sock, state.device)
    _set_buffers(sock, state.buffers)
    if state.local.port:
        _transparent(sock, 1)
        sock.bind(to_sockaddr(sock.family, state.local))
        _transparent(sock, _captured_transparent(state))
    if state.backlog is not None:
        sock.listen(state.backlog)


def _transparent(sock: socket.socket, value: int) -> None:
    six = sock.family == socket.AF_INET6
    level, name = (socket.IPPROTO_IPV6, IPV6_TRANSPARENT) if six else (socket.IPPROTO_IP, IP_TRANSPARENT)
    sock.setsockopt(level, name, value)


def _captured_transparent(state: TcpConnection | TcpListener) -> int:
    return int(any(state.options.get("IP_TRANSPARENT", b"")))


def _rebuild_connection(sock: socket.socket, state: TcpConnection) -> None:
    tcp_repair.repair_on(sock)
    options.apply(sock, state.options, When.EARLY, listener=False)
    _connect(sock, state)
    _agree(sock, state)
    queues = state.queues
    _set_size(sock, SO_RCVBUFFORCE, len(queues.unread) + _BUFFER_SLACK)
    _set_size(sock, SO_SNDBUFFORCE, len(queues.sent) + len(queues.unsent) + _BUFFER_SLACK)
    _write_queue(sock, Queue.RECEIVE, queues.unread)
    # Before anything is sent: a window that is offered must fit into the buffer, or the kernel takes it back
    # when it is used, and from then on takes the peer's acknowledgements for segments beyond the window.
    _set_size(sock, SO_RCVBUFFORCE, state.buffers[0] // 2)
    # What was sent and not acknowledged waits for `activate`: in the queue, it would be sent again after a
    # second, COMMIT or not.
    receive_end = (queues.receive_seq + len(queues.unread)) & 0xFFFFFFFF
    tcp_repair.set_repair_window(sock, _window(RepairWindow(*state.window), receive_end))
    _set_window_clamp(sock, state.window_clamp)


def _connect(sock: socket.socket, state: TcpConnection) -> None:
    """Established, without a packet: in repair, connect only takes note."""
    _set_device(sock, state.device)
    _set_segment_size(sock, min(state.mss_clamp, _LARGEST_MAXSEG))
    tcp_repair.set_queue_seq(sock, Queue.SEND, state.queues.send_seq)
    tcp_repair.set_queue_seq(sock, Queue.RECEIVE, state.queues.receive_seq)
    tcp_repair.select_queue(sock, Queue.NONE)
    _transparent(sock, 1)  # both bind and the choice of a route ask whether the address is ours
    sock.bind(to_sockaddr(sock.family, state.local))
    sock.connect(to_sockaddr(sock.family, state.peer))
    _transparent(sock, _captured_transparent(state))
    _set_segment_size(sock, 0)


def _set_segment_size(sock: socket.socket, size: int) -> None:
    # What is sent is cut by a size that connect works out and TCP_REPAIR_OPTIONS does not change: without
    # this, the connection would go on in segments of 536 bytes.
    sock.setsockopt(tcp_repair.SOL_TCP, tcp_repair.TCP_MAXSEG, size)


def _agree(sock: socket.socket, state: TcpConnection) -> None:
    """What the handshake settled."""
    tcp_repair.repair_options(sock, state.mss_clamp, state.wscale, state.sack, state.timestamp is not None)
    if state.timestamp is not None:
        tcp_repair.set_timestamp(sock, _timestamp_now(state, state.timestamp))


def _timestamp_now(state: TcpConnection, captured: int) -> int:
    # the hosts' clocks may differ: bounded
    elapsed = (time.time() - state.captured_at) * 1000 + _TIMESTAMP_MARGIN_MS
    margin = int(min(max(elapsed, _TIMESTAMP_MARGIN_MS), _TIMESTAMP_MARGIN_MAX_MS))
    value = captured + (margin * 1000 if state.timestamp_usec else margin)
    # the lowest bit says whether they are microseconds (since Linux 6.7)
    return (value | 1 if state.timestamp_usec else value & ~1) & 0xFFFFFFFF


def _window(window: RepairWindow, receive_end: int) -> RepairWindow:
    """The captured window where `receive_end` does not count the peer's FIN (yet): its right edge stays."""
    ahead = (window.rcv_wup - receive_end) & 0xFFFFFFFF
    if not 0 < ahead < 1 << 31:
        return window
    return window._replace(rcv_wup=receive_end, rcv_wnd=window.rcv_wnd + ahead)


def _set_window_clamp(sock: socket.socket, clamp: int) -> None:
    # Below and then to the value: only where the clamp grows does the kernel raise its slow-start threshold
    # of the window that it offers to the window just restored.
    for value in (clamp - 1, clamp):
        sock.setsockopt(tcp_repair.SOL_TCP, tcp_repair.TCP_WINDOW_CLAMP, value)


def _write_queue(sock: socket.socket, queue: Queue, data: bytes) -> None:
    if not data:
        return
    tcp_repair.select_queue(sock, queue)
    _write_all(sock, data)
    tcp_repair.select_queue(sock, Queue.NONE)


def _write_all(sock: socket.socket, data: bytes) -> None:
    """Write without waiting, in smaller pieces where memory is scarce."""
    view, chunk = memoryview(data), _CHUNK
    while view:
        try:
            view = view[sock.send(view[:chunk], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ENOBUFS) or chunk <= _SMALLEST_CHUNK:
                raise
            chunk //= 2


def _set_size(sock: socket.socket, name: int, size: int) -> None:
    sock.setsockopt(socket.SOL_SOCKET, name, min(size, _BUFFER_LIMIT))


def _set_buffers(sock: socket.socket, buffers: tuple[int, int, int]) -> None:
    receive, send, locks = buffers
    _set_size(sock, SO_RCVBUFFORCE, receive // 2)  # the kernel doubles what it is told
    _set_size(sock, SO_SNDBUFFORCE, send // 2)
    sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, locks)


def _set_device(sock: socket.socket, device: bytes) -> None:
    if device != bound_device(sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)


def activate(fd: int, state: TcpConnection | TcpListener) -> None:
    """Bring a rebuilt socket to life; its address must be on this host by now. Idempotent, also after an
    agent that died over it.

    Effect: the peer is asked for its window, bytes never sent are sent, a shutdown is repeated, the
    application's own filter is back. OSError: the connection is alive but something of it (named) could not
    be restored.
    """
    with borrow(fd) as sock:
        held = held_filter(sock) is not None
        repair = isinstance(state, TcpConnection) and tcp_repair.in_repair(sock)
        if not held and not repair:
            return
        if isinstance(state, TcpConnection) and repair and not tcp_repair.unacknowledged(sock):
            _write_queue(sock, Queue.SEND, state.queues.sent)
        if held:
            sock_filter.let_go(sock, state.filter)
        if isinstance(state, TcpConnection):
            tcp_repair.repair_off(sock)
            _resume(sock, state)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(state.reuse_address))
        options.apply(sock, state.options, When.LATE, listener=isinstance(state, TcpListener))


def _resume(sock: socket.socket, state: TcpConnection) -> None:
    captured = TcpState(state.state)
    _write_all(sock, state.queues.unsent)
    if captured in FIN_SENT and captured != TcpState.LAST_ACK:
        sock.shutdown(socket.SHUT_WR)  # if the peer has this FIN already, it says so
    if captured in FIN_RECEIVED:
        _receive_fin(sock, state)
    if captured == TcpState.LAST_ACK:
        sock.shutdown(socket.SHUT_WR)
    _set_buffers(sock, state.buffers)


def _receive_fin(sock: socket.socket, state: TcpConnection) -> None:
    """Let the peer's FIN, which it will not send again, arrive once more."""
    queues = state.queues
    fin = packet.tcp_packet(
        source=(state.peer.address, state.peer.port),
        destination=(state.local.address, state.local.port),
        seq=queues.receive_seq + len(queues.unread),
        ack=queues.send_seq,
        flags=packet.FIN | packet.ACK,
        window=min(state.window[1] >> state.wscale[0], 0xFFFF),
    )
    _set_device(sock, b"")  # it comes by the loopback interface
    injector = packet.Injector()
    try:
        injector.inject(fin)
        _wait_for_fin(sock, state)
    finally:
        injector.close()
        _set_device(sock, state.device)


def _wait_for_fin(sock: socket.socket, state: TcpConnection) -> None:
    deadline = time.monotonic() + _FIN_SECONDS
    while tcp_repair.tcp_info(sock).state not in _AFTER_FIN:
        if time.monotonic() > deadline:
            sock.shutdown(socket.SHUT_RD)  # the application at least reads the end of the stream
            raise OSError(errno.ETIMEDOUT, "the peer's end of stream could not be repeated", str(state.peer))
        time.sleep(0.0005)


def discard(fd: int) -> None:
    """Close a rebuilt (or captured) socket without a word to the peer."""
    with borrow(fd) as sock:
        if tcp_repair.tcp_info(sock).state in MOVABLE_STATES:
            tcp_repair.repair_on(sock)
    os.close(fd)
