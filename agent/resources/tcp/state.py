"""What a TCP socket consists of, as it travels, and the few reads that all sides share."""

from __future__ import annotations

import errno
import socket
from typing import Annotated, Literal

import msgspec

from agent.bounds import U31, U32, Finite, Name
from agent.kernel import sock_filter, tcp_repair
from agent.kernel.tcp_repair import TcpState, borrow
from agent.resources.tcp.options import OPTIONS

Port = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
Shift = Annotated[int, msgspec.Meta(ge=0, le=14)]
Family = Literal[2, 10]  # AF_INET, AF_INET6
State = Literal[1, 4, 5, 8, 9, 11]  # MOVABLE_STATES
Options = Annotated[dict[Name, Annotated[bytes, msgspec.Meta(max_length=16)]], msgspec.Meta(max_length=128)]
Device = Annotated[bytes, msgspec.Meta(max_length=16)]  # IFNAMSIZ
Program = Annotated[bytes, msgspec.Meta(max_length=8 * sock_filter.BPF_MAXINSNS)]

SO_BUF_LOCK = 72

FIN_RECEIVED = frozenset({TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING})
FIN_UNACKNOWLEDGED = frozenset({TcpState.FIN_WAIT1, TcpState.LAST_ACK, TcpState.CLOSING})
FIN_SENT = FIN_UNACKNOWLEDGED | {TcpState.FIN_WAIT2}
MOVABLE_STATES = FIN_RECEIVED | FIN_SENT | {TcpState.ESTABLISHED}


class SocketAddress(msgspec.Struct, frozen=True):
    """An address as its family writes it; `scope` is the interface's name of a link-local IPv6 address."""

    host: Name
    port: Port
    flow: U32 = 0
    scope: Name = ""

    @property
    def address(self) -> str:
        """The address that a host would have configured: plain IPv4 for an IPv4-mapped one."""
        return self.host.removeprefix("::ffff:") if "." in self.host else self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class TcpSocketInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a TCP socket is, read without disturbing it."""

    family: int
    protocol: int  # IPPROTO_TCP, or IPPROTO_MPTCP
    state: TcpState
    local: SocketAddress
    peer: SocketAddress | None
    accept_queue: int  # connections of a listener that nobody has accepted yet
    used: bool  # it has sent or received something at some time
    mptcp: bool  # Multipath TCP, also a listener that merely offers it
    locked: bool
    repair: bool


class Queues(msgspec.Struct, frozen=True, kw_only=True):
    """Both directions' bytes, each with the sequence number of its first byte."""

    receive_seq: U32
    unread: bytes
    send_seq: U32
    sent: bytes  # not acknowledged
    unsent: bytes


class TcpConnection(msgspec.Struct, frozen=True, kw_only=True, tag="tcp-connection"):
    """A connection between two instants of its life."""

    family: Family
    state: State
    local: SocketAddress
    peer: SocketAddress
    queues: Queues
    mss_clamp: U32
    wscale: tuple[Shift, Shift]  # what the peer's windows are shifted by, what ours are; (0, 0): not in use
    sack: bool
    timestamp: U32 | None  # None: not in use
    timestamp_usec: bool
    captured_at: Finite  # seconds since the epoch
    window: tuple[U32, U32, U32, U32, U32]  # tcp_repair.RepairWindow
    window_clamp: U31
    options: Options
    reuse_address: bool
    device: Device  # SO_BINDTODEVICE; empty: none
    buffers: tuple[U31, U31, U31]  # SO_RCVBUF, SO_SNDBUF, SO_BUF_LOCK
    filter: Program  # the application's own classic BPF program; empty: none
    uid: U32


class TcpListener(msgspec.Struct, frozen=True, kw_only=True, tag="tcp-listener"):
    """A listening socket; or (backlog None) one that only is bound, or not even that (port 0)."""

    family: Family
    local: SocketAddress
    backlog: U31 | None
    options: Options
    reuse_address: bool
    device: Device
    buffers: tuple[U31, U31, U31]
    filter: Program
    uid: U32


TcpSocket = TcpConnection | TcpListener


def validate(state: TcpSocket) -> None:
    """ValueError for a received socket that is none: an address that would be looked up, another family's."""
    ends = [state.local, state.peer] if isinstance(state, TcpConnection) else [state.local]
    for end in ends:
        try:
            socket.inet_pton(state.family, end.host)
        except OSError:
            raise ValueError(f"{end} is not of family {state.family}") from None
        if "\0" in end.scope:
            raise ValueError(f"an interface {end.scope!r}")
    for name, value in state.options.items():
        if name not in OPTIONS or len(value) > OPTIONS[name].size:
            raise ValueError(f"{len(value)} bytes of a socket option {name}")
    if len(state.filter) % 8:
        raise ValueError(f"a filter of {len(state.filter)} bytes")


def from_sockaddr(raw: tuple[object, ...]) -> SocketAddress:
    """What getsockname and getpeername answer."""
    host, port = str(raw[0]).partition("%")[0], int(str(raw[1]))
    if len(raw) < 4:
        return SocketAddress(host, port)
    scope = int(str(raw[3]))
    return SocketAddress(host, port, int(str(raw[2])), socket.if_indextoname(scope) if scope else "")


def to_sockaddr(family: int, address: SocketAddress) -> tuple[str, int] | tuple[str, int, int, int]:
    """What bind and connect want. OSError ENODEV if the scope's interface is not here."""
    if family == socket.AF_INET:
        return (address.host, address.port)
    scope = socket.if_nametoindex(address.scope) if address.scope else 0
    return (address.host, address.port, address.flow, scope)


def held_filter(sock: socket.socket) -> sock_filter.Filter | None:
    """Our filter on the socket, if it is there (an application's is not ours)."""
    found = sock_filter.read(sock)
    return found if found is not None and found.kind != sock_filter.Kind.APPLICATION else None


def bound_device(sock: socket.socket) -> bytes:
    """SO_BINDTODEVICE: the interface's name, zero-terminated, or nothing."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)


def inspect(fd: int) -> TcpSocketInfo:
    """What the socket is. Changes nothing. OSError: EACCES (a BPF filter that cannot be read), ENOTSOCK."""
    with borrow(fd) as sock:
        info = tcp_repair.tcp_info(sock)
        held = held_filter(sock)
        mptcp = sock.proto == tcp_repair.IPPROTO_MPTCP
        return TcpSocketInfo(
            family=int(sock.family),
            protocol=sock.proto,
            state=TcpState(info.state),
            local=from_sockaddr(sock.getsockname()),
            peer=_peer(sock),
            accept_queue=info.unacked if info.state == TcpState.LISTEN else 0,
            used=bool(info.segs_out or info.segs_in),
            mptcp=mptcp or _is_mptcp(sock),
            locked=held is not None and held.kind == sock_filter.Kind.LOCK,
            repair=not mptcp and tcp_repair.in_repair(sock),
        )


def _peer(sock: socket.socket) -> SocketAddress | None:
    try:
        return from_sockaddr(sock.getpeername())
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.EINVAL):
            return None
        raise


def _is_mptcp(sock: socket.socket) -> bool:
    try:
        return bool(sock.getsockopt(tcp_repair.SOL_TCP, tcp_repair.TCP_IS_MPTCP))
    except OSError:
        return False  # before Linux 5.16, which has no other way for a plain TCP socket to be part of one
