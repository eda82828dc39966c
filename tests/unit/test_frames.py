"""Frames and the codec: bounds before allocation, and nothing but ProtocolError for what does not fit."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from transport import frames
from transport.codec import PROBE_EVERY, Decoder, Encoder
from transport.frames import Kind, LinkClosed, ProtocolError

PAGE = 4096


def reader(data: bytes) -> Callable[[int], bytes]:
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        if position + size > len(data):
            raise LinkClosed("end")
        position += size
        return data[position - size : position]

    return read


def header(
    kind: int = 0, length: int = 0, raw: int = 0, magic: int = frames.MAGIC, reserved: int = 0
) -> bytes:
    return frames.HEADER.pack(magic, kind, reserved, length, 0, raw)


@given(st.sampled_from(Kind), st.binary(max_size=3000), st.integers(0, frames.MAX_PAGES))
def test_round_trip(kind: Kind, body: bytes, raw_size: int) -> None:
    raw_size = 0 if kind is Kind.MESSAGE else raw_size
    found, content = frames.read_frame(reader(frames.encode(kind, body, raw_size) + b"more"))
    assert (found.kind, found.length, found.raw_size) == (kind, len(body), raw_size)
    assert content == body


@pytest.mark.parametrize(
    "data",
    [
        header(magic=0x474E),
        header(reserved=1),
        header(kind=3),
        header(kind=255),
        header(length=frames.MAX_MESSAGE + 1),
        header(length=0xFFFFFFFF),
        header(kind=1, length=frames.MAX_PAGES + 8 + 16 * frames.MAX_RANGES + 1),
        header(kind=2, raw=frames.MAX_PAGES + 1),
        header(kind=0, raw=1),
        b"",
        header()[:-1],
        header() + b"x",
    ],
)
def test_header_bounds(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.decode_header(data)


def test_a_length_beyond_the_bound_is_never_read() -> None:
    asked: list[int] = []

    def read(size: int) -> bytes:
        asked.append(size)
        return header(length=0xFFFFFFFF)

    with pytest.raises(ProtocolError):
        frames.read_frame(read)
    assert asked == [frames.HEADER.size]


@given(st.binary(min_size=1, max_size=200), st.data())
def test_a_flipped_bit_is_noticed(body: bytes, data: st.DataObject) -> None:
    whole = bytearray(frames.encode(Kind.MESSAGE, body))
    at = data.draw(st.integers(frames.HEADER.size, len(whole) - 1))
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ProtocolError, match="checksum"):
        frames.read_frame(reader(bytes(whole)))


EDGES = st.lists(st.integers(0, 1 << 40), unique=True, max_size=40).map(lambda x: sorted(p * PAGE for p in x))


@given(EDGES, st.binary(max_size=50))
def test_ranges_round_trip(edges: list[int], rest: bytes) -> None:
    ranges = list(zip(edges[::2], edges[1::2], strict=False))
    found, tail = frames.decode_ranges(memoryview(frames.encode_ranges(ranges) + rest))
    assert found == ranges
    assert tail == rest


@pytest.mark.parametrize(
    "ranges",
    [
        [(PAGE, PAGE)],
        [(2 * PAGE, PAGE)],
        [(0, PAGE), (0, PAGE)],
        [(4 * PAGE, 5 * PAGE), (PAGE, 2 * PAGE)],
        [(0, 2 * PAGE), (PAGE, 3 * PAGE)],
        [(1, PAGE)],
        [(0, PAGE + 1)],
    ],
)
def test_ranges_out_of_order(ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(ProtocolError):
        frames.decode_ranges(memoryview(frames.encode_ranges(ranges)))


@pytest.mark.parametrize("body", [b"", b"\0\0\0", struct.pack("<I", 1), struct.pack("<IQ", 1, 0)])
def test_a_truncated_table(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        frames.decode_ranges(memoryview(body))


def test_a_table_that_is_too_long() -> None:
    count = frames.MAX_RANGES + 1
    ranges = [(2 * n * PAGE, (2 * n + 1) * PAGE) for n in range(count)]
    with pytest.raises(ProtocolError):
        frames.decode_ranges(memoryview(frames.encode_ranges(ranges)))
    assert len(frames.decode_ranges(memoryview(frames.encode_ranges(ranges[:-1])))[0]) == frames.MAX_RANGES


@given(st.binary(max_size=100))
def test_any_table_is_understood_or_refused(body: bytes) -> None:
    try:
        ranges, _ = frames.decode_ranges(memoryview(body))
    except ProtocolError:
        return
    assert all(s < e for s, e in ranges)


# --- codec ---


@given(st.sampled_from(("zstd", "none")), st.lists(st.binary(max_size=2000), max_size=5))
def test_codec_round_trip(compression: str, pieces: list[bytes]) -> None:
    encoder, decoder = Encoder(compression, -3), Decoder()
    for piece in pieces:
        kind, body = encoder.encode(memoryview(piece))
        assert bytes(decoder.decode(kind, memoryview(body), len(piece))) == piece


def test_compressible_data_is_compressed_and_other_data_is_not() -> None:
    encoder = Encoder("zstd", -3)
    dull, lively = memoryview(b"abcd" * 50_000), memoryview(os.urandom(200_000))
    assert encoder.encode(dull)[0] is Kind.PAGES_ZSTD
    # one that does not shrink: the next ones are not even tried, until one in sixteen shrinks again
    kinds = [encoder.encode(lively)[0], *(encoder.encode(dull)[0] for _ in range(PROBE_EVERY + 1))]
    assert kinds == [Kind.PAGES_RAW] * PROBE_EVERY + [Kind.PAGES_ZSTD] * 2
    assert Encoder("none", -3).encode(dull)[0] is Kind.PAGES_RAW


@pytest.mark.parametrize(("seconds_per_byte", "worth_it"), [(1e-6, True), (1e-12, False)])
def test_compression_must_pay_in_time(seconds_per_byte: float, worth_it: bool) -> None:
    """The time it takes (here a millisecond a chunk) against what the link takes for the bytes saved."""
    ticks = itertools.count()
    encoder = Encoder("zstd", -3, clock=lambda: next(ticks) / 1000)
    for _ in range(50):
        encoder.observe(1 << 20, (1 << 20) * seconds_per_byte)
    half = memoryview(bytes(100_000) + os.urandom(100_000))
    kinds = [encoder.encode(half)[0] for _ in range(PROBE_EVERY)]
    assert kinds == [Kind.PAGES_ZSTD] + [Kind.PAGES_ZSTD if worth_it else Kind.PAGES_RAW] * (PROBE_EVERY - 1)


def test_a_limit_on_the_bandwidth_is_the_speed_of_the_link() -> None:
    encoder = Encoder("zstd", -3, bandwidth=1000)
    encoder.observe(1 << 20, 1e-3)
    assert encoder.seconds_per_byte == 1 / 1000


def test_a_few_bytes_tell_nothing_of_the_link() -> None:
    encoder = Encoder("zstd", -3)
    before = encoder.seconds_per_byte
    encoder.observe(1000, 1.0)
    assert encoder.seconds_per_byte == before


@given(st.binary(max_size=300), st.integers(0, 5000))
def test_any_compressed_data_is_understood_or_refused(data: bytes, size: int) -> None:
    for kind in (Kind.PAGES_ZSTD, Kind.PAGES_RAW):
        try:
            plain = Decoder().decode(kind, memoryview(data), size)
        except ProtocolError:
            continue
        assert len(plain) == size


@pytest.mark.parametrize("announced", [PAGE - 1, PAGE + 1, 0])
def test_another_size_than_announced(announced: int) -> None:
    packed = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(PAGE))
    for kind, body in ((Kind.PAGES_ZSTD, packed), (Kind.PAGES_RAW, bytes(PAGE))):
        with pytest.raises(ProtocolError):
            Decoder().decode(kind, memoryview(body), announced)


def test_trailing_and_truncated_data() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(range(256)) * 16)
    for damaged in (packed + b"\0", packed[:-1], packed[:4], packed + packed, packed[:-3] + b"abc"):
        with pytest.raises(ProtocolError):
            Decoder().decode(Kind.PAGES_ZSTD, memoryview(damaged), PAGE)


def test_a_frame_that_claims_terabytes_allocates_nothing() -> None:
    # magic, a descriptor with an 8-byte content size and a window descriptor, then that size: 1 TiB
    bomb = bytes.fromhex("28b52ffd") + bytes([0xC0, 0x50]) + struct.pack("<Q", 1 << 40) + b"\1\0\0"
    with pytest.raises(ProtocolError):
        Decoder().decode(Kind.PAGES_ZSTD, memoryview(bomb), PAGE)


def test_a_frame_that_grows_beyond_what_was_announced_is_refused_before_it_is_unpacked() -> None:
    packed = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(1 << 28))
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts anew (proc_pid_clear_refs(5))
    with pytest.raises(ProtocolError):
        Decoder().decode(Kind.PAGES_ZSTD, memoryview(packed), PAGE)
    assert memory("VmHWM") - before < 1 << 26


def memory(name: str) -> int:
    """A field of our own /proc/self/status, bytes."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) * 1024
