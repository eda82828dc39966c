"""How a person names a host: `[user@]host[:port]`, an IPv6 address in brackets.

The host part is a name that ssh_config may give a meaning to, so it is not resolved here; only what could
not be a name, or could be taken for an option of a command, is refused.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

import msgspec

_LABEL: Final = r"[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_NAME: Final = re.compile(rf"(?=.{{1,255}}\Z){_LABEL}(?:\.{_LABEL})*\.?")
_ZONE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")
_USER: Final = re.compile(r"[A-Za-z0-9_.][^\s:/\[\]\x00-\x1f\x7f]{0,254}")
_PORT: Final = re.compile(r"[0-9]{1,5}")


class InvalidTarget(ValueError):
    """The text does not name a host (or a process on one); the message says why."""


class HostTarget(msgspec.Struct, frozen=True):
    """A host as it was named. `user` and `port` are None where ssh_config or its defaults decide."""

    host: str  # a name or an address, without brackets
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = "" if self.user is None else f"{self.user}@"
        return user + host + ("" if self.port is None else f":{self.port}")


def parse_host(text: str) -> HostTarget:
    """Parse `[user@]host[:port]`; InvalidTarget."""
    user, at, rest = text.rpartition("@")
    if at and not _USER.fullmatch(user):
        raise InvalidTarget(f"{text!r}: {user!r} is not a user name")
    host, port = _split_bracketed(text, rest) if rest.startswith("[") else _split_plain(text, rest)
    return HostTarget(host, user if at else None, port)


def _split_bracketed(text: str, rest: str) -> tuple[str, int | None]:
    address, bracket, tail = rest[1:].partition("]")
    if not bracket:
        raise InvalidTarget(f"{text!r}: the bracket is never closed")
    zone = address.partition("%")[2]
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        raise InvalidTarget(f"{text!r}: {address!r} is not an IPv6 address") from None
    if zone and not _ZONE.fullmatch(zone):
        raise InvalidTarget(f"{text!r}: {zone!r} is not the name of an interface")
    if tail and not tail.startswith(":"):
        raise InvalidTarget(f"{text!r}: after the bracket only :PORT may follow")
    return address, _port(text, tail[1:]) if tail else None


def _split_plain(text: str, rest: str) -> tuple[str, int | None]:
    if rest.count(":") > 1:
        raise InvalidTarget(f"{text!r}: write an IPv6 address in brackets, as in [::1]:22")
    host, colon, port = rest.partition(":")
    if not _NAME.fullmatch(host):
        raise InvalidTarget(
            f"{text!r}: {host!r} is not a host name" if host else f"{text!r}: no host is named"
        )
    return host, _port(text, port) if colon else None


def _port(text: str, digits: str) -> int:
    if not _PORT.fullmatch(digits) or not 0 < int(digits) < 65536:
        raise InvalidTarget(f"{text!r}: {digits!r} is not a port (1 to 65535)")
    return int(digits)
