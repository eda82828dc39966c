"""The self-checking program, moved back and forth: no complaint, and really on the other host each time."""

from __future__ import annotations

import itertools
import re

import pytest
from e2e.support import FULL, Hosts, Place, Workload, start_selfcheck

MOVES = 50 if FULL else 5

# Of /proc/PID/status: what must be the same to a byte wherever the process is.
STATUS_FIELDS = {
    *("Name", "Umask", "Uid", "Gid", "Groups", "VmLck", "SigIgn", "SigCgt", "NoNewPrivs", "Seccomp"),
    *("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"),
}


def facts(workload: Workload) -> dict[str, str]:
    """What the host tells of the process, from outside."""
    directory = f"/proc/{workload.pid}"
    status = workload.lab.run(workload.host, "cat", f"{directory}/status")
    smaps = workload.lab.run(workload.host, "cat", f"{directory}/smaps")
    fields = re.findall(r"^(\w+):\s*(.*)$", status, re.M)
    found = {name: value for name, value in fields if name in STATUS_FIELDS}
    for name in ("cmdline", "environ", "limits", "oom_score_adj", "auxv", "personality", "coredump_filter"):
        found[name] = workload.lab.run(workload.host, "base64", f"{directory}/{name}")
    for name in ("exe", "cwd", "root"):
        found[name] = workload.lab.run(workload.host, "readlink", f"{directory}/{name}")
    flags = re.findall(r"^VmFlags: (.*)$", smaps, re.M)
    found["locked"] = str(sum(" lo" in each for each in flags))
    found["advised huge"] = str(sum(" hg" in each for each in flags))
    return found


@pytest.mark.timeout(300 + 40 * MOVES)
def test_back_and_forth(lab: Hosts, place: Place) -> None:
    workload = start_selfcheck(lab, place)
    before = facts(workload)
    pid_at_start = workload.now()["pid"]
    hosts = itertools.cycle(["beta", "alpha"])
    for number, host in zip(range(MOVES), hosts, strict=False):
        monotonic = workload.now()["monotonic"]
        report = workload.move(host, *(["--verify"] if number % 2 else []))
        assert number % 2 == 0 or report["verified_pages"] > 0
        status = workload.assert_well()
        assert status["pid"] == pid_at_start
        assert monotonic < status["monotonic"] < monotonic + 300
        assert facts(workload) == before
    workload.end()


def test_check_touches_nothing(lab: Hosts, place: Place) -> None:
    workload = start_selfcheck(lab, place)
    done = lab.ask("alpha", "migrate", "check", workload.pid, "beta", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert workload.untraced()
    workload.assert_well()
    workload.end()
