"""Service addresses: which may leave a host, how they move, and that the neighbours notice."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
from e2e.segment import Host, segment, wait_for

from agent.api import Blocker
from agent.kernel import addresses
from agent.kernel.addresses import Announcer
from agent.resources import service_address
from agent.resources.service_address import ServiceAddress

V4, V6 = "10.77.0.100", "fd77::100"
ALONE = "192.168.9.9"


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host, Host]]:
    with segment("client", "first", "second") as (client, first, second):
        first.run("ip", "addr", "add", f"{V4}/24", "dev", "eth0", "label", "eth0:service")
        first.run("ip", "addr", "add", f"{V6}/64", "dev", "eth0", "nodad", "preferred_lft", "1000")
        yield client, first, second


def find(host: Host, *wanted: str) -> list[ServiceAddress]:
    with host:
        return service_address.find(wanted)


def refusals(host: Host, address: str, link: str = "10.77.0.2", own: tuple[int, ...] = ()) -> list[str]:
    with host:
        found = service_address.takeover_blockers([address], [link], own)
    assert all(str(ipaddress.ip_address(address)) in one.what and one.why for one in found)
    return [one.kind for one in found]


def speak_to(host: Host, address: str) -> None:
    with (
        host,
        socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        sender.sendto(b"?", (address, 9))


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_find_in_any_spelling(hosts: tuple[Host, Host, Host]) -> None:
    _, first, _ = hosts
    (v4,) = find(first, f"::ffff:{V4}", "10.1.2.3")
    assert (v4.address, v4.prefix_length, v4.interface, v4.label) == (V4, 24, "eth0", "eth0:service")
    (v6,) = find(first, "FD77:0:0::100")
    assert (v6.address, v6.prefix_length, v6.label) == (V6, 64, "")
    assert 990 <= v6.preferred <= 1000
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(v6), type=ServiceAddress) == v6


def test_free_addresses_may_leave(hosts: tuple[Host, Host, Host]) -> None:
    _, first, _ = hosts
    first.run("ip", "addr", "add", f"{ALONE}/32", "dev", "eth0")
    for address in (V4, V6, ALONE):
        assert refusals(first, address) == []


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("127.0.0.1", "address-kind"),
        ("::1", "address-kind"),
        ("fe80::1", "address-kind"),
        ("10.77.0.222", "address-not-here"),
        ("10.77.0.2", "address-carries-link"),
    ],
)
def test_addresses_that_belong_to_a_host(hosts: tuple[Host, Host, Host], address: str, kind: str) -> None:
    assert refusals(hosts[1], address) == [kind]


def test_the_first_and_the_only_address_of_a_network_stay(hosts: tuple[Host, Host, Host]) -> None:
    _, first, _ = hosts
    assert refusals(first, "10.77.0.2", link="10.77.0.3") == ["address-primary"]
    first.run("ip", "addr", "add", "192.168.3.3/24", "dev", "eth0")
    assert refusals(first, "192.168.3.3") == ["address-primary"]


def test_an_address_that_routes_use_stays(hosts: tuple[Host, Host, Host]) -> None:
    _, first, _ = hosts
    first.run("ip", "route", "add", "192.168.7.0/24", "via", "10.77.0.1", "src", V4)
    assert refusals(first, V4) == ["address-primary"]
    first.run("ip", "route", "add", "default", "via", "fd77::1", "src", V6)
    assert refusals(first, V6) == ["address-primary"]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_an_address_that_others_use_stays(hosts: tuple[Host, Host, Host], kind: socket.SocketKind) -> None:
    _, first, _ = hosts
    with first:
        mine, other = socket.socket(socket.AF_INET, kind), socket.socket(socket.AF_INET6, kind)
    other.bind((f"::ffff:{V4}", 7001))
    mine.bind((V4, 7000))
    if kind == socket.SOCK_STREAM:  # a bound TCP socket is in no table until it listens or connects
        mine.listen()
        other.listen()
    assert refusals(first, V4) == ["address-in-use"] * 2
    assert refusals(first, V4, own=(inode(mine),)) == ["address-in-use"]
    assert refusals(first, V4, own=(inode(mine), inode(other))) == []


def test_a_connection_of_another_process_keeps_its_address(hosts: tuple[Host, Host, Host]) -> None:
    client, first, _ = hosts
    with client:
        listener = socket.create_server(("10.77.0.1", 7000))
    with first:
        connection = socket.create_connection(("10.77.0.1", 7000), source_address=(V4, 0))
    assert refusals(first, V4) == ["address-in-use"]
    connection.close()
    assert refusals(first, V4) == []
    listener.close()


@pytest.mark.parametrize("address", [V4, V6])
def test_move_and_restore(hosts: tuple[Host, Host, Host], address: str) -> None:
    client, first, second = hosts
    before = first.run("ip", "-o", "addr", "show", "to", address).split("valid_lft")[0]
    (service,) = find(first, address)
    with second:
        assert service_address.place(service) == "eth0"
        announcer = Announcer()
    speak_to(client, address)
    wait_for(lambda: client.neighbour(address) == first.mac(), "the client to find it")
    with first:
        service_address.withdraw(service)
        service_address.withdraw(service)
        assert find(first, address) == []
    with second:
        for _ in range(2):
            service_address.install(service, "eth0")
        assert addresses.is_local(address)
        assert service_address.announce(service, "eth0", announcer)
    wait_for(lambda: client.neighbour(address) == second.mac(), "the client to know")
    (there,) = find(second, address)
    assert msgspec.structs.replace(there, flags=0, preferred=0) == msgspec.structs.replace(
        service, flags=0, preferred=0
    )
    with second:
        for _ in range(2):
            service_address.remove(service, "eth0")
        assert find(second, address) == []
    with first:
        service_address.restore(service)
    assert first.run("ip", "-o", "addr", "show", "to", address).split("valid_lft")[0] == before
    announcer.close()


def test_the_place_is_an_interface_of_the_same_network(hosts: tuple[Host, Host, Host]) -> None:
    _, first, second = hosts
    (service,) = find(first, V4)
    second.run("ip", "link", "add", "other", "type", "veth", "peer", "name", "end")
    second.run("ip", "link", "set", "end", "up")
    second.run("ip", "link", "set", "other", "up")
    second.run("ip", "addr", "add", "10.77.0.50/24", "dev", "other")
    with second:
        assert service_address.place(service) == "eth0"
        assert service_address.place(msgspec.structs.replace(service, interface="other")) == "other"
    second.run("ip", "link", "set", "eth0", "down")
    with second:
        assert service_address.place(service) == "other"
        service_address.install(service, "other")
        assert find(second, V4)[0].label == "other:service"
        taken = service_address.place(service)
        service_address.remove(service, "other")
    second.run("ip", "addr", "del", "10.77.0.50/24", "dev", "other")
    with second:
        nowhere = service_address.place(service)
    assert isinstance(taken, Blocker) and taken.kind == "address-taken"
    assert isinstance(nowhere, Blocker) and nowhere.kind == "address-no-place"


def test_nobody_to_tell_on_the_loopback(hosts: tuple[Host, Host, Host]) -> None:
    with hosts[1]:
        announcer = Announcer()
        assert not announcer.announce("lo", V4)
        with pytest.raises(OSError, match="no such interface"):
            announcer.announce("eth9", V4)
        announcer.close()


def test_announcement_frames() -> None:
    mac = bytes.fromhex("02aabbccddee")
    request, reply = addresses.announcements(mac, V4)
    packed = socket.inet_aton(V4)
    head = b"\xff" * 6 + mac + bytes.fromhex("0806 0001 0800 06 04")
    assert request == head + b"\0\1" + mac + packed + b"\0" * 6 + packed
    assert reply == head + b"\0\2" + mac + packed + mac + packed
    (advertisement,) = addresses.announcements(mac, V6)
    assert advertisement[:14] == bytes.fromhex("333300000001") + mac + b"\x86\xdd"
    assert advertisement[21] == 255  # hop limit, or receivers discard it
    kind, code, _, flags = struct.unpack_from(">BBHI", advertisement, 54)
    assert (kind, code, flags) == (136, 0, 0x20000000)
    assert advertisement[62:] == socket.inet_pton(socket.AF_INET6, V6) + b"\x02\x01" + mac
