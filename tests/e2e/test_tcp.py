"""TCP connections and listeners that move between hosts while their peers go on."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from segment import Host, wait_for
from tcp_mover import FAMILIES, PORT, SERVICE, V4, V6, Family, Lab, Service, laboratory

from agent.kernel import sock_filter, tcp_repair
from agent.kernel.tcp_repair import TcpState, tcp_info
from agent.resources import tcp
from agent.resources.switchover import PacketCapture, replay
from agent.resources.tcp import options

MIB = 1 << 20


@pytest.fixture
def lab() -> Iterator[Lab]:
    with laboratory() as built:
        yield built


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def state_of(sock: socket.socket) -> TcpState:
    return TcpState(tcp_info(sock).state)


def receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(min(size - len(data), MIB))
        assert piece, f"the stream ended after {len(data)} of {size} bytes"
        data += piece
    return bytes(data)


def fill(sock: socket.socket, data: bytes) -> int:
    """Write as much of `data` as the kernel takes."""
    sock.setblocking(False)
    written = 0
    try:
        while written < len(data):
            written += sock.send(memoryview(data)[written:])
    except BlockingIOError:
        pass
    sock.settimeout(20)
    return written


def peer_got(sock: socket.socket) -> Callable[[], bool]:
    """Everything written to `sock` was acknowledged."""
    return lambda: tcp_repair.unacknowledged(sock) == 0


def large_buffers(*sockets: socket.socket) -> None:
    for one in sockets:
        one.setsockopt(socket.SOL_SOCKET, 32, 8 * MIB)  # SO_SNDBUFFORCE
        one.setsockopt(socket.SOL_SOCKET, 33, 8 * MIB)  # SO_RCVBUFFORCE


# connections ------------------------------------------------------------------------------------------------


def test_conversation_goes_on(lab: Lab, family: Family) -> None:
    client, server = lab.connect(family)
    client.sendall(b"question")
    server.sendall(b"unread by the client")
    wait_for(lambda: tcp_repair.unread(server) == 8, "the question")
    service = Service(lab.first, [server])
    service.move(lab.second)
    (server,) = service.sockets()
    assert server.recv(100) == b"question"
    assert client.recv(100) == b"unread by the client"
    for number in range(50):
        client.sendall(b"%d" % number)
        assert server.recv(100) == b"%d" % number
        server.sendall(b"answer %d" % number)
        assert client.recv(100) == b"answer %d" % number
    assert lab.second.counter("Tcp.InSegs") > 50  # it really moved
    assert lab.resets() == 0
    assert tcp_info(client).total_retrans == 0


def test_all_queues_are_kept(lab: Lab, family: Family) -> None:
    client, server = lab.connect(family)
    large_buffers(client, server)
    data = random.Random(7).randbytes(6 * MIB)
    to_server = fill(client, data)
    wait_for(lambda: tcp_repair.unread(server) > 2 * MIB, "unread data on the server")
    with lab.first:
        tcp.lock(server.fileno())  # so that nothing written from now on is acknowledged
    to_client = fill(server, data)
    service = Service(lab.first, [server])
    service.move(lab.second)
    (state,) = service.states
    assert isinstance(state, tcp.TcpConnection)
    assert len(state.queues.unread) > 2 * MIB
    assert len(state.queues.sent) > 0
    assert len(state.queues.unsent) > 100_000
    (server,) = service.sockets()
    assert receive(client, to_client) == data[:to_client]
    assert receive(server, to_server) == data[:to_server]
    assert lab.resets() == 0


def test_large_queues_there_and_back(lab: Lab) -> None:
    """8 MiB in each direction, and the application's buffer limits do not grow on the way."""
    client, server = lab.connect(FAMILIES["ipv4"])
    large_buffers(client, server)
    data = random.Random(8).randbytes(16 * MIB)
    sizes = fill(client, data), fill(server, data)
    assert min(sizes) > 8 * MIB
    before = [server.getsockopt(socket.SOL_SOCKET, one) for one in (socket.SO_RCVBUF, socket.SO_SNDBUF, 72)]
    service = Service(lab.first, [server])
    for host in (lab.second, lab.first):
        service.move(host)
    (server,) = service.sockets()
    after = [server.getsockopt(socket.SOL_SOCKET, one) for one in (socket.SO_RCVBUF, socket.SO_SNDBUF, 72)]
    assert after == before
    writers = [threading.Thread(target=client.sendall, args=(b"end",)), threading.Thread(target=server.sendall, args=(b"end",))]
    for one in writers:
        one.start()
    assert receive(client, sizes[1] + 3) == data[: sizes[1]] + b"end"
    assert receive(server, sizes[0] + 3) == data[: sizes[0]] + b"end"
    for one in writers:
        one.join()
    assert lab.resets() == 0


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
        if self.sent == self.total:
            sock.shutdown(socket.SHUT_WR)

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
        readable, writable, _ = select.select([] if ended else [sock], [sock] if back.sent < back.total else [], [], 20)
        assert readable or writable, "the connection stands still"
        ended |= bool(readable) and not out.receive_some(sock)
        if writable:
            back.send_some(sock)
    return not ended


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_streams_stay_exact_over_twenty_moves(lab: Lab, name: str) -> None:
    client, server = lab.connect(FAMILIES[name])
    out, back = Stream(48 * MIB), Stream(48 * MIB)
    thread = run_client(client, out, back)
    service = Service(lab.first, [server])
    hosts = [lab.second, lab.first] * 10
    for number, host in enumerate(hosts, 1):
        with socket.socket(fileno=os.dup(service.fds[0])) as sock:
            assert serve_some(sock, out, back, out.total * number // 21)
        service.move(host)
    (server,) = service.sockets()
    assert not serve_some(server, out, back, out.total + 1)
    thread.join(20)
    assert (out.received, back.received) == (out.total, back.total)
    assert out.exact() and back.exact()
    assert lab.resets() == 0


SYSCTLS = {
    "tcp_window_scaling": tcp_repair.TCPI_OPT_WSCALE,
    "tcp_sack": tcp_repair.TCPI_OPT_SACK,
    "tcp_timestamps": tcp_repair.TCPI_OPT_TIMESTAMPS,
}


@pytest.mark.parametrize("off", [(), *[(one,) for one in SYSCTLS], tuple(SYSCTLS)], ids=str)
def test_what_the_handshake_settled_is_kept(lab: Lab, off: tuple[str, ...]) -> None:
    for name in off:
        lab.client.sysctl(f"ipv4.{name}", "0")
    client, server = lab.connect(FAMILIES["ipv4"])
    before, segment_size = tcp_info(server), server.getsockopt(socket.IPPROTO_TCP, tcp_repair.TCP_MAXSEG)
    for name, bit in SYSCTLS.items():
        assert bool(before.options & bit) == (name not in off)
    service = Service(lab.first, [server])
    service.move(lab.second)
    (server,) = service.sockets()
    after = tcp_info(server)
    mask = tcp_repair.TCPI_OPT_SACK | tcp_repair.TCPI_OPT_TIMESTAMPS
    assert after.options & mask == before.options & mask
    scaled = "tcp_window_scaling" not in off
    assert (after.snd_wscale, after.rcv_wscale) == ((before.snd_wscale, before.rcv_wscale) if scaled else (0, 0))
    assert server.getsockopt(socket.IPPROTO_TCP, tcp_repair.TCP_MAXSEG) >= segment_size - 12 > 1400
    data = random.Random(9).randbytes(2 * MIB)
    for sender, receiver in ((client, server), (server, client)):
        writer = threading.Thread(target=sender.sendall, args=(data,))
        writer.start()
        assert receive(receiver, len(data)) == data
        writer.join()
    assert lab.resets() == 0
    assert lab.client.counter("TcpExt.PAWSEstab") == 0


def test_offered_window_does_not_collapse(lab: Lab) -> None:
    """A connection that received at full speed before goes on doing so: its window is not slow-started again."""
    client, server = lab.connect(FAMILIES["ipv4"])
    writer = threading.Thread(target=client.sendall, args=(bytes(48 * MIB),))
    writer.start()
    receive(server, 48 * MIB)
    writer.join()
    before = tcp_info(server).rcv_ssthresh
    assert before > 300_000
    service = Service(lab.first, [server])
    service.move(lab.second)
    (server,) = service.sockets()
    assert tcp_info(server).rcv_ssthresh > before * 0.8


# half-closed ---------------------------------------------------------------------------------------------------


def deafen(sock: socket.socket) -> None:
    sock_filter.attach(sock, sock_filter.assemble([(sock_filter.BPF_RET_K, 0, 0, 0)]))


def enter(state: TcpState, lab: Lab, client: socket.socket, server: socket.socket) -> None:
    """Bring the server's socket into `state`, with data in both directions before the ends of the streams."""
    client.sendall(b"before the end")
    server.sendall(b"before the end")
    wait_for(lambda: tcp_repair.unread(server) == 14 and tcp_repair.unread(client) == 14, "both greetings")
    wait_for(peer_got(server), "the acknowledgement")
    if state == TcpState.CLOSING:
        deafen(client)  # so that its FIN does not acknowledge ours
        server.shutdown(socket.SHUT_WR)
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: state_of(server) == state, state.name)
        sock_filter.detach(client)
        return
    if state in (TcpState.CLOSE_WAIT, TcpState.LAST_ACK):
        client.shutdown(socket.SHUT_WR)
        wait_for(lambda: state_of(server) == TcpState.CLOSE_WAIT, "CLOSE_WAIT")
    if state in (TcpState.FIN_WAIT1, TcpState.LAST_ACK):
        with lab.first:
            tcp.lock(server.fileno())
    if state != TcpState.CLOSE_WAIT:
        server.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(server) == state, state.name)


