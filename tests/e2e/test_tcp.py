"""TCP connections that move between hosts while their peers go on."""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import struct
import threading

import pytest
from e2e.segment import Host, wait_for
from e2e.tcp_mover import (
    FAMILIES,
    HALF_CLOSED,
    MIB,
    PORT,
    Family,
    Service,
    Wire,
    enter,
    fill,
    large_buffers,
    receive,
)

from agent.kernel import netlink, tcp_repair
from agent.kernel.tcp_repair import TcpState, tcp_info
from agent.resources import tcp


def test_conversation_goes_on(wire: Wire, family: Family) -> None:
    client, server = wire.connect(family)
    client.sendall(b"question")
    server.sendall(b"unread by the client")
    wait_for(lambda: tcp_repair.unread(server) == 8, "the question")
    service = Service(wire.first, [server])
    service.move(wire.second)
    (server,) = service.sockets()
    assert server.recv(100) == b"question"
    assert client.recv(100) == b"unread by the client"
    for number in range(50):
        client.sendall(b"%d" % number)
        assert server.recv(100) == b"%d" % number
        server.sendall(b"answer %d" % number)
        assert client.recv(100) == b"answer %d" % number
    assert wire.second.counter("Tcp.InSegs") > 50  # it really moved
    assert wire.resets() == 0
    assert tcp_info(client).total_retrans == 0


def test_the_peer_may_be_on_the_destination(wire: Wire, family: Family) -> None:
    with wire.listen(family) as listener:
        client = wire.second.socket(family.client)
        client.connect((family.address, PORT))
        server, _ = listener.accept()
    client.sendall(b"before")
    wait_for(lambda: tcp_repair.unread(server) == 6, "the data")
    service = Service(wire.first, [server])
    service.move(wire.second, pause=lambda: client.sendall(b", meanwhile"))
    (server,) = service.sockets()
    assert receive(server, 17) == b"before, meanwhile"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"
    assert wire.resets() == 0


def test_all_queues_are_kept(wire: Wire, family: Family) -> None:
    client, server = wire.connect(family)
    large_buffers(client, server)
    data = random.Random(7).randbytes(6 * MIB)
    to_server = fill(client, data)
    wait_for(lambda: tcp_repair.unread(server) > 2 * MIB, "unread data on the server")
    with wire.first:
        tcp.lock(server.fileno())  # so that nothing written from now on is acknowledged
    to_client = fill(server, data)
    service = Service(wire.first, [server])
    service.move(wire.second)
    (state,) = service.states
    assert isinstance(state, tcp.TcpConnection)
    assert len(state.queues.unread) > 2 * MIB
    assert len(state.queues.sent) > 0
    assert len(state.queues.unsent) > 100_000
    (server,) = service.sockets()
    assert receive(client, to_client) == data[:to_client]
    assert receive(server, to_server) == data[:to_server]
    assert wire.resets() == 0


def test_large_queues_there_and_back(wire: Wire) -> None:
    """8 MiB in each direction, and the application's buffer limits do not grow on the way."""
    client, server = wire.connect(FAMILIES["ipv4"])
    large_buffers(client, server)
    data = random.Random(8).randbytes(16 * MIB)
    sizes = fill(client, data), fill(server, data)
    assert min(sizes) > 8 * MIB
    before = [server.getsockopt(socket.SOL_SOCKET, one) for one in (socket.SO_RCVBUF, socket.SO_SNDBUF, 72)]
    service = Service(wire.first, [server])
    for host in (wire.second, wire.first):
        service.move(host)
    (server,) = service.sockets()
    after = [server.getsockopt(socket.SOL_SOCKET, one) for one in (socket.SO_RCVBUF, socket.SO_SNDBUF, 72)]
    assert after == before
    writers = [
        threading.Thread(target=client.sendall, args=(b"end",)),
        threading.Thread(target=server.sendall, args=(b"end",)),
    ]
    for one in writers:
        one.start()
    assert receive(client, sizes[1] + 3) == data[: sizes[1]] + b"end"
    assert receive(server, sizes[0] + 3) == data[: sizes[0]] + b"end"
    for one in writers:
        one.join()
    assert wire.resets() == 0


