"""What other commands know of a lab that is up: one JSON file, and what /proc says of the processes in it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import kernel
from lab.plan import LABS, SHARED, LabError, shared

_DEADLINE = 20.0  # seconds for the kernel to take down a host's processes
_GRACE = 2.0  # seconds for the supervisor to end by itself


@dataclass(frozen=True)
class Process:
    """A process of the machine, told from a later one of the same number by its start time (clock ticks)."""

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Process:
        """The living process `pid`. Raises ProcessLookupError."""
        state, start = _stat(pid)
        if state in "ZX":
            raise ProcessLookupError(f"pid {pid} has ended")
        return cls(pid, start)

    def alive(self) -> bool:
        try:
            return Process.of(self.pid) == self
        except ProcessLookupError:
            return False

    def open(self) -> int:
        """A pidfd of it. Raises ProcessLookupError if it has ended."""
        fd = os.pidfd_open(self.pid)
        if self.alive():
            return fd
        os.close(fd)
        raise ProcessLookupError(f"pid {self.pid} has ended")


def _stat(pid: int) -> tuple[str, int]:
    """State letter and start time of /proc/PID/stat (proc_pid_stat(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError) as err:
        raise ProcessLookupError(f"no pid {pid}") from err
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class HostState:
    """A host that is up; `init` is its first process as the machine sees it."""

    name: str
    init: Process
    ipv4: str
    ipv6: str

    @property
    def root(self) -> Path:
        """The host's file system as seen from outside."""
        return Path(f"/proc/{self.init.pid}/root")

    def command(self, pid: int) -> str | None:
        """The name of the host's process `pid`, or None if there is none."""
        try:
            return (self.root / f"proc/{pid}/comm").read_text().strip()
        except (FileNotFoundError, ProcessLookupError):
            return None

    def outside(self, pid: int) -> int:
        """The machine's number of the host's process `pid`. Raises ProcessLookupError."""
        namespace = os.stat(f"/proc/{self.init.pid}/ns/pid").st_ino
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _number_in(entry, namespace) == pid:
                return int(entry.name)
        raise ProcessLookupError(f"{self.name} has no pid {pid}")


def _number_in(process: Path, namespace: int) -> int | None:
    """The number that `process` (/proc/PID) has in pid namespace `namespace` (inode), or None."""
    with contextlib.suppress(OSError):
        status = (process / "status").read_text()
        numbers = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[1:]
        fd = os.open(process / "ns/pid", os.O_RDONLY)
        try:
            for number in reversed(numbers):
                if os.fstat(fd).st_ino == namespace:
                    return int(number)
                inner, fd = fd, kernel.parent_namespace(fd)
                os.close(inner)
        finally:
            os.close(fd)
    return None


@dataclass(frozen=True)
class LabState:
    """A lab that is, or was, up."""

    name: str
    supervisor: Process
    environment: dict[str, str]
    hosts: dict[str, HostState]

    def host(self, name: str) -> HostState:
        """The host `name`. Raises LabError if there is none, or it is dead."""
        if name not in self.hosts:
            raise LabError(f"no host {name!r} in lab {self.name!r}, only {', '.join(self.hosts)}")
        host = self.hosts[name]
        if not host.init.alive():
            raise LabError(f"host {name} of lab {self.name!r} is dead")
        return host

    def log(self, host: str, pid: int) -> Path:
        """Where the output is of the command that was started detached in `host` with the number `pid`."""
        return shared(self.name) / f"{host}-{pid}.log"

    def detached(self, host: str) -> dict[int, str | None]:
        """Commands started detached in `host`: their pids there, and their names; None: ended, or moved."""
        found = (each.stem.removeprefix(f"{host}-") for each in shared(self.name).glob(f"{host}-*.log"))
        pids = sorted(int(each) for each in found if each.isdecimal())
        return {pid: self.hosts[host].command(pid) for pid in pids}

    def processes(self) -> list[Process]:
        return [*(host.init for host in self.hosts.values()), self.supervisor]


def directory(name: str) -> Path:
    return LABS / name


def claim(name: str, environment: dict[str, str]) -> None:
    """Make the lab's directories, naming this process as its supervisor for now; a dead lab's are removed.

    Raises LabError if a living lab has it.
    """
    state = load(name)
    if state is None or not any(each.alive() for each in state.processes()):
        remove(name)
    ours = _new_directory(LABS / f".{name}.{os.getpid()}")
    save(LabState(name, Process.of(os.getpid()), environment, {}), ours)
    try:
        ours.rename(directory(name))  # fails on a directory that is not empty: whoever is first has it
    except OSError as err:
        shutil.rmtree(ours)
        raise LabError(f"lab {name!r} is up or coming up; `lab down --name {name}` removes it") from err
    try:
        _new_directory(shared(name), 0o755)
    except OSError:
        forget(name)
        raise


def _new_directory(path: Path, mode: int = 0o700) -> Path:
    """Make `path`. Its parent may vanish meanwhile, when another lab, the last one, is removed."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.mkdir()
            path.chmod(mode)  # whatever the umask
            return path


def save(state: LabState, where: Path | None = None) -> None:
    """Write the state file, whole or not at all."""
    path = (where or directory(state.name)) / "state.json"
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(asdict(state), indent=1))
    temporary.rename(path)


def load(name: str) -> LabState | None:
    """The lab's state, or None if there is no such lab, or one that never came up."""
    try:
        raw = json.loads((directory(name) / "state.json").read_text())
    except FileNotFoundError:
        return None
    hosts = {
        key: HostState(each["name"], Process(**each["init"]), each["ipv4"], each["ipv6"])
        for key, each in raw["hosts"].items()
    }
    return LabState(raw["name"], Process(**raw["supervisor"]), raw["environment"], hosts)


def remove(name: str) -> None:
    """End the lab's processes, wait until they are gone, and remove its directories.

    With a host's pid 1 all its processes end (pid_namespaces(7)); with its last process its namespaces and
    their mounts go, for nothing else refers to them. Does nothing if there is no such lab. Raises LabError
    if a process does not go.
    """
    state = load(name)
    if state is not None:
        hosts = [host.init for host in state.hosts.values()]
        end(hosts)
        if hosts:
            _gone([state.supervisor], _GRACE)  # it reaps them and ends with the last one
        end([state.supervisor])
    forget(name)


def forget(name: str) -> None:
    """Remove the lab's directories, and the common ones if it was the last lab."""
    # The one with the state comes last: as long as it is there, `down` and the next `up` look for the others.
    for path in (shared(name), *LABS.glob(f".{name}.[0-9]*"), directory(name)):
        shutil.rmtree(path, ignore_errors=True)
    for common in (SHARED, LABS):
        with contextlib.suppress(OSError):
            common.rmdir()


def end(processes: list[Process]) -> None:
    """SIGKILL all of `processes` and wait for their end. Raises LabError if that takes too long."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            fd = process.open()
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            os.close(fd)
    if not _gone(processes, _DEADLINE):
        raise LabError(f"the lab's processes {[each.pid for each in processes]} do not all end")


def _gone(processes: list[Process], timeout: float) -> bool:
    """Wait at most `timeout` seconds for `processes` to end; whether they have."""
    deadline = time.monotonic() + timeout
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            fd = process.open()
            left = max(deadline - time.monotonic(), 0)
            ended, _, _ = select.select([fd], [], [], left)
            os.close(fd)
            if not ended:
                return False
    return True
