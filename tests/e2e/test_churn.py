"""A program that changes its address space all the time, moved under --verify: no page is lost or old."""

from __future__ import annotations

import pytest
from e2e.support import FULL, Hosts, Place, Workload

SEEDS = range(1, 51 if FULL else 7)


@pytest.mark.parametrize("seed", SEEDS)
def test_churn(lab: Hosts, place: Place, seed: int) -> None:
    megabytes, threads, rate = 24 + 16 * (seed % 4), 1 + seed % 3, (10, 30, 80)[seed % 3]
    options = ["--seed", seed, "--megabytes", megabytes, "--threads", threads, "--rate", rate]
    workload = Workload.start(lab, place, "churn", "--dir", place.path, *options)
    for host in ("beta", "alpha"):
        before = workload.now()["counters"]
        report = workload.move(host, "--verify")
        assert report["verified_pages"] > 0
        lab.kill(host, workload.pid, "USR1")  # compare every page with the model, at once
        after = workload.assert_well()["counters"]
        assert all(after[name] >= before[name] for name in before if name.startswith("checked"))
    workload.end()
