"""Why a TCP socket cannot be moved, or not to a certain host. What is not known to work is refused."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator

import msgspec

from agent.api import Blocker
from agent.kernel import addresses, tcp_repair
from agent.kernel.sock_diag import SockDiag
from agent.kernel.tcp_repair import TcpState, borrow
from agent.resources.tcp import options
from agent.resources.tcp.destination import discard, rebuild
from agent.resources.tcp.state import (
    MOVABLE_STATES,
    TcpConnection,
    TcpListener,
    TcpSocket,
    TcpSocketInfo,
    held_filter,
    inspect,
)

_TRANSIENT = "try again: this state passes by itself"
_PLAIN_TCP = "let the program listen with plain TCP (Go: GODEBUG=multipathtcp=0)"


def blockers(fd: int, name: str) -> list[Blocker]:
    """Everything that keeps this TCP socket from being moved, by `name` ("fd 7"). Changes nothing."""
    with borrow(fd) as sock:
        if sock.proto not in (socket.IPPROTO_TCP, tcp_repair.IPPROTO_MPTCP):
            return [_blocker("tcp-protocol", name, f"protocol {sock.proto} is not TCP")]
        try:
            held_filter(sock)
        except OSError as error:
            return [_blocker("tcp-filter", name, f"its packet filter cannot be read: {error.strerror}")]
        info = inspect(fd)
        what = f"{name} (tcp {info.local}{f' to {info.peer}' if info.peer else ''}, {info.state.name})"
        return [_blocker(kind, what, why, hint) for kind, why, hint in _reasons(sock, info)]


def _blocker(kind: str, what: str, why: str, hint: str = "") -> Blocker:
    return Blocker(kind=kind, what=what, why=why, hint=hint)


def _reasons(sock: socket.socket, info: TcpSocketInfo) -> Iterator[tuple[str, str, str]]:
    """(kind, why, hint) of each."""
    if info.mptcp:
        yield "tcp-multipath", "it uses Multipath TCP, which cannot be held still", _PLAIN_TCP
        return
    yield from _state_reasons(info)
    yield from _use_reasons(sock, info)
    yield from _option_reasons(sock)
    if info.peer is not None and info.state in MOVABLE_STATES:
        yield from _peer_reasons(info, info.peer.address)


def _state_reasons(info: TcpSocketInfo) -> Iterator[tuple[str, str, str]]:
    if info.state in (TcpState.SYN_SENT, TcpState.SYN_RECV, TcpState.NEW_SYN_RECV):
        yield "tcp-connecting", "its handshake is not finished", _TRANSIENT
    elif info.state in (TcpState.CLOSE, TcpState.TIME_WAIT) and info.used:
        yield (
            "tcp-ended",
            "its connection has ended, and how cannot be read from it",
            "let the program close it",
        )
    elif info.state not in MOVABLE_STATES | {TcpState.LISTEN, TcpState.CLOSE}:
        yield "tcp-state", f"state {info.state.name} is not known", ""
    if info.repair and not info.locked:
        yield "tcp-repair", "somebody else has it under repair", ""


def _use_reasons(sock: socket.socket, info: TcpSocketInfo) -> Iterator[tuple[str, str, str]]:
    if info.state not in MOVABLE_STATES:
        return
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLPRI)
    events = dict(poll.poll(0)).get(sock.fileno(), 0)
    if events & select.POLLPRI:
        yield "tcp-urgent", "urgent data waits to be read", _TRANSIENT
    if events & select.POLLERR:
        yield "tcp-error", "an error waits to be read", "let the program read it, or close the socket"


def _option_reasons(sock: socket.socket) -> Iterator[tuple[str, str, str]]:
    for name, (option, harmless) in options.NOT_MOVED.items():
        value = options.get(sock, option)
        if value is not None and int.from_bytes(value[:4], "little", signed=True) != harmless:
            yield "tcp-option", f"socket option {name} is in use", ""
    for name, option in options.NOT_MOVED_BYTES.items():
        value = options.get(sock, option)
        if value and value.strip(b"\0"):
            what = f" ({value.rstrip(chr(0).encode()).decode()})" if name == "TCP_ULP" else ""
            yield "tcp-option", f"socket option {name} is in use{what}", ""
    if _has(sock, tcp_repair.TCP_AO_INFO):
        yield (
            "tcp-ao",
            "its segments are authenticated (TCP-AO), and the kernel does not give the keys away",
            "",
        )


def _has(sock: socket.socket, tcp_option: int) -> bool:
    try:
        sock.getsockopt(tcp_repair.SOL_TCP, tcp_option, 64)
    except OSError as error:
        return error.errno not in (errno.ENOPROTOOPT, errno.ENOENT, errno.EOPNOTSUPP)
    return True


def _peer_reasons(info: TcpSocketInfo, peer: str) -> Iterator[tuple[str, str, str]]:
    if "%" not in peer and addresses.is_local(peer):
        why = "its other end is on this host, and would lose it"
        yield "tcp-local-peer", why, "connect the two by an address that moves along, or move the peer first"
    if info.local.scope:
        yield "tcp-link-local", "its address belongs to one link and host", "connect by another address"


def signed_blockers(names: dict[int, str]) -> list[Blocker]:
    """Which of a process's TCP sockets, by inode with names, sign their segments. Asks the kernel once."""
    diag = SockDiag()
    try:
        families = (socket.AF_INET, socket.AF_INET6) if names else ()
        entries = [e for f in families for e in diag.sockets(f, socket.IPPROTO_TCP, details=True)]
    finally:
        diag.close()
    why = "its segments are signed (TCP_MD5SIG), and the kernel does not give the key away"
    return [_blocker("tcp-md5", names[e.inode], why) for e in entries if e.md5 and e.inode in names]


# destination ------------------------------------------------------------------------------------------------


def can_listen(state: TcpListener) -> Blocker | None:
    """Whether this host can have that socket, tried out: it is bound (not yet listening) for a moment."""
    try:
        fd = rebuild(msgspec.structs.replace(state, backlog=None))
    except OSError as error:
        return not_rebuilt(state, error)
    discard(fd)
    return None


def can_connect(outline: TcpConnection) -> Blocker | None:
    """Whether this host can have that connection, tried out: it is rebuilt for a moment, in silence."""
    try:
        fd = rebuild(outline)
    except OSError as error:
        return not_rebuilt(outline, error)
    discard(fd)
    return None


def not_rebuilt(state: TcpSocket, error: OSError) -> Blocker:
    """Why `rebuild` has failed."""
    if isinstance(state, TcpListener):
        what = f"tcp {state.local}"
        if error.errno == errno.EADDRINUSE:
            why = "another socket of the destination has this port"
            return _blocker("tcp-port-taken", what, why, "free it")
        return _blocker("tcp-listener", what, f"the destination cannot listen there: {error.strerror}")
    what = f"tcp {state.local} to {state.peer}"
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return _blocker("tcp-no-route", what, "the destination has no route to the peer", "give it one")
    if error.errno == errno.EADDRNOTAVAIL:
        why = "the destination has a connection between the same two ends"
        return _blocker("tcp-connection-taken", what, why, "let the one there end")
    return _blocker("tcp-connection", what, f"the destination cannot have it: {error.strerror}")
