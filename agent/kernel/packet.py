"""IP packets: taking copies of those that arrive, and letting them arrive again (packet(7), raw(7)).

Copies are taken by packet sockets of one protocol each (IPv4, IPv6), not ETH_P_ALL: so a packet that crosses
a bridge, a bond or a VLAN is seen once, on the interface where it enters the IP stack, and nothing that
leaves is seen.

A packet is made to arrive again by a raw socket that sends it, headers included, to its own (local)
destination. The kernel loops it back with the route of that send attached, so input routing does not judge
its source address: it arrives whatever rp_filter says (measured with 0, 1 and 2). A firewall sees it on
output and on input, on "lo".
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from agent.kernel import sock_filter
from agent.kernel.sock_filter import BPF_JMP_JEQ_K, BPF_LD_B_ABS, BPF_LD_W_ABS, BPF_RET_K

ETH_P_IP = 0x0800
ETH_P_IPV6 = 0x86DD
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_AUXDATA = 8
PACKET_HOST = 0
TP_STATUS_CSUMNOTREADY = 1 << 3
TP_STATUS_CSUM_VALID = 1 << 7
SKF_AD_PKTTYPE = (-0x1000 + 4) & 0xFFFFFFFF
SKF_AD_IFINDEX = (-0x1000 + 8) & 0xFFFFFFFF
SO_RCVBUFFORCE = 33
IPV6_HDRINCL = 36
TCP_HEADER = 20
FIN, ACK = 0x01, 0x10

_AUXDATA = struct.Struct("=IIIHHHH")
_PACKET_BYTES = (1 << 16) + 64  # the longest IP packet, IPv6 header included
_CHECKSUM_OFFSET = 16  # in a TCP header

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Parsed(NamedTuple):
    """Where an IP packet goes and where its TCP header begins."""

    destination: Address
    tcp: int  # offset of the TCP header
    fragment: bool


def parse(packet: bytes) -> Parsed:
    """Raises ValueError if it is not a whole IP packet that carries TCP (extension headers count as not)."""
    version = packet[0] >> 4 if packet else 0
    if version == 4 and len(packet) >= 20:
        header = (packet[0] & 15) * 4
        total, fragment = struct.unpack_from(">H2xH", packet, 2)
        if packet[9] == socket.IPPROTO_TCP and header >= 20 and total == len(packet):
            return _parsed(ipaddress.IPv4Address(packet[16:20]), packet, header, bool(fragment & 0x3FFF))
    if version == 6 and len(packet) >= 40:
        (payload,) = struct.unpack_from(">H", packet, 4)
        if packet[6] == socket.IPPROTO_TCP and payload + 40 == len(packet):
            return _parsed(ipaddress.IPv6Address(packet[24:40]), packet, 40, False)
    raise ValueError(f"not an IP packet with TCP in it: {len(packet)} bytes, {packet[:20].hex()}")


def _parsed(destination: Address, packet: bytes, tcp: int, fragment: bool) -> Parsed:
    if not fragment and len(packet) < tcp + TCP_HEADER:
        raise ValueError(f"TCP header cut off: {len(packet)} bytes, {packet[:40].hex()}")
    return Parsed(destination, tcp, fragment)


def destination_port(packet: bytes, parsed: Parsed) -> int | None:
    """None for a fragment."""
    return None if parsed.fragment else int.from_bytes(packet[parsed.tcp + 2 : parsed.tcp + 4], "big")


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071): arithmetic modulo 65535, which long integers do fast."""
    total = int.from_bytes(data + b"\0" if len(data) & 1 else data, "big")
    folded = total % 0xFFFF
    return 0xFFFF - (folded or (0xFFFF if total else 0))


