"""A slice of the fuzzing campaign (`make fuzz`): valid input of every target, changed.

Only a decoder's one error class may come out of it, in time, and within the memory that is allowed.
"""

from __future__ import annotations

from random import Random

import pytest
from fuzz.target import Target, allowed, peak_of
from fuzz.targets import TARGETS
from hypothesis import given, settings
from hypothesis import strategies as st

EACH = [pytest.param(target, id=name) for name, target in TARGETS.items()]
SEEDS = {name: target.seeds() for name, target in TARGETS.items()}


@pytest.mark.parametrize("target", EACH)
def test_valid_input_is_understood(target: Target) -> None:
    """Else changes of it would be refused for the wrong reason."""
    seeds = SEEDS[target.name]
    understood = [target.run(data) for data in seeds]
    assert sum(understood) >= len(seeds) / 2
    for data in seeds:
        assert peak_of(target, data) <= allowed(target, data)


@pytest.mark.parametrize("target", EACH)
@settings(max_examples=30, database=None)
@given(data=st.data())
def test_changed_input(target: Target, data: st.DataObject) -> None:
    original = data.draw(st.sampled_from(SEEDS[target.name]))
    random = Random(data.draw(st.integers(0, (1 << 64) - 1), label="seed"))
    changed = original
    for _ in range(4):
        changed = target.mutate(changed, random)
        target.run(changed)
    assert peak_of(target, changed) <= allowed(target, changed)


@pytest.mark.parametrize("target", EACH)
@settings(max_examples=30, database=None)
@given(data=st.binary(max_size=200))
def test_any_input(target: Target, data: bytes) -> None:
    target.run(data)


@pytest.mark.parametrize("target", EACH)
def test_nothing_and_a_lot_of_one_thing(target: Target) -> None:
    for piece in (b"\0", b"\xff", b"[", b'{"a":', b"\x91", b"\x81\xa1a", b"- ", b"\n", b"1", b'"'):
        for count in (0, 1, 20_000):
            assert peak_of(target, piece * count) <= allowed(target, piece * count)
