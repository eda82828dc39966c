"""The way to a service: each HTTP connection is a `migrate-agent connect`, here or over one ssh connection.

    aiohttp -- socketpair -- ssh session, or subprocess -- migrate-agent connect -- unix socket -- the service

What `connect` says first (`agent/server/connect.py`) tells who answers, before any request is made. Lines
before that are a login script's; they are shown and otherwise ignored.
"""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

import aiohttp

from agent import launch, version
from agent.api import PROTOCOL_VERSION, Connected, SshOptions
from migrate.errors import ExitCode, Failure
from migrate.hello import Hello, connected_of
from transport.link_errors import LinkError
from transport.process import Bridge, ProcessEnd, bridge_local
from transport.target import HostTarget

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler

DEFAULT_AGENT: Final = SshOptions().agent_command
MAX_SHOWN: Final = 4096
END_TIMEOUT: Final = 3.0  # seconds that a broken connection may take to say why
_NO_CONNECT: Final = "No such command 'connect'"

OnLine = Callable[[str], None]


class Lost(Failure):
    """The connection broke while something was asked for: whether it was done is not known."""


class Way(Protocol):
    """How `migrate-agent connect` is started on a host; many at once."""

    name: str  # of the host, for messages

    async def open(self, sock: socket.socket) -> Bridge:
        """Start one on the other end of `sock`; LinkError, OSError."""

    def reached_at(self) -> str | None:
        """The address of the host that this way leads to, if it is known here."""

    async def close(self) -> None: ...


class LocalWay:
    """On this host."""

    name = "this host"

    def __init__(self, ssh: SshOptions, on_line: OnLine) -> None:
        command, self._environment = launch.module("agent.main")
        if ssh.agent_command != DEFAULT_AGENT:
            command = shlex.split(ssh.agent_command)
        self._argv = [*command, "connect"]
        self._on_line = on_line

    async def open(self, sock: socket.socket) -> Bridge:
        return await bridge_local(self._argv, self._environment, sock, self._on_line)

    def reached_at(self) -> str | None:
        return None

    async def close(self) -> None:
        """Each connection ends by itself."""


class SshWay:
    """On another host, over one ssh connection."""

    def __init__(self, host: HostTarget, ssh: SshOptions, on_line: OnLine) -> None:
        self.name = str(host)
        self._host = host
        self._ssh = ssh
        self._on_line = on_line
        self._connection: Any = None
        self._lock = asyncio.Lock()

    async def open(self, sock: socket.socket) -> Bridge:
        from transport import ssh

        try:
            async with self._lock:
                if self._connection is None:
                    self._connection = await ssh.connect(self._host, self._ssh)
        except BaseException:
            sock.close()
            raise
        command = ssh.agent_command(self._ssh, ["connect"])
        return await ssh.open_bridge(self._connection, self._host, command, sock, self._on_line)

    def reached_at(self) -> str | None:
        from transport import ssh

        return None if self._connection is None else ssh.peer_address(self._connection)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.abort()
            await self._connection.wait_closed()


def way_to(host: HostTarget | None, ssh: SshOptions, on_line: OnLine) -> Way:
    return LocalWay(ssh, on_line) if host is None else SshWay(host, ssh, on_line)


class Connector(aiohttp.BaseConnector):
    """aiohttp's connections, made this way. Failure where none can be made."""

    def __init__(self, way: Way, on_line: OnLine) -> None:
        super().__init__(limit=0)
        self._way = way
        self._on_line = on_line
        self._bridges: list[Bridge] = []
        self.connected: Connected | None = None  # what the last one said

    async def _create_connection(self, req: object, traces: object, timeout: object) -> ResponseHandler:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            bridge = await self._open(theirs)
            self.connected = self._agreed(await self._hello(ours, bridge))
            _, protocol = await asyncio.get_running_loop().create_connection(self._factory, sock=ours)
        except BaseException:
            ours.close()
            raise
        return protocol

    async def why(self, error: Exception) -> Lost:
        """What is known about a connection that broke."""
        reason = self._unclean_end()
        still = [bridge.ended for bridge in self._bridges if not bridge.ended.done()]
        if reason is None and still:
            await asyncio.wait(still, timeout=END_TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            reason = self._unclean_end()
        if reason is not None:
            return Lost(reason.kind, str(reason), "link", ExitCode.UNREACHABLE)
        message = f"{self._way.name}: the agent's service has ended ({error})"
        return Lost("agent-failed", message, "source", ExitCode.UNREACHABLE)

    def _unclean_end(self) -> LinkError | None:
        ends = [bridge.ended.result() for bridge in self._bridges if bridge.ended.done()]
        return next((end.error() for end in reversed(ends) if not end.clean), None)

    async def hang_up(self) -> None:
        """After `close`: wait until nothing of the connections is left here."""
        await self._all_ended()
        for bridge in self._bridges:
            bridge.kill()
        await self._all_ended()

    async def _all_ended(self) -> None:
        ended = [bridge.ended for bridge in self._bridges]
        if ended:
            await asyncio.wait(ended, timeout=END_TIMEOUT)

    async def _open(self, sock: socket.socket) -> Bridge:
        try:
            bridge = await self._way.open(sock)
        except LinkError as error:
            raise Failure.of_link(error) from error
        except OSError as error:
            message = f"the agent cannot be started: {error}"
            raise Failure("agent-not-found", message, "coordinator", ExitCode.UNREACHABLE) from error
        self._bridges = [b for b in self._bridges if not b.ended.done()] + [bridge]
        return bridge

    async def _hello(self, sock: socket.socket, bridge: Bridge) -> bytes:
        hello = Hello()
        while True:
            data = b"" if hello.full else await _receive(sock)
            if not data:
                self._show(hello.noise[:MAX_SHOWN])
                sock.close()
                raise self._no_hello(await asyncio.shield(bridge.ended))
            line = hello.feed(data)
            if line is not None:
                self._show(hello.noise)
                return line

    def _show(self, noise: bytes) -> None:
        """Once: a login script says the same each time."""
        if self.connected is not None:
            return
        for line in noise.decode("utf-8", "replace").splitlines():
            self._on_line(line)

    def _no_hello(self, end: ProcessEnd) -> Failure:
        if any(_NO_CONNECT in line for line in end.said):
            return self._other_version("an older version, with a protocol below 2")
        return Failure.of_link(end.error())

    def _agreed(self, hello: bytes) -> Connected:
        """Failure if it is an agent of another protocol."""
        connected = connected_of(hello)
        if connected is None:
            raise self._other_version("another version, which cannot be understood")
        health = connected.health
        if health.protocol != PROTOCOL_VERSION:
            raise self._other_version(f"version {health.version} with protocol {health.protocol}")
        return connected

    def _other_version(self, theirs: str) -> Failure:
        ours = f"version {version.installed()} with protocol {PROTOCOL_VERSION}"
        hint = "install the same version of migrate on both"
        message = f"{self._way.name}: its migrate-agent is {theirs}, this is {ours} ({hint})"
        return Failure("version", message, "source", ExitCode.REFUSED)


async def _receive(sock: socket.socket) -> bytes:
    try:
        return await asyncio.get_running_loop().sock_recv(sock, 65536)
    except OSError:
        return b""