HALF_CLOSED = [TcpState.CLOSE_WAIT, TcpState.FIN_WAIT1, TcpState.FIN_WAIT2, TcpState.LAST_ACK, TcpState.CLOSING]


@pytest.mark.parametrize("reverse_path", ["0", "1", "2"])
@pytest.mark.parametrize("state", HALF_CLOSED, ids=lambda state: state.name)
def test_half_closed(lab: Lab, family: Family, state: TcpState, reverse_path: str) -> None:
    lab.second.sysctl("ipv4.conf.all.rp_filter", reverse_path)
    client, server = lab.connect(family)
    enter(state, lab, client, server)
    service = Service(lab.first, [server])
    service.move(lab.second)
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
    wait_for(lambda: not lab.second.run("ss", "-Htn", "state", "connected", "exclude", "time-wait"), "the end")
    assert lab.resets() == 0


def test_half_closed_and_bound_to_a_device(lab: Lab) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    server.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    enter(TcpState.CLOSE_WAIT, lab, client, server)
    service = Service(lab.first, [server])
    service.move(lab.second)
    (server,) = service.sockets()
    assert server.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16) == b"eth0\0"
    assert receive(server, 14) == b"before the end"
    assert server.recv(1) == b""
    server.sendall(b"!")
    assert receive(client, 15) == b"before the end!"


