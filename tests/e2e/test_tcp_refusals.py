"""TCP sockets that cannot be moved, and what is said about them."""

from __future__ import annotations

import errno
import os
import socket
import struct

import msgspec
import pytest
from e2e.segment import Host, wait_for
from e2e.tcp_mover import (
    FAMILIES,
    PORT,
    V4,
    Family,
    Wire,
    drop_payload_with,
)

from agent.kernel import sock_filter, tcp_repair
from agent.resources import tcp


def kinds(host: Host, sock: socket.socket) -> list[str]:
    with host:
        found = tcp.blockers(sock.fileno(), "fd 9")
        found += tcp.signed_blockers({os.fstat(sock.fileno()).st_ino: "fd 9"})
    assert all(one.what.startswith("fd 9") for one in found)
    return [one.kind for one in found]


def test_ordinary_sockets_are_not_refused(wire: Wire, family: Family) -> None:
    listener = wire.listen(family)
    client = wire.client.socket(family.client)
    client.connect((family.address, PORT))
    server, _ = listener.accept()
    sock_filter.attach(server, drop_payload_with(1))
    for sock in (listener, server, wire.first.socket(family.server)):
        assert kinds(wire.first, sock) == []
    tcp.lock(server.fileno())
    assert kinds(wire.first, server) == []


def test_refused_for_its_state(wire: Wire) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    client.send(b"!", socket.MSG_OOB)
    wait_for(lambda: kinds(wire.first, server) == ["tcp-urgent"], "the urgent data")
    server.setblocking(False)
    assert server.recv(1, socket.MSG_OOB) == b"!"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    wait_for(lambda: kinds(wire.first, server) == ["tcp-ended"], "the reset")
    connecting = wire.first.socket()
    connecting.setblocking(False)
    connecting.connect_ex(("10.77.0.99", 1))
    assert kinds(wire.first, connecting) == ["tcp-connecting"]


def test_refused_for_what_it_uses(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv4"])
    for number, value in ((60, 1), (42, 0)):  # SO_ZEROCOPY, SO_PEEK_OFF
        fresh = wire.first.socket()
        fresh.setsockopt(socket.SOL_SOCKET, number, value)
        assert kinds(wire.first, fresh) == ["tcp-option"]
    sock_filter.attach(server, drop_payload_with(1))
    server.setsockopt(socket.SOL_SOCKET, sock_filter.SO_LOCK_FILTER, 1)
    assert kinds(wire.first, server) == ["tcp-option"]
    with pytest.raises(PermissionError):
        tcp.lock(server.fileno())


def test_refused_for_a_key(wire: Wire) -> None:
    listener = wire.listen(FAMILIES["ipv4"])
    address = struct.pack("=H2x4s120x", socket.AF_INET, socket.inet_aton("10.77.0.1"))
    signature = address + struct.pack("=BBHI80s", 0, 0, 3, 0, b"key")
    listener.setsockopt(socket.IPPROTO_TCP, 14, signature)  # TCP_MD5SIG
    assert kinds(wire.first, listener) == ["tcp-md5"]


def test_refused_for_multipath(wire: Wire) -> None:
    listener = wire.first.socket(socket.AF_INET, tcp_repair.IPPROTO_MPTCP)
    listener.bind((V4, PORT))
    listener.listen()
    assert kinds(wire.first, listener) == ["tcp-multipath"]
    client = wire.client.socket()
    client.connect((V4, PORT))
    fd, _ = listener._accept()  # type: ignore[attr-defined]
    with socket.socket(fileno=fd) as server:  # fell back: this is plain TCP, and moves
        assert kinds(wire.first, server) == []


def test_refused_for_a_peer_on_the_same_host(wire: Wire) -> None:
    listener = wire.listen(FAMILIES["ipv4"])
    client = wire.first.socket()
    client.connect((V4, PORT))
    server, _ = listener.accept()
    assert kinds(wire.first, server) == ["tcp-local-peer"]


def test_asking_for_a_connection_is_silent_and_leaves_nothing(wire: Wire, family: Family) -> None:
    client, server = wire.connect(family)
    client.sendall(b"unread")
    before = len(os.listdir("/proc/self/fd"))
    asked = tcp.outline(server.fileno())
    sent = wire.second.counter("Ip.OutRequests"), wire.second.counter("Tcp.OutSegs")
    assert verdict(wire.second, asked) == ""
    assert (wire.second.counter("Ip.OutRequests"), wire.second.counter("Tcp.OutSegs")) == sent
    assert not wire.second.run("ss", "-Hatn")
    assert len(os.listdir("/proc/self/fd")) == before
    assert server.recv(100) == b"unread"
    server.sendall(b"as before")
    assert client.recv(100) == b"as before"


def verdict(host: Host, asked: tcp.TcpConnection) -> str:
    """Of what kind the host's refusal is, "" for none."""
    with host:
        blocker = tcp.can_connect(asked)
    assert blocker is None or (str(asked.peer) in blocker.what and str(asked.local) in blocker.what)
    return blocker.kind if blocker else ""


def test_a_connection_that_the_destination_has_already(wire: Wire, family: Family) -> None:
    _, server = wire.connect(family)
    asked = tcp.outline(server.fileno())
    with wire.second:
        there = tcp.rebuild(asked)
    assert verdict(wire.second, asked) == "tcp-connection-taken"
    other = msgspec.structs.replace(asked.peer, port=asked.peer.port ^ 1)
    assert verdict(wire.second, msgspec.structs.replace(asked, peer=other)) == ""
    tcp.discard(there)
    assert verdict(wire.second, asked) == ""


def test_what_the_destination_cannot_give_a_connection(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv4"])
    wire.first.run("ip", "link", "add", "only-here", "type", "veth", "peer", "name", "end")
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"only-here")
    asked = tcp.outline(server.fileno())
    assert verdict(wire.second, asked) == "tcp-connection"
    strange = asked.options | {"TCP_CONGESTION": b"strange".ljust(16, b"\0")}
    with wire.second:
        blocker = tcp.can_connect(msgspec.structs.replace(asked, device=b"", options=strange))
    assert blocker is not None and "TCP_CONGESTION" in blocker.why


def test_a_destination_without_ipv6(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv6"])
    asked = tcp.outline(server.fileno())
    wire.second.sysctl("ipv6.conf.all.disable_ipv6", "1")
    assert verdict(wire.second, asked) == "tcp-no-route"
    wire.second.sysctl("ipv6.conf.all.disable_ipv6", "0")
    wire.second.run("ip", "addr", "add", "fd77::3/64", "dev", "eth0", "nodad")
    assert verdict(wire.second, asked) == ""


def test_no_route_to_the_peer(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv4"])
    asked = tcp.outline(server.fileno())
    assert verdict(wire.second, asked) == ""
    wire.second.run("ip", "route", "del", "10.77.0.0/24")
    assert verdict(wire.second, asked) == "tcp-no-route"
    tcp.lock(server.fileno())
    state = tcp.capture(server.fileno())
    with wire.second, pytest.raises(OSError, match=r"10\.77\.0\.100:7000 to 10\.77\.0\.1") as raised:
        tcp.rebuild(state)
    assert raised.value.errno == errno.ENETUNREACH
    tcp.release(server.fileno())


def test_state_survives_the_wire_and_nonsense_does_not(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv6"])
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
    with wire.second, pytest.raises(ValueError, match="SO_NONSENSE"):
        tcp.rebuild(unknown)
    assert len(os.listdir("/proc/self/fd")) == before
    tcp.release(server.fileno())
