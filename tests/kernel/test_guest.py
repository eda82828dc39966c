"""On Debian 12's kernel, 6.1: no asynchronous write-protection, no PAGEMAP_SCAN, but soft-dirty.

One emulated machine runs what the tests are run for there; with MIGRATE_TEST_FULL=1 all of the longer list.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from programs.status import build

from kernel import guest
from kernel.guest import GuestFailed

ROOT = Path(__file__).resolve().parents[2]
FULL = os.environ.get("MIGRATE_TEST_FULL") == "1"
TRACKER = ("tracker", "tracker_mappings", "tracker_anything", "halt")
UNIT = (*TRACKER, "soft_dirty", "engine", "timer_numbers", "eventfd", "waits", "between", "letting_go")
SHORT = (*(f"tests/unit/test_{name}.py" for name in TRACKER), "tests/kernel/moves.py::test_churn[1]")
LONG = (
    *(f"tests/unit/test_{name}.py" for name in UNIT),
    "tests/kernel/moves.py",
    # an emulated machine takes longer than its limit for the way there
    "--deselect=tests/unit/test_engine.py::test_the_destination_does_not_answer_in_the_freeze",
)
# nothing is written below the root, which is the host's
SETTINGS = (
    *("PYTHONDONTWRITEBYTECODE=1", "HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis", "NO_COLOR=1"),
    f"MIGRATE_TEST_EXAMPLES={200 if FULL else 30}",
)


@pytest.mark.timeout(0 if FULL else 900)
def test_with_soft_dirty() -> None:
    """The tests of dirty tracking, and moves; the first line says that it is what we think it is."""
    build()
    what = (
        "from agent.dirty_tracking import mechanism; import os; "
        "print(os.uname().release, mechanism(), flush=True)"
    )
    tests = " ".join(f'"{name}"' for name in (LONG if FULL else SHORT))
    script = f"{sys.executable} -c '{what}' && {sys.executable} -m pytest -p no:cacheprovider -q {tests}"
    result = guest.run(["env", *SETTINGS, "sh", "-c", script], str(ROOT), 5400 if FULL else 800)
    assert result.status == 0, result.output
    release, mechanism = result.output.split("\n")[0].split()
    assert release.startswith("6.1.")
    assert mechanism == "soft-dirty"


def test_the_status_and_the_output_of_a_command() -> None:
    result = guest.run(["sh", "-c", "echo one; echo two >&2; pwd; exit 41"], "/usr")
    assert (result.status, result.output) == (41, "one\ntwo\n/usr\n")


def test_a_guest_that_does_not_end_is_ended() -> None:
    with pytest.raises(GuestFailed, match="did not end in 1 s"):
        guest.run(["true"], seconds=1)


def test_a_guest_that_fails_says_why() -> None:
    with pytest.raises(GuestFailed, match="Kernel panic"):
        guest.run(["sh", "-c", "echo c >/proc/sysrq-trigger"])
