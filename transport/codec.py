"""Pages to bytes and back: zstd where it pays, raw where it does not.

Whether it pays is measured: after a piece of memory that did not shrink, only one chunk in sixteen is tried until one
shrinks again.
"""

from __future__ import annotations

from typing import Final

import zstandard

from transport.frames import Kind, ProtocolError

WORTH_IT: Final = 0.9  # a chunk that stays above this share of its size travels raw
PROBE_EVERY: Final = 16


class Encoder:
    """One direction's compressor; not shared between threads."""

    def __init__(self, compression: str, level: int) -> None:
        self._zstd = (
            None if compression == "none" else zstandard.ZstdCompressor(level=level, write_content_size=True)
        )
        self._skip = 0

    def encode(self, data: memoryview) -> tuple[Kind, bytes]:
        """The kind of frame and the body part for `data`."""
        if self._zstd is None:
            return Kind.PAGES_RAW, bytes(data)
        if self._skip:
            self._skip -= 1
            return Kind.PAGES_RAW, bytes(data)
        packed = self._zstd.compress(data)
        if len(packed) < WORTH_IT * len(data):
            return Kind.PAGES_ZSTD, packed
        self._skip = PROBE_EVERY - 1
        return Kind.PAGES_RAW, bytes(data)


class Decoder:
    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()

    def decode(self, kind: Kind, data: memoryview, raw_size: int) -> bytes | memoryview:
        """Exactly `raw_size` bytes; ProtocolError if that is not what is in there."""
        if kind is Kind.PAGES_RAW:
            if len(data) != raw_size:
                raise ProtocolError(f"{len(data)} raw bytes where {raw_size} were announced")
            return data
        try:
            # what the data claims is allocated at once, whatever max_output_size says
            if zstandard.frame_content_size(data) != raw_size:
                raise ProtocolError(f"compressed data of another size than the {raw_size} bytes announced")
            plain = self._zstd.decompress(data, max_output_size=raw_size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"damaged page data: {error}") from error
        if len(plain) != raw_size:
            raise ProtocolError(f"{len(plain)} bytes where {raw_size} were announced")
        return plain
