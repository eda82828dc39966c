"""Bytes in, whole lines out: however they come, and no longer than they may be."""

from __future__ import annotations


class LineTooLong(ConnectionError):
    """What speaks there does not speak in lines that anybody means."""


class LineBuffer:
    """What came of a line is kept until the rest is there."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of one line."""
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that end in `data`, without their line feeds; LineTooLong."""
        first, *more = data.split(b"\n")
        lines: list[bytes] = []
        for part in more:
            lines.append(self._end(first))
            first = part
        self._keep(first)
        return lines

    def _end(self, last: bytes) -> bytes:
        self._keep(last)
        line = b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        return line

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > self._limit:
            raise LineTooLong(f"a line of more than {self._limit} bytes")
        if part:
            self._parts.append(part)