class Stream:
    """A pseudo-random stream of which each end knows how far it is."""

    block = random.Random(1).randbytes(MIB)

    def __init__(self, total: int) -> None:
        self.total = total
        self.sent = 0
        self.received = 0
        self.digest = hashlib.sha1()

    def send_some(self, sock: socket.socket) -> None:
        start = self.sent % MIB
        limit = min(64 << 10, self.total - self.sent)
        self.sent += sock.send(memoryview(self.block)[start : start + limit])

    def receive_some(self, sock: socket.socket) -> bool:
        data = sock.recv(256 << 10)
        self.digest.update(data)
        self.received += len(data)
        return bool(data)

    def exact(self) -> bool:
        whole, rest = divmod(self.total, MIB)
        return self.digest.digest() == hashlib.sha1(self.block * whole + self.block[:rest]).digest()


def run_client(client: socket.socket, out: Stream, back: Stream) -> threading.Thread:
    def write() -> None:
        while out.sent < out.total:
            out.send_some(client)
        client.shutdown(socket.SHUT_WR)

    def read() -> None:
        writer = threading.Thread(target=write)
        writer.start()
        while back.receive_some(client):
            pass
        writer.join()

    thread = threading.Thread(target=read)
    thread.start()
    return thread


def serve_some(sock: socket.socket, out: Stream, back: Stream, until: int) -> bool:
    """Read and write until that many bytes were read; False: all is done."""
    sock.setblocking(False)
    ended = False
    while out.received < until and not (ended and back.sent == back.total):
        reading, writing = [] if ended else [sock], [sock] if back.sent < back.total else []
        readable, writable, _ = select.select(reading, writing, [], 20)
        assert readable or writable, "the connection stands still"
        ended |= bool(readable) and not out.receive_some(sock)
        if writable:
            back.send_some(sock)
    return not ended


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_streams_stay_exact_over_twenty_moves(wire: Wire, name: str) -> None:
    client, server = wire.connect(FAMILIES[name])
    out, back = Stream(48 * MIB), Stream(48 * MIB)
    thread = run_client(client, out, back)
    service = Service(wire.first, [server])
    hosts = [wire.second, wire.first] * 10
    for number, host in enumerate(hosts, 1):
        with socket.socket(fileno=os.dup(service.fds[0])) as sock:
            assert serve_some(sock, out, back, out.total * number // 21)
        service.move(host)
    (server,) = service.sockets()
    assert not serve_some(server, out, back, out.total + 1)
    server.shutdown(socket.SHUT_WR)
    thread.join(20)
    assert (out.received, back.received) == (out.total, back.total)
    assert out.exact() and back.exact()
    assert wire.resets() == 0


SYSCTLS = {
    "tcp_window_scaling": tcp_repair.TCPI_OPT_WSCALE,
    "tcp_sack": tcp_repair.TCPI_OPT_SACK,
    "tcp_timestamps": tcp_repair.TCPI_OPT_TIMESTAMPS,
}


@pytest.mark.parametrize("off", [(), *[(one,) for one in SYSCTLS], tuple(SYSCTLS)], ids=str)
def test_what_the_handshake_settled_is_kept(wire: Wire, off: tuple[str, ...]) -> None:
    for name in off:
        wire.client.sysctl(f"ipv4.{name}", "0")
    client, server = wire.connect(FAMILIES["ipv4"])
    before, segment_size = tcp_info(server), server.getsockopt(socket.IPPROTO_TCP, tcp_repair.TCP_MAXSEG)
    for name, bit in SYSCTLS.items():
        assert bool(before.options & bit) == (name not in off)
    service = Service(wire.first, [server])
    service.move(wire.second)
    (server,) = service.sockets()
    after = tcp_info(server)
    mask = tcp_repair.TCPI_OPT_SACK | tcp_repair.TCPI_OPT_TIMESTAMPS
    assert after.options & mask == before.options & mask
    scale = (0, 0) if "tcp_window_scaling" in off else (before.snd_wscale, before.rcv_wscale)
    assert (after.snd_wscale, after.rcv_wscale) == scale
    assert server.getsockopt(socket.IPPROTO_TCP, tcp_repair.TCP_MAXSEG) >= segment_size - 12 > 1400
    data = random.Random(9).randbytes(2 * MIB)
    for sender, receiver in ((client, server), (server, client)):
        writer = threading.Thread(target=sender.sendall, args=(data,))
        writer.start()
        assert receive(receiver, len(data)) == data
        writer.join()
    assert wire.resets() == 0
    assert wire.client.counter("TcpExt.PAWSEstab") == 0


def microsecond_timestamps(host: Host) -> None:
    """Have connections use them that go by the segment's own route (iproute2 has no word for it yet)."""
    with host, netlink.Netlink(netlink.NETLINK_ROUTE) as route:
        features = netlink.attribute(12, struct.pack("=I", 1 << 4))  # RTAX_FEATURES, RTAX_FEATURE_TCP_USEC_TS
        message = struct.pack("=BBBBBBBBI", socket.AF_INET, 24, 0, 0, 254, 4, 253, 1, 0)  # rtmsg: main, link
        message += netlink.attribute(1, socket.inet_aton("10.77.0.0"))  # RTA_DST
        message += netlink.attribute(4, struct.pack("=I", socket.if_nametoindex("eth0")))  # RTA_OIF
        message += netlink.attribute(8, features)  # RTA_METRICS
        route.request(24, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE, message, "route")  # RTM_NEWROUTE


def test_microsecond_timestamps_are_kept(wire: Wire) -> None:
    for host in (wire.client, wire.first):  # the destination does not use them by itself
        microsecond_timestamps(host)
    client, server = wire.connect(FAMILIES["ipv4"])
    assert tcp_info(server).options & tcp_repair.TCPI_OPT_USEC_TS
    service = Service(wire.first, [server])
    for host in (wire.second, wire.first, wire.second):
        client.sendall(b"x")
        service.move(host)
    (server,) = service.sockets()
    assert tcp_info(server).options & tcp_repair.TCPI_OPT_USEC_TS
    assert receive(server, 3) == b"xxx"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"
    assert wire.client.counter("TcpExt.PAWSEstab") == 0
    assert wire.resets() == 0


def test_offered_window_does_not_collapse(wire: Wire) -> None:
    """A connection that received at full speed before goes on doing so: its window is not slow-started
    again."""
    client, server = wire.connect(FAMILIES["ipv4"])
    writer = threading.Thread(target=client.sendall, args=(bytes(48 * MIB),))
    writer.start()
    receive(server, 48 * MIB)
    writer.join()
    service = Service(wire.first, [server])
    service.move(wire.second)
    (state,) = service.states
    assert isinstance(state, tcp.TcpConnection)
    offered = state.window[3]
    assert offered > 300_000  # a new connection begins with 64 KiB
    (server,) = service.sockets()
    assert tcp_info(server).rcv_ssthresh >= offered


# half-closed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse_path", ["0", "1", "2"])
@pytest.mark.parametrize("state", HALF_CLOSED, ids=lambda state: state.name)
def test_half_closed(wire: Wire, family: Family, state: TcpState, reverse_path: str) -> None:
    wire.second.sysctl("ipv4.conf.all.rp_filter", reverse_path)
    client, server = wire.connect(family)
    enter(state, wire, client, server)
    service = Service(wire.first, [server])
    service.move(wire.second)
    assert [one.state for one in service.states if isinstance(one, tcp.TcpConnection)] == [state]
    (server,) = service.sockets()
    assert server.recv(100) == b"before the end"
    assert client.recv(100) == b"before the end"
    if state in (TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING):
        assert server.recv(100) == b""
    if state == TcpState.CLOSE_WAIT:
        server.sendall(b"still speaking")
        assert client.recv(100) == b"still speaking"
        server.close()
    assert client.recv(100) == b""
    if state in (TcpState.FIN_WAIT1, TcpState.FIN_WAIT2):
        client.sendall(b"still listening?")
        assert server.recv(100) == b"still listening?"
        client.close()
        assert server.recv(100) == b""
    server.close()
    client.close()
    wait_for(lambda: not wire.second.connections(), "the end")
    assert wire.resets() == 0


def test_half_closed_and_bound_to_a_device(wire: Wire) -> None:
    client, server = wire.connect(FAMILIES["ipv4"])
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    enter(TcpState.CLOSE_WAIT, wire, client, server)
    service = Service(wire.first, [server])
    service.move(wire.second)
    (server,) = service.sockets()
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b"eth0\0"
    assert receive(server, 14) == b"before the end"
    assert server.recv(1) == b""
    server.sendall(b"!")
    assert receive(client, 15) == b"before the end!"
