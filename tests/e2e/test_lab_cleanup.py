"""Nothing of a lab is left behind: not by `down`, not by any crash, not by a test that is killed."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lab import state
from lab.fixture import LAB, Lab, command, until
from lab.plan import LABS, PROJECT, SHARED

KINDS = ("net", "mnt", "pid", "uts", "ipc", "cgroup", "time")


def members(name: str) -> list[int]:
    """A lab's `up`, supervisor and hosts' first processes, found by their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if name.encode() in words and str(LAB).encode() in words:
                found.append(int(entry.name))
    return found


def directories(name: str) -> list[str]:
    """A lab's directories on the machine."""
    return [str(each) for common in (LABS, SHARED) for each in common.glob(f"*{name}*")]


class Traces:
    """What a lab that is up might leave. Holds its namespaces, so that no others get their numbers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pins: list[int] = []
        for pid in members(name):
            # One that has ended since is no host: a child with our command line, on its way to be `ip`.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                self._pins += [os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY) for kind in KINDS]
        ours = {os.stat(f"/proc/self/ns/{kind}").st_ino for kind in KINDS}
        self.namespaces = {os.fstat(pin).st_ino for pin in self._pins} - ours

    def left(self) -> dict[str, list[str]]:
        """What is there of it, by kind; empty lists if nothing is. Ends the watch."""
        found = {
            "members": [str(each) for each in members(self.name)],
            "processes": self._links("ns"),
            "descriptors": self._links("fd"),
            "directories": directories(self.name),
            "mounts": re.findall(".*nsfs.*", Path("/proc/self/mountinfo").read_text()),
        }
        for pin in self._pins:
            os.close(pin)
        return {kind: those for kind, those in found.items() if those}

    def _links(self, directory: str) -> list[str]:
        """Links of other processes that lead to our namespaces."""
        found = []
        for link in Path("/proc").glob(f"[0-9]*/{directory}/*"):
            with contextlib.suppress(OSError):
                if "\nState:\tZ" in (link.parents[1] / "status").read_text():
                    continue  # nothing but its exit status, which its parent is yet to fetch
                number = re.fullmatch(r"\w+:\[(\d+)\]", os.readlink(link))
                if number and int(number[1]) in self.namespaces:
                    found.append(str(link))
        return [link for link in found if not link.startswith(f"/proc/{os.getpid()}/")]


def busy(raised: Lab) -> Traces:
    """Give a lab something to leave behind, and note what it is made of."""
    raised.spawn("alpha", "sleep", "1000")
    raised.spawn("beta", "unshare", "--mount", "--net", "--pid", "--fork", "sleep", "1000")
    raised.exec("beta", "mount", "-t", "tmpfs", "none", "/mnt")
    inside = 'mkdir "$0" && touch "$0/file" && mount -t tmpfs none "$0"'
    raised.exec("beta", "sh", "-c", inside, str(raised.shared / "directory"))
    traces = Traces(raised.name)
    assert len(traces.namespaces) >= 3 * len(KINDS) + 1  # three hosts and the bridge
    return traces


def test_down_leaves_nothing() -> None:
    mounts = Path("/proc/self/mounts").read_text()
    devices = Path("/proc/net/dev").read_text().count(":")
    with Lab("leaves") as raised:
        traces = busy(raised)
    assert traces.left() == {}
    assert Path("/proc/self/mounts").read_text() == mounts
    assert Path("/proc/net/dev").read_text().count(":") == devices


def test_down_removes_the_shared_directory() -> None:
    with Lab("shared", hosts=1) as raised:
        pid = raised.spawn("alpha", "sleep", "1000")
        assert [each.name for each in raised.shared.iterdir()] == [f"alpha-{pid}.log"]
        assert str(raised.shared) in directories(raised.name)
    assert not raised.shared.exists()


def test_down_is_the_same_the_second_time() -> None:
    with Lab("twice", hosts=1) as raised:
        assert command("down", "--name", raised.name).returncode == 0
        assert command("down", "--name", raised.name).returncode == 0
    assert command("down", "--name", "never-was-up").returncode == 0


def test_a_killed_host_is_dead_and_the_others_are_not() -> None:
    with Lab("killed") as raised:
        traces = busy(raised)
        lab_state = state.load(raised.name)
        assert lab_state is not None
        init = lab_state.host("beta").init
        running = raised.popen("beta", "sh", "-c", "echo ready; exec sleep 1000", stdout=subprocess.PIPE)
        assert running.stdout is not None and running.stdout.readline() == b"ready\n"
        os.kill(init.pid, signal.SIGKILL)
        until(lambda: not init.alive(), "it ends")
        running.communicate(timeout=30)
        assert running.returncode == 128 + signal.SIGKILL
        shown = command("status", "--name", raised.name)
        assert shown.returncode == 1 and re.search(r"^beta +dead ", shown.stdout, re.MULTILINE)
        assert "is dead" in raised.exec("beta", "true", check=False).stderr
        assert raised.exec("client", "ssh", "alpha", "hostname").stdout == "alpha\n"
    assert traces.left() == {}


def test_with_the_supervisor_killed_all_hosts_die() -> None:
    with Lab("headless") as raised:
        traces = busy(raised)
        lab_state = state.load(raised.name)
        assert lab_state is not None
        os.kill(lab_state.supervisor.pid, signal.SIGKILL)
        until(lambda: members(raised.name) == [], "all hosts end")
        assert command("status", "--name", raised.name).returncode == 1
    assert traces.left() == {}


def test_a_dead_labs_name_can_be_used_again() -> None:
    with Lab("again", hosts=1) as raised:
        lab_state = state.load(raised.name)
        assert lab_state is not None
        os.kill(lab_state.supervisor.pid, signal.SIGKILL)
        until(lambda: members(raised.name) == [], "all hosts end")
        assert command("up", "--name", raised.name, "--hosts", "2").returncode == 0
        assert raised.exec("beta", "hostname").stdout == "beta\n"


@pytest.mark.parametrize("count", range(1, 11))
def test_up_killed_in_the_middle_leaves_nothing(count: int) -> None:
    """`count` processes of the lab are there when it is killed: `up`, supervisor, eight hosts one by one."""
    name = f"middle-{os.getpid()}"
    process = subprocess.Popen([str(LAB), "up", "--name", name, "--hosts", "8"])
    until(lambda: len(members(name)) >= count or process.poll() is not None, "so many processes")
    traces = Traces(name)
    process.kill()
    process.wait(timeout=30)
    whole = command("status", "--name", name).returncode == 0  # it was quicker than we
    if not whole:
        until(lambda: members(name) == [], "what was raised ends by itself")
    assert command("down", "--name", name).returncode == 0
    assert traces.left() == {}


def test_up_that_is_interrupted_cleans_up_itself() -> None:
    """Interrupted with fewer and fewer processes there, until once it was not quicker than we."""
    for count in range(6, 0, -1):
        name = f"interrupted-{os.getpid()}-{count}"
        # what a shell starts in the background ignores SIGINT, and hands that down
        words = ["env", "--default-signal=INT", str(LAB), "up", "--name", name, "--hosts", "8"]
        process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        until(lambda name=name, count=count: len(members(name)) >= count, "some processes")  # type: ignore[misc]
        traces = Traces(name)
        process.send_signal(signal.SIGINT)
        if interrupted := process.wait(timeout=30) != 0:
            break
        assert command("down", "--name", name).returncode == 0
    assert interrupted
    assert traces.left() == {}


def test_up_that_fails_says_why_and_cleans_up(tmp_path: Path) -> None:
    """An `ip` that fails for one host only."""
    script = '#!/bin/sh\nread -r line; case "$line" in *port1*) echo broken >&2; exit 1;; esac\n'
    fake = tmp_path / "ip"
    fake.write_text(f'{script}{{ echo "$line"; cat; }} | /usr/sbin/ip "$@"\n')
    fake.chmod(0o755)
    name = f"fails-{os.getpid()}"
    done = command("up", "--name", name, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 1 and "broken" in done.stderr
    assert members(name) == [] and directories(name) == []


def test_a_tests_lab_goes_when_the_test_is_killed() -> None:
    script = "lab = Lab('orphan'); lab.up(); print(lab.name, flush=True); sys.stdin.read()"
    line = [sys.executable, "-c", f"import sys; from lab.fixture import Lab; {script}"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    environment = {**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'tests'}"}
    with subprocess.Popen(line, env=environment, text=True, **pipes) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        traces = Traces(name)
        assert len(traces.namespaces) > 3 * len(KINDS)
        process.kill()
    until(lambda: members(name) == [] and directories(name) == [], "the lab goes")
    assert traces.left() == {}
