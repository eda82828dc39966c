"""TCP sockets that cannot be moved, and what is said about them."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import msgspec
import pytest
from e2e.segment import Host, wait_for
from e2e.tcp_mover import (
    FAMILIES,
    PORT,
    V4,
    Family,
    Lab,
    drop_payload_with,
    laboratory,
)

from agent.kernel import sock_filter, tcp_repair
from agent.resources import tcp


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def kinds(host: Host, sock: socket.socket) -> list[str]:
    with host:
        found = tcp.blockers(sock.fileno(), "fd 9")
    assert all(one.what.startswith("fd 9") for one in found)
    return [one.kind for one in found]


def test_ordinary_sockets_are_not_refused(lab: Lab, family: Family) -> None:
    listener = lab.listen(family)
    client = lab.client.socket(family.client)
    client.connect((family.address, PORT))
    server, _ = listener.accept()
    sock_filter.attach(server, drop_payload_with(1))
    for sock in (listener, server, lab.first.socket(family.server)):
        assert kinds(lab.first, sock) == []
    tcp.lock(server.fileno())
    assert kinds(lab.first, server) == []


def test_refused_for_its_state(lab: Lab) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    client.send(b"!", socket.MSG_OOB)
    wait_for(lambda: kinds(lab.first, server) == ["tcp-urgent"], "the urgent data")
    server.setblocking(False)
    assert server.recv(1, socket.MSG_OOB) == b"!"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_for(lambda: kinds(lab.first, server) == ["tcp-ended"], "the reset")
    connecting = lab.first.socket()
    connecting.setblocking(False)
    connecting.connect_ex(("10.77.0.99", 1))
    assert kinds(lab.first, connecting) == ["tcp-connecting"]


def test_refused_for_what_it_uses(lab: Lab) -> None:
    _, server = lab.connect(FAMILIES["ipv4"])
    for number, value in ((60, 1), (42, 0)):  # SO_ZEROCOPY, SO_PEEK_OFF
        fresh = lab.first.socket()
        fresh.setsockopt(socket.SOL_SOCKET, number, value)
        assert kinds(lab.first, fresh) == ["tcp-option"]
    sock_filter.attach(server, drop_payload_with(1))
    server.setsockopt(socket.SOL_SOCKET, sock_filter.SO_LOCK_FILTER, 1)
    assert kinds(lab.first, server) == ["tcp-option"]
    with pytest.raises(PermissionError):
        tcp.lock(server.fileno())


def test_refused_for_a_key(lab: Lab) -> None:
    listener = lab.listen(FAMILIES["ipv4"])
    address = struct.pack("=H2xI120x", socket.AF_INET, int.from_bytes(socket.inet_aton("10.77.0.1"), "little"))
    signature = address + struct.pack("=BBHI80s", 0, 0, 3, 0, b"key")
    listener.setsockopt(socket.IPPROTO_TCP, 14, signature)  # TCP_MD5SIG
    assert kinds(lab.first, listener) == ["tcp-md5"]


def test_refused_for_multipath(lab: Lab) -> None:
    listener = lab.first.socket(socket.AF_INET, tcp_repair.IPPROTO_MPTCP)
    listener.bind((V4, PORT))
    listener.listen()
    assert kinds(lab.first, listener) == ["tcp-multipath"]
    client = lab.client.socket()
    client.connect((V4, PORT))
    fd, _ = listener._accept()  # type: ignore[attr-defined]
    with socket.socket(fileno=fd) as server:  # fell back: this is plain TCP, and moves
        assert kinds(lab.first, server) == []


def test_refused_for_a_peer_on_the_same_host(lab: Lab) -> None:
    listener = lab.listen(FAMILIES["ipv4"])
    client = lab.first.socket()
    client.connect((V4, PORT))
    server, _ = listener.accept()
    assert kinds(lab.first, server) == ["tcp-local-peer"]


def test_no_route_to_the_peer(lab: Lab) -> None:
    _, server = lab.connect(FAMILIES["ipv4"])
    info = tcp.inspect(server.fileno())
    with lab.second:
        assert tcp.can_connect(info) is None
    lab.second.run("ip", "route", "del", "10.77.0.0/24")
    with lab.second:
        blocker = tcp.can_connect(info)
    assert blocker is not None and blocker.kind == "tcp-no-route"
    tcp.lock(server.fileno())
    state = tcp.capture(server.fileno())
    with lab.second, pytest.raises(OSError, match=r"10\.77\.0\.100:7000 to 10\.77\.0\.1") as raised:
        tcp.rebuild(state)
    assert raised.value.errno == errno.ENETUNREACH
    tcp.release(server.fileno())


def test_state_survives_the_wire_and_nonsense_does_not(lab: Lab) -> None:
    _, server = lab.connect(FAMILIES["ipv6"])
    tcp.lock(server.fileno())
    state = tcp.capture(server.fileno())
    encoded = msgspec.msgpack.encode(state)
    assert msgspec.msgpack.decode(encoded, type=tcp.TcpSocket) == state
    raw = msgspec.msgpack.decode(encoded)
    for field, nonsense in (("state", 10), ("wscale", [15, 0]), ("mss_clamp", -1), ("family", 16)):
        with pytest.raises(msgspec.ValidationError):
            msgspec.msgpack.decode(msgspec.msgpack.encode(raw | {field: nonsense}), type=tcp.TcpSocket)
    unknown = msgspec.structs.replace(state, options={"SO_NONSENSE": b"1"})
    before = len(os.listdir("/proc/self/fd"))
    with lab.second, pytest.raises(ValueError, match="SO_NONSENSE"):
        tcp.rebuild(unknown)
    assert len(os.listdir("/proc/self/fd")) == before
    tcp.release(server.fileno())
