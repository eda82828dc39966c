"""An sshd of a test's own: on loopback, its own keys and ssh_config, a script in the place of the agent."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from agent.api import SshOptions

SSHD = "/usr/sbin/sshd"  # must be started by its absolute path
PRIVILEGE_SEPARATION = Path("/run/sshd")  # exists where the service has run once
DEADLINE = 20.0

_SSHD_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {here}/host_key
AuthorizedKeysFile {here}/authorized_keys
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
"""

_SSH_CONFIG = """
Host there
  HostName 127.0.0.1
  Port {port}
  UserKnownHostsFile {here}/known_hosts
  IdentityFile {here}/is-not-there
  IdentityFile {here}/client_key
Host behind
  HostName 127.0.0.1
  Port {port}
  UserKnownHostsFile {here}/known_hosts
  IdentityFile {here}/client_key
  ProxyJump there
"""


class PrivateSshd:
    """A running sshd, known as "there" (and "behind" itself) in `self.config`."""

    def __init__(self, here: Path) -> None:
        self.here = here
        self.port = _free_port()
        self.config = here / "ssh_config"
        for name in ("host_key", "client_key", "other_key"):
            new_key(here / name)
        self.accept("client_key")
        self.trust("host_key")
        self.config.write_text(_SSH_CONFIG.format(port=self.port, here=here))
        (here / "sshd_config").write_text(_SSHD_CONFIG.format(port=self.port, here=here))
        PRIVILEGE_SEPARATION.mkdir(mode=0o755, exist_ok=True)
        self._process = subprocess.Popen(
            [SSHD, "-D", "-f", str(here / "sshd_config"), "-E", str(here / "sshd.log")]
        )
        self._await_answer()

    def accept(self, key: str) -> None:
        """Let in who has this key, and nobody else."""
        (self.here / "authorized_keys").write_text((self.here / f"{key}.pub").read_text())

    def trust(self, key: str | None) -> None:
        """Put this host key on record for the sshd; none for None."""
        words = "" if key is None else (self.here / f"{key}.pub").read_text()
        (self.here / "known_hosts").write_text(words and f"[127.0.0.1]:{self.port} {words}")

    def options(self, script: str = "cat", identity: tuple[str, ...] = ()) -> SshOptions:
        """How to reach it; `script` (sh) runs in the place of the agent."""
        file = self.here / f"agent-{len(list(self.here.glob('agent-*')))}"
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
        return SshOptions(config=(str(self.config),), identity=identity, agent_command=shlex.quote(str(file)))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(DEADLINE)

    def _await_answer(self) -> None:
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline and self._process.poll() is None:
            with (
                contextlib.suppress(ConnectionRefusedError),
                socket.create_connection(("127.0.0.1", self.port)) as s,
            ):
                assert s.recv(4) == b"SSH-"
                return
            time.sleep(0.02)
        raise AssertionError(f"sshd does not answer: {(self.here / 'sshd.log').read_text()}")


def new_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextlib.contextmanager
def private_sshd(here: Path) -> Iterator[PrivateSshd]:
    server = PrivateSshd(here)
    try:
        yield server
    finally:
        server.close()


def session_of(pid: int) -> int:
    """The sshd process that serves the session in which `pid` runs."""
    while True:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            comm, _, rest = file.read().partition("(")[2].rpartition(")")
        if comm.startswith("sshd"):
            return pid
        pid = int(rest.split()[1])
        assert pid > 1, "not in a session of sshd"


def kill_session(pid: int) -> None:
    """As if the other host had gone: the connection ends in the middle of a word."""
    os.kill(session_of(pid), 9)
