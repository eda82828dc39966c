"""Sockets and their service addresses, moved between hosts in the order in which a migration does it."""

from __future__ import annotations

import os
from collections.abc import Sequence

from segment import Host

from agent.kernel.addresses import Announcer
from agent.resources import service_address, tcp
from agent.resources.service_address import ServiceAddress
from agent.resources.switchover import PacketCapture, replay

V4, V6 = "10.77.0.100", "fd77::100"
SERVICE = (V4, V6)


def give_service(host: Host) -> None:
    host.run("ip", "addr", "add", f"{V4}/24", "dev", "eth0")
    host.run("ip", "addr", "add", f"{V6}/64", "dev", "eth0", "nodad")


class Service:
    """Descriptors of sockets (listeners first) on `host`, and the addresses they are reached at."""

    def __init__(self, host: Host, fds: Sequence[int]) -> None:
        self.host = host
        self.fds = list(fds)
        self.replayed = 0
        self.states: list[tcp.TcpSocket] = []

    def freeze(self) -> tuple[list[ServiceAddress], PacketCapture]:
        with self.host:
            addresses = service_address.find(SERVICE)
            capture = PacketCapture(SERVICE)
            capture.start()
            for fd in self.fds:
                tcp.lock(fd)
            self.states = [tcp.capture(fd) for fd in self.fds]
        return addresses, capture

    def roll_back(self, capture: PacketCapture) -> None:
        with self.host:
            for fd in self.fds:
                tcp.release(fd)
            replay(capture.drain(), SERVICE)
            capture.close()

    def move(self, destination: Host, loss_free: bool = True) -> None:
        addresses, capture = self.freeze()
        with destination:
            rebuilt = [tcp.rebuild(state) for state in self.states]
        with self.host:
            for address in addresses:
                service_address.withdraw(address)
            packets = capture.drain()
            for fd in self.fds:
                os.close(fd)
        with destination:
            for address in addresses:
                service_address.install(address, "eth0")
            for fd, state in zip(rebuilt, self.states, strict=True):
                tcp.activate(fd, state)
            if loss_free:
                self.replayed += replay(packets, SERVICE)
            announcer = Announcer()
            for address in addresses:
                service_address.announce(address, "eth0", announcer)
            if loss_free:
                self.replayed += replay(capture.drain(), SERVICE)
        announcer.close()
        capture.close()
        self.host, self.fds = destination, rebuilt
