"""Service addresses: those that move with a process, so that its clients find it where it is.

Source: `takeover_blockers` before anything is touched, `withdraw` after COMMIT (`restore` undoes it).
Destination: `place` before anything is touched, `install` on COMMIT, then `announce` (`remove` undoes
`install`). All of it concerns the network namespace of the calling thread.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Literal

import msgspec

from agent.api import Blocker
from agent.bounds import Word
from agent.kernel import addresses as kernel
from agent.kernel.addresses import Announcer, InterfaceAddress
from agent.kernel.sock_diag import SockDiag, SocketEntry

_LOCAL_TABLE = 255
_INSTALL_SECONDS = 1.0
_PROTOCOLS = {
    "TCP": socket.IPPROTO_TCP,
    "UDP": socket.IPPROTO_UDP,
    "UDPLITE": socket.IPPROTO_UDPLITE,
    "SCTP": socket.IPPROTO_SCTP,
    "DCCP": 33,
    "raw": socket.IPPROTO_RAW,
}
# where the default route leads; nobody has these addresses (RFC 5737, RFC 3849)
_ANYWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}


class ServiceAddress(msgspec.Struct, frozen=True, kw_only=True):
    """One address as the source has it. `interface` is the source's."""

    address: Word
    prefix_length: Annotated[int, msgspec.Meta(ge=0, le=128)]
    family: Literal[2, 10]
    interface: Word
    scope: Annotated[int, msgspec.Meta(ge=0, le=255)]
    flags: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    broadcast: Word
    label: Word
    preferred: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]  # seconds left; 2**32-1: forever
    valid: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]
    metric: Annotated[int, msgspec.Meta(ge=0, le=0xFFFFFFFF)]


def validate(received: ServiceAddress) -> None:
    """ValueError for one that is none."""
    parsed = ipaddress.ip_address(received.address)
    if "%" in received.address or parsed.version != (4 if received.family == int(socket.AF_INET) else 6):
        raise ValueError(f"{received.address} is not of family {received.family}")
    if received.prefix_length > parsed.max_prefixlen:
        raise ValueError(f"{received.address} with a prefix of {received.prefix_length} bits")
    if received.broadcast and ipaddress.ip_address(received.broadcast).version != parsed.version:
        raise ValueError(f"{received.address} with the broadcast address {received.broadcast}")


def find(addresses: Iterable[str]) -> list[ServiceAddress]:
    """Those of `addresses` that this host has."""
    wanted = {_normal(one) for one in addresses}
    return [_service(one) for one in kernel.addresses() if one.address in wanted]


def _normal(address: str) -> str:
    """One spelling for one address; ValueError if it is none."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def _service(entry: InterfaceAddress) -> ServiceAddress:
    fields = entry._asdict()
    del fields["peer"]
    return ServiceAddress(**fields)


def _entry(address: ServiceAddress, interface: str) -> InterfaceAddress:
    fields = msgspec.structs.asdict(address) | {"interface": interface, "peer": ""}
    if interface != address.interface:  # a label must begin with its interface's name
        fields["label"] = interface + address.label.removeprefix(address.interface)
    return InterfaceAddress(**fields)


def stays_valid(address: str) -> bool:
    """Wildcard and loopback addresses mean the same on every host."""
    return address in ("0.0.0.0", "::", "") or address.startswith("127.") or address == "::1"


# source ---------------------------------------------------------------------------------------------------


def takeover_blockers(
    addresses: Collection[str], link_addresses: Collection[str], own_inodes: Collection[int]
) -> list[Blocker]:
    """Why these addresses cannot leave this host; empty: they can.

    `link_addresses` are those that the hosts use to talk to each other, `own_inodes` the socket inodes of the
    migrating process. Reads only.
    """
    here = kernel.addresses()
    used = _users({_normal(one) for one in addresses}, frozenset(own_inodes))
    links = {_normal(one) for one in link_addresses}
    blockers: list[Blocker] = []
    for address in map(_normal, addresses):
        entries = [one for one in here if one.address == address]
        blockers += _unfit(address, entries, here, links) or used.get(address, [])
    return blockers


def _unfit(
    address: str, entries: list[InterfaceAddress], here: list[InterfaceAddress], links: Collection[str]
) -> list[Blocker]:
    """The one reason why the address, whoever uses it, belongs to this host."""
    parsed = ipaddress.ip_address(address)
    if parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified or parsed.is_multicast:
        return [_blocker("address-kind", address, "addresses of this kind belong to one host")]
    if not entries:
        return [_blocker("address-not-here", address, "no interface of this host has it")]
    if len(entries) > 1 or entries[0].peer:
        return [_blocker("address-kind", address, "it is on several interfaces or a point-to-point link")]
    hint = "give the service an address of its own (ip address add ...) and let its clients use that"
    if address in links:
        return [
            _blocker("address-carries-link", address, "the connection between the two hosts uses it", hint)
        ]
    why = _host_needs(entries[0], here)
    return [_blocker("address-primary", address, why, hint)] if why else []


def _host_needs(entry: InterfaceAddress, here: list[InterfaceAddress]) -> str:
    """What else of this host would go with the address; "" if nothing."""
    route = kernel.route_to(_ANYWHERE[socket.AddressFamily(entry.family)])
    if route is not None and route.source == entry.address:
        return "it is this host's own: the source address of its default route"
    if any(
        one.source == entry.address and one.protocol != kernel.RTPROT_KERNEL and one.table != _LOCAL_TABLE
        for one in kernel.routes(entry.family)
    ):
        return "a route of this host names it as its source address"
    if entry.prefix_length == ipaddress.ip_address(entry.address).max_prefixlen:
        return ""
    same = [
        one
        for one in here
        if one.interface == entry.interface and one.network == entry.network and one.address != entry.address
    ]
    if not same:
        return "it is the only address of its network on this host, whose route would go with it"
    if entry.family == socket.AF_INET and not entry.flags & kernel.IFA_F_SECONDARY:
        return "it is the first address of its network, and the others would go with it"
    return ""


def _users(addresses: Collection[str], own: frozenset[int]) -> dict[str, list[Blocker]]:
    """Other processes' sockets on each address."""
    found: dict[str, list[Blocker]] = {}
    for name, entry in _sockets():
        address = _normal(entry.local[0])
        if address in addresses and entry.inode and entry.inode not in own:
            what = f"{address} port {entry.local[1]} ({name}, socket:[{entry.inode}], user {entry.uid})"
            why = "a socket of another process is bound to the address that would move"
            found.setdefault(address, []).append(_blocker("address-in-use", what, why))
    return found