def with_tcp_checksum(packet: bytes, tcp: int) -> bytes:
    """The packet with the checksum of its TCP segment filled in."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    segment = bytearray(packet[tcp:])
    segment[_CHECKSUM_OFFSET : _CHECKSUM_OFFSET + 2] = b"\0\0"
    pseudo = addresses + struct.pack(">II", len(segment), socket.IPPROTO_TCP)
    struct.pack_into(">H", segment, _CHECKSUM_OFFSET, checksum(pseudo + segment))
    return packet[:tcp] + bytes(segment)


def tcp_packet(
    source: tuple[str, int], destination: tuple[str, int], seq: int, ack: int, flags: int, window: int
) -> bytes:
    """A whole IP packet with a TCP segment that has neither options nor data. Numbers wrap at 32 bits."""
    ends = [ipaddress.ip_address(one) for one in (source[0], destination[0])]
    tcp = struct.pack(
        ">HHIIBBHHH",
        source[1],
        destination[1],
        seq & 0xFFFFFFFF,
        ack & 0xFFFFFFFF,
        5 << 4,
        flags,
        window,
        0,
        0,
    )
    if ends[0].version == 4:
        head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, socket.IPPROTO_TCP, 0)
    else:
        head = struct.pack(">IHBB", 6 << 28, len(tcp), socket.IPPROTO_TCP, 64)
    head += ends[0].packed + ends[1].packed
    return with_tcp_checksum(head + tcp, len(head))


# taking copies ----------------------------------------------------------------------------------------------


def _arrives_here() -> list[tuple[int, int, int, int]]:
    return [
        (BPF_LD_W_ABS, 0, 0, SKF_AD_PKTTYPE),
        (BPF_JMP_JEQ_K, 1, 0, PACKET_HOST),
        (BPF_RET_K, 0, 0, 0),
        (BPF_LD_W_ABS, 0, 0, SKF_AD_IFINDEX),
        (BPF_JMP_JEQ_K, 0, 1, socket.if_nametoindex("lo")),
        (BPF_RET_K, 0, 0, 0),
    ]


def arrival_filter(version: int, addresses: Iterable[Address]) -> bytes:
    """Classic BPF: TCP to one of `addresses` that arrives from outside, seen from the IP header on."""
    protocol, destination = (9, 16) if version == 4 else (6, 24)
    program = _arrives_here()
    program += [
        (BPF_LD_B_ABS, 0, 0, protocol),
        (BPF_JMP_JEQ_K, 1, 0, socket.IPPROTO_TCP),
        (BPF_RET_K, 0, 0, 0),
    ]
    for address in addresses:
        words = struct.unpack(f">{len(address.packed) // 4}I", address.packed)
        for index, word in enumerate(words):
            left = 2 * (len(words) - index - 1) + 1  # instructions from here to the next address
            program += [(BPF_LD_W_ABS, 0, 0, destination + 4 * index), (BPF_JMP_JEQ_K, 0, left, word)]
        program.append((BPF_RET_K, 0, 0, sock_filter.ACCEPT))
    program.append((BPF_RET_K, 0, 0, 0))
    return sock_filter.assemble(program)


NOTHING = sock_filter.assemble([(BPF_RET_K, 0, 0, 0)])


class Tap:
    """One packet socket. Hears nothing until `start`; needs CAP_NET_RAW.

    Closing it waits for the kernel to quiesce (milliseconds): not to be done in a pause.
    """

    def __init__(self, version: int, addresses: Sequence[Address], buffer_bytes: int) -> None:
        self._program = arrival_filter(version, addresses)
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK  # DGRAM: from the IP header on
        protocol = socket.htons(ETH_P_IP if version == 4 else ETH_P_IPV6)
        self._socket = socket.socket(socket.AF_PACKET, kind, protocol)  # on all interfaces, from here on
        self._socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer_bytes // 2)
        sock_filter.attach(self._socket, NOTHING)
        while self.receive() is not None:  # what came before the filter
            pass

    def start(self) -> None:
        sock_filter.attach(self._socket, self._program)

    def stop(self) -> None:
        """Hear nothing more; what was heard can still be received."""
        sock_filter.attach(self._socket, NOTHING)

    def fileno(self) -> int:
        return self._socket.fileno()

    def receive(self) -> bytes | None:
        """The next packet that is whole and intact (its TCP checksum filled in); None: none is waiting."""
        while True:
            try:
                packet, control, flags, _ = self._socket.recvmsg(
                    _PACKET_BYTES, socket.CMSG_SPACE(_AUXDATA.size)
                )
            except BlockingIOError:
                return None
            whole = None if flags & socket.MSG_TRUNC else _completed(packet, _status(control))
            if whole is not None:
                return whole

    def lost(self) -> int:
        """How many packets did not fit into the buffer since the last call."""
        raw = self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8)
        return int(struct.unpack("=II", raw)[1])

    def close(self) -> None:
        self._socket.close()


def _status(control: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in control:
        if level == SOL_PACKET and kind == PACKET_AUXDATA:
            return int(_AUXDATA.unpack(data[: _AUXDATA.size])[0])
    return 0


def _completed(packet: bytes, status: int) -> bytes | None:
    # A sender on the same machine and the kernel's own merging of segments (GRO) leave the checksum to be
    # filled in. It is filled in only where the kernel vouches for the data: otherwise the receiving stack
    # must judge it.
    try:
        parsed = parse(packet)
    except ValueError:
        return None
    if parsed.fragment or not status & (TP_STATUS_CSUMNOTREADY | TP_STATUS_CSUM_VALID):
        return packet
    return with_tcp_checksum(packet, parsed.tcp)


# letting them arrive ----------------------------------------------------------------------------------------


class Injector:
    """Lets packets arrive at this host, whose destination address must be local. Needs CAP_NET_RAW."""

    def __init__(self) -> None:
        flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._v4 = socket.socket(socket.AF_INET, flags, socket.IPPROTO_RAW)
        self._v6: socket.socket | None = None
        try:
            self._v6 = socket.socket(socket.AF_INET6, flags, socket.IPPROTO_RAW)
            self._v6.setsockopt(socket.IPPROTO_IPV6, IPV6_HDRINCL, 1)
        except OSError as error:
            if error.errno != errno.EAFNOSUPPORT:  # a host without IPv6 gets no IPv6 packets
                raise

    def inject(self, packet: bytes) -> None:
        """Returns when it is in the stack. OSError: EMSGSIZE (loopback MTU), EPERM (firewall)."""
        if packet[0] >> 4 == 4:
            self._v4.sendto(packet, (socket.inet_ntop(socket.AF_INET, packet[16:20]), 0))
        elif self._v6 is not None:
            self._v6.sendto(packet, (socket.inet_ntop(socket.AF_INET6, packet[24:40]), 0, 0, 0))

    def close(self) -> None:
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()
