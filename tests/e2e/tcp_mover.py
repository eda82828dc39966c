"""Sockets and their service addresses, moved between hosts in the order in which a migration does it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from e2e.segment import Host, segment, wait_for

from agent.kernel import sock_filter, tcp_repair
from agent.kernel.addresses import Announcer
from agent.kernel.tcp_repair import TcpState, tcp_info
from agent.resources import service_address, tcp
from agent.resources.service_address import ServiceAddress
from agent.resources.switchover import PacketCapture, replay
from agent.resources.tcp import options

V4, V6 = "10.77.0.100", "fd77::100"
SERVICE = (V4, V6)
PORT = 7000
INTERFACE = "eth0"
MIB = 1 << 20


def nothing() -> None:
    """What happens in a pause if nothing else is said."""


class Service:
    """Descriptors of sockets (listeners first) on `host`, and the addresses they are reached at."""

    def __init__(self, host: Host, sockets: Sequence[socket.socket]) -> None:
        self.host = host
        self.fds = [one.detach() for one in sockets]
        self.states: list[tcp.TcpSocket] = []
        self.replayed = 0

    def freeze(self) -> PacketCapture:
        with self.host:
            capture = PacketCapture(SERVICE)
            capture.start()
            for fd in self.fds:
                tcp.lock(fd)
            self.states = [tcp.capture(fd) for fd in self.fds]
        return capture

    def roll_back(self, capture: PacketCapture) -> None:
        with self.host:
            for fd in self.fds:
                tcp.release(fd)
            self.replayed = replay(capture.drain(), SERVICE)
        capture.close()

    def move(
        self,
        destination: Host,
        pause: Callable[[], None] = nothing,
        lossless: bool = True,
        transfer: Callable[[], None] = nothing,
    ) -> None:
        """`transfer` is called while the sockets are held still, `pause` when they are rebuilt as well."""
        capture = self.freeze()
        transfer()
        announcer = self._announcer(destination)
        with destination:
            rebuilt = [tcp.rebuild(state) for state in self.states]
        pause()
        addresses = self._withdraw()
        with self.host:
            packets = capture.drain()
        for fd in self.fds:
            os.close(fd)
        self.host, self.fds = destination, rebuilt
        self._arrive(addresses)
        with destination:
            self.replayed = replay(packets, SERVICE) if lossless else 0
            for address in addresses:
                service_address.announce(address, INTERFACE, announcer)
            self.replayed += replay(capture.drain(), SERVICE) if lossless else 0
        announcer.close()
        capture.close()

    @staticmethod
    def _announcer(host: Host) -> Announcer:
        with host:
            return Announcer()

    def _withdraw(self) -> list[ServiceAddress]:
        with self.host:
            addresses = service_address.find(SERVICE)
            for address in addresses:
                service_address.withdraw(address)
        return addresses

    def _arrive(self, addresses: list[ServiceAddress]) -> None:
        with self.host:
            for address in addresses:
                service_address.install(address, INTERFACE)
            for fd, state in zip(self.fds, self.states, strict=True):
                tcp.activate(fd, state)

    def sockets(self) -> list[socket.socket]:
        """The sockets as Python objects, which own them from now on."""
        made = [socket.socket(fileno=fd) for fd in self.fds]
        for one in made:
            one.settimeout(20)
        self.fds = []
        return made


@dataclass
class Family:
    """How a client and a server may reach each other."""

    server: int
    client: int
    listen: str
    address: str


FAMILIES = {
    "ipv4": Family(socket.AF_INET, socket.AF_INET, V4, V4),
    "ipv6": Family(socket.AF_INET6, socket.AF_INET6, V6, V6),
    "mapped": Family(socket.AF_INET6, socket.AF_INET, "::", V4),
}


@dataclass
class Wire:
    """A client's host and two between which a service moves, now on `first`."""

    client: Host
    first: Host
    second: Host

    def listen(self, family: Family) -> socket.socket:
        listener = self.first.socket(family.server)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((family.listen, PORT))
        listener.listen(16)
        return listener

    def connect(self, family: Family) -> tuple[socket.socket, socket.socket]:
        """(client's socket, server's); the listener is closed again."""
        with self.listen(family) as listener:
            client = self.client.socket(family.client)
            client.connect((family.address, PORT))
            server, _ = listener.accept()
        server.settimeout(20)
        return client, server

    def resets(self) -> int:
        return sum(host.counter("Tcp.OutRsts") for host in (self.client, self.first, self.second))


@contextmanager
def three_hosts() -> Iterator[Wire]:
    with segment("client", "first", "second") as hosts:
        hosts[1].ip(f"addr add {V4}/24 dev {INTERFACE}", f"addr add {V6}/64 dev {INTERFACE} nodad")
        yield Wire(*hosts)


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


def deafen(sock: socket.socket) -> None:
    sock_filter.attach(sock, sock_filter.assemble([(sock_filter.BPF_RET_K, 0, 0, 0)]))


def enter(state: TcpState, wire: Wire, client: socket.socket, server: socket.socket) -> None:
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
        with wire.first:
            tcp.lock(server.fileno())
    if state != TcpState.CLOSE_WAIT:
        server.shutdown(socket.SHUT_WR)
    wait_for(lambda: state_of(server) == state, state.name)


HALF_CLOSED = [
    TcpState.CLOSE_WAIT,
    TcpState.FIN_WAIT1,
    TcpState.FIN_WAIT2,
    TcpState.LAST_ACK,
    TcpState.CLOSING,
]


def options_of(sock: socket.socket) -> dict[str, bytes | None]:
    values = {name: options.get(sock, option) for name, option in options.OPTIONS.items()}
    values["SO_REUSEADDR"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 4)
    values["SO_BUF_LOCK"] = sock.getsockopt(socket.SOL_SOCKET, 72, 4)
    values["device"] = sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16)
    return values


def accept(wire: Wire, listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = wire.client.socket(socket.AF_INET)
    client.connect((V4, PORT))
    server, _ = listener.accept()
    server.settimeout(20)
    return client, server


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
