"""TCP sockets as descriptors: the adapter between the registry of kinds and `agent.resources.tcp`."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final

import msgspec

from agent.api import Blocker
from agent.bounds import Nonblocking
from agent.descriptors import OpenFile, Rebuilding, Refusal, SourceProcess, not_agreed
from agent.kernel.tcp_repair import borrow
from agent.reasons import Shortage, explained
from agent.resources import tcp
from agent.resources.service_address import stays_valid
from agent.resources.tcp import options
from agent.tracee import Tracee

NAME: Final = "tcp"
IPPROTO_MPTCP: Final = 262


class State(msgspec.Struct, frozen=True):
    tcp: tcp.TcpConnection | tcp.TcpListener
    flags: Nonblocking


def validate(state: State) -> None:
    """ValueError for a received state that is none."""
    tcp.validate(state.tcp)


def recognise(file: OpenFile) -> bool:
    if file.socket is None:
        return False
    family, kind, protocol = file.socket
    inet = family in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_STREAM
    return inet and protocol in (socket.IPPROTO_TCP, IPPROTO_MPTCP)


def is_connection(file: OpenFile, process: SourceProcess) -> bool:
    """Not a listener, and not one that is only bound."""
    if not recognise(file):
        return False
    with borrow(process.duplicate(file.fd)) as sock:
        try:
            sock.getpeername()
        except OSError:
            return False
    return True


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return tcp.blockers(process.duplicate(file.fd), file.name)


def capture(file: OpenFile, process: SourceProcess) -> State:
    """A connection stays locked. In repair nobody could read it: it is not, for if we die the process runs
    on.
    """
    ours = process.duplicate(file.fd)
    captured = tcp.capture(ours)
    tcp.loosen(ours)
    return State(captured, file.flags & os.O_NONBLOCK)


def rebuild(state: State, context: Rebuilding) -> int:
    """Locked and in repair until `tcp.activate`. Refusal if it was not agreed, and could be another's, or
    cannot be had any more.
    """
    _check(state.tcp, context)
    try:
        fd = tcp.rebuild(state.tcp)
    except OSError as error:
        if isinstance(shortage := explained(error), Shortage):
            raise shortage from error
        raise Refusal.by(tcp.not_rebuilt(state.tcp, error)) from error
    os.set_blocking(fd, not state.flags & os.O_NONBLOCK)
    context.sockets.append((fd, state.tcp))
    return fd


def _check(one: tcp.TcpSocket, context: Rebuilding) -> None:
    """What listens, or is bound, was tried out at the offer; connections may have been made since."""
    if isinstance(one, tcp.TcpListener):
        if one.local.port and bound_to(one) not in context.listening:
            raise context.not_agreed(bound_to(one), f"tcp {one.local}")
    elif one.local.address not in context.addresses and not stays_valid(one.local.address):
        raise not_agreed(f"tcp {one.local}")


def bound_to(one: tcp.TcpListener) -> tuple[int, str, int]:
    return one.family, one.local.host, one.local.port


def rouse(state: State, fd: int, process: Tracee) -> Callable[[], None]:
    """Let it have an event (see `agent.silencing`): a listener shut down for a moment is hung up (tcp_poll).

    That keeps its port and its lock, but forgets some options. A connection needs nothing: it has room.
    """
    listener = state.tcp
    if not isinstance(listener, tcp.TcpListener) or listener.backlog is None:
        return lambda: None
    backlog = listener.backlog
    with socket.socket(fileno=os.dup(fd)) as sock:
        sock.shutdown(socket.SHUT_RD)

    def calm() -> None:
        with socket.socket(fileno=os.dup(fd)) as sock:
            options.apply(sock, listener.options, options.When.EARLY, listener=True)
            sock.listen(backlog)

    return calm
