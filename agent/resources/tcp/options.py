"""The socket options of a TCP socket that move with it: one table, read on one host and set on the other.

Values are the kernel's own bytes under the kernel's own names. Those that are the kernel's compiled-in
defaults do not travel; a host whose administrator chose other defaults sets them explicitly. An option that a
kernel does not know matters only when it is in use.
"""

from __future__ import annotations

import enum
import errno
import functools
import os
import socket
from collections.abc import Mapping
from typing import NamedTuple


def _int(value: int) -> bytes:
    return value.to_bytes(4, "little", signed=True)


_TIMEVAL = bytes(16)
_LINGER = bytes(8)


class When(enum.IntEnum):
    """At which moment of a rebuild an option is set."""

    EARLY = 0  # on the fresh socket, before bind
    LATE = 1  # when the socket comes to life: it could act by itself, or stand in the way of the queues


class Option(NamedTuple):
    level: int
    number: int
    default: bytes = b"\0\0\0\0"
    when: When = When.EARLY
    listener_only: bool = False  # of a connection, the value means something else (TCP_MAXSEG) or nothing

    @property
    def size(self) -> int:
        return len(self.default)


_SOL, _TCP, _IP, _IP6 = socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP, socket.IPPROTO_IPV6

# Order matters in two places: IP_TOS sets SO_PRIORITY as a side effect, SO_RCVLOWAT may raise SO_RCVBUF. Not
# here: SO_REUSEADDR (repair changes it), the buffer sizes and SO_BINDTODEVICE (each has its moment).
OPTIONS: dict[str, Option] = {
    "IP_TOS": Option(_IP, 1),
    "IPV6_TCLASS": Option(_IP6, 67),
    "SO_DEBUG": Option(_SOL, 1),
    "SO_REUSEPORT": Option(_SOL, 15),
    "SO_DONTROUTE": Option(_SOL, 5),
    "SO_KEEPALIVE": Option(_SOL, 9, when=When.LATE),
    "SO_OOBINLINE": Option(_SOL, 10),
    "SO_PRIORITY": Option(_SOL, 12),
    "SO_LINGER": Option(_SOL, 13, _LINGER),
    "SO_RCVLOWAT": Option(_SOL, 18, _int(1)),
    "SO_RCVTIMEO": Option(_SOL, 20, _TIMEVAL),
    "SO_SNDTIMEO": Option(_SOL, 21, _TIMEVAL),
    "SO_TIMESTAMP": Option(_SOL, 29),
    "SO_TIMESTAMPNS": Option(_SOL, 35),
    "SO_MARK": Option(_SOL, 36),
    "SO_RXQ_OVFL": Option(_SOL, 40),
    "SO_SELECT_ERR_QUEUE": Option(_SOL, 45),
    "SO_BUSY_POLL": Option(_SOL, 46),
    "SO_MAX_PACING_RATE": Option(_SOL, 47, b"\xff" * 8),
    "SO_PREFER_BUSY_POLL": Option(_SOL, 69),
    "SO_TXREHASH": Option(_SOL, 74, _int(1)),
    "SO_RCVMARK": Option(_SOL, 75),
    "SO_RCVPRIORITY": Option(_SOL, 82),
    "TCP_NODELAY": Option(_TCP, 1),
    "TCP_MAXSEG": Option(_TCP, 2, _int(536), listener_only=True),
    "TCP_CORK": Option(_TCP, 3),
    "TCP_KEEPIDLE": Option(_TCP, 4, _int(7200)),
    "TCP_KEEPINTVL": Option(_TCP, 5, _int(75)),
    "TCP_KEEPCNT": Option(_TCP, 6, _int(9)),
    "TCP_SYNCNT": Option(_TCP, 7, _int(6)),
    "TCP_LINGER2": Option(_TCP, 8, _int(60)),
    "TCP_DEFER_ACCEPT": Option(_TCP, 9),
    "TCP_QUICKACK": Option(_TCP, 12, _int(1), when=When.LATE),
    "TCP_CONGESTION": Option(_TCP, 13, b"cubic".ljust(16, b"\0")),
    "TCP_THIN_LINEAR_TIMEOUTS": Option(_TCP, 16),
    "TCP_THIN_DUPACK": Option(_TCP, 17),
    "TCP_USER_TIMEOUT": Option(_TCP, 18, when=When.LATE),
    "TCP_FASTOPEN": Option(_TCP, 23, listener_only=True),
    "TCP_NOTSENT_LOWAT": Option(_TCP, 25, when=When.LATE),
    "TCP_SAVE_SYN": Option(_TCP, 27),
    "TCP_FASTOPEN_CONNECT": Option(_TCP, 30, listener_only=True),
    "TCP_FASTOPEN_NO_COOKIE": Option(_TCP, 34),
    "TCP_INQ": Option(_TCP, 36),
    "TCP_TX_DELAY": Option(_TCP, 37),
    "TCP_RTO_MAX_MS": Option(_TCP, 44, _int(120000)),
    "TCP_RTO_MIN_US": Option(_TCP, 45, _int(200000)),
    "TCP_DELACK_MAX_US": Option(_TCP, 46, _int(200000)),
    "IP_TTL": Option(_IP, 2, _int(64)),
    "IP_RECVOPTS": Option(_IP, 6),
    "IP_RETOPTS": Option(_IP, 7),
    "IP_PKTINFO": Option(_IP, 8),
    "IP_MTU_DISCOVER": Option(_IP, 10, _int(1)),
    "IP_RECVERR": Option(_IP, 11),
    "IP_RECVTTL": Option(_IP, 12),
    "IP_RECVTOS": Option(_IP, 13),
    "IP_FREEBIND": Option(_IP, 15),
    "IP_TRANSPARENT": Option(_IP, 19),
    "IP_MINTTL": Option(_IP, 21),
    "IP_BIND_ADDRESS_NO_PORT": Option(_IP, 24),
    "IP_LOCAL_PORT_RANGE": Option(_IP, 51),
    "IPV6_UNICAST_HOPS": Option(_IP6, 16, _int(64)),
    "IPV6_MTU_DISCOVER": Option(_IP6, 23, _int(1)),
    "IPV6_RECVERR": Option(_IP6, 25),
    "IPV6_V6ONLY": Option(_IP6, 26),
    "IPV6_FLOWINFO_SEND": Option(_IP6, 33),
    "IPV6_RECVPKTINFO": Option(_IP6, 49),
    "IPV6_RECVHOPLIMIT": Option(_IP6, 51),
    "IPV6_DONTFRAG": Option(_IP6, 62),
    "IPV6_RECVTCLASS": Option(_IP6, 66),
    "IPV6_AUTOFLOWLABEL": Option(_IP6, 70, _int(1)),
    "IPV6_ADDR_PREFERENCES": Option(_IP6, 72, _int(1280)),
    "IPV6_MINHOPCOUNT": Option(_IP6, 73),
}

