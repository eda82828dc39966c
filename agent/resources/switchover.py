"""Lossless switchover: what arrives for a service address in the pause is kept and delivered to the new
place.

A dropped packet costs its sender a retransmission timeout (200 ms and more, a SYN a second); a packet that
arrives a pause late costs the pause. Source: `PacketCapture` is opened before the freeze, started first thing
in it, drained after the addresses were withdrawn and again until the neighbours know the new place.
Destination: `replay`, after the sockets are active. Undoing a freeze: `replay` on the source itself.
"""

from __future__ import annotations

import errno
import ipaddress
import time
from collections.abc import Collection, Iterable

from agent.kernel import packet
from agent.kernel.packet import Address, Injector, Tap

BUFFER_BYTES = 64 << 20  # the kernel's accounting: two to four times the packets' own size
_RETRY_SECONDS = 0.05


def _parsed(addresses: Iterable[str]) -> list[Address]:
    return [ipaddress.ip_address(one) for one in addresses]


class PacketCapture:
    """Copies of the TCP packets that arrive from outside for `addresses` (and `ports`, if given).

    Needs CAP_NET_RAW. Costs nothing while not started. `lost` counts packets that found no room: their
    senders will send them again by themselves.
    """

    def __init__(
        self, addresses: Iterable[str], ports: Collection[int] | None = None, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        parsed = _parsed(addresses)
        self._ports = None if ports is None else frozenset(ports)
        self.lost = 0
        self._taps: list[Tap] = []
        for version in (4, 6):
            own = [one for one in parsed if one.version == version]
            if own:
                self._taps.append(Tap(version, own, buffer_bytes))

    def start(self) -> None:
        """From now on copies are kept."""
        for tap in self._taps:
            tap.start()

    def stop(self) -> None:
        """Keep no more; what is kept can still be drained."""
        for tap in self._taps:
            tap.stop()

    def drain(self, max_packets: int = 20_000, max_bytes: int = 64 << 20) -> list[bytes]:
        """What arrived since the last call, whole IP packets in order of arrival; at most so many and so
        much.

        More may be waiting if a limit was reached: call again. Does not block.
        """
        packets: list[bytes] = []
        size = 0
        for tap in self._taps:
            while len(packets) < max_packets and size < max_bytes:
                one = tap.receive()
                if one is None:
                    break
                if self._wanted(one):
                    packets.append(one)
                    size += len(one)
            self.lost += tap.lost()
        return packets

    def _wanted(self, one: bytes) -> bool:
        if self._ports is None:
            return True
        port = packet.destination_port(one, packet.parse(one))
        return port is None or port in self._ports

    def close(self) -> None:
        """Takes milliseconds (the kernel waits for other CPUs): not in a pause."""
        for tap in self._taps:
            tap.close()


def replay(packets: Iterable[bytes], addresses: Iterable[str], injector: Injector | None = None) -> int:
    """Let `packets` arrive at this host, in order; returns how many did.

    Only whole TCP packets to one of `addresses`, which must be on this host by now, are let in: anything else
    came from a peer that is not what it should be, and raises ValueError before anything is delivered. A
    packet that this host's firewall or a smaller loopback MTU rejects is left out: its sender will send it
    again.
    """
    allowed = set(_parsed(addresses))
    checked = list(packets)
    for one in checked:
        if packet.parse(one).destination not in allowed:
            raise ValueError(f"a packet to {packet.parse(one).destination}, which is not being taken over")
    own = injector or Injector()
    try:
        return sum(_deliver(own, one) for one in checked)
    finally:
        if injector is None:
            own.close()


def _deliver(injector: Injector, one: bytes) -> bool:
    deadline = time.monotonic() + _RETRY_SECONDS
    while True:
        try:
            injector.inject(one)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN) or time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
