"""What each process keeps of root's capabilities: enough to move what needs most, and nothing spare."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.children import ended, gone, wait_for
from unit.moving import Move, Moving
from unit.stand_in_service import Service

from agent import privileges
from agent.api import MoveOptions
from agent.kernel import capabilities, clone
from agent.kernel.capabilities import NAMES, numbers
from agent.privileges import DESTINATION, ENGINE, FRONT, SERVICE, Role

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="of root's capabilities")

CLONE_NEWNET = 0x40000000
DOCS = Path(__file__).parents[2] / "docs" / "threat-model.md"
ROLES = {"service": SERVICE, "front": FRONT, "engine": ENGINE, "destination": DESTINATION}
HEADER = Path("/usr/include/linux/capability.h")
USER = 64001
# Has of each kind what takes a right to make, or to look at; then it becomes what it is told.
PROGRAM = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <grp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
static int opened(const char *directory, const char *name, int flags)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return open(path, flags, 0600);
}
int main(int count, char **arguments)
{
    struct sockaddr_in local = {AF_INET, htons(81), {htonl(INADDR_LOOPBACK)}};
    struct sched_param priority = {5};
    struct timespec time = {0, 3000000};
    int user = atoi(arguments[2]), listener = socket(AF_INET, SOCK_STREAM, 0);
    int deleted = opened(arguments[1], "deleted", O_RDWR | O_CREAT);
    char path[4096];
    snprintf(path, sizeof path, "%s/deleted", arguments[1]);
    if (unlink(path) || fchown(deleted, 64001, 64001) || opened(arguments[1], "file", O_RDWR | O_NOATIME) < 0)
        return 1;
    if (opened(arguments[1], "fifo", O_RDWR) < 0 || timerfd_create(CLOCK_BOOTTIME_ALARM, 0) < 0)
        return 2;
    if (bind(listener, (void *)&local, sizeof local) || listen(listener, 5))
        return 3;
    if (sched_setscheduler(0, SCHED_RR, &priority))
        return 4;
    if (user && (setgroups(0, 0) || setresgid(user, user, user) || setresuid(user, user, user)))
        return 5;
    for (long round = 0;; round++) {
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


def sets_of(pid: int | str) -> dict[str, int]:
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(value, 16) for name, value in re.findall(r"^Cap(\w+):\s+(\w+)$", text, re.M)}


def ours(names: frozenset[str]) -> int:
    """Of those that there are here."""
    return numbers(names) & capabilities.get().permitted


def expected(role: Role) -> dict[str, int]:
    all_ = ours(role.own | role.starts)
    return {"Inh": 0, "Prm": all_, "Eff": ours(role.own), "Bnd": all_, "Amb": 0}


def in_child(function: Callable[[], Any]) -> Any:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer: Any = None
        try:
            answer = function()
        except BaseException as error:
            answer = repr(error)
        finally:
            os.write(writing, json.dumps(answer).encode())
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        found = json.loads(file.read())
    os.waitpid(pid, 0)
    return found


@pytest.mark.parametrize("name", ROLES)
def test_a_role_is_what_a_process_has(name: str) -> None:
    role = ROLES[name]

    def work() -> tuple[dict[str, int], dict[str, int]]:
        privileges.enter(role)
        entered = sets_of("self")
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True)
        child = {n: int(v, 16) for n, v in re.findall(r"^Cap(\w+):\s+(\w+)$", status.stdout, re.M)}
        return entered, child

    entered, child = in_child(work)
    assert entered == expected(role)
    all_ = ours(role.own | role.starts)
    assert child == {"Inh": 0, "Prm": all_, "Eff": all_, "Bnd": all_, "Amb": 0}, "what it starts has it again"


def test_what_nothing_is_started_with_any_more_is_gone_for_good() -> None:
    def work() -> dict[str, int]:
        privileges.enter(DESTINATION)
        privileges.leave_starting(DESTINATION)
        return sets_of("self")

    assert in_child(work) == expected(Role(DESTINATION.own))


def test_names_are_the_kernel_s() -> None:
    found = re.findall(r"^#define CAP_(\w+)\s+(\d+)$", HEADER.read_text(), re.M)
    known = {name: int(number) for name, number in found}
    assert len(known) > 35
    assert {name: NAMES.index(name) for name in known} == known


def test_what_runs_is_in_its_role(tmp_path: Path) -> None:
    service = Service.playing("waits", tmp_path)
    try:
        assert sets_of(service.process.pid) == expected(SERVICE)
    finally:
        service.close()
    for command, role in (("source", FRONT), ("destination", DESTINATION)):
        process = subprocess.Popen(
            [sys.executable, "-m", "agent.main", command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        try:
            wait_for(lambda p=process, r=role: sets_of(p.pid) == expected(r), command)  # type: ignore[misc]
        finally:
            process.kill()
            process.communicate()


# --- moves ---


@contextlib.contextmanager
def program(directory: Path, user: int) -> Iterator[Moving]:
    """In a network of its own; its files are a user's, whom root has to pass."""
    own = directory / "own"
    own.mkdir(mode=0o700)
    (own / "file").write_bytes(b"content")
    os.mkfifo(own / "fifo", 0o600)
    for path in (own / "file", own / "fifo", own):
        os.chown(path, USER, USER)
    own_network()
    found = Moving(directory, PROGRAM, own, str(user))
    try:
        found.progress()
        yield found
    finally:
        found.close()


