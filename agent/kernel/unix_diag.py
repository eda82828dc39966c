"""What the kernel tells of one unix socket (sock_diag(7), linux/unix_diag.h)."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from agent.kernel.netlink import NETLINK_SOCK_DIAG, Netlink, attributes
from agent.kernel.sock_diag import ALL_STATES, SOCK_DIAG_BY_FAMILY

AF_UNIX: Final = 1
LISTENING: Final = 10  # TCP_LISTEN
SHUT_RECEIVE: Final = 1
SHUT_SEND: Final = 2
_SHOW_NAME: Final = 0x01
_SHOW_PEER: Final = 0x04
_NAME: Final = 0
_PEER: Final = 2
_SHUTDOWN: Final = 6
_NO_COOKIE: Final = 0xFFFFFFFF
_REQUEST: Final = struct.Struct("=BBxxIIIII")  # unix_diag_req
_MESSAGE: Final = struct.Struct("=BBBxIII")  # unix_diag_msg


class UnixSocket(NamedTuple):
    """`peer`: its inode, 0 if it is closed, None if there never was one. `name`: as in sun_path, b"" for
    none.
    """

    inode: int
    kind: int
    state: int
    name: bytes
    peer: int | None
    shutdown: int


def look(inode: int) -> UnixSocket:
    """The socket with this inode in the network namespace of the calling thread. OSError ENOENT."""
    payload = _REQUEST.pack(
        AF_UNIX, 0, ALL_STATES, inode, _SHOW_NAME | _SHOW_PEER, _NO_COOKIE, _NO_COOKIE
    )
    with Netlink(NETLINK_SOCK_DIAG) as netlink:
        ((_, body),) = netlink.request(SOCK_DIAG_BY_FAMILY, 0, payload, f"unix socket {inode}")
    _, kind, state, found, _, _ = _MESSAGE.unpack_from(body)
    said = attributes(body[_MESSAGE.size :])
    peer = struct.unpack("=I", said[_PEER])[0] if _PEER in said else None
    return UnixSocket(found, kind, state, said.get(_NAME, b""), peer, said[_SHUTDOWN][0])
