"""TCP sockets held still: let go as they were, closed in silence, rebuilt with all their options."""

from __future__ import annotations

import os
import socket
import struct
import time

import msgspec
import pytest
from e2e.segment import wait_for
from e2e.tcp_mover import (
    FAMILIES,
    HALF_CLOSED,
    MIB,
    PORT,
    V4,
    Family,
    Service,
    Wire,
    accept,
    drop_payload_with,
    enter,
    fill,
    options_of,
    peer_got,
    receive,
    state_of,
)

from agent.kernel import sock_filter, tcp_repair
from agent.kernel.tcp_repair import TcpState, tcp_info
from agent.resources import tcp
from agent.resources.tcp import options


@pytest.mark.parametrize("reuse", [0, 1])
def test_release_is_exact(wire: Wire, family: Family, reuse: int) -> None:
    client, server = wire.connect(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    client.sendall(b"before")
    wait_for(lambda: tcp_repair.unread(server) == 6, "the data")
    before = options_of(server)
    service = Service(wire.first, [server])
    for _ in range(5):
        capture = service.freeze()
        client.sendall(b" during")
        service.roll_back(capture)
        assert service.replayed > 0
    (server,) = service.sockets()
    assert options_of(server) == before
    assert sock_filter.read(server) is None
    assert receive(server, 41) == b"before" + b" during" * 5
    server.sendall(b"after")
    assert client.recv(100) == b"after"
    assert tcp_info(client).total_retrans == 0
    assert wire.resets() == 0


@pytest.mark.parametrize("state", HALF_CLOSED, ids=lambda state: state.name)
def test_release_of_half_closed(wire: Wire, state: TcpState) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    enter(state, wire, client, server)
    with wire.first:
        tcp.lock(server.fileno())
        tcp.capture(server.fileno())
        tcp.release(server.fileno())
    assert receive(server, 14) == b"before the end"
    assert receive(client, 14) == b"before the end"
    server.close()
    client.close()
    wait_for(lambda: not wire.first.connections(), "the end")
    assert wire.resets() == 0


def test_every_step_may_come_twice_and_in_any_state(wire: Wire) -> None:
    listener = wire.listen(FAMILIES["ipv4"])
    client, server = accept(wire, listener)
    fresh = wire.first.socket()
    for sock in (listener, server, fresh):
        before = options_of(sock)
        fd = sock.fileno()
        tcp.release(fd)
        for _ in range(2):
            tcp.lock(fd)
        first = tcp.capture(fd)
        again = tcp.capture(fd)
        if isinstance(first, tcp.TcpConnection) and isinstance(again, tcp.TcpConnection):
            again = msgspec.structs.replace(again, captured_at=first.captured_at, timestamp=first.timestamp)
        assert again == first
        for _ in range(2):
            tcp.release(fd)
        assert options_of(sock) == before
    with wire.first:
        fd = tcp.rebuild(tcp.capture(fresh.fileno()))
        for _ in range(2):
            tcp.activate(fd, tcp.capture(fresh.fileno()))
        os.close(fd)
    assert state_of(client) == TcpState.ESTABLISHED


def test_a_release_that_was_interrupted_is_finished_by_another(wire: Wire) -> None:
    """After any of its steps the socket shows that it is not let go yet."""
    client, server = wire.connect(FAMILIES["ipv4"])
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    before, fd = options_of(server), server.fileno()
    tcp.lock(fd)
    tcp.capture(fd)
    found = sock_filter.read(server)
    assert found is not None
    sock_filter.hold(server, sock_filter.Kind.OPEN, found.program, found.note)
    assert tcp.held(fd) and tcp.inspect(fd).repair
    tcp_repair.repair_off(server)
    assert tcp.held(fd)
    client.sendall(b"it is open already")
    assert receive(server, 18) == b"it is open already"
    tcp.release(fd)
    assert not tcp.held(fd)
    assert options_of(server) == before


def test_an_unlocked_connection_is_not_captured(wire: Wire) -> None:
    _, server = wire.connect(FAMILIES["ipv4"])
    with pytest.raises(PermissionError, match="not locked"):
        tcp.capture(server.fileno())
    assert not tcp.inspect(server.fileno()).repair


def test_closing_what_was_captured_is_silent(wire: Wire, family: Family) -> None:
    client, server = wire.connect(family)
    client.sendall(b"never read")
    wait_for(lambda: tcp_repair.unread(server) == 10, "the data")
    server.sendall(b"something")
    wait_for(peer_got(server), "the acknowledgement")
    service = Service(wire.first, [server])
    service.freeze().close()
    before = wire.first.counter("Tcp.OutSegs"), wire.client.counter("Tcp.InSegs")
    os.close(service.fds[0])
    assert (wire.first.counter("Tcp.OutSegs"), wire.client.counter("Tcp.InSegs")) == before
    assert state_of(client) == TcpState.ESTABLISHED
    assert not wire.first.run("ss", "-Hatn")


def test_what_is_rebuilt_is_silent_until_activated(wire: Wire) -> None:
    """Longer than any first timeout of TCP, with data to send and keepalive on; then it is discarded."""
    clients, servers = zip(*(wire.connect(family) for family in FAMILIES.values()), strict=True)
    for server in servers:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        tcp.lock(server.fileno())
        server.sendall(b"sent, and never acknowledged")
        fill(server, bytes(8 * MIB))
    service = Service(wire.first, servers)
    service.freeze().close()
    with wire.second:
        rebuilt = [tcp.rebuild(state) for state in service.states]
    before = wire.second.counter("Tcp.OutSegs"), wire.second.counter("Ip.OutRequests")
    deadline = time.monotonic() + 2.5
    wait_for(lambda: time.monotonic() > deadline, "every timer to have had its chance")
    for fd in rebuilt:
        tcp.discard(fd)
    assert (wire.second.counter("Tcp.OutSegs"), wire.second.counter("Ip.OutRequests")) == before
    for fd in service.fds:
        tcp.release(fd)  # and the source goes on
    servers = tuple(service.sockets())
    for client in clients:
        assert receive(client, 28) == b"sent, and never acknowledged"
    assert wire.resets() == 0


def test_rebuilt_but_not_active_drops_without_reset(wire: Wire) -> None:
    """Between the arrival of the address and that of the last socket, packets may come already."""
    client, server = wire.connect(FAMILIES["ipv4"])
    service = Service(wire.first, [server])
    capture = service.freeze()
    with wire.second:
        fd = tcp.rebuild(service.states[0])
    service._withdraw()
    wire.second.run("ip", "addr", "add", f"{V4}/24", "dev", "eth0")
    wire.client.run("ip", "neigh", "replace", V4, "lladdr", wire.second.mac(), "dev", "eth0")
    before = wire.second.counter("Tcp.InSegs")
    client.sendall(b"too early")
    wait_for(lambda: wire.second.counter("Tcp.InSegs") > before, "the packet")
    with wire.second:
        tcp.activate(fd, service.states[0])
    with socket.socket(fileno=fd) as moved:
        moved.settimeout(20)
        assert receive(moved, 9) == b"too early"
    capture.close()
    assert wire.resets() == 0


# another value than the default, where any value can be another
UNUSUAL: dict[str, bytes] = {
    "SO_LINGER": struct.pack("=ii", 1, 7),
    "SO_RCVTIMEO": struct.pack("=qq", 12, 500_000),
    "SO_SNDTIMEO": struct.pack("=qq", 13, 0),
    "SO_MAX_PACING_RATE": struct.pack("=Q", 1 << 30),
    "TCP_CONGESTION": b"reno".ljust(16, b"\0"),
    "TCP_MAXSEG": struct.pack("=i", 1200),
    "TCP_DEFER_ACCEPT": struct.pack("=i", 7),
    "TCP_LINGER2": struct.pack("=i", 33),
    "TCP_USER_TIMEOUT": struct.pack("=i", 9000),
    "TCP_NOTSENT_LOWAT": struct.pack("=i", 4000),
    "TCP_FASTOPEN": struct.pack("=i", 5),
    "TCP_RTO_MAX_MS": struct.pack("=i", 30_000),
    "TCP_RTO_MIN_US": struct.pack("=i", 100_000),
    "TCP_DELACK_MAX_US": struct.pack("=i", 50_000),
    "TCP_TX_DELAY": struct.pack("=i", 0),  # would need a fair-queueing discipline to be of use
    "IP_MTU_DISCOVER": struct.pack("=i", 2),
    "IPV6_MTU_DISCOVER": struct.pack("=i", 2),
    "IP_TOS": struct.pack("=i", 0x28),
    "IPV6_TCLASS": struct.pack("=i", 0x30),
    "IPV6_ADDR_PREFERENCES": struct.pack("=i", 0x0002),
    "IP_LOCAL_PORT_RANGE": struct.pack("=I", 40000 | 50000 << 16),
    "IPV6_AUTOFLOWLABEL": struct.pack("=i", 0),
    "TCP_QUICKACK": struct.pack("=i", 1),
}
NOT_WHILE_CONNECTED = {
    "TCP_FASTOPEN",
    "TCP_FASTOPEN_NO_COOKIE",
    "TCP_FASTOPEN_CONNECT",
    "IPV6_V6ONLY",
    "TCP_MAXSEG",
}


def make_unusual(sock: socket.socket, connected: bool) -> list[str]:
    """Set every option to another value; returns the names of those that are now."""
    changed = []
    for name, option in options.OPTIONS.items():
        before = options.get(sock, option)
        if before is None or (connected and name in NOT_WHILE_CONNECTED):
            continue
        number = 17 if name.startswith(("TCP_KEEP", "TCP_SYNC", "IP_TTL", "IPV6_UNI")) else 1
        options.put(sock, name, UNUSUAL.get(name, struct.pack("=i", number)))
        if options.get(sock, option) != before:
            changed.append(name)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return changed


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_connection_keeps_its_options(wire: Wire, name: str) -> None:
    client, server = wire.connect(FAMILIES[name])
    changed = make_unusual(server, connected=True)
    assert len(changed) > 35, changed
    before = options_of(server)
    os.fchown(server.fileno(), 4711, -1)
    service = Service(wire.first, [server])
    service.move(wire.second)
    (server,) = service.sockets()
    after = options_of(server) | {"SO_RCVTIMEO": before["SO_RCVTIMEO"], "SO_SNDTIMEO": before["SO_SNDTIMEO"]}
    assert after == before
    assert os.fstat(server.fileno()).st_uid == 4711
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
    client.sendall(b"question")
    assert receive(server, 8) == b"question"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_listener_keeps_its_options(wire: Wire, name: str) -> None:
    family = FAMILIES[name]
    listener = wire.first.socket(family.server)
    changed = make_unusual(listener, connected=False)
    assert len(changed) > 40, changed
    listener.bind((family.listen, PORT))
    listener.listen(33)
    before = options_of(listener)
    service = Service(wire.first, [listener])
    service.move(wire.second)
    (listener,) = service.sockets()
    assert options_of(listener) == before
    assert tcp_info(listener).sacked == 33


def test_other_defaults_on_the_destination(wire: Wire) -> None:
    """The application relies on what it was given, not on what the other host's administrator prefers."""
    wire.second.sysctl("ipv4.tcp_keepalive_time", "100")
    wire.second.sysctl("ipv4.ip_default_ttl", "33")
    wire.first.sysctl("ipv4.tcp_fin_timeout", "44")
    _, server = wire.connect(FAMILIES["ipv4"])
    before = options_of(server)
    service = Service(wire.first, [server])
    service.move(wire.second)
    (server,) = service.sockets()
    assert options_of(server) == before


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "rolled back"])
def test_application_filter_is_kept(wire: Wire, moved: bool) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    program = drop_payload_with(ord("x"))
    sock_filter.attach(server, program)
    service = Service(wire.first, [server])
    if moved:
        service.move(wire.second)
    else:
        service.roll_back(service.freeze())
    (server,) = service.sockets()
    assert sock_filter.read(server) == sock_filter.Filter(sock_filter.Kind.APPLICATION, program, 0)
    client.sendall(b"hello")
    assert receive(server, 5) == b"hello"
    dropped = (wire.second if moved else wire.first).counter("Tcp.InSegs")
    client.sendall(b"xyz")
    host = wire.second if moved else wire.first
    wait_for(lambda: host.counter("Tcp.InSegs") > dropped + 1, "the segment, and its repetition")
    assert tcp_repair.unread(server) == 0
