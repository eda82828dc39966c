"""Which sockets there are in a network namespace, as the kernel lists them (sock_diag(7),
linux/inet_diag.h)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from agent.kernel.netlink import NETLINK_SOCK_DIAG, Netlink, attributes, dump
from agent.kernel.tcp_repair import TcpState

SOCK_DIAG_BY_FAMILY = 20
INET_DIAG_INFO = 2
INET_DIAG_MD5SIG = 18
ALL_STATES = 0xFFFFFFFF

# inet_diag_req_v2: family, protocol, extensions, states, id (ports, addresses, interface, cookie)
_REQUEST = struct.Struct("=BBBxI")
_ID = struct.Struct("=2s2s16s16sIII")
_NO_ID = _ID.pack(b"\0\0", b"\0\0", b"", b"", 0, 0xFFFFFFFF, 0xFFFFFFFF)
_MESSAGE = struct.Struct("=BBBB")
_TAIL = struct.Struct("=IIIII")  # expires, rqueue, wqueue, uid, inode


class SocketEntry(NamedTuple):
    """One socket of the kernel's tables. Inode 0: no descriptor refers to it."""

    family: int
    protocol: int
    state: int
    local: tuple[str, int]
    peer: tuple[str, int]
    receive_queue: int  # bytes; of a listener: connections waiting to be accepted
    uid: int
    inode: int
    md5: bool


class SockDiag:
    """Socket diagnostics of the network namespace of the thread that made it."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_SOCK_DIAG)

    def close(self) -> None:
        self._netlink.close()

    def sockets(
        self, family: int, protocol: int, states: int = ALL_STATES, details: bool = False
    ) -> Iterator[SocketEntry]:
        """All sockets of one family and protocol in one of `states` (bits 1 << TcpState).

        `md5` is known only with `details` (newer kernels tell of keys only together with INET_DIAG_INFO).

        OSError ENOENT: this kernel cannot list that protocol.
        """
        extensions = 1 << INET_DIAG_INFO - 1 if details else 0
        payload = _REQUEST.pack(family, protocol, extensions, states) + _NO_ID
        for _, body in dump(self._netlink, SOCK_DIAG_BY_FAMILY, payload, "socket list"):
            yield _entry(protocol, body)

    def half_open(self, port: int, family: int) -> int:
        """Connections to a local TCP port whose handshake is not finished."""
        families = (socket.AF_INET, socket.AF_INET6) if family == socket.AF_INET6 else (socket.AF_INET,)
        states = 1 << TcpState.SYN_RECV
        entries = [one for each in families for one in self.sockets(each, socket.IPPROTO_TCP, states)]
        return sum(one.local[1] == port for one in entries)


def _entry(protocol: int, body: bytes) -> SocketEntry:
    family, state, _, _ = _MESSAGE.unpack_from(body)
    sport, dport, source, destination, _, _, _ = _ID.unpack_from(body, 4)
    _, receive_queue, _, uid, inode = _TAIL.unpack_from(body, 52)
    size = 4 if family == socket.AF_INET else 16
    return SocketEntry(
        family=family,
        protocol=protocol,
        state=state,
        local=(socket.inet_ntop(family, source[:size]), int.from_bytes(sport, "big")),
        peer=(socket.inet_ntop(family, destination[:size]), int.from_bytes(dport, "big")),
        receive_queue=receive_queue,
        uid=uid,
        inode=inode,
        md5=INET_DIAG_MD5SIG in attributes(body[72:]),
    )