# holding still, and undoing it --------------------------------------------------------------------------------


def options_of(sock: socket.socket) -> dict[str, bytes | None]:
    values = {name: options.get(sock, option) for name, option in options.OPTIONS.items()}
    values["SO_REUSEADDR"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 4)
    values["SO_BUF_LOCK"] = sock.getsockopt(socket.SOL_SOCKET, 72, 4)
    values["device"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
    return values


@pytest.mark.parametrize("reuse", [0, 1])
def test_release_is_exact(lab: Lab, family: Family, reuse: int) -> None:
    client, server = lab.connect(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
    client.sendall(b"before")
    wait_for(lambda: tcp_repair.unread(server) == 6, "the data")
    before = options_of(server)
    service = Service(lab.first, [server])
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
    assert lab.resets() == 0


@pytest.mark.parametrize("state", HALF_CLOSED, ids=lambda state: state.name)
def test_release_of_half_closed(lab: Lab, state: TcpState) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    enter(state, lab, client, server)
    with lab.first:
        tcp.lock(server.fileno())
        tcp.capture(server.fileno())
        tcp.release(server.fileno())
    assert receive(server, 14) == b"before the end"
    assert receive(client, 14) == b"before the end"
    server.close()
    client.close()
    wait_for(lambda: not lab.first.run("ss", "-Htn", "state", "connected", "exclude", "time-wait"), "the end")
    assert lab.resets() == 0


def test_every_step_may_come_twice_and_in_any_state(lab: Lab) -> None:
    listener = lab.listen(FAMILIES["ipv4"])
    client, server = lab.connect_to(listener) if hasattr(lab, "connect_to") else _accept(lab, listener)
    fresh = lab.first.socket()
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
    with lab.first:
        fd = tcp.rebuild(msgspec.structs.replace(tcp.capture(fresh.fileno())))
        for _ in range(2):
            tcp.activate(fd, tcp.capture(fresh.fileno()))
        os.close(fd)


def _accept(lab: Lab, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = lab.client.socket(socket.AF_INET)
    client.connect((V4, PORT))
    server, _ = listener.accept()
    server.settimeout(20)
    return client, server


def test_an_unlocked_connection_is_not_captured(lab: Lab) -> None:
    _, server = lab.connect(FAMILIES["ipv4"])
    with pytest.raises(PermissionError, match="not locked"):
        tcp.capture(server.fileno())
    assert not tcp.inspect(server.fileno()).repair


def test_closing_what_was_captured_is_silent(lab: Lab, family: Family) -> None:
    client, server = lab.connect(family)
    client.sendall(b"never read")
    wait_for(lambda: tcp_repair.unread(server) == 10, "the data")
    server.sendall(b"something")
    wait_for(peer_got(server), "the acknowledgement")
    service = Service(lab.first, [server])
    service.freeze().close()
    before = lab.first.counter("Tcp.OutSegs"), lab.client.counter("Tcp.InSegs")
    os.close(service.fds[0])
    assert (lab.first.counter("Tcp.OutSegs"), lab.client.counter("Tcp.InSegs")) == before
    assert state_of(client) == TcpState.ESTABLISHED
    assert not lab.first.run("ss", "-Hatn")


def test_what_is_rebuilt_is_silent_until_activated(lab: Lab, family: Family) -> None:
    """Longer than any first timeout of TCP, with data to send and keepalive on; then it is discarded."""
    client, server = lab.connect(family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    tcp.lock(server.fileno())
    server.sendall(b"sent, and never acknowledged")
    fill(server, bytes(8 * MIB))
    service = Service(lab.first, [server])
    service.freeze().close()
    with lab.second:
        fd = tcp.rebuild(service.states[0])
    before = lab.second.counter("Tcp.OutSegs"), lab.second.counter("Ip.OutRequests")
    deadline = time.monotonic() + 2.5
    wait_for(lambda: time.monotonic() > deadline, "every timer to have had its chance")
    tcp.discard(fd)
    assert (lab.second.counter("Tcp.OutSegs"), lab.second.counter("Ip.OutRequests")) == before
    tcp.release(service.fds[0])  # and the source goes on
    (server,) = service.sockets()
    assert receive(client, 28) == b"sent, and never acknowledged"
    assert lab.resets() == 0


def test_rebuilt_but_not_active_drops_without_reset(lab: Lab) -> None:
    """Between the arrival of the address and that of the last socket, packets may come already."""
    client, server = lab.connect(FAMILIES["ipv4"])
    service = Service(lab.first, [server])
    capture = service.freeze()
    with lab.second:
        fd = tcp.rebuild(service.states[0])
    service._withdraw()
    lab.second.run("ip", "addr", "add", f"{V4}/24", "dev", "eth0")
    lab.client.run("ip", "neigh", "replace", V4, "lladdr", lab.second.mac(), "dev", "eth0")
    before = lab.second.counter("Tcp.InSegs")
    client.sendall(b"too early")
    wait_for(lambda: lab.second.counter("Tcp.InSegs") > before, "the packet")
    with lab.second:
        tcp.activate(fd, service.states[0])
    with socket.socket(fileno=fd) as moved:
        moved.settimeout(20)
        assert receive(moved, 9) == b"too early"
    capture.close()
    assert lab.resets() == 0


# options and filters ----------------------------------------------------------------------------------------------

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
NOT_WHILE_CONNECTED = {"TCP_FASTOPEN", "TCP_FASTOPEN_NO_COOKIE", "TCP_FASTOPEN_CONNECT", "IPV6_V6ONLY", "TCP_MAXSEG"}


def make_unusual(sock: socket.socket, connected: bool) -> list[str]:
    """Set every option to another value; returns the names of those that are now."""
    changed = []
    for name, option in options.OPTIONS.items():
        before = options.get(sock, option)
        if before is None or (connected and name in NOT_WHILE_CONNECTED):
            continue
        flipped = struct.pack("=i", 17 if name.startswith(("TCP_KEEP", "TCP_SYNC", "IP_TTL", "IPV6_UNI")) else 1)
        options.put(sock, name, UNUSUAL.get(name, flipped))
        if options.get(sock, option) != before:
            changed.append(name)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 200_000)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    return changed


@pytest.mark.parametrize("name", ["ipv4", "ipv6"])
def test_connection_keeps_its_options(lab: Lab, name: str) -> None:
    client, server = lab.connect(FAMILIES[name])
    changed = make_unusual(server, connected=True)
    assert len(changed) > 35, changed
    before = options_of(server)
    os.fchown(server.fileno(), 4711, -1)
    service = Service(lab.first, [server])
    service.move(lab.second)
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
def test_listener_keeps_its_options(lab: Lab, name: str) -> None:
    family = FAMILIES[name]
    listener = lab.first.socket(family.server)
    changed = make_unusual(listener, connected=False)
    assert len(changed) > 40, changed
    listener.bind((family.listen, PORT))
    listener.listen(33)
    before = options_of(listener)
    service = Service(lab.first, [listener])
    service.move(lab.second)
    (listener,) = service.sockets()
    assert options_of(listener) == before
    assert tcp_info(listener).sacked == 33


def test_other_defaults_on_the_destination(lab: Lab) -> None:
    """The application relies on what it was given, not on what the other host's administrator prefers."""
    lab.second.sysctl("ipv4.tcp_keepalive_time", "100")
    lab.second.sysctl("ipv4.ip_default_ttl", "33")
    lab.first.sysctl("ipv4.tcp_fin_timeout", "44")
    _, server = lab.connect(FAMILIES["ipv4"])
    before = options_of(server)
    service = Service(lab.first, [server])
    service.move(lab.second)
    (server,) = service.sockets()
    assert options_of(server) == before


def drop_payload_with(first_byte: int) -> bytes:
    """A filter as an application might have: it drops segments whose data begins with `first_byte`."""
    return sock_filter.assemble(
        [
            (sock_filter.BPF_LD_B_ABS, 0, 0, 12),
            (0x74, 0, 0, 2),  # A >>= 2: the length of the TCP header
            (0x54, 0, 0, 0x3C),
            (0x07, 0, 0, 0),  # X = A
            (0x80, 0, 0, 0),  # A = length
            (0x1D, 0, 1, 0),  # no data?
            (sock_filter.BPF_RET_K, 0, 0, sock_filter.ACCEPT),
            (0x50, 0, 0, 0),  # A = first byte of data
            (sock_filter.BPF_JMP_JEQ_K, 0, 1, first_byte),
            (sock_filter.BPF_RET_K, 0, 0, 0),
            (sock_filter.BPF_RET_K, 0, 0, sock_filter.ACCEPT),
        ]
    )


@pytest.mark.parametrize("moved", [True, False], ids=["moved", "rolled back"])
def test_application_filter_is_kept(lab: Lab, moved: bool) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    program = drop_payload_with(ord("x"))
    sock_filter.attach(server, program)
    service = Service(lab.first, [server])
    if moved:
        service.move(lab.second)
    else:
        service.roll_back(service.freeze())
    (server,) = service.sockets()
    assert sock_filter.read(server) == sock_filter.Filter(sock_filter.Kind.APPLICATION, program, 0)
    client.sendall(b"hello")
    assert receive(server, 5) == b"hello"
    dropped = (lab.second if moved else lab.first).counter("Tcp.InSegs")
    client.sendall(b"xyz")
    host = lab.second if moved else lab.first
    wait_for(lambda: host.counter("Tcp.InSegs") > dropped + 1, "the segment, and its repetition")
    assert tcp_repair.unread(server) == 0


# listeners ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [V4, V6, "0.0.0.0", "::"])
def test_listener_goes_on_listening(lab: Lab, address: str) -> None:
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = lab.first.socket(kind)
    listener.bind((address, PORT))
    listener.listen(7)
    with lab.first:
        client = lab.client.socket(kind)
        client.connect((V6 if kind == socket.AF_INET6 else V4, PORT))
    server, _ = listener.accept()
    service = Service(lab.first, [listener, server])
    service.move(lab.second)
    listener, server = service.sockets()
    assert tcp_info(listener).sacked == 7
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 0
    second = lab.client.socket(kind)
    second.connect((V6 if kind == socket.AF_INET6 else V4, PORT))
    accepted, _ = listener.accept()
    assert sock_filter.read(accepted) is None
    second.sendall(b"new")
    client.sendall(b"old")
    assert (accepted.recv(10), server.recv(10)) == (b"new", b"old")
    assert lab.resets() == 0


def test_sockets_that_do_nothing_yet(lab: Lab) -> None:
    fresh, bound = lab.first.socket(), lab.first.socket()
    fresh.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    bound.bind((V4, 7100))
    service = Service(lab.first, [fresh, bound])
    service.move(lab.second)
    fresh, bound = service.sockets()
    assert fresh.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert bound.getsockname() == (V4, 7100)
    bound.listen()
    fresh.connect((V4, 7100))
    assert bound.accept()[1] == fresh.getsockname()


def test_a_taken_port_is_refused(lab: Lab) -> None:
    with lab.listen(FAMILIES["ipv4"]) as listener:
        state = tcp.capture(listener.fileno())
    assert isinstance(state, tcp.TcpListener)
    with lab.second:
        assert tcp.can_listen(state) is None
        with socket.create_server(("", PORT)):
            blocker = tcp.can_listen(state)
            assert blocker is not None and blocker.kind == "tcp-port-taken"
            assert V4 in blocker.what
            with pytest.raises(OSError, match=f"in use.*{V4}:{PORT}") as raised:
                tcp.rebuild(state)
            assert raised.value.errno == errno.EADDRINUSE
        assert tcp.can_listen(state) is None
        assert not lab.second.run("ss", "-Hltn")


def half_open(lab: Lab, host: Host) -> socket.socket:
    """A client's handshake that cannot be finished until its filter is taken away."""
    client = lab.client.socket()
    deafen(client)
    client.setblocking(False)
    client.connect_ex((V4, PORT))
    wait_for(lambda: "SYN-RECV" in host.run("ss", "-Hatn"), "the half-open connection")
    return client


def test_pending_accepts_and_quiesce(lab: Lab) -> None:
    listener = lab.listen(FAMILIES["ipv4"])
    with lab.first:
        diag = tcp_diag()
        pending = lambda: tcp.pending_accepts(listener.fileno(), diag)  # noqa: E731
        assert pending() == 0
        waiting = lab.client.socket()
        waiting.connect((V4, PORT))
        wait_for(lambda: pending() == 1, "the connection that waits to be accepted")
        half = half_open(lab, lab.first)
        assert pending() == 2
        tcp.quiesce(listener.fileno())
        before = lab.first.counter("Tcp.PassiveOpens")
        late = lab.client.socket()
        late.setblocking(False)
        late.connect_ex((V4, PORT))
        sock_filter.detach(half)  # its SYN-ACK is repeated, and its handshake finishes
        wait_for(lambda: lab.first.counter("Tcp.PassiveOpens") > before, "the handshake")
        for _ in range(2):
            listener.accept()[0].close()
        assert pending() == 0
        assert state_of(late) == TcpState.SYN_SENT
        tcp.lock(listener.fileno())
        tcp.release(listener.fileno())
        late.settimeout(20)
        assert listener.accept()[1] == late.getsockname()
        diag.close()


def tcp_diag():  # type: ignore[no-untyped-def]
    from agent.kernel.sock_diag import SockDiag

    return SockDiag()


# arrivals in the pause ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lossless", [True, False], ids=["replayed", "lost"])
def test_what_arrives_in_the_pause_costs_no_retransmission(lab: Lab, family: Family, lossless: bool) -> None:
    client, server = lab.connect(family)
    client.sendall(b"0")
    assert server.recv(1) == b"0"

    def pause() -> None:
        client.sendall(b"asked in the pause")

    service = Service(lab.first, [server])
    service.move(lab.second, pause, lossless)
    (server,) = service.sockets()
    assert receive(server, 18) == b"asked in the pause"
    server.sendall(b"answer")
    assert receive(client, 6) == b"answer"
    assert (tcp_info(client).total_retrans == 0) == lossless
    assert (service.replayed > 0) == lossless


@pytest.mark.parametrize("lossless", [True, False], ids=["replayed", "lost"])
def test_who_connects_in_the_pause_need_not_try_again(lab: Lab, family: Family, lossless: bool) -> None:
    client = lab.client.socket(family.client)
    client.setblocking(False)
    service = Service(lab.first, [lab.listen(family)])

    def pause() -> None:
        assert client.connect_ex((family.address, PORT)) == errno.EINPROGRESS

    service.move(lab.second, pause, lossless)
    (listener,) = service.sockets()
    server, _ = listener.accept()
    assert (tcp_info(client).total_retrans == 0) == lossless
    client.sendall(b"hello")
    server.settimeout(20)
    assert receive(server, 5) == b"hello"
    assert lab.resets() == 0


def test_capture_keeps_to_its_addresses_ports_and_limits(lab: Lab) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    with lab.first:
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


def test_capture_that_has_no_room_says_so(lab: Lab) -> None:
    client, server = lab.connect(FAMILIES["ipv4"])
    with lab.first:
        capture = PacketCapture(SERVICE, buffer_bytes=4096)
        capture.start()
        client.sendall(bytes(MIB // 2))
        wait_for(lambda: tcp_repair.unread(server) > 30_000, "the data")
        capture.drain()
        assert capture.lost > 0
        capture.close()


# refusals ------------------------------------------------------------------------------------------------------------


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
    with lab.second, pytest.raises(OSError, match="10.77.0.100:7000 to 10.77.0.1") as raised:
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
