"""elf(5): the GNU build id of a file, from its notes. A few reads, as it may have to be done in the pause."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Final

PT_NOTE: Final = 4
_BUILD_ID_NOTE: Final = 3
_IDENT: Final = b"\x7fELF\x02\x01"  # 64 bits, little endian
_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_NOTE: Final = struct.Struct("<III")
_MAX_SEGMENTS: Final = 256
_MAX_NOTES: Final = 1 << 16  # bytes of one segment
_MAX_ID: Final = 64  # bytes; what linkers write has 8 to 32


def build_id(fd: int) -> str:
    """In hexadecimal; "" if the file has none, or is no ELF file of 64 bits."""
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size or not head.startswith(_IDENT):
        return ""
    for kind, _, offset, _, _, size, _, alignment in _segments(fd, _HEADER.unpack(head)):
        if kind == PT_NOTE:
            notes = _read(fd, min(size, _MAX_NOTES), offset)
            for name, number, content in _notes(notes, 8 if alignment == 8 else 4):
                if name == b"GNU\0" and number == _BUILD_ID_NOTE and len(content) <= _MAX_ID:
                    return content.hex()
    return ""


def _segments(fd: int, header: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    offset, size, count = header[5], header[9], header[10]
    if size != _SEGMENT.size or count > _MAX_SEGMENTS:
        return
    table = _read(fd, size * count, offset)
    yield from _SEGMENT.iter_unpack(table[: len(table) // size * size])


def _read(fd: int, size: int, offset: int) -> bytes:
    """What is there: an offset that is damaged may not even be one (pread(2))."""
    return os.pread(fd, size, offset) if offset < os.fstat(fd).st_size else b""


def _notes(data: bytes, alignment: int) -> Iterator[tuple[bytes, int, bytes]]:
    """(name, type, content) of each whole note."""
    position = 0
    while position + _NOTE.size <= len(data):
        name_size, content_size, number = _NOTE.unpack_from(data, position)
        name_at = position + _NOTE.size
        content_at = _aligned(name_at + name_size, alignment)
        if content_at + content_size > len(data):
            return
        yield data[name_at : name_at + name_size], number, data[content_at : content_at + content_size]
        position = _aligned(content_at + content_size, alignment)


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment
