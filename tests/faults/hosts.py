"""The lab's hosts as the machine sees them: their processes, what is on them, their cables.

A host's processes are those in its network namespace. What a migration may leave is compared with how the
host was before the first one.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from e2e.support import GUARDIAN, SERVICE, Hosts
from lab import state

from faults.fault import PROCESS, ROLES, Way

_LAB_COMMANDS: Final = re.compile(r"lab/lab exec ")
_HELD_BY_SOMEBODY: Final = (
    "01",
    "08",
)  # ESTABLISHED, CLOSE_WAIT: others end by themselves (net/tcp_states.h)
# What a service that nobody uses has there; everything else is something that was left.
_KEPT_FILES: Final = {
    "run/migrate",
    "run/migrate/agent.sock",
    "run/migrate/agent.sock.lock",
    "run/migrate/outgoing",
    "run/migrate/incoming",
}
_STATE: Final = "var/lib/migrate"
SHADOW: Final = "/memfd:migrate-shadow"  # what a copy executes until it is the program
T = TypeVar("T")
OPEN_FILE: Final = Path("/tmp/campaign")  # that the process has open; each host has its own, or has none


@dataclass(frozen=True)
class Process:
    pid: int  # the machine's
    inside: int  # in its own pid namespace
    state: str  # a letter of proc_pid_stat(5)
    tracer: int
    parent: int
    executable: str
    command: str  # of a guardian, which is forked, its name in brackets

    @property
    def runs(self) -> bool:
        return self.state not in "TtZX" and not self.tracer

    @property
    def is_session(self) -> bool:
        """sshd's, of one connection."""
        return re.search(ROLES["session"], self.command) is not None

    def __str__(self) -> str:
        traced = f", traced by {self.tracer}" if self.tracer else ""
        return (
            f"{self.pid} ({self.inside} there, state {self.state}{traced}) {self.command or self.executable}"
        )


