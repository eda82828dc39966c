"""TCP sockets as descriptors: the adapter between the registry of kinds and `agent.resources.tcp`."""

from __future__ import annotations

import os
import socket
from typing import Final

import msgspec

from agent.api import Blocker
from agent.descriptors import OpenFile, Rebuilding, SourceProcess
from agent.resources import tcp

NAME: Final = "tcp"
IPPROTO_MPTCP: Final = 262


class State(msgspec.Struct, frozen=True):
    tcp: tcp.TcpConnection | tcp.TcpListener
    flags: int


def recognise(file: OpenFile) -> bool:
    if file.socket is None:
        return False
    family, kind, protocol = file.socket
    inet = family in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_STREAM
    return inet and protocol in (socket.IPPROTO_TCP, IPPROTO_MPTCP)


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return tcp.blockers(process.duplicate(file.fd), file.name)


def capture(file: OpenFile, process: SourceProcess) -> State:
    return State(tcp.capture(process.duplicate(file.fd)), file.flags & os.O_NONBLOCK)


def rebuild(state: State, context: Rebuilding) -> int:
    """Locked and in repair until `tcp.activate`."""
    fd = tcp.rebuild(state.tcp)
    os.set_blocking(fd, not state.flags & os.O_NONBLOCK)
    context.sockets.append((fd, state.tcp))
    return fd