def own_network() -> None:
    clone.unshare(CLONE_NEWNET)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def moved(directory: Path, user: int, engine: Role, there: Role) -> dict[str, Any]:
    """How a move went whose engine and destination had no more than this, and what the copy has."""

    def prepare() -> None:
        own_network()
        setattr(privileges, "DESTINATION", there)  # noqa: B010
        privileges.enter(there)

    def drop(move: Move, state: str) -> None:
        if state == "examining":
            privileges.enter(engine)

    def move(target: Moving) -> dict[str, Any]:
        report = Move(target.pid, MoveOptions(verify=True), on_state=drop, prepare=prepare).report
        assert report is not None
        error = report.error.message if report.error else ""
        why = [b.why for b in report.blockers] or [f"{report.outcome}: {error}"]
        return {"why": why[0], "copy": report.destination.pid}

    def work() -> dict[str, Any]:
        with program(directory, user) as target:
            before = sets_of(target.pid)
            found: dict[str, Any] = in_child(lambda: move(target))
            assert isinstance(found, dict), found
            if found["copy"] and not gone(found["copy"]):
                target.copies.append(found["copy"])
                wait_for(lambda: ended(target.pid), "the original to end")
                found |= {"before": before, "after": sets_of(found["copy"])}
            return found

    found: dict[str, Any] = in_child(work)
    assert isinstance(found, dict), found
    return found


@pytest.mark.parametrize("user", [0, USER])
def test_it_is_enough_and_the_process_keeps_its_own(tmp_path: Path, user: int) -> None:
    """The copy has every capability that the original had, though the destination itself had fewer."""
    found = moved(tmp_path, user, ENGINE, DESTINATION)
    assert found["after"] == found["before"], found
    assert found["after"]["Bnd"] & ~numbers(DESTINATION.own)
    assert bool(found["after"]["Prm"]) is not bool(user)


# NET_RAW needs a service address, SYS_RESOURCE is not had everywhere; without KILL both copies stay in doubt
ENGINE_NEEDS = sorted(ENGINE.own - {"NET_RAW", "KILL", "SYS_RESOURCE"})
DESTINATION_NEEDS = sorted(DESTINATION.own - {"NET_RAW", "KILL", "SYS_RESOURCE"})


@pytest.mark.parametrize("name", ENGINE_NEEDS)
def test_the_engine_needs_each(tmp_path: Path, name: str) -> None:
    found = moved(tmp_path, USER, Role(ENGINE.own - {name}), DESTINATION)
    assert "after" not in found and not found["why"].startswith("migrated"), found


@pytest.mark.parametrize("name", DESTINATION_NEEDS)
def test_the_destination_needs_each(tmp_path: Path, name: str) -> None:
    fewer = Role(DESTINATION.own - {name}, DESTINATION.starts)
    found = moved(tmp_path, 0, ENGINE, fewer)
    assert "after" not in found and not found["why"].startswith("migrated"), found


# --- the page ---


def test_the_page_has_the_roles() -> None:
    text = DOCS.read_text()
    for name, role in ROLES.items():
        assert f"| {name} | {listed(role.own)} | {permitted(role)} |" in text
    explained = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| [^|]+ \|$", text.partition("Why each")[2], re.M)
    names = {name for row in explained for name in re.findall(r"`(\w+)`", row)}
    started = SERVICE.starts | FRONT.starts
    assert names == {*started, *(name for role in ROLES.values() for name in role.own)}


def listed(names: frozenset[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def permitted(role: Role) -> str:
    if role.starts == frozenset(NAMES):
        return "all, until the shadow is born; then these"
    more = role.starts - role.own
    return f"these and {listed(more)}" if more else "these"
