"""TCP listeners that move, and what arrives while nobody can answer."""

from __future__ import annotations

import errno
import socket

import pytest
from e2e.segment import Host, wait_for
from e2e.tcp_mover import (
    FAMILIES,
    MIB,
    PORT,
    SERVICE,
    V4,
    V6,
    Family,
    Service,
    Wire,
    deafen,
    receive,
)

from agent.kernel import sock_filter, tcp_repair
from agent.kernel.sock_diag import SockDiag
from agent.kernel.tcp_repair import tcp_info
from agent.resources import tcp
from agent.resources.switchover import PacketCapture, replay
from agent.resources.tcp import destination


@pytest.mark.parametrize("address", [V4, V6, "0.0.0.0", "::"])
def test_listener_goes_on_listening(wire: Wire, address: str) -> None:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = wire.first.socket(kind)
    listener.bind((address, PORT))
    listener.listen(7)
    with wire.first:
        client = wire.client.socket(kind)
        client.connect((V6 if kind == socket.AF_INET6 else V4, PORT))
    server, _ = listener.accept()
    service = Service(wire.first, [listener, server])
    service.move(wire.second)
    listener, server = service.sockets()
    assert tcp_info(listener).sacked == 7
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    second = wire.client.socket(kind)
    second.connect((V6 if kind == socket.AF_INET6 else V4, PORT))
    accepted, _ = listener.accept()
    assert sock_filter.read(accepted) is None
    second.sendall(b"new")
    client.sendall(b"old")
    assert (accepted.recv(10), server.recv(10)) == (b"new", b"old")
    assert wire.resets() == 0


def test_sockets_that_do_nothing_yet(wire: Wire) -> None:
    fresh, bound = wire.first.socket(), wire.first.socket()
    fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.bind((V4, 7100))
    service = Service(wire.first, [fresh, bound])
    service.move(wire.second)
    fresh, bound = service.sockets()
    assert fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert bound.getsockname() == (V4, 7100)
    bound.listen()
    fresh.connect((V4, 7100))
    assert bound.accept()[1] == fresh.getsockname()


def test_a_taken_port_is_refused(wire: Wire) -> None:
    with wire.listen(FAMILIES["ipv4"]) as listener:
        state = tcp.capture(listener.fileno())
    assert isinstance(state, tcp.TcpListener)
    with wire.second:
        assert tcp.can_listen(state) is None
        with socket.create_server(("", PORT)):
            blocker = tcp.can_listen(state)
            assert blocker is not None and blocker.kind == "tcp-port-taken"
            assert V4 in blocker.what
            with pytest.raises(OSError, match=f"in use.*{V4}:{PORT}") as raised:
                tcp.rebuild(state)
            assert raised.value.errno == errno.EADDRINUSE
        assert tcp.can_listen(state) is None
        assert not wire.second.run("ss", "-Hltn")


def half_open(wire: Wire, host: Host) -> socket.socket:
    """A client's handshake that cannot be finished until its filter is taken away."""
    client = wire.client.socket()
    deafen(client)
    client.setblocking(False)
    client.connect_ex((V4, PORT))
    wait_for(lambda: "SYN-RECV" in host.run("ss", "-Hatn"), "the half-open connection")
    return client


def test_pending_accepts(wire: Wire) -> None:
    listener = wire.listen(FAMILIES["ipv4"])
    with wire.first:
        diag = SockDiag()

        def pending() -> int:
            return tcp.pending_accepts(listener.fileno(), diag)

        assert pending() == 0
        waiting = wire.client.socket()
        waiting.connect((V4, PORT))
        wait_for(lambda: pending() == 1, "the connection that waits to be accepted")
        half = half_open(wire, wire.first)
        assert pending() == 2
        sock_filter.detach(half)  # its SYN-ACK is repeated, and its handshake finishes
        for _ in range(2):
            listener.accept()[0].close()
        assert pending() == 0
        diag.close()


