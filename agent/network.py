"""The network side of a migration on either host: which addresses move, sockets locked and let go, packets kept.

Order, so that no peer ever sees a reset or an answer from the wrong host: on the source, capture starts before the first
lock; the address is withdrawn right after COMMIT was sent and before the sockets are closed (under repair: silently). On
the destination, the address is installed after COMMIT, then the sockets are activated, then neighbours are told.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from agent.api import Blocker, Notice
from agent.kernel.addresses import Announcer
from agent.kernel.packet import Injector
from agent.kernel.sock_diag import SockDiag
from agent.kernel.tcp_repair import TcpState
from agent.resources import service_address, tcp
from agent.resources.service_address import ServiceAddress
from agent.resources.switchover import PacketCapture, replay
from agent.resources.tcp_socket import recognise

if TYPE_CHECKING:
    from agent.descriptors import SourceProcess
    from agent.inventory import Inventory

_ANNOUNCEMENTS = 3


class SourceNetwork:
    """The source's part."""

    def __init__(self) -> None:
        self.addresses: list[ServiceAddress] = []
        self.listeners: list[tcp.TcpListener] = []
        self.blockers: list[Blocker] = []
        self.notices: list[Notice] = []
        self._capture: PacketCapture | None = None
        self._locked: list[int] = []
        self._diag: SockDiag | None = None
        self._withdrawn = False

    def plan(self, found: Inventory, process: SourceProcess, wanted: tuple[str, ...] | None) -> None:
        """Which addresses the connections need, and why they could not move. Touches nothing."""
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
            if not _stays_valid(info.local.address):
                needed.setdefault(info.local.address, file.name)
        self._decide(needed, wanted, inodes)

    def _decide(self, needed: dict[str, str], wanted: tuple[str, ...] | None, inodes: set[int]) -> None:
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
        self.blockers += service_address.takeover_blockers(chosen, _link_addresses(), inodes)
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
        self._locked = fds
        for fd in fds:
            tcp.lock(fd)

    def busy(self) -> bool:
        """Whether a connection waits to be accepted, is half open, or has ended and is about to be closed."""
        assert self._diag is not None
        for fd in self._locked:
            info = tcp.inspect(fd)
            if info.state == TcpState.CLOSE and info.used:
                return True
            if info.state == TcpState.LISTEN and tcp.pending_accepts(fd, self._diag):
                return True
        return False

    def unlock(self, give_back: bool = True) -> None:
        """Roll back: every socket as it was, and what arrived meanwhile arrives now.

        Without `give_back` a withdrawn address stays withdrawn: another host may have it.
        """
        for fd in self._locked:
            tcp.release(fd)
        self._locked = []
        if self._withdrawn and give_back:
            for address in self.addresses:
                service_address.restore(address)
            self._withdrawn = False
        if self._capture is not None and give_back:
            self._capture.stop()
            with contextlib.suppress(OSError, ValueError):  # their senders repeat them
                replay(self._capture.drain(), [a.address for a in self.addresses])

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


def _stays_valid(address: str) -> bool:
    """Wildcard and loopback addresses mean the same on every host."""
    return address in ("0.0.0.0", "::", "") or address.startswith("127.") or address == "::1"


def _link_addresses() -> list[str]:
    """The address that this agent was reached at."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2:3]


class DestinationNetwork:
    """The destination's part."""

    def __init__(self) -> None:
        self._places: list[tuple[ServiceAddress, str]] = []
        # opened early, closed late: the kernel takes milliseconds over them
        self._announcer: Announcer | None = None
        self._injector: Injector | None = None

    def check(self, addresses: tuple[ServiceAddress, ...], listeners: tuple[tcp.TcpListener, ...]) -> list[Blocker]:
        """Why this host could not have them; remembers where each address goes."""
        found: list[Blocker] = []
        for address in addresses:
            place = service_address.place(address)
            if isinstance(place, Blocker):
                found.append(place)
            else:
                self._places.append((address, place))
        found += [b for b in (tcp.can_listen(one) for one in listeners) if b is not None]
        if self._places:
            self._announcer, self._injector = Announcer(), Injector()
        return found

    @property
    def moved(self) -> tuple[str, ...]:
        return tuple(address.address for address, _ in self._places)

    def take_over(self, sockets: list[tuple[int, tcp.TcpSocket]]) -> list[Notice]:
        """After COMMIT: addresses here, sockets alive, neighbours told. What fails is said: there is no way back."""
        notices: list[Notice] = []

        def attempt(what: str, action: Callable[[], object]) -> None:
            try:
                action()
            except Exception as error:
                notices.append(Notice(kind="network", message=f"{what}: {error}"))

        for address, interface in self._places:
            attempt(f"address {address.address}", partial(service_address.install, address, interface))
        for fd, state in sockets:
            attempt(f"socket {state.local}", partial(tcp.activate, fd, state))
        for address, interface in self._places:
            attempt(f"announcing {address.address}", partial(service_address.announce, address, interface, self._announcer))
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


