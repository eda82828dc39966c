"""The network side of a migration on either host: which addresses move, sockets locked, let go, packets kept.

Order, so that no peer ever sees a reset or an answer from the wrong host: on the source, capture starts
before the first lock; the address is withdrawn right after COMMIT was sent and before the sockets are closed
(under repair: silently). On the destination, the address is installed after COMMIT, then the sockets are
activated, then neighbours are told.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from agent.api import Blocker, Notice
from agent.kernel.addresses import Announcer
from agent.kernel.packet import Injector
from agent.kernel.sock_diag import SockDiag
from agent.resources import service_address, tcp
from agent.resources.service_address import ServiceAddress, stays_valid
from agent.resources.switchover import PacketCapture, replay
from agent.resources.tcp_socket import recognise

if TYPE_CHECKING:
    from agent.descriptors import SourceProcess
    from agent.inventory import Inventory

_ANNOUNCEMENTS = 3
_ATTEMPTS = 3
_BETWEEN_ATTEMPTS = 0.01  # seconds


class SourceNetwork:
    """The source's part."""

    def __init__(self) -> None:
        self.addresses: list[ServiceAddress] = []
        self.listeners: list[tcp.TcpListener] = []
        self.connections: list[tcp.TcpConnection] = []  # outlines, for the destination to try
        self.blockers: list[Blocker] = []
        self.notices: list[Notice] = []
        self._capture: PacketCapture | None = None
        self._locked: list[int] = []
        self._diag: SockDiag | None = None
        self._withdrawn = False

    def plan(
        self, found: Inventory, process: SourceProcess, wanted: tuple[str, ...] | None, reached_at: str | None
    ) -> None:
        """Which addresses the connections need, and why they could not move. Touches nothing.

        `reached_at`, the address that whoever asks for it came by, stays in any case.
        """
        needed: dict[str, str] = {}
        inodes: set[int] = set()
        for file in found.descriptors:
            if not recognise(file):
                continue
            inodes.add(file.inode)
            ours = process.duplicate(file.fd)
            if tcp.blockers(ours, file.name):
                continue  # said by its kind; there is nothing to plan for it
            info = tcp.inspect(ours)
            if info.peer is None:
                state = tcp.capture(ours)
                if isinstance(state, tcp.TcpListener):
                    self.listeners.append(state)
            else:
                self.connections.append(tcp.outline(ours))
            if not stays_valid(info.local.address):
                needed.setdefault(info.local.address, file.name)
        self._decide(needed, wanted, [reached_at] if reached_at else [], inodes)

    def _decide(
        self, needed: dict[str, str], wanted: tuple[str, ...] | None, staying: list[str], inodes: set[int]
    ) -> None:
        chosen = list(needed) if wanted is None else list(wanted)
        for address, name in needed.items():
            if address not in chosen:
                self.blockers.append(
                    Blocker(
                        kind="address-stays",
                        what=name,
                        why=f"it is bound to {address}, which was not asked to move",
                        hint=f"add --address {address}",
                    )
                )
        if not chosen:
            return
        self.blockers += service_address.takeover_blockers(chosen, staying, inodes)
        if not self.blockers:
            self.addresses = service_address.find(chosen)

    def prepare(self) -> None:
        """Before the freeze: open everything it will need."""
        self._diag = SockDiag()
        if self.addresses:
            self._capture = PacketCapture([a.address for a in self.addresses])

    def start_capture(self) -> None:
        if self._capture is not None:
            self._capture.start()

    def lock(self, fds: list[int]) -> None:
        for fd in fds:
            self._locked.append(fd)
            tcp.lock(fd)

    def busy(self) -> bool:
        """Whether a connection waits to be accepted, is half open, or has ended and is about to be closed."""
        assert self._diag is not None
        return any(tcp.unsettled(fd, self._diag) for fd in self._locked)

    def silence(self) -> None:
        """Whoever closes the sockets now sends nothing."""
        for fd in self._locked:
            tcp.silence(fd)

    def unlock(self) -> None:
        """Roll back: every socket as it was, and what arrived meanwhile arrives now.

        Each step is done, whatever fails.
        """
        with contextlib.ExitStack() as steps:
            if self._capture is not None:
                steps.callback(self._replay, self._capture)
            if self._withdrawn:
                for address in self.addresses:
                    steps.callback(service_address.restore, address)
            while self._locked:
                steps.callback(tcp.release, self._locked.pop())
        self._withdrawn = False

    def _replay(self, capture: PacketCapture) -> None:
        capture.stop()
        with contextlib.suppress(OSError, ValueError):  # their senders repeat them
            replay(capture.drain(), [a.address for a in self.addresses])

    def give_up(self) -> None:
        """In doubt: another host may have the connections. They stay locked, the addresses away from here."""
        if not self._withdrawn:
            self.withdraw()
        self._locked.clear()

    def release(self) -> None:
        self.unlock()
        self.close()

    def withdraw(self) -> None:
        """After COMMIT: this host answers nothing for the addresses any more."""
        self._withdrawn = True
        for address in self.addresses:
            service_address.withdraw(address)

    def captured(self) -> list[bytes]:
        return self._capture.drain() if self._capture is not None else []

    def close(self) -> None:
        if self._capture is not None:
            self._capture.close()
            self._capture = None
        if self._diag is not None:
            self._diag.close()
            self._diag = None


