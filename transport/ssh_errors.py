"""From asyncssh's exceptions and the socket layer's to `transport.link_errors`.

The one place that knows both.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

import asyncssh

from transport import link_errors as errors
from transport.target import HostTarget


class Trust(asyncssh.SSHClient):  # type: ignore[misc]
    """Remembers which key the host showed when nobody vouches for it; never trusts it."""

    def __init__(self, known: Any, files: Sequence[str]) -> None:
        self.known = known
        self.files = files
        self.shown: str | None = None
        self.on_record = False

    def validate_host_public_key(self, host: str, addr: str, port: int, key: Any) -> bool:
        self.shown = f"{key.get_algorithm()} {key.get_fingerprint()}"
        matched = self.known.match(host, addr, port if port != 22 else None)
        self.on_record = bool(matched[0] or matched[1])
        return False


def translate(error: Exception, target: HostTarget, trust: Trust | None) -> errors.LinkError:
    """The LinkError that says what `error` means for a person."""
    name = str(target)
    if isinstance(error, errors.LinkError):
        return error
    if isinstance(error, asyncssh.Error):
        return _ssh_error(error, target, trust)
    if isinstance(error, OSError):
        return _network_error(error, name)
    if isinstance(error, UnicodeError):
        return errors.HostNotFound(name, f"no such name is possible: {error}")
    if isinstance(error, asyncssh.KeyImportError):
        return errors.IdentityUnusable(name, f"a private key cannot be used: {error}", "see --identity")
    return errors.SshConfigInvalid(name, str(error), "correct ssh_config")


def _ssh_error(error: Exception, target: HostTarget, trust: Trust | None) -> errors.LinkError:
    name = str(target)
    if isinstance(error, asyncssh.HostKeyNotVerifiable):
        return _host_key_error(error, target, trust)
    if isinstance(error, asyncssh.KeyExchangeFailed) and "host key" in str(error):
        return errors.HostKeyChanged(name, "it has no key of the kind on record for it", _forget(target))
    if isinstance(error, asyncssh.PermissionDenied):
        return _authentication_error(error, name)
    if isinstance(error, asyncssh.ConnectionLost):
        return _broke_early(name)
    return errors.SshFailed(name, str(error), "see sshd's log there")


def _broke_early(name: str) -> errors.LinkError:
    return errors.ConnectionLost(name, "the connection broke before it was ready", "see sshd's log there")


def _forget(target: HostTarget) -> str:
    host = target.host if target.port is None else f"'[{target.host}]:{target.port}'"
    return f"if it was set up anew, forget its old key: ssh-keygen -R {host}"


def _host_key_error(error: Exception, target: HostTarget, trust: Trust | None) -> errors.LinkError:
    name = str(target)
    if trust is None or trust.shown is None:
        return errors.HostKeyRejected(name, str(error))
    where = ", ".join(trust.files) or "any known_hosts file"
    if trust.on_record:
        return errors.HostKeyChanged(
            name,
            f"it shows the key {trust.shown}, but another one is on record for it in {where}: it was set up "
            "anew, or somebody is in between",
            _forget(target),
        )
    return errors.HostKeyUnknown(
        name,
        f"its key {trust.shown} is not in {where}",
        f"compare the fingerprint with the host's own, then accept it with: ssh {_arguments(target)}",
    )


def _arguments(target: HostTarget) -> str:
    user = "" if target.user is None else f"{target.user}@"
    return ("" if target.port is None else f"-p {target.port} ") + user + target.host


def _authentication_error(error: Exception, name: str) -> errors.LinkError:
    return errors.AuthenticationFailed(
        name,
        f"{error}: it accepts none of our keys",
        "add the public key to authorized_keys there, or name another key with --identity; a key with a "
        "passphrase has to be in ssh-agent, and passwords are never asked for",
    )


def _network_error(error: OSError, name: str) -> errors.LinkError:
    if isinstance(error, socket.gaierror):
        return errors.HostNotFound(name, error.strerror or str(error))
    if isinstance(error, ConnectionResetError | BrokenPipeError):
        return _broke_early(name)
    if isinstance(error, TimeoutError):
        return errors.HostUnreachable(name, "no answer in time")
    if isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error):
        return errors.ConnectionRefused(name, "connection refused")
    return errors.HostUnreachable(name, error.strerror or str(error))
