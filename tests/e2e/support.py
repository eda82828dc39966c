"""What the end-to-end tests have in common: hosts, workloads in them, and moves of which each is proven.

The product is a black box here: `migrate` is run in a host as a person would, and what it did is looked up
in the hosts themselves.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lab.fixture import Lab, until
from programs.status import BUILD, build, read_status, wait_for_status

FULL = os.environ.get("MIGRATE_TEST_FULL") == "1"
SERVICE = "10.77.0.100"
GUARDIAN = "migrate-guard"
DONE, USAGE, REFUSED, ROLLED_BACK, IN_DOUBT, UNREACHABLE = 0, 2, 3, 4, 5, 6
# Of a migration's processes, by what `ps` shows: who watches, who works on either host.
PARTS = {
    "coordinator": r"migrate (move|check)",
    "source": r"(migrate-agent|agent\.main) source",
    "worker": r"agent\.worker",
    "destination": r"(migrate-agent|agent\.main) destination",
    "guardian": rf"\[{GUARDIAN}\]",
}
SERVE = r"(migrate-agent|agent\.main) serve"
_UNSEEN = rf"ps -e -o pid=,comm=,args=|{SERVE}"


class View(NamedTuple):
    """Namespaces, and which file systems are where each host has its own."""

    net: str
    mnt: str
    time: str
    devices: list[str]


class Hosts(Lab):
    """A lab, asked the way these tests ask; arguments may be anything that has a text."""

    def up(self) -> None:
        self.numbers = itertools.count()
        self.outputs = Path(tempfile.mkdtemp(prefix="output-", dir=build()))
        super().up()

    def down(self) -> None:
        super().down()
        shutil.rmtree(self.outputs, ignore_errors=True)

    def ask(self, host: str, *command: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command in a host, whatever its exit status."""
        return self.exec(host, *map(str, command), check=False, timeout=timeout)

    def run(self, host: str, *command: object, timeout: float = 120) -> str:
        """The output of a command that has to succeed."""
        return self.exec(host, *map(str, command), timeout=timeout).stdout

    def start(self, host: str, *command: object) -> int:
        """Start a command detached; its pid as the host sees it. Its output is a file that every host has."""
        output = self.outputs / f"{next(self.numbers)}.log"
        words = ["sh", "-c", 'exec "$@" >>"$0" 2>&1', str(output), *map(str, command)]
        pid = self.spawn(host, *words)
        until(lambda: self.proc(host, pid, "comm") != "sh\n", f"{command[0]} runs")
        return pid

    def attend(self, host: str, *command: object) -> subprocess.Popen[str]:
        """A command that runs in a host while the test goes on."""
        return self.popen(host, *map(str, command), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(self, host: str, pid: int, signal: str = "KILL") -> None:
        self.ask(host, "kill", f"-{signal}", pid)

    def proc(self, host: str, pid: int, name: str) -> str:
        """/proc/PID/`name` of a process of `host`, read from outside the lab; "" if it is gone."""
        try:
            return Path(f"/proc/{self.pid_outside(host, pid)}/{name}").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def alive(self, host: str, pid: int) -> bool:
        """Whether `pid` is there and not a zombie."""
        state = self.proc(host, pid, "stat")
        return bool(state) and state.rpartition(")")[2].split()[0] not in "ZX"

    def view(self, host: str, pid: int | str = "self") -> View:
        """What a process of `host` lives in; "self": what the host itself does."""
        links = [f"/proc/{pid}/ns/{name}" for name in ("net", "mnt", "time")]
        own = [f"/proc/{pid}/root/run", f"/proc/{pid}/root/tmp"]
        net, mnt, time, *devices = self.run(
            host, "sh", "-c", f"readlink {' '.join(links)}; stat -c %d {' '.join(own)}"
        ).split()
        return View(net, mnt, time, devices)

    def processes(self, host: str) -> dict[int, str]:
        """What runs in a host, by pid: the command lines. Without the asking itself, and without the agent's
        service: one on demand stays for a while after its last use."""
        listing = self.run(host, "ps", "-e", "-o", "pid=,comm=,args=")
        entries = (line.split(None, 2) for line in listing.splitlines())
        # a guardian is forked, so its command line is the engine's
        named = {int(pid): f"[{name}]" if name == GUARDIAN else words for pid, name, words in entries}
        return {pid: words for pid, words in named.items() if not re.search(_UNSEEN, words)}

    def services(self, host: str) -> list[int]:
        listing = self.run(host, "ps", "-e", "-o", "pid=,args=").splitlines()
        return [int(line.split()[0]) for line in listing if re.search(SERVE, line) and "setpriv" not in line]

    def agents(self, host: str, part: str = "") -> list[int]:
        """Pids of the project's own processes in a host; `part` is one of PARTS, "" stands for all."""
        pattern = PARTS[part] if part else "|".join(PARTS.values())
        running = {pid: words for pid, words in self.processes(host).items() if "/lab exec " not in words}
        return [pid for pid, words in running.items() if re.search(pattern, words)]


@dataclass
class Place:
    """A directory that every host sees, gone after the test."""

    path: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="run-", dir=build())))

    def close(self) -> None:
        shutil.rmtree(self.path)


