"""What cannot be moved is refused by name, all of it at once, and before anything is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.support import DONE, REFUSED, SERVICE, UNREACHABLE, Hosts, Place
from lab.fixture import until
from programs import holder
from programs.status import BUILD, PROGRAMS

# By kind of tests/programs/holder.py: what a blocker has to speak of.
NAMED = {
    "unix-socket": "unix",
    "unix-listener": "unix",
    "udp": "udp",
    "netlink": "netlink",
    "packet": "packet",
    "child": "child",
    "shared-anonymous": "shared",
    "sysv-memory": "shared|sysv|system v",
    "tty": "tty|terminal|pts|ptmx",
    "inotify": "inotify",
    "fanotify": "fanotify",
    "seccomp": "seccomp",
    "io-uring": "io.?uring",
    "aio": "aio|asynchronous",
    "pidfd": "pidfd",
    "userfaultfd": "userfaultfd",
    "perf-event": "perf",
    "proc-file": "proc",
    "directory-gone": "director",
    "lock": "lock",
    "namespace": "namespace",
    "passed-descriptor": "scm_rights",
    "tracer": "trace|debug",
}
# A process that nobody stops is not late by more than this, even where many things run at once.
UNDISTURBED_MS = 1500


@dataclass
class Holder:
    """A process that holds what cannot be moved."""

    lab: Hosts
    status: Path
    pid: int

    @classmethod
    def start(cls, lab: Hosts, place: Place, kinds: str) -> Holder:
        status = place.path / "holder.status"
        pid = lab.start("alpha", "/usr/bin/python3", PROGRAMS / "holder.py", kinds, status)
        held = cls(lab, status, pid)
        until(lambda: held.beats() > 5, f"holder.py {kinds}")
        return held

    def told(self) -> dict[str, Any]:
        """Its status; empty while there is none."""
        text = self.status.read_text() if self.status.exists() else ""
        told: dict[str, Any] = json.loads(text) if text.endswith("\n") else {}
        return told

    def beats(self) -> int:
        return int(self.told().get("beats", 0))

    def assert_undisturbed(self) -> None:
        before = self.beats()
        until(lambda: self.beats() > before + 10, "heartbeats")
        told = self.told()
        assert told["pid"] == self.pid
        assert told["longest_gap_ms"] < UNDISTURBED_MS

    def end(self) -> None:
        children = self.lab.ask("alpha", "cat", f"/proc/{self.pid}/task/{self.pid}/children").stdout.split()
        for pid in (self.pid, *map(int, children)):
            self.lab.kill("alpha", pid)


def text_of(blockers: list[dict[str, str]]) -> str:
    return "\n".join(f"{each['kind']}: {each['what']}: {each['why']}" for each in blockers).lower()


def assert_refused(lab: Hosts, pid: int, *patterns: str) -> None:
    """By `check` and by `move` alike, each thing by its name. They are asked at the same time."""
    commands = [lab.attend("alpha", "migrate", word, pid, "beta", "--json") for word in ("check", "move")]
    told = []
    for command in commands:
        output, errors = command.communicate(timeout=120)
        assert command.returncode == REFUSED, output + errors
        told.append(json.loads(output))
    assert told[1]["outcome"] == "refused"
    for each in told:
        named = text_of(each["blockers"])
        for pattern in patterns:
            assert re.search(pattern, named), f"no blocker speaks of {pattern}:\n{named}"


@pytest.mark.parametrize("kind", NAMED)
def test_refused_by_name(lab: Hosts, place: Place, kind: str) -> None:
    before = lab.processes("beta")
    held = Holder.start(lab, place, kind)
    try:
        assert_refused(lab, held.pid, NAMED[kind])
        held.assert_undisturbed()
        if kind != "tracer":
            assert "TracerPid:\t0" in lab.run("alpha", "cat", f"/proc/{held.pid}/status")
        until(lambda: lab.processes("beta").items() <= before.items(), "the end of what was started on beta")
        assert not lab.agents("alpha")
    finally:
        held.end()


def test_all_blockers_at_once(lab: Hosts, place: Place) -> None:
    kinds = ["unix-socket", "inotify", "udp", "shared-anonymous", "pidfd"]
    held = Holder.start(lab, place, ",".join(kinds))
    try:
        assert_refused(lab, held.pid, *(NAMED[kind] for kind in kinds))
        held.assert_undisturbed()
    finally:
        held.end()


@pytest.fixture
def taken_port(lab: Hosts) -> Iterator[int]:
    """A port that somebody listens on on beta."""
    listen = f"import signal, socket; s = socket.create_server(('', {holder.PORT})); signal.pause()"
    pid = lab.start("beta", "/usr/bin/python3", "-c", listen)
    until(lambda: lab.run("beta", "ss", "-Hltn", f"sport = {holder.PORT}"), "the listener on beta")
    yield holder.PORT
    lab.kill("beta", pid)


def test_blockers_of_both_hosts_at_once(lab: Hosts, place: Place, taken_port: int) -> None:
    held = Holder.start(lab, place, "unix-socket,listener,private-directory")
    try:
        there = (f"tcp-port-taken: .*:{taken_port}", f"directory-missing: .*{holder.PRIVATE}")
        assert_refused(lab, held.pid, NAMED["unix-socket"], *there)
        held.assert_undisturbed()
    finally:
        held.end()


def test_a_peer_that_the_destination_cannot_reach(lab: Hosts) -> None:
    lab.run("alpha", "ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
    server = lab.start("alpha", "/usr/bin/python3", PROGRAMS / "http_threads.py", SERVICE, 8005)
    peer = lab.address("client")
    lab.run("beta", "ip", "route", "add", "unreachable", peer)
    until(lambda: lab.run("alpha", "ss", "-Hltn", "sport = 8005"), "the server")
    client = lab.start("client", "bash", "-c", f"exec 3<>/dev/tcp/{SERVICE}/8005; exec sleep 1000")
    try:
        established = ["ss", "-Htn", "state", "established", "sport = 8005"]
        until(lambda: lab.run("alpha", *established), "the connection")
        assert_refused(lab, server, f"tcp-no-route: .*{peer}")
    finally:
        lab.run("beta", "ip", "route", "del", "unreachable", peer)
        lab.kill("alpha", server)
        lab.kill("client", client)
        lab.run("alpha", "ip", "address", "del", f"{SERVICE}/24", "dev", "eth0")


@pytest.fixture
def private_program(lab: Hosts) -> str:
    """A program in alpha's own /tmp; beta's is empty."""
    path = "/tmp/private-program"
    lab.run("alpha", "cp", BUILD / "heartbeat", path)
    lab.ask("beta", "rm", "-f", path)
    return path


def test_missing_file(lab: Hosts, private_program: str) -> None:
    pid = lab.start("alpha", private_program)
    try:
        assert_refused(lab, pid, re.escape(private_program))
    finally:
        lab.kill("alpha", pid)


def test_file_that_differs(lab: Hosts, private_program: str) -> None:
    """By one byte in the middle, the length and the build id being the same."""
    change = f"printf X | dd of={private_program} bs=1 seek=9000 conv=notrunc"
    script = f"cp {BUILD}/heartbeat {private_program} && {change}"
    lab.run("beta", "sh", "-c", script)
    pid = lab.start("alpha", private_program)
    try:
        assert_refused(lab, pid, re.escape(private_program))
    finally:
        lab.kill("alpha", pid)


def test_no_such_process(lab: Hosts) -> None:
    done = lab.ask("alpha", "migrate", "move", 999_999, "beta", "--json")
    assert done.returncode not in (DONE, UNREACHABLE)
    assert "999999" in done.stdout + done.stderr


def test_unreachable_host(lab: Hosts) -> None:
    pid = lab.start("alpha", BUILD / "heartbeat")
    # nobody answers: that is known after three times this
    lab.run("alpha", "sysctl", "-qw", "net.ipv4.neigh.eth0.retrans_time_ms=100")
    try:
        done = lab.ask("alpha", "migrate", "move", pid, "10.77.0.77", "--json")
        assert done.returncode == UNREACHABLE, done.stdout + done.stderr
        assert lab.alive("alpha", pid)
    finally:
        lab.kill("alpha", pid)
