"""Sockets and their service addresses, moved between hosts in the order in which a migration does it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from segment import Host, segment

from agent.kernel.addresses import Announcer
from agent.resources import service_address, tcp
from agent.resources.service_address import ServiceAddress
from agent.resources.switchover import PacketCapture, replay

V4, V6 = "10.77.0.100", "fd77::100"
SERVICE = (V4, V6)
PORT = 7000
INTERFACE = "eth0"


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

    def move(self, destination: Host, pause: Callable[[], None] = nothing, lossless: bool = True) -> None:
        """`pause` is called while the sockets are held still on the source and rebuilt on the destination."""
        capture = self.freeze()
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
class Lab:
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
def laboratory() -> Iterator[Lab]:
    with segment("client", "first", "second") as hosts:
        hosts[1].run("ip", "addr", "add", f"{V4}/24", "dev", INTERFACE)
        hosts[1].run("ip", "addr", "add", f"{V6}/64", "dev", INTERFACE, "nodad")
        yield Lab(*hosts)