@pytest.mark.parametrize("lossless", [True, False], ids=["replayed", "lost"])
@pytest.mark.parametrize("reverse_path", ["0", "1", "2"])
def test_what_arrives_in_the_pause_costs_no_retransmission(
    wire: Wire, family: Family, lossless: bool, reverse_path: str
) -> None:
    wire.second.sysctl("ipv4.conf.all.rp_filter", reverse_path)
    client, server = wire.connect(family)
    client.sendall(b"0")
    assert server.recv(1) == b"0"

    def pause() -> None:
        client.sendall(b"asked in the pause")

    service = Service(wire.first, [server])
    service.move(wire.second, pause, lossless)
    (server,) = service.sockets()
    assert receive(server, 18) == b"asked in the pause"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"
    assert (tcp_info(client).total_retrans == 0) == lossless
    assert (service.replayed > 0) == lossless


@pytest.mark.parametrize("margin", [destination._TIMESTAMP_MARGIN_MS, 0], ids=["margin", "no margin"])
def test_the_source_may_still_retransmit_after_its_capture(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, margin: int
) -> None:
    """Its timestamps then run ahead of those captured: the peer must not take the destination's for old."""
    monkeypatch.setattr(destination, "_TIMESTAMP_MARGIN_MS", margin)
    if not margin:
        monkeypatch.setattr("time.time", lambda: 0.0)  # nor do the hosts' clocks help
    client, server = wire.connect(FAMILIES["ipv4"])
    tcp.lock(server.fileno())
    server.sendall(b"sent again and again")
    service = Service(wire.first, [server])

    def transfer() -> None:
        wait_for(lambda: wire.first.counter("Tcp.RetransSegs") >= 2, "retransmissions by the source")

    service.move(wire.second, transfer=transfer)
    (server,) = service.sockets()
    server.sendall(b", and more")
    assert receive(client, 30) == b"sent again and again, and more"
    assert (wire.client.counter("TcpExt.PAWSEstab") == 0) == bool(margin)
    assert wire.resets() == 0


@pytest.mark.parametrize("lossless", [True, False], ids=["replayed", "lost"])
def test_who_connects_in_the_pause_need_not_try_again(wire: Wire, family: Family, lossless: bool) -> None:
    client = wire.client.socket(family.client)
    client.setblocking(False)
    service = Service(wire.first, [wire.listen(family)])

    def pause() -> None:
        assert client.connect_ex((family.address, PORT)) == errno.EINPROGRESS

    service.move(wire.second, pause, lossless)
    (listener,) = service.sockets()
    server, _ = listener.accept()
    assert (tcp_info(client).total_retrans == 0) == lossless
    client.sendall(b"hello")
    server.settimeout(20)
    assert receive(server, 5) == b"hello"
    assert wire.resets() == 0


def test_capture_keeps_to_its_addresses_ports_and_limits(wire: Wire) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    with wire.first:
        mine, others = PacketCapture([V4], ports=[PORT]), PacketCapture([V4], ports=[1])
        elsewhere = PacketCapture([V6, "10.77.0.2"])
        captures = mine, others, elsewhere
        client.sendall(b"before the start")
        wait_for(lambda: tcp_repair.unread(server) == 16, "the data")
        for one in captures:
            one.start()
        for number in range(10):
            client.sendall(b"%d" % number)
            wait_for(lambda n=number: tcp_repair.unread(server) == 17 + n, "the data")  # type: ignore[misc]
        for one in captures:
            one.stop()
        client.sendall(b"after the end")
        assert len(mine.drain(max_packets=4)) == 4
        rest = mine.drain()
        assert [packet[-1:] for packet in rest] == [b"%d" % number for number in range(4, 10)]
        assert mine.drain() == others.drain() == elsewhere.drain() == []
        assert mine.lost == 0
        with pytest.raises(ValueError, match="not being taken over"):
            replay(rest, [V6])
        for one in captures:
            one.close()


def test_capture_that_has_no_room_says_so(wire: Wire) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    with wire.first:
        capture = PacketCapture(SERVICE, buffer_bytes=4096)
        capture.start()
        client.sendall(bytes(MIB // 2))
        wait_for(lambda: tcp_repair.unread(server) > 30_000, "the data")
        capture.drain()
        assert capture.lost > 0
        capture.close()
