"""The engine is killed in the freeze, where it has most to undo, or with its front: a person cleans up."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest
from e2e.redis_session import PORT, RedisSession
from e2e.support import ROLLED_BACK, SERVICE, Hosts, Place, start_selfcheck
from lab.fixture import until

from agent import cleanup
from agent.kernel import procfs
from agent.kernel.memory import RemoteMemory

# by the front, or by the guardian before it
UNDONE = re.compile("cleaned up|nothing is left of it here")


def left_in(outside: int) -> cleanup.Leftovers:
    """What of ours is in a process, by the machine's number."""
    memory = RemoteMemory(outside)
    found = cleanup.look(outside, memory)
    memory.close()
    return found


def is_frozen(outside: int) -> bool:
    """All its threads are held (pre-copy stops but one), and its sockets locked."""
    tracers = procfs.each_thread(outside, lambda tid: procfs.status(outside, tid)["TracerPid"])
    return "0" not in tracers and bool(cleanup.held_sockets(outside))


class Visitor:
    """A client of redis-server with one connection, which says nothing while the server is frozen."""

    def __init__(self, lab: Hosts) -> None:
        words = ("redis-cli", "-h", SERVICE, "-p", str(PORT))
        pipe = subprocess.PIPE
        self.process: subprocess.Popen[str] = lab.popen("client", *words, stdin=pipe, stdout=pipe, text=True)
        self.number = self.ask("CLIENT ID")

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def assert_served(self) -> None:
        """On the same connection: the server numbers them."""
        assert self.ask("CLIENT ID") == self.number
        assert self.ask("ECHO still-here") == "still-here\n"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def session(lab: Hosts, place: Place) -> Iterator[RedisSession]:
    # the address may have been elsewhere in another test
    lab.run("client", "ip", "neighbour", "flush", "dev", "eth0")
    found = RedisSession(lab, place, 64)
    try:
        found.fill()
        yield found
    finally:
        found.close()


@pytest.fixture
def visitor(session: RedisSession) -> Iterator[Visitor]:
    found = Visitor(session.lab)
    yield found
    found.close()


class FrozenMove:
    """A move that is held in the freeze: its destination does not answer any more."""

    def __init__(self, session: RedisSession) -> None:
        self.lab, self.pid = session.lab, session.server.pid
        self.outside = self.lab.pid_outside("alpha", self.pid)
        # slow enough that its parts are found before it freezes, and then still for a while
        options = ("--json", "--verify", "--freeze-timeout", "60s", "--bandwidth", "10MB")
        self.move = self.lab.attend("alpha", "migrate", "move", self.pid, "beta", *options)
        self.destination = 0
        until(self._find, "the destination's agent", 60)
        until(self._hold, "the freeze", 120)

    def agents(self, host: str, part: str) -> list[int]:
        found = self.lab.services(host) if part == "service" else self.lab.agents(host, part)
        return [self.lab.pid_outside(host, pid) for pid in found]

    def _find(self) -> bool:
        """It forks for a moment while it makes the shadow."""
        found = self.agents("beta", "destination")
        if len(found) == 1:
            self.destination = found[0]
        return bool(self.destination)

    def _hold(self) -> bool:
        assert self.move.poll() is None, self.move.communicate()
        if not is_frozen(self.outside):
            return False
        os.kill(self.destination, signal.SIGSTOP)
        return True

    def kill(self, *parts: str) -> None:
        victims = [pid for part in parts for pid in self.agents("alpha", part)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # at the same time: none can answer the other's end
            for victim in reversed(victims):
                os.kill(victim, number)
        os.kill(self.destination, signal.SIGCONT)

    def outcome(self) -> tuple[int, str]:
        """The exit status of `migrate move`, and the error in its report."""
        output, errors = self.move.communicate(timeout=120)
        return self.move.returncode, json.loads(output)["error"]["message"] if output else errors


def test_engine_is_killed_in_the_freeze(session: RedisSession, visitor: Visitor) -> None:
    frozen = FrozenMove(session)
    frozen.kill("worker")
    status, message = frozen.outcome()
    assert status == ROLLED_BACK
    assert UNDONE.search(message)
    assert not left_in(frozen.outside)
    visitor.assert_served()
    # and it can still be moved
    session.server.move("beta")
    visitor.assert_served()


def test_all_of_the_source_is_killed_in_the_freeze(session: RedisSession, visitor: Visitor) -> None:
    """The guardian is left, and puts it in order."""
    frozen = FrozenMove(session)
    frozen.kill("source", "worker")
    until(lambda: not left_in(frozen.outside), "the guardian")
    visitor.assert_served()
    assert frozen.outcome()[0] == ROLLED_BACK


def test_nobody_of_the_source_is_left_in_the_freeze(session: RedisSession, visitor: Visitor) -> None:
    """The service that the tool starts, when it asks for the migration again, puts it in order."""
    frozen = FrozenMove(session)
    assert left_in(frozen.outside).scratches and left_in(frozen.outside).sockets
    frozen.kill("guardian", "service", "source", "worker")
    status, message = frozen.outcome()
    assert status == ROLLED_BACK and "unlocked the socket" in message and "removed the mapping" in message
    assert not left_in(frozen.outside)
    visitor.assert_served()
    assert session.lab.run("alpha", "ls", "/run/migrate/outgoing") == ""


def test_a_person_puts_in_order_what_is_left(session: RedisSession, visitor: Visitor) -> None:
    lab = session.lab
    frozen = FrozenMove(session)
    left = left_in(frozen.outside)
    frozen.kill("coordinator", "guardian", "service", "source", "worker")
    (file,) = lab.run("alpha", "ls", "/run/migrate/outgoing").split()
    done = lab.run("alpha", "migrate-agent", "recover", file.partition(".")[0])
    assert done.count("unlocked the socket") == len(left.sockets) and "removed the mapping" in done
    assert not left_in(frozen.outside)
    visitor.assert_served()
    assert "nothing is left" in lab.run("alpha", "migrate-agent", "recover", file.partition(".")[0])
    assert lab.run("alpha", "ls", "/run/migrate/outgoing") == ""


def test_nothing_is_cleaned_up_under_a_living_engine(lab: Hosts, place: Place) -> None:
    workload = start_selfcheck(lab, place, "--megabytes", 64)
    outside = lab.pid_outside("alpha", workload.pid)
    options = ("--json", "--bandwidth", "10MB")
    move: subprocess.Popen[str] = lab.attend("alpha", "migrate", "move", workload.pid, "beta", *options)
    until(lambda: bool(left_in(outside).scratches), "pre-copy", 60)
    refused = lab.ask("alpha", "migrate-agent", "cleanup", workload.pid)
    assert refused.returncode == cleanup.EXIT_BUSY and "under way" in refused.stderr
    assert left_in(outside).scratches
    (engine,) = lab.agents("alpha", "worker")
    lab.kill("alpha", engine)
    output, _ = move.communicate(timeout=120)
    assert move.returncode == ROLLED_BACK
    assert UNDONE.search(json.loads(output)["error"]["message"])
    assert not left_in(outside)
    workload.assert_well()
    workload.end()