def look(pid: int) -> Process | None:
    """A process, None if it is gone."""
    directory = Path(f"/proc/{pid}")
    try:
        status = dict(
            line.split(":\t", 1) for line in (directory / "status").read_text().splitlines() if ":\t" in line
        )
        command = (
            (directory / "cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode("utf-8", "replace")
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        executable = os.readlink(directory / "exe")
    except OSError:  # a zombie, or a thread of the kernel
        executable = status["Name"]
    if status["Name"] == GUARDIAN:
        command = f"[{GUARDIAN}]"
    numbers = status["NSpid"].split()
    tracer, parent = int(status["TracerPid"]), int(status["PPid"])
    return Process(pid, int(numbers[-1]), status["State"][0], tracer, parent, executable, command)


class Host:
    """One host of the lab that is up."""

    def __init__(self, lab: Hosts, name: str) -> None:
        found = state.load(lab.name)
        assert found is not None
        self.name = name
        self.root = found.hosts[name].root
        self._init = found.hosts[name].init.pid
        self._switch = found.supervisor.pid
        self._port = f"port{list(found.hosts).index(name)}"
        self._network = os.readlink(f"/proc/{self._init}/ns/net")
        self._before: dict[str, frozenset[str]] = {}
        self._own: set[int] = set()

    # --- processes ---

    def processes(self) -> list[Process]:
        """All of them but the host's own first one and what the lab runs here; zombies have no namespace."""
        found = (look(pid) for pid in self._pids())
        return [
            one for one in found if one and one.pid != self._init and not _LAB_COMMANDS.search(one.command)
        ]

    def _pids(self) -> Iterator[int]:
        for name in os.listdir("/proc"):
            if name.isdecimal():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{name}/ns/net") == self._network:
                        yield int(name)

    def strangers(self) -> list[Process]:
        """Those that were not there before, but for the service, which stays for a while."""
        service = re.compile(ROLES["service"])
        return [
            one for one in self.processes() if one.pid not in self._own and not service.search(one.command)
        ]

    def agents(self, roles: Iterable[str] = ROLES) -> list[Process]:
        pattern = re.compile("|".join(ROLES[role] for role in roles if role != PROCESS) or r"(?!)")
        return [one for one in self.processes() if pattern.search(one.command)]

    def signal(self, pids: Iterable[int], number: signal.Signals) -> None:
        """As nearly at the same time as can be: what is to be killed is stopped first."""
        pids = list(pids)
        for step in [signal.SIGSTOP, number] if number is signal.SIGKILL else [number]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, step)

    # --- the network ---

    def enter(self, *command: str) -> str:
        """The output of a program of the machine in this host's network."""
        return _run("nsenter", "-t", str(self._init), "-n", *command)

    def link(self, way: Way, up: bool) -> None:
        state = "up" if up else "down"
        if way == "device":
            self.enter("ip", "link", "set", "eth0", state)
        else:
            _run("nsenter", "-t", str(self._switch), "-n", "ip", "link", "set", self._port, state)

    def has_service_address(self) -> bool:
        return f" {SERVICE}/" in self.enter("ip", "-o", "-4", "address", "show", "dev", "eth0")

    # --- what a migration may leave ---

    def picture(self) -> dict[str, frozenset[str]]:
        """All that is compared, by kind."""
        return {
            "network": frozenset(self._network_lines()),
            "mounts": frozenset(_without_numbers(self._read("mountinfo"))),
            "packet sockets": self._sockets("packet"),
            "raw sockets": self._sockets("raw") | self._sockets("raw6"),
            "ssh connections": frozenset(self._connections()),
            "files": frozenset(self._files()),
        }

    def _network_lines(self) -> Iterator[str]:
        script = "ip -o address; ip rule; ip route show table all; nft list ruleset"
        for line in self.enter("sh", "-c", script).splitlines():
            if SERVICE not in line and " lft " not in line:
                yield re.sub(r"expires \S+|linkdown|dadfailed|tentative|qdisc \S+| dead\b", "", line).rstrip()

    def _read(self, name: str) -> list[str]:
        return self.read(name).splitlines()

    def read(self, name: str) -> str:
        """Of /proc, as the host's first process has it."""
        return Path(f"/proc/{self._init}/{name}").read_text()

    def _sockets(self, family: str) -> frozenset[str]:
        return frozenset(self._read(f"net/{family}")[1:])

    def _connections(self) -> Iterator[str]:
        """TCP connections of port 22 that somebody has open."""
        for name in ("tcp", "tcp6"):
            for line in self._read(f"net/{name}")[1:]:
                _, local, remote, status = line.split()[:4]
                if status in _HELD_BY_SOMEBODY and (local.endswith(":0016") or remote.endswith(":0016")):
                    yield f"{local} {remote} state {status}"

    def _files(self) -> Iterator[str]:
        for name in self.leavings():
            ours = name in _KEPT_FILES or name == str(OPEN_FILE.relative_to("/"))
            if not ours and not name.startswith((f"{_STATE}/reports", f"{_STATE}/agent.log")):
                yield name

    def leavings(self) -> list[str]:
        """What is in the directories where an agent may have files, but for what is mounted there."""
        tops = [self.root / top for top in ("run/migrate", "tmp", "dev/shm", _STATE)]
        return sorted(
            str(path.relative_to(self.root)) for top in tops if top.is_dir() for path in _below(top)
        )

    def remember(self) -> None:
        """How it is now is how it should be after each move."""
        self._before = self.picture()
        self._own = {one.pid for one in self.processes()}

    def changes(self, without: Iterable[str] = ()) -> list[str]:
        """What is there that was not, or the other way round, `without` some kinds."""
        now, found = self.picture(), []
        for kind, lines in self._before.items():
            if kind in without:
                continue
            found += [f"{self.name}: {kind}: new: {line}" for line in sorted(now[kind] - lines)]
            found += [f"{self.name}: {kind}: gone: {line}" for line in sorted(lines - now[kind])]
        return found

    def log(self) -> str:
        """The service's."""
        path = self.root / _STATE / "agent.log"
        return path.read_text(errors="replace") if path.exists() else ""


def _below(top: Path) -> Iterator[Path]:
    """All that is in a directory's own file system."""
    device = top.stat().st_dev
    for path in top.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.lstat().st_dev == device:
                yield path
                if path.is_dir() and not path.is_symlink():
                    yield from _below(path)


def _without_numbers(lines: list[str]) -> Iterator[str]:
    """Lines of mountinfo without what differs from mount to mount (proc_pid_mountinfo(5))."""
    for line in lines:
        yield " ".join(line.split()[2:])


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode != 0 and "nft" not in done.stderr:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def first(condition: Callable[[], list[T]], seconds: float, pause: float = 0.05) -> list[T]:
    """Asks until nothing is found, so many seconds at most; what is found last."""
    deadline = time.monotonic() + seconds
    while (found := condition()) and time.monotonic() < deadline:
        time.sleep(pause)
    return found
