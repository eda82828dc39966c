"""Where the service is found, and where it keeps what has to last."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

import msgspec

SOCKET_VARIABLE: Final = "MIGRATE_AGENT_SOCKET"
STATE_VARIABLE: Final = "MIGRATE_AGENT_STATE"
HOST_SOCKET: Final = Path("/run/migrate/agent.sock")
RUNTIME_VARIABLE: Final = "MIGRATE_AGENT_RUNTIME"
LOG_BYTES: Final = 1 << 20  # then the log of services on demand begins anew, the old one is kept


class UnsafeDirectory(Exception):
    """A directory that others may write to, or that belongs to somebody else."""


class Places(msgspec.Struct, frozen=True):
    socket: Path
    state: Path

    @property
    def lock(self) -> Path:
        """Held by the service for as long as it lives."""
        return self.socket.with_name(self.socket.name + ".lock")

    @property
    def reports(self) -> Path:
        return self.state / "reports"

    @property
    def log(self) -> Path:
        """What a service that was started on demand says."""
        return self.state / "agent.log"


def default() -> Places:
    """Root's are the host's, anybody else's are their own; both can be named in the environment.

    Whom root's service lets in (`serve --group`) uses that.
    """
    let_in = RUNTIME_VARIABLE not in os.environ and os.access(HOST_SOCKET, os.W_OK)
    socket = HOST_SOCKET if let_in else runtime() / HOST_SOCKET.name
    named = os.environ.get(SOCKET_VARIABLE) or socket
    return Places(Path(named), Path(os.environ.get(STATE_VARIABLE) or _state()))


def is_of_root(directory: Path) -> bool:
    """Whether it is root's, we are not, and nobody else can put anything there."""
    try:
        found = directory.lstat()
    except OSError:
        return False
    safe = stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022
    return safe and found.st_uid == 0 != os.geteuid()


def open_to_group(directory: Path, gid: int) -> None:
    """Let the members of a group pass through a directory that is not open to all; OSError."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not mode & 0o001:
        os.chown(directory, -1, gid)
        directory.chmod(mode | 0o010)


def runtime() -> Path:
    """Where is what ends with this boot."""
    named = os.environ.get(RUNTIME_VARIABLE)
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/run/migrate")
    of_user = os.environ.get("XDG_RUNTIME_DIR")
    return Path(of_user, "migrate") if of_user else Path(f"/tmp/migrate-{os.geteuid()}")


def _state() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/migrate")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "migrate"


def make_private(directory: Path) -> None:
    """Have `directory`; a new one is ours to enter alone. UnsafeDirectory, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UnsafeDirectory(f"{directory} is not a directory of our own")
    if found.st_mode & 0o022:
        raise UnsafeDirectory(f"{directory} can be written to by others")


def open_log(places: Places) -> int:
    """A descriptor to append to the log."""
    make_private(places.state)
    if places.log.exists() and places.log.stat().st_size > LOG_BYTES:
        places.log.replace(places.log.with_name(places.log.name + ".old"))
    return os.open(places.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
