"""Whatever breaks during pre-copy, the process runs on at the source, and nothing is left on either host."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import pytest
from e2e.support import DONE, ROLLED_BACK, Hosts, Place, Workload
from lab.fixture import until

# The link is slow, so that pre-copy takes many seconds and the fault comes in the middle of it.
BANDWIDTH, MEGABYTES, ENOUGH = "100mbit", 160, 8 << 20


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    with Hosts("faults", bandwidth=BANDWIDTH) as hosts:
        yield hosts


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
    before: dict[str, tuple[dict[int, str], str, str]] = field(init=False)
    move: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        self.before = {host: traces(self.lab, host) for host in ("alpha", "beta")}
        received = self.received()
        self.move = self.lab.attend("alpha", "migrate", "move", self.workload.pid, "beta", "--json")
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
    workload = Workload.start(lab, place, "selfcheck", "--dir", place.path, "--megabytes", MEGABYTES)
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


@pytest.mark.parametrize("which", ["first", "last"])
def test_source_agent_is_killed(interrupted: Interrupted, which: str) -> None:
    """The front, and the worker that it has started."""
    lab = interrupted.lab
    agents = sorted(lab.agents("alpha", "source"))
    assert agents
    lab.kill("alpha", agents[0 if which == "first" else -1])
    assert interrupted.outcome() == ROLLED_BACK
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    interrupted.workload.end()


def test_coordinator_is_killed(interrupted: Interrupted) -> None:
    lab = interrupted.lab
    (pid,) = [
        pid
        for pid, command in lab.processes("alpha").items()
        if f"move {interrupted.workload.pid}" in command
    ]
    lab.kill("alpha", pid)
    interrupted.move.wait(60)
    interrupted.assert_runs_on()
    interrupted.assert_nothing_left()
    interrupted.workload.end()


def test_link_is_cut(interrupted: Interrupted) -> None:
    lab = interrupted.lab
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
    until(lambda: not interrupted.lab.agents("beta"), "the destination's end")
    assert not any("selfcheck" in command for command in interrupted.lab.processes("beta").values())
