"""What a process has besides memory and TCP, looked at by itself on either side of a move."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.support import REFUSED, Hosts, Place, Workload
from lab.fixture import until
from programs.belongings import LOCKED, SERVICE
from programs.status import PROGRAMS, wait_for_status

HOSTS = ("alpha", "beta")
# writes what it receives, a line each, to the file of its name
LOG = (
    "import os, socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.bind(sys.argv[1]); "
    "os.chmod(sys.argv[1], 0o666); f = open(sys.argv[2], 'wb', 0)\nwhile True: f.write(s.recv(1000) + b'\\n')"
)


class Log:
    """The service of one host."""

    def __init__(self, lab: Hosts, place: Place, host: str) -> None:
        self.lines = place.path / f"log-{host}"
        self._lab, self._host = lab, host
        self._pid = lab.start(host, "/usr/bin/python3", "-c", LOG, SERVICE, self.lines)
        until(self.lines.exists, "the log service")

    def count(self) -> int:
        return len(self.lines.read_bytes().splitlines())

    def close(self) -> None:
        self._lab.kill(self._host, self._pid)
        self._lab.run(self._host, "rm", "-f", SERVICE)


@pytest.fixture
def logs(lab: Hosts, place: Place) -> Iterator[dict[str, Log]]:
    found = {host: Log(lab, place, host) for host in HOSTS}
    yield found
    for log in found.values():
        log.close()


@pytest.fixture
def workload(lab: Hosts, place: Place, logs: dict[str, Log]) -> Iterator[Workload]:
    """Its locked files are each host's own."""
    for host in HOSTS:
        lab.run(host, "sh", "-c", f"for name in flock posix ofd; do echo locked >{LOCKED}-$name; done")
    status = place.path / "belongings.status"
    pid = lab.start("alpha", "/usr/bin/python3", PROGRAMS / "belongings.py", status)
    wait_for_status(status)
    found = Workload(lab, "alpha", pid, status=status)
    yield found
    lab.kill(found.host, found.pid)


def test_there_and_back_and_there(workload: Workload, logs: dict[str, Log], lab: Hosts) -> None:
    for host in ("beta", "alpha", "beta"):
        workload.assert_well()
        workload.move(host)
        workload.assert_well()
        before = logs[host].count()
        until(lambda: logs[host].count() > before + 3, "lines in this host's log")  # noqa: B023
        assert_locked(lab, host)
    workload.end()


def assert_locked(lab: Hosts, host: str) -> None:
    """Strangers cannot have what it has locked."""
    assert lab.ask(host, "flock", "--nonblock", f"{LOCKED}-flock", "true").returncode == 1
    for name, place in (("posix", 7), ("ofd", 4)):
        take = f"fcntl.lockf(open(sys.argv[1], 'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, {place})"
        done = lab.ask(host, "/usr/bin/python3", "-c", f"import fcntl, sys; {take}", f"{LOCKED}-{name}")
        assert done.returncode == 1 and "BlockingIOError" in done.stderr, done


def test_a_lock_that_is_taken_over_there(workload: Workload, lab: Hosts) -> None:
    """Seen only when it is tried, in the freeze: nothing has happened then."""
    stranger = lab.start("beta", "flock", f"{LOCKED}-flock", "sleep", "1000")
    try:
        done = lab.ask("alpha", "migrate", "move", workload.pid, "beta", "--json")
        report = json.loads(done.stdout)
        assert report["outcome"] == "rolled-back" and report["error"]["kind"] == "file-lock", report
        assert f"{LOCKED}-flock: another process has it locked" in report["error"]["message"]
        workload.assert_well()
    finally:
        lab.kill("beta", stranger)
    workload.end()


def test_what_the_destination_does_not_have(workload: Workload, lab: Hosts, logs: dict[str, Log]) -> None:
    logs["beta"].close()
    done = lab.ask("alpha", "migrate", "move", workload.pid, "beta", "--json")
    assert done.returncode == REFUSED, done
    (blocker,) = json.loads(done.stdout)["blockers"]
    assert (blocker["kind"], Path(blocker["what"])) == ("unix-service", Path(SERVICE))
    workload.assert_well()
    workload.end()
