"""Where a run happens: the machine, the checkout; and the CPU time of a host's agents, by a cgroup."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Final

import psutil

from bench.results import Machine

ROOT: Final = Path(__file__).resolve().parents[2]
_PREFIX: Final = "migrate-bench-"


def machine() -> Machine:
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert memory is not None
    ssh = subprocess.run(["ssh", "-V"], capture_output=True, text=True, check=True).stderr
    return Machine(
        cpu=_cpu(Path("/proc/cpuinfo").read_text()),
        cores=len(os.sched_getaffinity(0)),
        memory=int(memory[1]) * 1024,
        kernel=platform.release(),
        python=platform.python_version(),
        openssh=ssh.split(",")[0].strip(),
    )


def _cpu(text: str) -> str:
    """The model's name, or where a hypervisor hides it, its vendor, family and number."""
    fields: dict[str, str] = dict(
        re.findall(r"^([^\n:]+?)\s*: (.*)$", text.split("\n\n", maxsplit=1)[0], re.M)
    )
    name = fields.get("model name", "")
    if re.search("[A-Za-z]", name):
        return name
    return " ".join(f"{key} {fields.get(key, '?')}" for key in ("vendor_id", "cpu family", "model"))


def commit() -> tuple[str, bool]:
    """The checkout's commit, and whether anything in it differs; ("unknown", True) outside of one."""
    try:
        return _git("rev-parse", "--short=12", "HEAD"), bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True


def _git(*command: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cgroup_root() -> Path:
    """Where version 2's hierarchy is mounted (cgroups(7)): it accounts CPU time in every group by itself."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise RuntimeError("no cgroup2 hierarchy is mounted: mount -t cgroup2 none /sys/fs/cgroup")


class Account:
    """A cgroup of its own for a process and all that it starts from now on; their use is counted together.

    Made for a host's first process it counts sshd and what comes by ssh, the agents: what a lab runs in a
    host is not started by that host.
    """

    def __init__(self, name: str, pid: int) -> None:
        remove_stale()
        self._path = cgroup_root() / f"{_PREFIX}{os.getpid()}-{name}"
        self._path.mkdir()
        first = psutil.Process(pid)
        for task in (first, *first.children(recursive=True)):
            with contextlib.suppress(ProcessLookupError):
                (self._path / "cgroup.procs").write_text(str(task.pid))

    def seconds(self) -> float:
        used = re.search(r"usage_usec (\d+)", (self._path / "cpu.stat").read_text())
        assert used is not None
        return int(used[1]) / 1e6

    def close(self) -> None:
        """After the host is down."""
        deadline = time.monotonic() + 10
        while True:
            try:
                return self._path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def remove_stale() -> None:
    """Groups of runs that were killed; those in use cannot be removed."""
    for path in cgroup_root().glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("-")[0]
        if not Path(f"/proc/{owner}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def process_seconds(pid: int) -> float:
    """CPU time that a process has used so far, all threads together, to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9
