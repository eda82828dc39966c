"""A slice of the campaign: whatever dies, one live copy is left, it is well, and both hosts are clean.

Here only cases in which nothing waits for long; `make faults` runs as much of it all as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults import cli, evidence
from faults.campaign import Campaign
from faults.fault import Case

SEED, RUNS = 1, 30


@pytest.fixture(scope="module")
def campaign() -> Iterator[Campaign]:
    with Campaign() as running:
        yield running


@pytest.mark.parametrize("case", cli.quick(SEED, RUNS), ids=lambda case: case.name)
def test_case(campaign: Campaign, case: Case) -> None:
    verdict = campaign.run(case)
    assert not verdict.problems, f"{evidence.line(1, verdict)}\n{verdict.evidence}"
