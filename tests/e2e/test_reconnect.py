"""A link that breaks in pre-copy: it goes on over another one, or everything is as before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.support import DONE, ROLLED_BACK, Hosts, Place, start_selfcheck
from e2e.test_faults import Interrupted
from lab.fixture import until

MEGABYTES = 96
PAGE = 4096


class Breaking(Interrupted):
    """A move whose link breaks: sshd's process for it is killed, and the kernel resets the connection."""

    def break_link(self) -> None:
        session = self.session()
        self.lab.kill("beta", session)
        until(lambda: self.session() != session, "sshd's session to be gone")

    def await_search(self) -> None:
        asked = ("migrate", "status", "--json")
        until(lambda: "reconnecting" in self.lab.run("alpha", *asked), "the search", 60)

    def session(self) -> int:
        """Of the agent that has the shadow, or of the process that is its present connection; 0: of none."""
        lines = self.lab.run("beta", "ps", "-e", "-o", "pid=,ppid=,comm=").splitlines()
        parents = {int(pid): int(parent) for pid, parent, _ in map(str.split, lines)}
        names = {int(pid): name for pid, _, name in map(str.split, lines)}
        for agent in self.lab.agents("beta", "destination"):
            pid = agent
            while pid > 1 and names.get(pid) != "sshd":
                pid = parents.get(pid, 0)
            if pid > 1:
                return pid
        return 0

    def report(self) -> dict[str, Any]:
        output, errors = self.move.communicate(timeout=150)
        assert output, errors
        found: dict[str, Any] = json.loads(output)
        return found


@contextlib.contextmanager
def unreachable(lab: Hosts, verdict: str) -> Iterator[None]:
    """What comes to beta's sshd is answered so."""
    hook = "{ type filter hook input priority 0; }"
    lab.run("beta", "nft", f"add table inet away; add chain inet away input {hook}")
    lab.run("beta", "nft", f"add rule inet away input tcp dport 22 {verdict}")
    try:
        yield
    finally:
        lab.run("beta", "nft", "delete table inet away")


@pytest.fixture
def breaking(lab: Hosts, place: Place, request: pytest.FixtureRequest) -> Iterator[Breaking]:
    """Its source seeks the destination for as long as a test says, or long enough for what the test does."""
    patience = getattr(request, "param", "60s")
    workload = start_selfcheck(lab, place, "--megabytes", MEGABYTES)
    under_way = Breaking(lab, workload, ("--verify", "--reconnect", patience))
    yield under_way
    under_way.move.kill()
    lab.kill(workload.host, workload.pid)


def test_pre_copy_goes_on_over_another_link(breaking: Breaking) -> None:
    """Twice, and what had arrived is not sent again; all memory is compared in the end."""
    for megabytes in (10, 20):
        received = breaking.received()
        breaking.break_link()
        until(lambda: breaking.received() > received + (megabytes << 19), "more of it", 60)  # noqa: B023
    report = breaking.report()
    assert breaking.move.returncode == DONE, report
    assert report["outcome"] == "migrated" and report["reconnects"] == 2
    assert report["verified_pages"] * PAGE >= MEGABYTES << 20
    pages = sum(each["pages_sent"] for each in report["rounds"]) * PAGE
    assert pages > MEGABYTES << 20
    # of what was on its way, at most what sockets and ssh had in their buffers
    assert report["bytes_sent"] < pages + (24 << 20)
    workload = breaking.workload
    source_pid, workload.host, workload.pid = workload.pid, "beta", report["destination"]["pid"]
    workload.assert_only_here("alpha", source_pid)
    workload.assert_well()
    workload.end()


@pytest.mark.parametrize("breaking", ["5s"], indirect=True)
def test_a_destination_that_is_not_reached_again(breaking: Breaking) -> None:
    lab = breaking.lab
    with unreachable(lab, "reject with tcp reset"):
        breaking.break_link()
        report = breaking.report()
        assert breaking.move.returncode == ROLLED_BACK, report
        assert report["error"]["kind"] == "connection-lost"
        assert "not reached again within 5 s" in report["error"]["message"], report["error"]
        breaking.assert_runs_on()
    breaking.assert_nothing_left()
    breaking.workload.move("beta")
    breaking.workload.end()


def test_the_shadow_is_gone_as_well(breaking: Breaking) -> None:
    """Its agent is killed while the link is down: there is nobody to go on with, and that is said."""
    lab = breaking.lab
    with unreachable(lab, "reject with tcp reset"):
        breaking.break_link()
        breaking.await_search()
        for agent in lab.agents("beta", "destination"):
            lab.kill("beta", agent)
    report = breaking.report()
    assert breaking.move.returncode == ROLLED_BACK, report
    assert "its shadow is gone" in report["error"]["message"], report["error"]
    breaking.assert_runs_on()
    breaking.assert_nothing_left()
    breaking.workload.end()


def test_an_abort_while_the_destination_is_sought(breaking: Breaking) -> None:
    lab = breaking.lab
    with unreachable(lab, "drop"):
        breaking.break_link()
        breaking.await_search()
        (coordinator,) = lab.agents("alpha", "coordinator")
        lab.kill("alpha", coordinator, "INT")
        report = breaking.report()
        assert breaking.move.returncode == ROLLED_BACK, report
        assert report["error"]["kind"] == "aborted", report["error"]
        breaking.assert_runs_on()
    breaking.workload.end()
