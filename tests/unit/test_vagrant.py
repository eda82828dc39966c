"""The files for virtual machines, as far as they can be looked at without any."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

VAGRANT = Path(__file__).parents[2] / "vagrant"
SCRIPTS = sorted(VAGRANT.glob("*.sh"))


def test_every_script_is_used_and_every_script_that_is_used_is_there() -> None:
    used = re.findall(r'path: "([^"]+)"', (VAGRANT / "Vagrantfile").read_text())
    assert sorted(used) == [script.name for script in SCRIPTS]


def test_every_block_has_its_end() -> None:
    text = re.sub(r"# .*", "", (VAGRANT / "Vagrantfile").read_text())
    begun = re.findall(r"\bdo( \|[^|]*\|)?$|^def ", text, re.M)
    assert len(begun) == len(re.findall(r"^ *end$", text, re.M)) > 0
    for left, right in ("()", "[]", "{}"):
        assert text.count(left) == text.count(right)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_programs(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


def test_the_files_that_trust_needs_are_sent() -> None:
    needed = set(re.findall(r'"\$KEYS/([^"$]+)"', (VAGRANT / "trust.sh").read_text()))
    (listed,) = re.findall(r"^ *\[(.*)\]\.each do \|file\|$", (VAGRANT / "Vagrantfile").read_text(), re.M)
    sent = set(re.findall(r'"([^"]+)"', listed))
    assert needed and needed <= sent, (needed, sent)
