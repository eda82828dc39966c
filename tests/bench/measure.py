"""One move, measured: by the workload's own heartbeats, the agents' report, the CPU time of both hosts."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from e2e.support import Hosts, Place
from lab.fixture import until
from programs.status import BUILD, wait_for_status

from bench import trace as traces
from bench.machine import Account, process_seconds
from bench.results import Case, Phase, Sample, Workload

SERVICE: Final = "10.77.0.100"
PORT: Final = 7000
BASELINE: Final = 1.0  # seconds of the workload alone, before each move
SETTLE: Final = 0.3  # seconds of it afterwards
TIMEOUT: Final = 240.0
REQUESTS: Final = 1000  # a second, of all clients together
# A pause of seconds is a result here, not a reason to give up.
OPTIONS: Final = ("--json", "--freeze-timeout", "60s")

Windows = dict[str, traces.Window]


class Accounted:
    """A lab whose hosts' CPU time is counted."""

    def __init__(self, bandwidth: str | None) -> None:
        self.lab = Hosts("bench", bandwidth=bandwidth)
        self._accounts: dict[str, Account] = {}

    def __enter__(self) -> Accounted:
        self.lab.up()
        try:
            for host in ("alpha", "beta"):
                self._accounts[host] = Account(host, self.lab.pid_outside(host, 1))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.down()
        for account in self._accounts.values():
            account.close()

    def seconds(self) -> tuple[float, float]:
        """CPU time of what was started by ssh, so far: the source's agents, the destination's."""
        return self._accounts["alpha"].seconds(), self._accounts["beta"].seconds()


