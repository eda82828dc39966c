"""Whatever breaks during pre-copy, the process runs on at the source, and nothing is left on either host."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from e2e.support import DONE, IN_DOUBT, ROLLED_BACK, Hosts, Place, Workload, start_selfcheck
from lab.fixture import until

# So slow that pre-copy takes many seconds and the fault comes in the middle of it.
BANDWIDTH, MEGABYTES, ENOUGH = "10MB", 160, 8 << 20


def traces(lab: Hosts, host: str) -> tuple[dict[int, str], str, str]:
    """What a migration might leave on a host: processes, addresses, packet filters."""
    return (
        lab.processes(host),
        lab.run(host, "ip", "-o", "address"),
        lab.ask(host, "nft", "list", "ruleset").stdout,
    )


@dataclass
class Interrupted:
    """A move that is under way, and how the hosts were before it."""

    lab: Hosts
    workload: Workload
    options: tuple[str, ...] = ()
    before: dict[str, tuple[dict[int, str], str, str]] = field(init=False)
    move: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {host: traces(self.lab, host) for host in ("alpha", "beta")}
        received = self.received()
        options = ("--json", "--bandwidth", BANDWIDTH, *self.options)
        self.move = self.lab.attend("alpha", "migrate", "move", self.workload.pid, "beta", *options)
        until(lambda: self.received() > received + ENOUGH or self.move.poll() is not None, "pre-copy", 60)
        assert self.move.poll() is None, f"the move has ended: {self.move.communicate()}"

    def received(self) -> int:
        """Bytes that beta has received."""
        lines = self.lab.run("beta", "cat", "/proc/net/dev").splitlines()
        return next(int(line.split()[1]) for line in lines if line.strip().startswith("eth0:"))

    def outcome(self, timeout: float = 150) -> int:
        """The exit status of `migrate move`; its report must agree with it."""
        output, errors = self.move.communicate(timeout=timeout)
        if self.move.returncode == ROLLED_BACK:
            report = json.loads(output)
            assert report["outcome"] == "rolled-back" and report["error"]["message"], report
        return self.move.returncode if output or errors else -1

    def is_as_before(self, host: str) -> bool:
        return traces(self.lab, host) == self.before[host]

    def assert_nothing_left(self) -> None:
        for host in self.before:
            until(partial(self.is_as_before, host), f"a clean {host}", 90)

    def assert_runs_on(self) -> None:
        until(self.workload.untraced, "the process to be let go")
        self.workload.assert_well()


@pytest.fixture
def interrupted(lab: Hosts, place: Place) -> Iterator[Interrupted]:
    workload = start_selfcheck(lab, place, "--megabytes", MEGABYTES)
    under_way = Interrupted(lab, workload)
    yield under_way
    under_way.move.kill()
    lab.kill(workload.host, workload.pid)


def test_destination_agent_is_killed(interrupted: Interrupted) -> None:
    lab = interrupted.lab
    agents = lab.agents("beta", "destination")
    assert agents
    for pid in agents:
        lab.kill("beta", pid)
    assert interrupted.outcome() == ROLLED_BACK
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    # And it can still be moved.
    interrupted.workload.move("beta")
    interrupted.workload.assert_well()
    interrupted.workload.end()


def test_source_worker_is_killed(interrupted: Interrupted) -> None:
    lab = interrupted.lab
    (pid,) = lab.agents("alpha", "worker")
    lab.kill("alpha", pid)
    assert interrupted.outcome() == ROLLED_BACK
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    interrupted.workload.end()


def test_source_agent_is_killed(interrupted: Interrupted) -> None:
    """The front of the source: nobody tells the coordinator how it ended, and the process runs on anyway."""
    lab = interrupted.lab
    (pid,) = lab.agents("alpha", "source")
    lab.kill("alpha", pid)
    assert interrupted.outcome() in (ROLLED_BACK, IN_DOUBT)
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    interrupted.workload.end()


def test_coordinator_is_killed(interrupted: Interrupted) -> None:
    lab = interrupted.lab
    (pid,) = lab.agents("alpha", "coordinator")
    lab.kill("alpha", pid)
    interrupted.move.wait(60)
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    interrupted.workload.end()


def test_link_is_cut(interrupted: Interrupted) -> None:
    lab = interrupted.lab
    # IPv6 addresses outlive the cut as IPv4 ones do.
    lab.run("beta", "sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/eth0/keep_addr_on_down")
    lab.run("beta", "ip", "link", "set", "eth0", "down")
    try:
        assert interrupted.outcome() == ROLLED_BACK
        interrupted.assert_runs_on()
    finally:
        lab.run("beta", "ip", "link", "set", "eth0", "up")
    interrupted.workload.move("beta")
    interrupted.workload.assert_well()
    interrupted.workload.end()


def test_process_ends(interrupted: Interrupted) -> None:
    """Of itself, in the middle of pre-copy: there is nothing to move, and no copy may come to life."""
    interrupted.lab.kill("alpha", interrupted.workload.pid)
    assert interrupted.outcome() not in (DONE, -1)
    # one that lost its source for good in an earlier test may be waiting for it still
    earlier = interrupted.before["beta"][0]
    until(lambda: not set(interrupted.lab.agents("beta")) - set(earlier), "the destination's end")
    assert not any("selfcheck" in command for command in interrupted.lab.processes("beta").values())
