"""SSH connections to other hosts' ordinary sshd, with asyncssh: configuration, trust, and errors a person
understands.

Host keys are always verified against known_hosts, as `ssh -o StrictHostKeyChecking=yes` does; nobody is
ever asked for a password. ssh_config is respected (HostName, Port, User, IdentityFile, ProxyJump,
ProxyCommand, UserKnownHostsFile, Ciphers ...), keys come from it, from ~/.ssh and from ssh-agent.

What the link's speed comes from, measured between asyncssh 2.24 and OpenSSH 9.2 on loopback, 400 MiB of
random bytes:
  - aes128-gcm and aes256-gcm first: 1.5 to 2 times chacha20-poly1305 where the processor has AES
    instructions;
  - no SSH_MSG_IGNORE before each data packet (see `_drop_ignore_packets`): 456 -> 645 MB/s, and a quarter
    less CPU time;
  - the standard event loop: uvloop is no faster here (491 MB/s median), because the time goes to ciphers
    and copies.
"""

from __future__ import annotations

import os
import shlex
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import asyncssh
from asyncssh.public_key import get_default_certificate_algs, get_default_public_key_algs

from agent.api import SshOptions
from transport import link_errors as errors
from transport.link import ChannelEnd, Link, LocalEnd
from transport.process import Bridge
from transport.session import Session
from transport.ssh_errors import Trust, translate
from transport.target import HostTarget, parse_host

CIPHERS: Final = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes128-ctr",
    "aes256-ctr",
)
AEAD: Final = frozenset(CIPHERS[:3])
CONNECT_TIMEOUT: Final = 15.0  # seconds, unless ssh_config says ConnectTimeout
LOGIN_TIMEOUT: Final = 30.0
KEEPALIVE: Final = 5.0  # seconds; three unanswered ones end the connection
# a new key exchange stops the stream, 4 ms on loopback and two ways more; AES may keep a key for 2^32
# blocks (RFC 4344, 3.2)
REKEY_BYTES: Final = 32 << 30
PACKET: Final = 32768  # what OpenSSH takes at most in one packet of a session
WINDOW: Final = 8 << 20
MAX_JUMPS: Final = 8
_MSG_IGNORE: Final = 2  # RFC 4250, 4.1.2
_SYSTEM_CONFIG: Final = "/etc/ssh/ssh_config"
_SYSTEM_KNOWN_HOSTS: Final = ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2")
_USER_KNOWN_HOSTS: Final = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2")

OnLine = Callable[[str], None]


async def connect(target: HostTarget, options: SshOptions, jumps: int = 0) -> Any:
    """An authenticated asyncssh connection to `target`. LinkError: one of its subclasses for each reason."""
    files = _config_files(target, options)
    trust: Trust | None = None
    try:
        base = await _base_options(target, files)
        trust = Trust(*_known_hosts(base.config))
        tunnel = await _jump(target, base.tunnel, options, jumps)
        connection = await asyncssh.connect(
            target.host,
            target.port or (),
            config=files,
            tunnel=tunnel,
            **_settings(target, options, base, trust),
        )
    except (OSError, asyncssh.Error, ValueError) as error:
        raise translate(error, target, trust) from error
    if tunnel is not None:
        connection.set_tunnel(tunnel)
    _drop_ignore_packets(connection)
    return connection


def peer_address(connection: Any) -> str | None:
    """The address of the host that a connection leads to; None behind a jump host or a ProxyCommand."""
    sock = connection.get_extra_info("socket")
    return None if sock is None else str(sock.getpeername()[0])


async def open_link(
    target: HostTarget, options: SshOptions, sock: socket.socket, on_stderr: OnLine, resume: str | None = None
) -> Link:
    """Start `migrate-agent destination` on `target`, or find the one that has the shadow of migration
    `resume`, and pump bytes between it and `sock` (one end of a socketpair).

    From then on `sock` belongs to the link: it is closed when the remote command or the connection ends.
    LinkError if the command could not be started; `sock` is closed then too.
    """
    local = await LocalEnd.open(sock)
    try:
        connection = await connect(target, options)
    except BaseException:
        local.socket.close()
        raise
    try:
        words = ("destination", "--resume", resume) if resume else ("destination",)
        return await _pump(connection, target, agent_command(options, words), local, on_stderr)
    except BaseException:
        connection.abort()
        raise


async def open_bridge(
    connection: Any, target: HostTarget, command: str, sock: socket.socket, on_stderr: OnLine
) -> Bridge:
    """Start `command` over a connection that it may share with others, and pump bytes between it and `sock`.

    As with a link, `sock` belongs to the bridge. LinkError; the connection stands in any case.
    """
    link = await _pump(connection, target, command, await LocalEnd.open(sock), on_stderr)
    return Bridge(link.ended, link.kill)


async def _pump(
    connection: Any, target: HostTarget, command: str, local: LocalEnd, on_stderr: OnLine
) -> Link:
    remote = ChannelEnd(local)
    session = Session(str(target), remote, on_stderr)
    try:
        channel, _ = await connection.create_session(
            lambda: session, command, encoding=None, request_pty=False, window=WINDOW, max_pktsize=PACKET
        )
    except BaseException as error:
        local.socket.close()
        if isinstance(error, OSError | asyncssh.Error):
            raise translate(error, target, None) from error
        raise
    local.start(channel)
    return Link(connection, channel, local, remote, session.ended)


def agent_command(options: SshOptions, argv: Sequence[str]) -> str:
    """What starts `migrate-agent ARGV` there.

    The agent command is the person's own shell text ("sudo migrate-agent"); the rest is quoted."""
    return f"{options.agent_command} {shlex.join(argv)}"


