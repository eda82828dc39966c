"""Why a host could not be reached, or was lost: each reason its own class, with what, why and what to do.

`kind` is stable and goes into reports. The classes are raised where asyncssh and the socket layer are
called and nowhere else (`transport.ssh`), so that nobody else needs to know their exceptions.
"""

from __future__ import annotations

from typing import ClassVar, Final


class LinkError(Exception):
    """A host is not, or no longer, within reach. `str()` is the whole message for a person."""

    kind: ClassVar[str] = "link"
    hint: str = ""

    def __init__(self, what: str, why: str, hint: str | None = None) -> None:
        self.what = what
        self.why = why
        if hint is not None:
            self.hint = hint
        super().__init__(f"{what}: {why}" + (f" ({self.hint})" if self.hint else ""))


class HostNotFound(LinkError):
    """The name means nothing to the resolver."""

    kind = "host-not-found"
    hint = "check the spelling, /etc/hosts and DNS, or name it with HostName in ssh_config"


class ConnectionRefused(LinkError):
    """The host answered that nobody listens on the port."""

    kind = "connection-refused"
    hint = "is sshd running there, and is this its port?"


class HostUnreachable(LinkError):
    """No answer in time, or no way there."""

    kind = "host-unreachable"
    hint = "check that the host is up, and the route and firewall on the way"


class HostKeyUnknown(LinkError):
    """Nobody has vouched for the host's key yet."""

    kind = "host-key-unknown"


class HostKeyChanged(LinkError):
    """The host shows another key than the one on record."""

    kind = "host-key-changed"


class HostKeyRejected(LinkError):
    """The host's key is revoked, or its certificate is not valid."""

    kind = "host-key-rejected"
    hint = "see the @revoked and @cert-authority lines of known_hosts"


class AuthenticationFailed(LinkError):
    """The host accepted none of our keys."""

    kind = "authentication-failed"


class IdentityUnusable(LinkError):
    """A key file that was asked for cannot be used."""

    kind = "identity-unusable"


class SshConfigInvalid(LinkError):
    """ssh_config, or an option made from it, cannot be used."""

    kind = "ssh-config-invalid"


class SshFailed(LinkError):
    """The two ends of SSH could not agree, or one broke the protocol."""

    kind = "ssh-failed"


class ConnectionLost(LinkError):
    """The connection stood, and broke."""

    kind = "connection-lost"
    hint = "the host or the network between may be down"


class AgentNotFound(LinkError):
    """The host is there, but it has no agent under this name."""

    kind = "agent-not-found"


class AgentFailed(LinkError):
    """The agent ended before its work was done."""

    kind = "agent-failed"


# what may be otherwise in a moment
PASSING: Final = (ConnectionLost, ConnectionRefused, HostUnreachable, HostNotFound, SshFailed)
