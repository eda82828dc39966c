"""Runs: a lab, a process in it that is moved to and fro, and a fault in each move."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from e2e.support import Hosts
from lab import plan
from lab.fixture import until

from faults import evidence
from faults.fault import Case, Side
from faults.hosts import Host
from faults.referee import Referee
from faults.subject import Subject
from faults.verdict import Ended, Judge, Kind, Verdict

COMMAND_WITHIN: Final = 100.0  # seconds
SETTLED_WITHIN: Final = 15.0  # after the command, and the last fault, have ended
# More, once there is a service on both hosts: it looks every 30 s. A destination that nobody told that its
# source will not come back waits for it about as long.
CLEAN_WITHIN: Final = 40.0
_NAME: Final = "faults"
_INJECT: Final = Path(__file__).with_name("inject")
_MOVE: Final = ("migrate", "move")
_OPTIONS: Final = ("--json", "--log-format", "json", "-v", "--reconnect", "5s")
# Time is not what is tested: who does not hear where an address is now asks again within a second, not a
# minute (arp(7)); TCP repeats what a link that was cut has lost within a second, not two minutes, and sshd
# sees within two seconds, not two hours, that a peer is gone whose last word was lost.
_QUICK: Final = {
    "neigh.eth0.base_reachable_time_ms": 1000,
    "neigh.eth0.delay_first_probe_time": 1,
    "neigh.eth0.retrans_time_ms": 200,
    "neigh.eth0.ucast_solicit": 1,
    "tcp_rto_max_ms": 1000,
    "tcp_retries2": 200,
    "tcp_keepalive_time": 1,
    "tcp_keepalive_intvl": 1,
    "tcp_keepalive_probes": 100,
}


class Campaign:
    """A lab that is up for many runs; it is made anew after one that went wrong."""

    def __init__(self, keep: bool = False, services: bool = False) -> None:
        """`keep`: evidence also of runs that went well. `services`: one on each host that stays."""
        self._keep = keep
        self._services = services
        self._lab: Hosts | None = None
        self.hosts: dict[str, Host] = {}
        self._subject: Subject | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._down()

    def run(self, case: Case) -> Verdict:
        """One case, on the host where the process is now."""
        lab, subject = self.up()
        source = subject.where
        destination = next(name for name in self.hosts if name != source)
        sides: dict[Side, Host] = {"source": self.hosts[source], "destination": self.hosts[destination]}
        self._prepare(case, sides)
        with Referee(lab.shared, case, sides, lambda: subject.pid) as referee:
            subject.new_window()
            ended = self._move(lab, subject, destination, case, referee)
        verdict = Verdict(case, source, ended, referee.fired)
        self._judge(verdict, subject, sides)
        if verdict.problems or self._keep:
            verdict.evidence = evidence.of(verdict, subject, self.hosts)
        if verdict.problems or case.kills_process or case.cuts_for_good:
            self._down()
        return verdict

    # --- the lab ---

    def up(self) -> tuple[Hosts, Subject]:
        """The lab and the process in it, made if there are none."""
        if self._lab is not None and self._subject is not None:
            return self._lab, self._subject
        shared = plan.shared(f"{_NAME}-{os.getpid()}")
        self._lab = Hosts(_NAME, variables={"PYTHONPATH": str(_INJECT), "MIGRATE_FAULTS": str(shared)})
        self._lab.up()
        self.hosts = {name: Host(self._lab, name) for name in ("alpha", "beta")}
        self._subject = Subject(self._lab, self.hosts)
        for host in self.hosts.values():
            self._subject.place_file(host.name)
            # addresses of IPv6 outlive a device that is down as those of IPv4 do
            host.enter("sysctl", "-qw", "net.ipv6.conf.eth0.keep_addr_on_down=1")
            if self._services:
                self._serve(self._lab, host)
            host.remember()
        settings = [f"net.ipv4.{name}={value}" for name, value in _QUICK.items()]
        for name in (*self.hosts, "client"):
            self._lab.run(name, "sysctl", "-eqw", *settings)  # an older kernel has not all of them
        self._subject.start()
        return self._lab, self._subject

    def _serve(self, lab: Hosts, host: Host) -> None:
        lab.start(host.name, "migrate-agent", "serve")
        until((host.root / "run/migrate/agent.sock").exists, f"the service of {host.name}")

    def _down(self) -> None:
        if self._lab is not None:
            self._lab.down()
        if self._subject is not None:
            self._subject.close()
        self._lab = self._subject = None

    # --- a run ---

    def _prepare(self, case: Case, sides: dict[Side, Host]) -> None:
        assert self._subject is not None
        self._subject.place_file(sides["source"].name)
        if case.file_missing:
            self._subject.remove_file(sides["destination"].name)
        else:
            self._subject.place_file(sides["destination"].name)
        if case.new_service:
            self._end_service(sides["source"])

    def _end_service(self, host: Host) -> None:
        host.signal((one.pid for one in host.agents(["service"])), signal.SIGTERM)
        until(lambda: not host.agents(["service"]), "the end of the service")

    def _move(self, lab: Hosts, subject: Subject, to: str, case: Case, referee: Referee) -> Ended:
        began = time.monotonic()
        command = lab.attend(subject.where, *_MOVE, subject.number, to, *_OPTIONS, *case.options)
        referee.begin()
        code: int | None = None
        try:
            output, errors = command.communicate(timeout=COMMAND_WITHIN)
            code = command.returncode
        except subprocess.TimeoutExpired:
            command.kill()
            output, errors = command.communicate()
        return Ended(code, output, errors, time.monotonic() - began)

    def _judge(self, verdict: Verdict, subject: Subject, sides: dict[Side, Host]) -> None:
        judge, began = Judge(subject, sides), time.monotonic()
        judge.wait(verdict, SETTLED_WITHIN)
        if verdict.problems and verdict.problems[0].kind is not Kind.OTHER:
            self._start_services()
            verdict.recovered = True
            judge.wait(verdict, CLEAN_WITHIN)
            judge.blame_for_time(verdict)
        verdict.settled_s = time.monotonic() - began
        verdict.gap_ms, verdict.wait_ms = subject.gap_ms(), subject.wait_ms()

    def _start_services(self) -> None:
        """Where there is none: they put right what dead agents have left."""
        assert self._lab is not None
        missing = [name for name, host in self.hosts.items() if not host.agents(["service"])]
        for name in missing:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._lab.ask(name, "migrate-agent", "connect", timeout=30)
