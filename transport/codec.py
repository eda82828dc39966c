"""Pages to bytes and back: zstd where it pays, raw where it does not.

Whether it pays is measured: the time that compressing took against the time that the link takes for the
bytes saved. After a chunk that was not worth it, only one in sixteen is tried until one is. On a slow link
nearly all are; a fast one carries raw bytes sooner than a CPU finds a tenth to leave out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import zstandard

from transport.frames import Kind, ProtocolError

WORTH_IT: Final = 0.9  # a chunk that stays above this share of its size travels raw, compressed or not
PROBE_EVERY: Final = 16
# before anything is known of it: a link of 100 MB/s
ASSUMED: Final = 1e-8  # seconds per byte
_WINDOW: Final = 256 * 1024  # bytes on the link that are too few to tell anything
_WEIGHT: Final = 0.5  # of the latest measurement


class Encoder:
    """One direction's compressor; not shared between threads."""

    def __init__(
        self,
        compression: str,
        level: int,
        bandwidth: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`bandwidth`: bytes per second that we may put on the link, whatever it would carry."""
        self._zstd = (
            None if compression == "none" else zstandard.ZstdCompressor(level=level, write_content_size=True)
        )
        self._skip = 0
        self._clock = clock
        self._at_least = 1 / bandwidth if bandwidth else 0.0
        self.seconds_per_byte = max(ASSUMED, self._at_least)  # of the link

    def observe(self, link_bytes: int, seconds: float) -> None:
        """So long the link took for so many bytes, from the first into it until the last was dealt with."""
        if link_bytes >= _WINDOW:
            latest = max(seconds / link_bytes, self._at_least)
            self.seconds_per_byte += _WEIGHT * (latest - self.seconds_per_byte)

    def encode(self, data: memoryview) -> tuple[Kind, bytes | memoryview]:
        """The kind of frame and the body part for `data`, which may be `data` itself."""
        if self._zstd is None:
            return Kind.PAGES_RAW, data
        if self._skip:
            self._skip -= 1
            return Kind.PAGES_RAW, data
        began = self._clock()
        packed = self._zstd.compress(data)
        spent = self._clock() - began
        saved = len(data) - len(packed)
        if saved * self.seconds_per_byte < spent or len(packed) >= WORTH_IT * len(data):
            self._skip = PROBE_EVERY - 1
        return (Kind.PAGES_ZSTD, packed) if len(packed) < WORTH_IT * len(data) else (Kind.PAGES_RAW, data)


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
