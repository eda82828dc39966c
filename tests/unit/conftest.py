"""What the tests of several parts share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from unit.children import puppet, wait_for
from unit.descriptor_case import Case, Make
from unit.watched import Watched

from agent.server.places import RUNTIME_VARIABLE

# How long an example takes says nothing: the machine may be busy.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def journals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of engines here: not the host's. At the end there is none: each migration was put in order."""
    place = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RUNTIME_VARIABLE, str(place))
        yield place
    wait_for(lambda: not any(file.is_file() for file in place.rglob("*")), "the last guardian")


@pytest.fixture
def make() -> Iterator[Make]:
    """Opens things in children; at the end all of it is closed, and no descriptor of ours was forgotten."""
    cases: list[Case] = []

    def made(setup: Callable[[], list[int]]) -> Case:
        cases.append(Case(setup))
        return cases[-1]

    before = len(os.listdir("/proc/self/fd"))
    yield made
    for case in cases:
        case.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def watched() -> Iterator[Watched]:
    with puppet() as target:
        found = Watched(target)
        yield found
        found.close()
