"""A host of the lab runs out of something while a program is moved, which notices nothing of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.support import ROLLED_BACK, Hosts, Place, Workload, start_selfcheck
from e2e.test_faults import Interrupted, traces
from lab.fixture import until
from unit.cgroups import Cgroup

MEGABYTES = 160
SPARE = 24 << 20  # bytes: for an agent with its buffers while it takes some of the pages


@pytest.fixture
def workload(lab: Hosts, place: Place) -> Iterator[Workload]:
    started = start_selfcheck(lab, place)
    yield started
    lab.kill(started.host, started.pid)


def rolled_back(workload: Workload) -> dict[str, Any]:
    """A move that ends so; both hosts are as before, and the program goes on."""
    lab = workload.lab
    before = {host: traces(lab, host) for host in ("alpha", "beta")}
    done = lab.ask("alpha", "migrate", "move", workload.pid, "beta", "--json")
    assert done.returncode == ROLLED_BACK, done.stdout + done.stderr
    for host, found in before.items():
        until(lambda: traces(lab, host) == found, f"a clean {host}")  # noqa: B023
    until(workload.untraced, "the process to be let go")
    workload.assert_well()
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def assert_goes_on(workload: Workload) -> None:
    """And can be moved once there is enough."""
    workload.move("beta")
    workload.assert_well()
    workload.end()


@contextlib.contextmanager
def sessions_in(lab: Hosts, group: Cgroup) -> Iterator[None]:
    """What beta's sshd starts is in this cgroup."""
    sshd = int(lab.run("beta", "cat", "/run/lab/sshd.pid"))
    outside = lab.pid_outside("beta", sshd)
    group.take(outside)
    try:
        yield
    finally:
        (group.path.parent / "cgroup.procs").write_text(str(outside))
        until(lambda: not group.processes(), "what sshd started to end", 90)
        group.remove()


def test_memory_runs_out_for_all_of_the_destination(lab: Hosts, place: Place) -> None:
    """The kernel chooses whom it kills, the copy first, then perhaps the agent: either is said."""
    workload = start_selfcheck(lab, place, "--megabytes", MEGABYTES)
    group = Cgroup("memory", 1 << 30)
    try:
        with sessions_in(lab, group):
            under_way = Interrupted(lab, workload)
            group.limit(group.usage() + SPARE)
            output, errors = under_way.move.communicate(timeout=150)
            assert under_way.move.returncode == ROLLED_BACK, output + errors
            error = json.loads(output)["error"]
            assert error["kind"] in ("out-of-memory", "agent-failed"), error
            assert "memory" in error["message"], error
            under_way.assert_runs_on()
            group.limit(1 << 30)
            under_way.assert_nothing_left()
        workload.end()
    finally:
        lab.kill(workload.host, workload.pid)


@contextlib.contextmanager
def full(lab: Hosts, host: str, place: str) -> Iterator[None]:
    """A file system there that has no room."""
    lab.run(host, "mkdir", "-p", "-m", "700", place)
    lab.run(host, "mount", "-t", "tmpfs", "-o", "size=16k,mode=700", "none", place)
    try:
        lab.ask(host, "dd", "if=/dev/zero", f"of={place}/filler", "bs=4k")
        yield
    finally:
        lab.run(host, "umount", "-l", place)


@pytest.mark.parametrize(
    ("host", "role", "where"), [("alpha", "outgoing", "source"), ("beta", "incoming", "destination")]
)
def test_no_room_for_a_journal(lab: Hosts, workload: Workload, host: str, role: str, where: str) -> None:
    with full(lab, host, f"/run/migrate/{role}"):
        error = rolled_back(workload)["error"]
        assert (error["kind"], error["where"]) == ("disk-full", where), error
        assert f"/run/migrate/{role}" in error["message"] and "free some" in error["message"]
    assert_goes_on(workload)


def test_no_room_for_the_records_of_the_service(lab: Hosts, workload: Workload) -> None:
    """They are a convenience: what can be done without one is done."""
    with full(lab, "alpha", "/var/lib/migrate"):
        assert_goes_on(workload)