@dataclass
class Moved:
    """A process somewhere in the lab, which is moved and looked at."""

    lab: Hosts
    host: str
    pid: int
    reports: list[dict[str, Any]] = field(default_factory=list)

    def move(self, to: str, *options: str, timeout: float = 240) -> dict[str, Any]:
        """Move it, and prove that it has moved."""
        done = self.lab.ask(self.host, "migrate", "move", self.pid, to, "--json", *options, timeout=timeout)
        assert done.returncode == DONE, f"migrate move: {done.returncode}\n{done.stdout}\n{done.stderr}"
        report: dict[str, Any] = json.loads(done.stdout)
        assert report["outcome"] == "migrated" and report.get("error") is None, report
        source, source_pid = self.host, self.pid
        self.host, self.pid = to, report["destination"]["pid"]
        self.reports.append(report)
        self.assert_only_here(source, source_pid)
        return report

    def assert_only_here(self, source: str, source_pid: int) -> None:
        """The new process is in the new host, the old one gone: by the kernel's word."""
        until(lambda: not self.lab.alive(source, source_pid), f"pid {source_pid} on {source} has ended")
        assert self.lab.alive(self.host, self.pid), f"no pid {self.pid} on {self.host}"
        here, its, there = self.lab.view(self.host), self.lab.view(self.host, self.pid), self.lab.view(source)
        assert its.net == here.net != there.net
        # If its numbers were taken it has its own /proc, and so a copy of the host's mount namespace.
        assert its.mnt != there.mnt
        assert its.devices == here.devices != there.devices
        # Its clocks go on as they were: it has a time namespace of its own, or its first host's.
        assert its.time != there.time or here.time == there.time

    def untraced(self) -> bool:
        return "TracerPid:\t0" in self.lab.run(self.host, "cat", f"/proc/{self.pid}/status")


@dataclass
class Workload(Moved):
    """One of tests/programs that writes a status."""

    status: Path = Path()

    @classmethod
    def start(
        cls, lab: Hosts, place: Place, program: str, *arguments: object, host: str = "alpha"
    ) -> Workload:
        status = place.path / f"{program}.status"
        command = [BUILD / program, "--status", status, "--log", place.path / f"{program}.log", *arguments]
        pid = lab.start(host, *command)
        assert wait_for_status(status)["host"] == host
        return cls(lab, host, pid, status=status)

    def now(self) -> dict[str, Any]:
        """A status written from now on."""
        before = read_status(self.status)
        return wait_for_status(self.status, later_than=before["seq"] + 1 if before else 0)

    def assert_well(self) -> dict[str, Any]:
        """It goes on, on the host where it should be, in that host's namespaces, without a complaint."""
        status = self.now()
        assert status["complaints"] == 0, status["first_complaint"]
        assert status["host"] == self.host
        here = self.lab.view(self.host, self.pid)
        assert (status["net"], status["mnt"], status["time"]) == (here.net, here.mnt, here.time)
        return status

    def end(self) -> dict[str, Any]:
        """Its last word: it checks everything once more. It must end by itself."""
        self.lab.kill(self.host, self.pid, "TERM")
        until(lambda: not self.lab.alive(self.host, self.pid), "the workload's end", 60)
        status = read_status(self.status)
        assert status is not None
        assert status["complaints"] == 0, status["first_complaint"]
        return status


def start_selfcheck(lab: Hosts, place: Place, *options: object) -> Workload:
    """The self-checking program on alpha, its files where every host sees them.

    But for its FIFO: what lies in one is the kernel's, of which these hosts have only one, and the other
    host's opening of the same FIFO would find it there. So each host has a FIFO of its own, by one name.
    """
    fifo = f"/tmp/{place.path.name}.fifo"
    for host in ("alpha", "beta"):
        lab.run(host, "mkfifo", fifo)
    return Workload.start(lab, place, "selfcheck", "--dir", place.path / "files", "--fifo", fifo, *options)
