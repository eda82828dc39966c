"""IP packets taken apart and put together, without a network."""

from __future__ import annotations

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.kernel import packet

V4 = (("10.0.0.1", 40000), ("10.0.0.2", 80))
V6 = (("fd00::1", 40000), ("fd00::2", 80))


def slow_checksum(data: bytes) -> int:
    """RFC 1071 to the letter."""
    total: int = sum(struct.unpack(f">{(len(data) + 1) // 2}H", data + b"\0" * (len(data) & 1)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def with_data(whole: bytes, data: bytes) -> bytes:
    """A packet of `tcp_packet`, with data in it and a wrong checksum."""
    if whole[0] >> 4 == 4:
        return whole[:2] + struct.pack(">H", len(whole) + len(data)) + whole[4:] + data
    return whole[:4] + struct.pack(">H", len(whole) - 40 + len(data)) + whole[6:] + data


@given(st.binary(max_size=200))
def test_checksum(data: bytes) -> None:
    assert packet.checksum(data) == slow_checksum(data)


@pytest.mark.parametrize("data", [b"", b"\0" * 40, b"\xff" * 40, b"\xff\xff", b"\xff\xfe\0\1"])
def test_checksum_at_its_edges(data: bytes) -> None:
    assert packet.checksum(data) == slow_checksum(data)


@pytest.mark.parametrize("ends", [V4, V6])
@given(data=st.binary(max_size=100))
def test_filled_in_checksum_verifies(ends: tuple[tuple[str, int], tuple[str, int]], data: bytes) -> None:
    bare = packet.tcp_packet(*ends, seq=2**32 + 5, ack=7, flags=packet.FIN | packet.ACK, window=99)
    whole = with_data(bare, data)
    parsed = packet.parse(whole)
    fixed = packet.with_tcp_checksum(whole, parsed.tcp)
    addresses = fixed[12:20] if len(parsed.destination.packed) == 4 else fixed[8:40]
    length = len(fixed) - parsed.tcp
    pseudo = addresses + struct.pack(">II", length, socket.IPPROTO_TCP)
    assert slow_checksum(pseudo + fixed[parsed.tcp :]) == 0
    assert fixed[parsed.tcp + 20 :] == data
    assert struct.unpack_from(">HHIIBBH", fixed, parsed.tcp) == (40000, 80, 5, 7, 0x50, 0x11, 99)


@pytest.mark.parametrize("ends", [V4, V6])
def test_parse(ends: tuple[tuple[str, int], tuple[str, int]]) -> None:
    whole = packet.tcp_packet(*ends, seq=1, ack=2, flags=packet.ACK, window=3)
    parsed = packet.parse(whole)
    assert str(parsed.destination) == ends[1][0]
    assert packet.destination_port(whole, parsed) == 80
    for wrong in (whole[:-1], whole + b"\0", whole[:30], b"", b"\x45"):
        with pytest.raises(ValueError):
            packet.parse(wrong)


def test_parse_refuses_other_protocols_and_knows_fragments() -> None:
    whole = bytearray(packet.tcp_packet(*V4, seq=1, ack=2, flags=packet.ACK, window=3))
    whole[6] = 0x20  # more fragments
    parsed = packet.parse(bytes(whole))
    assert parsed.fragment and packet.destination_port(bytes(whole), parsed) is None
    whole[9] = socket.IPPROTO_UDP
    with pytest.raises(ValueError, match="not an IP packet with TCP"):
        packet.parse(bytes(whole))


first_bytes = st.sampled_from([b"\x45", b"\x46", b"\x60", b"\x4f"])
nearly_ip = st.tuples(first_bytes, st.binary(max_size=80)).map(b"".join)


@given(st.binary(max_size=80) | nearly_ip)
def test_parse_of_anything_is_an_answer_or_a_value_error(data: bytes) -> None:
    try:
        parsed = packet.parse(data)
    except ValueError:
        return
    packet.destination_port(data, parsed)
