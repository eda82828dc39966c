"""What tests run on: a module's hosts, a directory per test that they all see, or hosts on a bare segment."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("e2e.support", "e2e.redis_session", "e2e.segment", "e2e.tcp_mover")

from e2e.support import Hosts, Place  # noqa: E402 - its assertions are rewritten from here on
from e2e.tcp_mover import FAMILIES, Family, Wire, three_hosts  # noqa: E402


@pytest.fixture(scope="module")
def lab() -> Iterator[Hosts]:
    with Hosts("e2e") as hosts:
        yield hosts


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def wire() -> Iterator[Wire]:
    with three_hosts() as built:
        yield built


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]