class DestinationNetwork:
    """The destination's part."""

    def __init__(self) -> None:
        self._places: list[tuple[ServiceAddress, str]] = []
        self.agreed: set[str] = set()  # addresses that sockets may have, besides those of every host
        # opened early, closed late: the kernel takes milliseconds over them
        self._announcer: Announcer | None = None
        self._injector: Injector | None = None

    def check(
        self,
        addresses: tuple[ServiceAddress, ...],
        listeners: tuple[tcp.TcpListener, ...],
        connections: tuple[tcp.TcpConnection, ...] = (),
    ) -> list[Blocker]:
        """Why this host could not have them; remembers where each address goes."""
        found: list[Blocker] = []
        for address in addresses:
            self.agreed.add(address.address)
            place = service_address.place(address)
            if isinstance(place, Blocker):
                found.append(place)
            else:
                self._places.append((address, place))
        sockets: tuple[tcp.TcpSocket, ...] = (*listeners, *connections)
        found += [
            Blocker(
                kind="address-stays",
                what=f"tcp {one.local}",
                why="it is bound to an address that does not move along",
                hint=f"add --address {one.local.address}",
            )
            for one in sockets
            if not self.may_have(one.local.address)
        ]
        asked = [*(tcp.can_listen(one) for one in listeners), *(tcp.can_connect(one) for one in connections)]
        found += [b for b in asked if b is not None]
        if self._places and self._announcer is None:
            self._announcer, self._injector = Announcer(), Injector()
        return found

    def may_have(self, address: str) -> bool:
        """Whether a socket of the process may have this local address here."""
        return address in self.agreed or stays_valid(address)

    @property
    def places(self) -> list[tuple[ServiceAddress, str]]:
        """Addresses that come here, each with its interface."""
        return self._places

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(address.address for address, _ in self._places)

    def take_over(self, sockets: list[tuple[int, tcp.TcpSocket]]) -> list[Notice]:
        """After COMMIT: addresses here, sockets alive, neighbours told. What fails is said; no way back."""
        notices: list[Notice] = []

        def attempt(what: str, action: Callable[[], object]) -> None:
            try:
                action()
            except Exception as error:
                notices.append(Notice(kind="network", message=f"{what}: {error}"))

        for address, interface in self._places:
            install = partial(service_address.install, address, interface)
            attempt(f"address {address.address}", partial(_insist, install))
        for fd, state in sockets:
            attempt(f"socket {state.local}", partial(tcp.activate, fd, state))
        for address, interface in self._places:
            attempt(
                f"announcing {address.address}",
                partial(service_address.announce, address, interface, self._announcer),
            )
        return notices

    def replay(self, packets: list[bytes]) -> None:
        if packets:
            replay(packets, self.moved, self._injector)

    def announce_again(self) -> None:
        """Frames can get lost: repeated over a moment."""
        for _ in range(_ANNOUNCEMENTS - 1):
            time.sleep(0.1)
            for address, interface in self._places:
                service_address.announce(address, interface, self._announcer)

    def close(self) -> None:
        for one in (self._announcer, self._injector):
            if one is not None:
                one.close()


def _insist(action: Callable[[], object]) -> None:
    """Of what may be done twice, where it must not fail: a moment without memory or descriptors passes."""
    for _ in range(_ATTEMPTS - 1):
        try:
            action()
            return
        except OSError:
            time.sleep(_BETWEEN_ATTEMPTS)
    action()
