"""What tests run on: hosts, a directory per test that they all see, hosts on a bare segment, an sshd."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("e2e.support", "e2e.redis_session", "e2e.segment", "e2e.tcp_mover")

from e2e.private_sshd import PrivateSshd, private_sshd  # noqa: E402
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with private_sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that could be moved."""
    process = subprocess.Popen(["sleep", "300"])
    yield process
    process.kill()
    process.wait()
