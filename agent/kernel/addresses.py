"""Addresses of this host's interfaces, and telling the neighbours where an address is (rtnetlink(7), RFC 826,
4861).

Everything concerns the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from typing import NamedTuple

from agent.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes,
    dump,
)
from agent.kernel.packet import checksum

RTM_GETLINK = 18
RTM_NEWADDR = 20
RTM_DELADDR = 21
RTM_GETADDR = 22
RTM_GETROUTE = 26

IFA_ADDRESS = 1
IFA_LOCAL = 2
IFA_LABEL = 3
IFA_BROADCAST = 4
IFA_CACHEINFO = 6
IFA_FLAGS = 8
IFA_RT_PRIORITY = 9

IFA_F_SECONDARY = 0x01
IFA_F_NODAD = 0x02
IFA_F_DADFAILED = 0x08
IFA_F_TENTATIVE = 0x40
IFA_F_MANAGETEMPADDR = 0x100
IFA_F_NOPREFIXROUTE = 0x200
IFA_F_MCAUTOJOIN = 0x400
# what can be asked for; the rest the kernel decides
_SETTABLE_FLAGS = IFA_F_MANAGETEMPADDR | IFA_F_NOPREFIXROUTE | IFA_F_MCAUTOJOIN

RTA_DST = 1
RTA_PREFSRC = 7
RTN_LOCAL = 2
RTPROT_KERNEL = 2

IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFF_NOARP = 0x80
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
ARPHRD_ETHER = 1

FOREVER = 0xFFFFFFFF

_IFADDRMSG = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, interface
_IFINFOMSG = struct.Struct("=BxHiII")  # family, hardware type, index, flags, change
_RTMSG = struct.Struct("=BBBBBBBBI")  # family, dst_len, src_len, tos, table, protocol, scope, type, flags
_CACHEINFO = struct.Struct("=IIII")  # preferred, valid (seconds), created, changed

_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
_BROADCAST = b"\xff" * 6
_ALL_NODES = b"\x33\x33\x00\x00\x00\x01"
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 0x20000000
_TARGET_LINK_LAYER_ADDRESS = 2


class InterfaceAddress(NamedTuple):
    """One address of one interface. Lifetimes are seconds from when it was read; FOREVER: no end."""

    interface: str
    family: int
    address: str
    prefix_length: int
    scope: int
    flags: int
    peer: str  # of a point-to-point interface, else ""
    broadcast: str
    label: str
    preferred: int
    valid: int
    metric: int

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        return ipaddress.ip_network(f"{self.address}/{self.prefix_length}", strict=False)


class Link(NamedTuple):
    name: str
    number: int
    hardware_type: int
    flags: int
    hardware_address: bytes


class Route(NamedTuple):
    type: int
    protocol: int
    table: int
    source: str  # preferred source address, "" if none


def _text(family: int, raw: bytes | None) -> str:
    return socket.inet_ntop(family, raw) if raw else ""


def _number(raw: bytes | None, default: int) -> int:
    return int.from_bytes(raw, "little") if raw else default


def _interface_address(body: bytes) -> InterfaceAddress:
    family, prefix, short_flags, scope, index = _IFADDRMSG.unpack_from(body)
    found = attributes(body[_IFADDRMSG.size :])
    local, address = found.get(IFA_LOCAL), found.get(IFA_ADDRESS)
    preferred, valid, _, _ = _CACHEINFO.unpack(
        found.get(IFA_CACHEINFO, _CACHEINFO.pack(FOREVER, FOREVER, 0, 0))
    )
    return InterfaceAddress(
        interface=socket.if_indextoname(index),
        family=family,
        address=_text(family, local or address),
        prefix_length=prefix,
        scope=scope,
        flags=_number(found.get(IFA_FLAGS), short_flags),
        peer=_text(family, address) if local and address != local else "",
        broadcast=_text(family, found.get(IFA_BROADCAST)),
        label=found.get(IFA_LABEL, b"").rstrip(b"\0").decode(),
        preferred=preferred,
        valid=valid,
        metric=_number(found.get(IFA_RT_PRIORITY), 0),
    )


def addresses() -> list[InterfaceAddress]:
    """All addresses of all interfaces."""
    with Netlink(NETLINK_ROUTE) as netlink:
        answers = dump(netlink, RTM_GETADDR, _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0), "addresses")
    return [_interface_address(body) for _, body in answers]


def links() -> list[Link]:
    with Netlink(NETLINK_ROUTE) as netlink:
        answers = dump(netlink, RTM_GETLINK, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0), "interfaces")
    return [_link(body) for _, body in answers]


def _link(body: bytes) -> Link:
    _, kind, index, flags, _ = _IFINFOMSG.unpack_from(body)
    found = attributes(body[_IFINFOMSG.size :])
    return Link(found[IFLA_IFNAME].rstrip(b"\0").decode(), index, kind, flags, found.get(IFLA_ADDRESS, b""))


def _message(entry: InterfaceAddress, flags: int) -> bytes:
    index = socket.if_nametoindex(entry.interface)
    local = socket.inet_pton(entry.family, entry.address)
    other = socket.inet_pton(entry.family, entry.peer) if entry.peer else local
    body = _IFADDRMSG.pack(entry.family, entry.prefix_length, 0, entry.scope, index)
    body += attribute(IFA_LOCAL, local) + attribute(IFA_ADDRESS, other)
    body += attribute(IFA_FLAGS, struct.pack("=I", flags))
    body += attribute(IFA_CACHEINFO, _CACHEINFO.pack(entry.preferred, entry.valid, 0, 0))
    if entry.broadcast:
        body += attribute(IFA_BROADCAST, socket.inet_pton(entry.family, entry.broadcast))
    if entry.label and entry.family == socket.AF_INET:
        body += attribute(IFA_LABEL, entry.label.encode() + b"\0")
    if entry.metric:
        body += attribute(IFA_RT_PRIORITY, struct.pack("=I", entry.metric))
    return body


def add(entry: InterfaceAddress) -> None:
    """Give the address to the interface, without duplicate address detection. EEXIST: it has it; ENODEV."""
    with Netlink(NETLINK_ROUTE) as netlink:
        message = _message(entry, (entry.flags & _SETTABLE_FLAGS) | IFA_F_NODAD)
        netlink.request(RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, message, entry.address)


def delete(entry: InterfaceAddress) -> None:
    """Take the address from the interface. EADDRNOTAVAIL: it does not have it."""
    index = socket.if_nametoindex(entry.interface)
    body = _IFADDRMSG.pack(entry.family, entry.prefix_length, 0, 0, index)
    body += attribute(IFA_LOCAL, socket.inet_pton(entry.family, entry.address))
    with Netlink(NETLINK_ROUTE) as netlink:
        netlink.request(RTM_DELADDR, 0, body, entry.address)


# routes --------------------------------------------------------------------------------------------------


def _route(body: bytes) -> Route:
    family, _, _, _, table, protocol, _, kind, _ = _RTMSG.unpack_from(body)
    return Route(kind, protocol, table, _text(family, attributes(body[_RTMSG.size :]).get(RTA_PREFSRC)))


def route_to(address: str) -> Route | None:
    """Where packets to `address` go; None: nowhere."""
    parsed = ipaddress.ip_address(address)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    destination = attribute(RTA_DST, parsed.packed)
    message = _RTMSG.pack(family, parsed.max_prefixlen, 0, 0, 0, 0, 0, 0, 0) + destination
    with Netlink(NETLINK_ROUTE) as netlink:
        try:
            answers = netlink.request(RTM_GETROUTE, 0, message, address)
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
    return _route(answers[0][1])


def is_local(address: str) -> bool:
    """Whether packets to `address` would be delivered on this host, now."""
    route = route_to(address)
    return route is not None and route.type == RTN_LOCAL


def routes(family: int) -> list[Route]:
    """All routes of all tables."""
    with Netlink(NETLINK_ROUTE) as netlink:
        answers = dump(netlink, RTM_GETROUTE, _RTMSG.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "routes")
    return [_route(body) for _, body in answers]


# telling the neighbours -------------------------------------------------------------------------------------


class Announcer:
    """Says on an interface's link where an address is. Needs CAP_NET_RAW.

    Closing it waits for the kernel to quiesce (measured: 12 ms): not to be done in a pause.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)

    def announce(self, interface: str, address: str) -> bool:
        """Tell everyone on the link that `address` is here now. False: this kind of link has no such notion.

        IPv4: gratuitous ARP in both forms, request and reply, since receivers differ in which they heed (RFC
        5227, 3). IPv6: an unsolicited neighbour advertisement with the override flag (RFC 4861, 7.2.6).
        """
        link = next((one for one in links() if one.name == interface), None)
        if link is None:
            raise OSError(errno.ENODEV, "no such interface", interface)
        if link.hardware_type != ARPHRD_ETHER or link.flags & IFF_NOARP:
            return False
        for frame in announcements(link.hardware_address, address):
            self._socket.sendto(frame, (interface, 0))
        return True

    def close(self) -> None:
        self._socket.close()


