"""TCP sockets: what they consist of, how they are taken from one host and brought to life on another.

Before anything:         outline each connection; on the destination can_listen and can_connect try each out.
Source, frozen process:  lock every socket -> pending_accepts of listeners -> capture each -> (COMMIT) close
                         or, at any point before COMMIT, release each: exactly as before.
Destination:             rebuild each, listeners first -> (COMMIT, address installed) activate each
                         or discard each.

A locked socket has a filter that drops all it receives (agent.kernel.sock_filter); what the application needs
back is kept in that filter, so `release` needs nothing but the descriptor, whoever calls it. A captured
connection is in repair: closing it sends nothing. A rebuilt one is locked and in repair,
and nothing is in its send queue yet, so that no timer of it can reach the network before COMMIT.

Not moved, and not refused either: what the connection has learned of the path (congestion window, round-trip
times, ECN), segments that arrived out of order (the peer keeps and repeats them, RFC 2018), SO_COOKIE,
SO_INCOMING_CPU, the SYN kept by TCP_SAVE_SYN, BPF that chooses within an SO_REUSEPORT group.
"""

from agent.resources.tcp.blockers import blockers, can_connect, can_listen, not_rebuilt, signed_blockers
from agent.resources.tcp.destination import activate, discard, rebuild
from agent.resources.tcp.source import (
    capture,
    held,
    lock,
    loosen,
    outline,
    pending_accepts,
    release,
    silence,
    unsettled,
)
from agent.resources.tcp.state import (
    Queues,
    SocketAddress,
    TcpConnection,
    TcpListener,
    TcpSocket,
    TcpSocketInfo,
    inspect,
    validate,
)

__all__ = [
    "Queues",
    "SocketAddress",
    "TcpConnection",
    "TcpListener",
    "TcpSocket",
    "TcpSocketInfo",
    "activate",
    "blockers",
    "can_connect",
    "can_listen",
    "capture",
    "discard",
    "held",
    "inspect",
    "lock",
    "loosen",
    "not_rebuilt",
    "outline",
    "pending_accepts",
    "rebuild",
    "release",
    "signed_blockers",
    "silence",
    "unsettled",
    "validate",
]
