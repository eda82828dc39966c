"""The keys of a lab's hosts, and the ssh files made of them."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.plan import Host, Plan


@dataclass(frozen=True)
class KeyPair:
    """An ed25519 key in OpenSSH's formats."""

    private: str
    public: str


@dataclass(frozen=True)
class Keys:
    """Every host's own key and its root's key, by host name."""

    hosts: dict[str, KeyPair]
    users: dict[str, KeyPair]

    def known_hosts(self, plan: Plan) -> str:
        """A known_hosts file with all hosts of the lab (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT)."""
        return "".join(
            f"{host.name},{host.ipv4},{host.ipv6} {self.hosts[host.name].public}" for host in plan.hosts
        )

    def authorized_keys(self) -> str:
        return "".join(pair.public for pair in self.users.values())


def generate(plan: Plan) -> Keys:
    """Make all keys of a lab; nothing of them stays on the machine's disk."""
    with tempfile.TemporaryDirectory(prefix="lab-keys-") as directory:
        place = Path(directory)
        return Keys(
            hosts={host.name: _pair(place, host, "host") for host in plan.hosts},
            users={host.name: _pair(place, host, "root") for host in plan.hosts},
        )


def _pair(place: Path, host: Host, owner: str) -> KeyPair:
    path = place / f"{host.name}-{owner}"
    command = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{owner}@{host.name}", "-f", str(path))
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return KeyPair(path.read_text(), path.with_suffix(".pub").read_text())
