"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lab.fixture import Lab


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Two hosts, alpha and beta, and the client, for the whole session: a test ends what it starts there."""
    with Lab("session") as raised:
        yield raised
