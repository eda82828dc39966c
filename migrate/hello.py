"""What `migrate-agent connect` says first, out of a stream that may have a login script's words before it."""

from __future__ import annotations

from typing import Final

import msgspec

from agent.api import Connected
from agent.bounds import MALFORMED
from agent.server.connect import MARK

MAX: Final = 1 << 20  # bytes of noise, and of the line itself
_BEYOND: Final = b"\n"


class Hello:
    """The stream, as it comes in, up to the end of that line."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._mark = -1
        self._seen = 0  # bytes in which there is nothing more to be found

    def feed(self, data: bytes) -> bytes | None:
        """The line once it is whole, without the mark; whatever follows it is lost."""
        self._data += data
        if self._mark < 0:
            self._mark = self._data.find(MARK, self._seen)
            if self._mark < 0:
                self._seen = max(0, len(self._data) - len(MARK) + 1)
                return None
            self._seen = self._mark + len(MARK)
        end = self._data.find(_BEYOND, self._seen)
        if end < 0:
            self._seen = len(self._data)
            return None
        return bytes(self._data[self._mark + len(MARK) : end])

    @property
    def full(self) -> bool:
        """No hello is so late, or so long."""
        return len(self._data) >= MAX

    @property
    def noise(self) -> bytes:
        """What came before it; all of it if it did not come."""
        return bytes(self._data if self._mark < 0 else self._data[: self._mark])


def connected_of(line: bytes) -> Connected | None:
    """None: it is another version's, or nobody's."""
    try:
        return msgspec.json.decode(line, type=Connected)
    except MALFORMED:
        return None