def _config_files(target: HostTarget, options: SshOptions) -> list[str]:
    if not options.config:
        return [f for f in (os.path.expanduser("~/.ssh/config"), _SYSTEM_CONFIG) if os.access(f, os.R_OK)]
    for file in options.config:
        if not os.access(file, os.R_OK):
            raise errors.SshConfigInvalid(
                str(target), f"{file} cannot be read", "name a file with --ssh-config"
            )
    return list(options.config)


async def _base_options(target: HostTarget, files: list[str]) -> Any:
    """What ssh_config says about the host, before any key is loaded."""
    return await asyncssh.SSHClientConnectionOptions.construct(
        host=target.host, port=target.port or (), username=target.user or (), config=files, client_keys=None
    )


def _settings(target: HostTarget, options: SshOptions, base: Any, trust: Trust) -> dict[str, Any]:
    """What we decide for ssh_config, or where it is silent."""
    config = base.config
    chosen: dict[str, Any] = {
        "username": target.user or (),
        "known_hosts": trust.known,
        "client_factory": lambda: trust,
        "client_keys": _identities(target, options, config),
        "ignore_encrypted": True,
        "password_auth": False,
        "kbdint_auth": False,
        "compression_algs": ["none"],
        "agent_forwarding": False,
        "x11_forwarding": False,
        "login_timeout": LOGIN_TIMEOUT,
    }
    for name, key, value in (
        ("HostKeyAlgorithms", "server_host_key_algs", _host_key_algorithms(base, trust)),
        ("Ciphers", "encryption_algs", CIPHERS),
        ("ConnectTimeout", "connect_timeout", CONNECT_TIMEOUT),
        ("ServerAliveInterval", "keepalive_interval", KEEPALIVE),
        ("RekeyLimit", "rekey_bytes", REKEY_BYTES),
    ):
        if config.get(name) is None:
            chosen[key] = value
    return chosen


def _host_key_algorithms(base: Any, trust: Trust) -> Any:
    """The kinds of key on record first, then all others, so that a host with another key can show it and be
    refused by name.

    () for asyncssh's choice where nothing is on record.
    """
    keys, authorities, *_ = trust.known.match(
        base.host_key_alias or base.host, "", base.port if base.port != 22 else None
    )
    recorded = [algorithm for key in keys for algorithm in key.sig_algorithms]
    if not recorded or authorities:
        return ()
    everything = (*recorded, *get_default_certificate_algs(), *get_default_public_key_algs())
    return [algorithm.decode() for algorithm in dict.fromkeys(everything)]


def _identities(target: HostTarget, options: SshOptions, config: Any) -> Any:
    """The key files to use.

    () for the defaults in ~/.ssh. ssh_config's files may be missing, as with ssh; ours may not.
    """
    for file in options.identity:
        if not os.access(os.path.expanduser(file), os.R_OK):
            raise errors.IdentityUnusable(
                str(target), f"the identity {file} cannot be read", "check the path given"
            )
    named = options.identity or config.get("IdentityFile", ())
    return [path for path in map(os.path.expanduser, named) if os.access(path, os.R_OK)] or ()


def _known_hosts(config: Any) -> tuple[Any, list[str]]:
    """The known hosts, and the files they come from.

    "UserKnownHostsFile none" means nobody is known, not everybody.
    """
    user = config.get("UserKnownHostsFile", _USER_KNOWN_HOSTS)
    system = config.get("GlobalKnownHostsFile", _SYSTEM_KNOWN_HOSTS)
    files = [os.path.expanduser(f) for f in (*user, *system) if f != "none"]
    lines = [
        line
        for f in files
        if os.access(f, os.R_OK)
        for line in Path(f).read_text("utf-8", "replace").splitlines()
    ]
    return _parse_known_hosts(lines), files


def _parse_known_hosts(lines: list[str]) -> Any:
    """Damaged lines are skipped, as OpenSSH does; asyncssh would reject the whole file."""
    try:
        return asyncssh.import_known_hosts("\n".join(lines))
    except ValueError:
        return asyncssh.import_known_hosts("\n".join(filter(_is_entry, lines)))


def _is_entry(line: str) -> bool:
    try:
        asyncssh.import_known_hosts(line)
    except ValueError:
        return False
    return True


async def _jump(target: HostTarget, jump: object, options: SshOptions, jumps: int) -> Any:
    """A connection to ProxyJump's last host, through those before it; None without one."""
    if not isinstance(jump, str) or jump.lower() == "none":
        return None
    hops = [parse_host(hop.removeprefix("ssh://")) for hop in jump.split(",")]
    if hops[-1].host == target.host:  # as ssh does: a jump host is reached without itself
        return None
    if jumps >= MAX_JUMPS:
        raise errors.SshConfigInvalid(
            str(target), f"more than {MAX_JUMPS} jumps", "ProxyJump goes round in a circle"
        )
    return await connect(hops[-1], options, jumps + 1)


def _drop_ignore_packets(connection: Any) -> None:
    """Keep asyncssh from sending an empty SSH_MSG_IGNORE before every packet.

    They protect CBC modes with a predictable initialisation vector (RFC 4251, 9.3.1); with an AEAD cipher
    they protect nothing and cost a second packet each.
    """
    if connection.get_extra_info("send_cipher") not in AEAD:
        return
    send = connection.send_packet

    def send_packet(kind: int, *args: bytes, handler: Any = None) -> None:
        if kind != _MSG_IGNORE:
            send(kind, *args, handler=handler)

    connection.send_packet = send_packet
