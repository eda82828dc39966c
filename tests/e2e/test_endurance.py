"""Moves and failures in turn, by the same two services; `make endurance` makes hundreds."""

from __future__ import annotations

from pathlib import Path

from endurance import cli

MOVES = "8"


def test_a_few_moves_and_failures(tmp_path: Path) -> None:
    found = cli.run(cli.parse(["--moves", MOVES, "--output", str(tmp_path)]))
    assert not found.problems, cli.show(found)
    assert [one.fails for one in found.done] == [False, True] * 4
