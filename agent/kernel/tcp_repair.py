"""TCP as the kernel lets it be read and set: TCP_INFO, TCP_REPAIR and the queue ioctls (tcp(7), linux/tcp.h).

Thin wrappers, no policy. All take a `socket.socket`; `borrow` lends one for a descriptor that somebody else
owns. Sequence numbers are 32 bit and wrap; queue sizes are bytes.
"""

from __future__ import annotations

import array
import contextlib
import enum
import fcntl
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

SOL_TCP = socket.IPPROTO_TCP

TCP_MAXSEG = 2
TCP_WINDOW_CLAMP = 10
TCP_INFO = 11
TCP_REPAIR = 19
TCP_REPAIR_QUEUE = 20
TCP_QUEUE_SEQ = 21
TCP_REPAIR_OPTIONS = 22
TCP_TIMESTAMP = 24
TCP_REPAIR_WINDOW = 29
TCP_ULP = 31
TCP_AO_INFO = 40
TCP_IS_MPTCP = 43

# TCP_REPAIR
TCP_REPAIR_ON = 1
TCP_REPAIR_OFF = 0
TCP_REPAIR_OFF_NO_WP = -1

# TCP_REPAIR_OPTIONS
TCPOPT_MSS = 2
TCPOPT_WINDOW = 3
TCPOPT_SACK_PERM = 4
TCPOPT_TIMESTAMP = 8

# tcp_info.tcpi_options
TCPI_OPT_TIMESTAMPS = 1
TCPI_OPT_SACK = 2
TCPI_OPT_WSCALE = 4
TCPI_OPT_USEC_TS = 64

SIOCINQ = 0x541B
SIOCOUTQ = 0x5411
SIOCOUTQNSD = 0x894B

IPPROTO_MPTCP = 262


class Queue(enum.IntEnum):
    """TCP_REPAIR_QUEUE: what reads, writes and TCP_QUEUE_SEQ mean while in repair."""

    NONE = 0
    RECEIVE = 1
    SEND = 2


class TcpState(enum.IntEnum):
    """include/net/tcp_states.h"""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


class TcpInfo(NamedTuple):
    """What is used of struct tcp_info; fields that an older kernel lacks are 0."""

    state: int
    options: int
    snd_wscale: int
    rcv_wscale: int
    unacked: int  # segments; of a listener: connections waiting in its accept queue
    sacked: int  # segments; of a listener: the longest its accept queue may become
    rcv_ssthresh: int
    total_retrans: int
    segs_out: int
    segs_in: int


class RepairWindow(NamedTuple):
    """struct tcp_repair_window (kernel commit b1ed4c4fa9a5): both directions' windows."""

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int


_INFO_BYTES = 144  # up to and with tcpi_segs_in
_INFO_HEAD = struct.Struct("=8B24I4Q2I")
_WINDOW = struct.Struct("=5I")
_OPTION = struct.Struct("=2I")


@contextlib.contextmanager
def borrow(fd: int) -> Iterator[socket.socket]:
    """A socket object for `fd` that does not close it. Raises OSError (ENOTSOCK) if it is no socket."""
    borrowed = socket.socket(fileno=fd)
    try:
        yield borrowed
    finally:
        borrowed.detach()


def tcp_info(sock: socket.socket) -> TcpInfo:
    """TCP_INFO, short answers of older kernels padded with zeros."""
    field = _INFO_HEAD.unpack(sock.getsockopt(SOL_TCP, TCP_INFO, _INFO_BYTES).ljust(_INFO_BYTES, b"\0"))
    return TcpInfo(
        state=field[0],
        options=field[5],
        snd_wscale=field[6] & 15,
        rcv_wscale=field[6] >> 4,
        unacked=field[12],
        sacked=field[13],
        rcv_ssthresh=field[22],
        total_retrans=field[31],
        segs_out=field[36],
        segs_in=field[37],
    )


def in_repair(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(SOL_TCP, TCP_REPAIR))


def repair_on(sock: socket.socket) -> None:
    """Enter repair. The kernel sets SO_REUSEADDR to a value of its own (2). EPERM for a listener."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_ON)


def repair_off(sock: socket.socket, window_probe: bool = True) -> None:
    """Leave repair; an established connection then asks its peer for its window. Clears SO_REUSEADDR."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR, TCP_REPAIR_OFF if window_probe else TCP_REPAIR_OFF_NO_WP)


def select_queue(sock: socket.socket, queue: Queue) -> None:
    sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, queue)


def queue_seq(sock: socket.socket) -> int:
    """Of the selected queue: the sequence number after its last byte (write_seq, rcv_nxt)."""
    return sock.getsockopt(SOL_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF


def set_queue_seq(sock: socket.socket, queue: Queue, seq: int) -> None:
    """Select `queue` and set where it begins; only before connect."""
    select_queue(sock, queue)
    sock.setsockopt(SOL_TCP, TCP_QUEUE_SEQ, struct.pack("=I", seq))


def repair_options(
    sock: socket.socket, mss_clamp: int, wscale: tuple[int, int], sack: bool, timestamps: bool
) -> None:
    """What the handshake settled; `wscale` is (send, receive), at most 14. Only right after connect."""
    pairs = [(TCPOPT_MSS, mss_clamp), (TCPOPT_WINDOW, wscale[0] | wscale[1] << 16)]
    pairs += [(TCPOPT_SACK_PERM, 0)] if sack else []
    pairs += [(TCPOPT_TIMESTAMP, 0)] if timestamps else []
    sock.setsockopt(SOL_TCP, TCP_REPAIR_OPTIONS, b"".join(_OPTION.pack(*pair) for pair in pairs))


def mss_clamp(sock: socket.socket) -> int:
    """The peer's announced maximum segment size; only in repair."""
    return sock.getsockopt(SOL_TCP, TCP_MAXSEG)


def repair_window(sock: socket.socket) -> RepairWindow:
    return RepairWindow(*_WINDOW.unpack(sock.getsockopt(SOL_TCP, TCP_REPAIR_WINDOW, _WINDOW.size)))


def set_repair_window(sock: socket.socket, window: RepairWindow) -> None:
    """EINVAL if max_window < snd_wnd, or if snd_wl1 or rcv_wup lie beyond what the queues allow."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, _WINDOW.pack(*window))


def timestamp(sock: socket.socket) -> int:
    """The timestamp that would be sent now: milliseconds (TCPI_OPT_USEC_TS: micro-), wrapping."""
    return sock.getsockopt(SOL_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF


def set_timestamp(sock: socket.socket, value: int) -> None:
    """Let the timestamps go on from `value`; since Linux 6.7 its lowest bit chooses microseconds."""
    sock.setsockopt(SOL_TCP, TCP_TIMESTAMP, struct.pack("=I", value))


def _ioctl_int(sock: socket.socket, request: int) -> int:
    value = array.array("i", [0])
    fcntl.ioctl(sock.fileno(), request, value)
    return value[0]


def unread(sock: socket.socket) -> int:
    """SIOCINQ: bytes received and not yet read, a FIN not counted."""
    return _ioctl_int(sock, SIOCINQ)


def unacknowledged(sock: socket.socket) -> int:
    """SIOCOUTQ: bytes written and not yet acknowledged, sent or not; a FIN counts as one."""
    return _ioctl_int(sock, SIOCOUTQ)


def not_sent(sock: socket.socket) -> int:
    """SIOCOUTQNSD: bytes written and not yet sent; a FIN that is not sent counts one."""
    return _ioctl_int(sock, SIOCOUTQNSD)