def _sockets() -> Iterator[tuple[str, SocketEntry]]:
    diag = SockDiag()
    try:
        for name, protocol in _PROTOCOLS.items():
            for family in (socket.AF_INET, socket.AF_INET6):
                yield from ((name, one) for one in _list(diag, family, protocol))
    finally:
        diag.close()


def _list(diag: SockDiag, family: int, protocol: int) -> list[SocketEntry]:
    try:
        return list(diag.sockets(family, protocol))
    except OSError as error:
        if error.errno == errno.ENOENT:  # a protocol this kernel has not (loaded), so it has no sockets
            return []
        raise


def withdraw(address: ServiceAddress) -> None:
    """Take the address from this host, which answers nothing for it any more. Gone already is fine."""
    try:
        kernel.delete(_entry(address, address.interface))
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.ENODEV):
            raise


def restore(address: ServiceAddress) -> None:
    """Undo `withdraw`. Nobody needs to be told unless the destination announced the address."""
    install(address, address.interface)


# destination ------------------------------------------------------------------------------------------------


def place(address: ServiceAddress) -> str | Blocker:
    """The interface of this host that can have the address: one that is up and in the same network. Reads
    only.

    The source's own interface name is preferred where several can.
    """
    here = kernel.addresses()
    if any(one.address == address.address for one in here):
        return _blocker("address-taken", address.address, "the destination has this address already")
    up = {
        one.name
        for one in kernel.links()
        if one.flags & kernel.IFF_UP and not one.flags & kernel.IFF_LOOPBACK
    }
    inside = ipaddress.ip_address(address.address)
    fitting = [one.interface for one in here if one.interface in up and _fits(inside, address, one)]
    if not fitting:
        why = "no interface of the destination is in the network of this address"
        hint = (
            "connect the destination to that network, or use an address of a network that both hosts are in"
        )
        return _blocker("address-no-place", f"{address.address}/{address.prefix_length}", why, hint)
    return address.interface if address.interface in fitting else fitting[0]


def _fits(
    inside: ipaddress.IPv4Address | ipaddress.IPv6Address, address: ServiceAddress, one: InterfaceAddress
) -> bool:
    """Whether it can stand beside `one`: no address of the network itself, nor with a larger network."""
    network = one.network
    edges = {network.network_address, network.broadcast_address} if network.num_addresses > 2 else set()
    odd = inside.is_loopback or inside.is_multicast or inside.is_unspecified or inside.is_link_local
    narrow = network.prefixlen <= address.prefix_length <= network.max_prefixlen
    return inside in network and narrow and not odd and inside not in edges


def install(address: ServiceAddress, interface: str) -> None:
    """Give this host the address; it is usable on return. Does not announce it. There already is fine."""
    try:
        kernel.add(_entry(address, interface))
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    deadline = time.monotonic() + _INSTALL_SECONDS
    while not kernel.is_local(address.address):  # an IPv6 address becomes usable a moment later
        if time.monotonic() > deadline:
            raise OSError(errno.EADDRNOTAVAIL, "the address did not become usable", address.address)
        time.sleep(0.0002)


def announce(address: ServiceAddress, interface: str, announcer: Announcer | None = None) -> bool:
    """Tell the neighbours once; False: nobody to tell. Frames get lost: repeat it over the first second."""
    announcer = announcer or _announcer(os.stat("/proc/thread-self/ns/net").st_ino)
    return announcer.announce(interface, address.address)


@functools.cache
def _announcer(_network_namespace: int) -> Announcer:
    return Announcer()  # kept: closing one takes milliseconds


def remove(address: ServiceAddress, interface: str) -> None:
    """Undo `install`. Gone already is fine."""
    withdraw(msgspec.structs.replace(address, interface=interface))


def _blocker(kind: str, what: str, why: str, hint: str = "") -> Blocker:
    return Blocker(kind=kind, what=what if " " in what else f"address {what}", why=why, hint=hint)