# In use (other than the value here), these are more than a number, and the socket is refused.
NOT_MOVED: dict[str, tuple[Option, int]] = {
    "SO_TIMESTAMPING": (Option(_SOL, 37), 0),
    "SO_PEEK_OFF": (Option(_SOL, 42), -1),
    "SO_LOCK_FILTER": (Option(_SOL, 44), 0),
    "SO_ZEROCOPY": (Option(_SOL, 60), 0),
    "SO_TXTIME": (Option(_SOL, 61), 0),
    "IP_UNICAST_IF": (Option(_IP, 50), 0),
    "IPV6_UNICAST_IF": (Option(_IP6, 76), 0),
}
# The same for those whose value is bytes: refused unless empty.
NOT_MOVED_BYTES: dict[str, Option] = {
    "TCP_ULP": Option(_TCP, 31, bytes(16)),
    "IP_OPTIONS": Option(_IP, 4, bytes(44)),
    "IPV6_HOPOPTS": Option(_IP6, 54, bytes(256)),
    "IPV6_RTHDRDSTOPTS": Option(_IP6, 55, bytes(256)),
    "IPV6_RTHDR": Option(_IP6, 57, bytes(256)),
    "IPV6_DSTOPTS": Option(_IP6, 59, bytes(256)),
}

SO_NETNS_COOKIE = 71
_UNKNOWN = frozenset({errno.ENOPROTOOPT, errno.EOPNOTSUPP, errno.EINVAL})


def get(sock: socket.socket, option: Option) -> bytes | None:
    """The value, or None where this kernel or this kind of socket has no such option."""
    try:
        return sock.getsockopt(option.level, option.number, option.size)
    except OSError as error:
        if error.errno in _UNKNOWN:
            return None
        raise


def capture(sock: socket.socket, listener: bool) -> dict[str, bytes]:
    """All options of the table that are not at their default. Quick: the process is frozen."""
    read = sock.getsockopt
    table = _present(_network_namespace(sock), sock.family, listener)
    return {
        name: value
        for name, level, number, default in table
        if (value := read(level, number, len(default))) != default
    }


def apply(sock: socket.socket, values: Mapping[str, bytes], when: When, listener: bool) -> None:
    """Make the socket's options of `when` those of `values`, or the default. ValueError for an unknown name.

    OSError names the option that could not be set.
    """
    if values.keys() - OPTIONS.keys():
        raise ValueError(f"unknown socket options {sorted(values.keys() - OPTIONS.keys())}")
    unlike = _unlike(_network_namespace(sock), sock.family)
    wanted = values.keys() | unlike.keys() | ({"SO_PRIORITY"} if "IP_TOS" in values else set())
    for name, option in OPTIONS.items():
        if name not in wanted or option.when != when or (option.listener_only and not listener):
            continue
        value = values.get(name, option.default)
        if unlike.get(name, option.default) != value or (name == "SO_PRIORITY" and "IP_TOS" in values):
            put(sock, name, value)


def put(sock: socket.socket, name: str, value: bytes) -> None:
    """Set one option; an OSError names it."""
    option = OPTIONS[name]
    try:
        sock.setsockopt(option.level, option.number, value)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"socket option {name}") from error


def _network_namespace(sock: socket.socket) -> bytes:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
    except OSError:  # before Linux 5.14
        return os.readlink("/proc/thread-self/ns/net").encode()


@functools.cache
def _fresh(_namespace: bytes, family: int) -> dict[str, bytes]:
    """What a new socket has in the calling thread's network namespace."""
    with socket.socket(family, socket.SOCK_STREAM) as fresh:
        values = {name: get(fresh, option) for name, option in OPTIONS.items()}
    return {name: value for name, value in values.items() if value is not None}


@functools.cache
def _unlike(namespace: bytes, family: int) -> dict[str, bytes]:
    """What of a new socket is not the kernel's default."""
    fresh = _fresh(namespace, family)
    return {name: value for name, value in fresh.items() if value != OPTIONS[name].default}


@functools.cache
def _present(namespace: bytes, family: int, listener: bool) -> list[tuple[str, int, int, bytes]]:
    here = _fresh(namespace, family)
    return [
        (name, option.level, option.number, option.default)
        for name, option in OPTIONS.items()
        if name in here and (listener or not option.listener_only)
    ]
