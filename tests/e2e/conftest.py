"""The hosts that a module's tests share, and a directory per test that all of them see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("e2e.support", "e2e.redis_session")

from e2e.support import Hosts, Place  # noqa: E402 - its assertions are rewritten from here on


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
