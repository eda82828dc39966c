"""Frames: how messages and pages travel between two agents.

Every frame is a header of 16 bytes, little endian, and a body:

    magic u16 = 0x474D | kind u8 | reserved u8 = 0 | body length u32 | CRC-32 of the body u32 | raw size u32

kind 0 is a message (msgpack, `agent.protocol`); 1 and 2 are pages: a table of ranges, then their bytes one
after another, compressed with zstd (1) or as they are (2). `raw size` is the length of those bytes before
compression, 0 for a message. Lengths are bounded before anything is allocated; what does not fit is a
ProtocolError.
"""

from __future__ import annotations

import enum
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

MAGIC: Final = 0x474D
HEADER: Final = struct.Struct("<HBBIII")
MAX_MESSAGE: Final = 256 * 1024 * 1024
MAX_PAGES: Final = 4 * 1024 * 1024
MAX_RANGES: Final = MAX_PAGES // 4096
MAX_PAGES_BODY: Final = MAX_PAGES + 8 + MAX_RANGES * 16  # they and their table
_COUNT: Final = struct.Struct("<I")


class Kind(enum.IntEnum):
    MESSAGE = 0
    PAGES_ZSTD = 1
    PAGES_RAW = 2


class ProtocolError(Exception):
    """The stream is not what this version speaks, or was damaged on its way."""


class LinkClosed(Exception):
    """The other end is gone, or the way to it."""


class Header(msgspec.Struct, frozen=True):
    kind: Kind
    length: int
    checksum: int
    raw_size: int


def encode(kind: Kind, body: bytes, raw_size: int = 0) -> bytes:
    """One whole frame."""
    return header(kind, (body,), raw_size) + body


def header(kind: Kind, parts: Sequence[bytes | memoryview], raw_size: int = 0) -> bytes:
    """Of a frame whose body is these parts, one after another."""
    checksum, length = 0, 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
        length += len(part)
    return HEADER.pack(MAGIC, kind, 0, length, checksum, raw_size)


def decode_header(data: bytes) -> Header:
    """Check and unpack a header; ProtocolError."""
    if len(data) != HEADER.size:
        raise ProtocolError(f"a header of {len(data)} bytes")
    magic, kind, reserved, length, checksum, raw_size = HEADER.unpack(data)
    if magic != MAGIC or reserved:
        raise ProtocolError(f"not a frame: it begins with {magic:#06x}")  # the rest may be memory
    if kind not in Kind._value2member_map_:
        raise ProtocolError(f"unknown kind of frame {kind}")
    if kind == Kind.MESSAGE and raw_size:
        raise ProtocolError(f"a message with a raw size of {raw_size}")
    limit = MAX_MESSAGE if kind == Kind.MESSAGE else MAX_PAGES_BODY
    if length > limit or raw_size > MAX_PAGES:
        raise ProtocolError(f"a frame of {length} bytes ({raw_size} raw) exceeds the bound {limit}")
    return Header(Kind(kind), length, checksum, raw_size)


def check_body(header: Header, body: bytes | bytearray | memoryview) -> None:
    if zlib.crc32(body) != header.checksum:
        raise ProtocolError("a frame's checksum does not match: damaged on its way, or by our own fault")


def encode_ranges(ranges: Sequence[tuple[int, int]]) -> bytes:
    """A table of [start, end) ranges."""
    return _COUNT.pack(len(ranges)) + struct.pack(f"<{2 * len(ranges)}Q", *(x for r in ranges for x in r))


def decode_ranges(body: memoryview) -> tuple[list[tuple[int, int]], memoryview]:
    """The table at the head of a body, and the rest; ProtocolError unless ordered, page-aligned, bounded."""
    if len(body) < _COUNT.size:
        raise ProtocolError("a page frame without its table")
    count = _COUNT.unpack_from(body)[0]
    end = _COUNT.size + 16 * count
    if count > MAX_RANGES or end > len(body):
        raise ProtocolError(f"a table of {count} ranges")
    words = struct.unpack_from(f"<{2 * count}Q", body, _COUNT.size)
    ranges = list(zip(words[::2], words[1::2], strict=True))
    position = 0
    for start, stop in ranges:
        if start < position or stop <= start or (start | stop) & 4095:
            raise ProtocolError(f"a range {start:#x}-{stop:#x} out of order")
        position = stop
    return ranges, body[end:]


def read_frame(read_exactly: Callable[[int], bytes]) -> tuple[Header, memoryview]:
    """Read one frame through `read_exactly(size)`, which raises LinkClosed at the end of the stream."""
    header = decode_header(read_exactly(HEADER.size))
    body = memoryview(read_exactly(header.length))
    check_body(header, body)
    return header, body
