"""Netlink (netlink(7)): one request, its answers, and attributes; no policy.

Small enough to be used while a process is frozen: one send and one or two receives per request, nothing
allocated in the background. Used for routing (addresses) and for socket diagnostics.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from types import TracebackType

NETLINK_ROUTE = 0
NETLINK_SOCK_DIAG = 4

NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_REPLACE = 0x100
NLM_F_CREATE = 0x400

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_TYPE_MASK = 0x3FFF

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port id
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_RECEIVE_BYTES = 1 << 18
_TIMEOUT_SECONDS = 5.0  # the kernel answers at once; this only keeps a lost answer from hanging an agent


def align(length: int) -> int:
    """`length` rounded up to netlink's four bytes."""
    return (length + 3) & ~3


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded."""
    return (_ATTRIBUTE.pack(4 + len(payload), kind) + payload).ljust(align(4 + len(payload)), b"\0")


def attributes(payload: bytes) -> dict[int, bytes]:
    """The attributes in `payload` by type (the last of each); ValueError if they are malformed."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(payload):
        length, kind = _ATTRIBUTE.unpack_from(payload, offset)
        if length < 4 or offset + length > len(payload):
            raise ValueError(f"netlink attribute of {length} bytes at {offset} of {len(payload)}")
        found[kind & NLA_TYPE_MASK] = payload[offset + 4 : offset + length]
        offset += align(length)
    return found


class Netlink:
    """A netlink socket in the network namespace of the thread that made it; for one thread."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._socket.settimeout(_TIMEOUT_SECONDS)
        self._socket.bind((0, 0))
        self._sequence = 0

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def request(self, kind: int, flags: int, payload: bytes, subject: str) -> list[tuple[int, bytes]]:
        """Send one request, return its answers as (type, payload).

        Raises OSError with the kernel's error and `subject`; EAGAIN if a dump was interrupted by a change
        (ask again).
        """
        self._sequence += 1
        flags |= NLM_F_REQUEST | (0 if flags & NLM_F_DUMP == NLM_F_DUMP else NLM_F_ACK)
        self._socket.send(_HEADER.pack(16 + len(payload), kind, flags, self._sequence, 0) + payload)
        answers: list[tuple[int, bytes]] = []
        while True:
            for answer, answer_flags, body in self._receive():
                if answer_flags & NLM_F_DUMP_INTR:
                    raise OSError(errno.EAGAIN, "changed while it was read", subject)
                if answer == NLMSG_ERROR:
                    _raise_error(body, subject)
                if answer in (NLMSG_ERROR, NLMSG_DONE):
                    return answers
                answers.append((answer, body))

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        data = self._socket.recv(_RECEIVE_BYTES)
        offset = 0
        while offset + 16 <= len(data):
            length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
            if length < 16 or offset + length > len(data):
                raise ValueError(f"netlink message of {length} bytes at {offset} of {len(data)}")
            if sequence == self._sequence:  # an earlier, interrupted dump may still be talking
                yield kind, flags, data[offset + 16 : offset + length]
            offset += align(length)


def _raise_error(body: bytes, subject: str) -> None:
    (code,) = struct.unpack_from("=i", body)
    if code:
        raise OSError(-code, os.strerror(-code), subject)


def dump(netlink: Netlink, kind: int, payload: bytes, subject: str) -> list[tuple[int, bytes]]:
    """A whole table, asked for again (a few times) when it changed while it was read."""
    for _ in range(9):
        try:
            return netlink.request(kind, NLM_F_DUMP, payload, subject)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
    return netlink.request(kind, NLM_F_DUMP, payload, subject)
