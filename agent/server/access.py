"""Who asks, by the kernel's word (SO_PEERCRED, unix(7)), and what they may.

Root, and the user whose service it is, may do everything. Where the socket is open to a group, its members
may use the routes that are for everyone, for processes and migrations of their own, and only with what the
operator has listed: root's ssh keys, configuration and commands are not theirs to choose.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from aiohttp import web

from agent.api import ErrorInfo, Request, SshOptions
from agent.ownership import foreign
from agent.server.failures import Failed
from transport.target import parse_host

_UCRED: Final = struct.Struct("3i")  # pid, uid, gid
ASK: Final = "ask root, or whoever set up the service (`migrate-agent serve --group`)"


class Users(msgspec.Struct, frozen=True, kw_only=True):
    """What members of the group may choose. `addresses`: those that may move with their processes."""

    gid: int
    destinations: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()


USERS: Final = web.AppKey("users", Users)


def caller(request: web.Request) -> int | None:
    """The user id of who asks; None for those who may do everything."""
    sock: socket.socket = request.get_extra_info("socket")
    _, uid, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return None if uid in (0, os.geteuid()) else int(uid)


def only_privileged(
    handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The same for root alone."""

    async def guarded(request: web.Request) -> web.StreamResponse:
        if caller(request) is not None:
            raise _forbidden(f"{request.path} is for root alone", ASK)
        return await handler(request)

    return guarded


def permitted(request: web.Request, wanted: Request) -> Request:
    """What is asked, as it may be done for who asks; Failed (403) if it may not."""
    uid = caller(request)
    if uid is None:
        return wanted
    users = request.app[USERS]
    _check_process(wanted.pid, uid)
    _check_destination(wanted.destination, users)
    _check_ssh(wanted.ssh)
    _check_options(wanted, users)
    # their ssh-agent is not asked: it is root who connects; no address moves that was not named and allowed
    options = msgspec.structs.replace(wanted.options, addresses=wanted.options.addresses or ())
    return msgspec.structs.replace(wanted, owner=uid, ssh=SshOptions(), options=options)


def _forbidden(what: str, hint: str) -> Failed:
    return Failed(403, ErrorInfo(kind="forbidden", message=f"{what}: {hint}", where="source"))


def _check_process(pid: int, uid: int) -> None:
    """One answer for what is somebody else's and what is not there: who looks shall not learn which."""
    try:
        why = foreign(pid, uid)
    except ProcessLookupError:
        why = "gone"
    if why:
        what = f"process {pid} is not there, or not yours alone (user ids, capabilities, dumpable)"
        raise _forbidden(what, "move a process of your own, or ask root")


def _check_destination(destination: str, users: Users) -> None:
    if parse_host(destination) in map(parse_host, users.destinations):
        return
    allowed = ", ".join(users.destinations) or "none"
    raise _forbidden(
        f"users may not move to {destination} (allowed: {allowed})",
        "choose one of those, or let root start the service with --allow-destination",
    )


def _check_ssh(ssh: SshOptions) -> None:
    default = SshOptions()
    for name in ("identity", "config", "agent_command"):
        if getattr(ssh, name) != getattr(default, name):
            raise _forbidden(
                f"ssh.{name} would be used by root", "leave it out: root's own ssh configuration decides"
            )


def _check_options(wanted: Request, users: Users) -> None:
    if wanted.options.copy_files:
        raise _forbidden("copy_files would write files as root", "have the files put there, or ask root")
    allowed = {ipaddress.ip_address(each) for each in users.addresses}
    for address in wanted.options.addresses or ():
        if ipaddress.ip_address(address) not in allowed:
            raise _forbidden(
                f"users may not move address {address} (allowed: {', '.join(users.addresses) or 'none'})",
                "let root start the service with --allow-address",
            )
