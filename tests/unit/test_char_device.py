"""The memory devices: /dev/null and its kind."""

from __future__ import annotations

import os

import pytest
from unit.descriptor_case import Make, captured_here, status_flags

from agent import kinds
from agent.resources import char_device


@pytest.mark.parametrize("name", ["null", "zero", "full", "random", "urandom"])
def test_memory_devices(make: Make, name: str) -> None:
    case = make(lambda: [os.open(f"/dev/{name}", os.O_RDWR | os.O_NONBLOCK)])
    assert kinds.kind_of(case.files()[0]) is char_device
    ours = case.move()
    assert captured_here(ours) == case.state()
    assert os.fstat(ours).st_rdev == os.stat(f"/dev/{name}").st_rdev
    assert status_flags(ours) & os.O_NONBLOCK