def announcements(hardware_address: bytes, address: str) -> list[bytes]:
    """The Ethernet frames of one announcement."""
    parsed = ipaddress.ip_address(address)
    if parsed.version == 4:
        return [_gratuitous_arp(hardware_address, parsed.packed, reply) for reply in (False, True)]
    return [_advertisement(hardware_address, parsed.packed)]


def _gratuitous_arp(mac: bytes, address: bytes, reply: bool) -> bytes:
    head = _BROADCAST + mac + struct.pack(">H", _ETH_P_ARP)
    target = mac if reply else b"\0" * 6
    return head + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 2 if reply else 1) + mac + address + target + address


def _advertisement(mac: bytes, address: bytes) -> bytes:
    all_nodes = socket.inet_pton(socket.AF_INET6, "ff02::1")
    option = struct.pack(">BB6s", _TARGET_LINK_LAYER_ADDRESS, 1, mac)
    body = struct.pack(">I16s", _OVERRIDE, address) + option
    pseudo = address + all_nodes + struct.pack(">II", len(body) + 4, socket.IPPROTO_ICMPV6)
    kind = struct.pack(">BB", _NEIGHBOUR_ADVERTISEMENT, 0)
    message = kind + struct.pack(">H", checksum(pseudo + kind + b"\0\0" + body)) + body
    ip = struct.pack(">IHBB", 6 << 28, len(message), socket.IPPROTO_ICMPV6, 255) + address + all_nodes
    return _ALL_NODES + mac + struct.pack(">H", _ETH_P_IPV6) + ip + message