class Running:
    """A workload on alpha, and its clients if it has any."""

    def __init__(self, lab: Hosts, workload: Workload) -> None:
        self.lab = lab
        self.workload = workload
        self.place = Place()
        self.host, self.pid = "alpha", 0
        self.callers = 0

    def start(self) -> None:
        if self.workload.connections:
            self.lab.run("alpha", "ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
            self.lab.run("client", "ip", "neigh", "flush", "dev", "eth0")
        self.pid = self.lab.start("alpha", BUILD / "heartbeat", *self._options(), *self._files("heartbeat"))
        wait_for_status(self.path("heartbeat.status"), deadline=60)
        if self.workload.connections:
            self._call()

    def _call(self) -> None:
        count = self.workload.connections
        options = ("--connections", count, "--interval", count / REQUESTS)
        self.callers = self.lab.start(
            "client", BUILD / "callers", SERVICE, PORT, *options, *self._files("callers", trace=False)
        )
        until(lambda: self._answers() > count, "every client has an answer")

    def _answers(self) -> int:
        return int(wait_for_status(self.path("callers.status"))["counters"]["answers"])

    def _options(self) -> list[object]:
        load = self.workload
        options: list[object] = ["--megabytes", load.megabytes, "--rate", load.rate, "--fill", load.fill]
        options += ["--mappings", load.mappings]
        if load.threads > 1:
            options += ["--sleepers", load.threads - 1]
        if load.connections:
            options += ["--listen", f"{SERVICE}:{PORT}"]
        return [*options, *(["--spin"] if load.spin else [])]

    def _files(self, program: str, trace: bool = True) -> list[object]:
        kinds = ("status", "log", "trace") if trace else ("status", "log")
        return [word for kind in kinds for word in (f"--{kind}", self.path(f"{program}.{kind}"))]

    def path(self, name: str) -> Path:
        return self.place.path / name

    def new_window(self) -> None:
        if self.callers:
            self.lab.kill("client", self.callers, "USR1")

    def end(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Its last word, after it has checked every page, and its clients'."""
        callers = self._end("client", self.callers, "callers") if self.callers else None
        self.callers = 0
        status = self._end(self.host, self.pid, "heartbeat")
        self.pid = 0
        return status, callers

    def _end(self, host: str, pid: int, program: str) -> dict[str, Any]:
        self.lab.kill(host, pid, "TERM")
        until(lambda: not self.lab.alive(host, pid), f"{program} ends", 60)
        return wait_for_status(self.path(f"{program}.status"))

    def close(self) -> None:
        """Whatever is left of it, on whichever host."""
        if self.callers:
            self.lab.kill("client", self.callers)
        for host in ("alpha", "beta") if self.pid else ():
            for pid, command in self.lab.processes(host).items():
                if str(self.path("heartbeat.status")) in command:
                    self._kill(host, pid)
        if self.workload.connections:
            for host in ("alpha", "beta"):
                self.lab.ask(host, "ip", "address", "del", f"{SERVICE}/24", "dev", "eth0")
        self.place.close()


    def _kill(self, host: str, pid: int) -> None:
        self.lab.kill(host, pid)
        until(lambda: not self.lab.alive(host, pid), "the workload has ended")


@contextlib.contextmanager
def running(lab: Hosts, workload: Workload) -> Iterator[Running]:
    process = Running(lab, workload)
    try:
        process.start()
        yield process
    finally:
        process.close()


def sample(hosts: Accounted, case: Case) -> Sample:
    """Move a new process of the case's kind once. What fails is a sample too, with its error."""
    try:
        with running(hosts.lab, case.workload) as process:
            return _move(hosts, process)
    except Exception as error:
        return Sample(outcome="error", error=f"{type(error).__name__}: {error}"[:500])


def _move(hosts: Accounted, process: Running) -> Sample:
    time.sleep(BASELINE)
    process.new_window()
    cpu, began = hosts.seconds(), time.time()
    events = process.path("events")
    command = ("migrate", "move", f"root@alpha:{process.pid}", "beta", *OPTIONS, "--log-file", events)
    done = process.lab.ask("client", *command, timeout=TIMEOUT)
    ended = time.time()
    time.sleep(SETTLE)
    report = _report(done.stdout)
    if report.get("outcome") != "migrated":
        return Sample(outcome=report.get("outcome", "error"), error=_error(report, done.stdout + done.stderr))
    process.host, process.pid = "beta", report["destination"]["pid"]
    its = process_seconds(process.lab.pid_outside("beta", process.pid))
    used = tuple(now - then for now, then in zip(hosts.seconds(), cpu, strict=True))
    status, callers = process.end()
    complaints = [each["first_complaint"] for each in (status, callers) if each and each["complaints"]]
    if complaints:
        return Sample(outcome="wrong", error="; ".join(complaints))
    windows = _windows(events, began, ended)
    return msgspec.structs.replace(
        _reported(report),
        command_s=ended - began,
        precopy_s=windows["precopy"][1] - windows["precopy"][0],
        cpu_source_s=used[0],
        cpu_destination_s=max(used[1] - its, 0.0),
        wait_ms=callers["counters"]["longest-us"] / 1000 if callers else None,
        **_felt(traces.read(process.path("heartbeat.trace")), windows, process.workload),
    )


def _report(output: str) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError:
        return {}
    return report


def _error(report: dict[str, Any], output: str) -> str:
    error = report.get("error")
    if error:
        return f"{error['where']}: {error['kind']}: {error['message']}"
    if report.get("blockers"):
        return "; ".join(f"{each['kind']}: {each['why']}" for each in report["blockers"])
    return output.strip()[-500:]


def _windows(events: Path, began: float, ended: float) -> Windows:
    """When what happened, by the clock of the workload."""
    at = _states(events.read_text())
    return {
        "idle": (began - BASELINE, began),
        "move": (began, ended),
        "precopy": (at["pre-copy"], at["freezing"]),
    }


def _states(text: str) -> dict[str, float]:
    """When each state was first seen."""
    found: dict[str, float] = {}
    for at, state in re.findall(r'^(\S+) .*"event":"state","state":"([^"]+)"', text, re.M):
        found.setdefault(state, datetime.fromisoformat(at).timestamp())
    return found


def _reported(report: dict[str, Any]) -> Sample:
    first = report["rounds"][0]
    return Sample(
        outcome=report["outcome"],
        pause_ms=report["pause_ms"],
        stop_ms=report["longest_stop_ms"],
        phases=tuple(Phase(each["name"], each["where"], each["ms"]) for each in report["phases"]),
        total_s=report["total_s"],
        rounds=len(report["rounds"]),
        memory=report["memory_bytes"],
        sent=report["bytes_sent"],
        throughput=report["memory_bytes"] / first["seconds"],
        link_rate=first["bytes"] / first["seconds"],
    )


def _felt(trace: list[traces.Record], windows: Windows, workload: Workload) -> dict[str, float | None]:
    idle, precopy = windows["idle"], windows["precopy"]
    return {
        "gap_ms": traces.longest_gap(trace, windows["move"]),
        "move_gap_ms": traces.move_gap(trace),
        "idle_gap_ms": traces.longest_gap(trace, idle),
        "slowdown": traces.slowdown(trace, "pages", idle, precopy) if workload.rate else None,
        "spin_slowdown": traces.slowdown(trace, "work", idle, precopy),
    }
