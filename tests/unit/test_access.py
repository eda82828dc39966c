"""Root's service, asked by people who are not root: a real socket, and real other users."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from unit.children import compiled, ended, forked, wait_for
from unit.moving import Move
from unit.stand_in_agent import USERS
from unit.stand_in_service import CHECK, MOVE, Service, until

from agent import inventory
from agent.api import MoveOptions, Outcome
from agent.ownership import foreign
from agent.server.connect import CannotConnect, find
from agent.server.places import Places
from agent.server.routes import ROUTES

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="root's service, and other users")

ANNA, BERT, GROUP = 64001, 64002, 64000
UNKNOWN = "01ARZ3NDEKTSV4RRFFQ69G5FAV"
ALLOWED = {"gid": GROUP, "destinations": ["beta", "root@gamma:2222"], "addresses": ["192.0.2.10"]}
SETUID = r"""
#include <unistd.h>
int main(void) { write(1, "r", 1); pause(); return 0; }
"""
CLOSES = r"""
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>
static void on_signal(int number) { (void)number; prctl(PR_SET_DUMPABLE, 0); }
int main(void) { signal(SIGUSR1, on_signal); write(1, "r", 1); close(1); for (;;) pause(); }
"""


def as_user(uid: int, function: Callable[[], Any], groups: tuple[int, ...] = (GROUP,)) -> Any:
    """What `function` returns (JSON) in a process of that user."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = {"answer": function()}
        except BaseException as error:
            answer = {"error": type(error).__name__}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as file:
        found = json.loads(file.read())
    os.waitpid(pid, 0)
    return found.get("answer", found)


@contextlib.contextmanager
def program(uid: int) -> Iterator[int]:
    """A process of that user."""
    process = subprocess.Popen(["sleep", "300"], user=uid, group=uid, extra_groups=[])
    wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "it to run")
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def here() -> Iterator[Path]:
    """A directory that others may pass through."""
    made = Path(tempfile.mkdtemp(prefix="access-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


@pytest.fixture
def start(here: Path) -> Iterator[Callable[[str], Service]]:
    running: list[Service] = []

    def started(scenario: str) -> Service:
        running.append(Service.playing(scenario, here, environment={USERS: json.dumps(ALLOWED)}))
        return running[-1]

    yield started
    for service in running:
        service.close()


def asks(uid: int, service: Service, method: str, path: str, body: object = None) -> tuple[int, Any]:
    status, answer = as_user(uid, lambda: service.ask(method, path, body))
    return status, answer


def refused(answer: tuple[int, Any]) -> tuple[int, str, str]:
    status, body = answer
    return status, body["error"]["kind"], body["error"]["message"]


# --- the way in ---


def test_the_socket_is_for_root_and_the_group(start: Callable[[str], Service]) -> None:
    service = start("migrated")
    found = service.places.socket.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, 0, GROUP)
    directory = service.places.socket.parent.stat()
    assert (stat.S_IMODE(directory.st_mode), directory.st_uid, directory.st_gid) == (0o710, 0, GROUP)
    assert asks(ANNA, service, "GET", "/v1/health")[0] == 200
    stranger = as_user(ANNA, lambda: service.ask("GET", "/v1/health"), groups=())
    assert stranger == {"error": "PermissionError"}


def test_who_may_come_in_does_not_start_another_one(start: Callable[[str], Service]) -> None:
    service = start("migrated")

    def connect(places: Places) -> Callable[[], Any]:
        def work() -> Any:
            try:
                connection, health = find(places, ["/bin/false"], {})
            except CannotConnect as error:
                return str(error)
            connection.close()
            return health.pid

        return work

    assert as_user(ANNA, connect(service.places)) == service.process.pid
    nobody = Places(service.places.socket.with_name("nobody"), service.places.state)
    assert "root has to start it" in as_user(ANNA, connect(nobody))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--group", "no-such-group"], "there is no group"),
        (["--allow-destination", "beta"], "are for a --group"),
        (["--group", "root", "--allow-destination", "a b"], "is not a host name"),
        (["--group", "root", "--allow-address", "beta"], "does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_a_service_that_is_set_up_wrong_does_not_start(options: list[str], why: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent.main", "serve", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2 and why in done.stderr


# --- what is theirs ---


def test_a_user_moves_what_is_theirs(start: Callable[[str], Service]) -> None:
    service = start("migrated")
    with program(ANNA) as pid:
        wanted = {**MOVE, "pid": pid, "ssh": {"auth_socket": "/tmp/agent"}, "reached_at": "192.0.2.1"}
        status, record = asks(ANNA, service, "POST", "/v1/migrations", wanted)
    assert status == 201
    request = record["request"]
    assert (request["owner"], request["options"]["addresses"]) == (ANNA, [])
    assert (request["ssh"]["auth_socket"], request["reached_at"]) == (None, "192.0.2.1")
    until(lambda: service.good("GET", f"/v1/migrations/{record['id']}")["status"] == "finished")
    assert asks(ANNA, service, "GET", f"/v1/migrations/{record['id']}")[1]["report"]["outcome"] == "migrated"
    (event,) = as_user(ANNA, lambda: service.events(record["id"]))
    assert event["event"] == "finished"
    listed = asks(ANNA, service, "GET", "/v1/migrations")[1]["migrations"]
    assert [each["id"] for each in listed] == [record["id"]]


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"destination": "delta"}, "users may not move to delta (allowed: beta, root@gamma:2222)"),
        ({"destination": "root@beta"}, "users may not move to root@beta"),
        ({"destination": "gamma"}, "users may not move to gamma"),
        ({"ssh": {"identity": ["/root/.ssh/id"]}}, "ssh.identity would be used by root"),
        ({"ssh": {"config": ["/tmp/config"]}}, "ssh.config would be used by root"),
        ({"ssh": {"agent_command": "touch /tmp/x;"}}, "ssh.agent_command would be used by root"),
        ({"options": {"copy_files": True}}, "copy_files would write files as root"),
        ({"options": {"addresses": ["192.0.2.11"]}}, "users may not move address 192.0.2.11"),
    ],
)
def test_what_would_be_root_s_is_not_theirs_to_choose(
    start: Callable[[str], Service], more: dict[str, Any], why: str
) -> None:
    service = start("migrated")
    with program(ANNA) as pid:
        for path, body in (("/v1/migrations", MOVE), ("/v1/check", CHECK)):
            status, kind, message = refused(asks(ANNA, service, "POST", path, {**body, "pid": pid, **more}))
            assert (status, kind) == (403, "forbidden") and message.startswith(why) and ": " in message
        assert service.good("GET", "/v1/migrations")["migrations"] == []
        # the same is root's to choose
        assert service.ask("POST", "/v1/migrations", {**MOVE, "pid": pid, **more})[0] == 201


def test_what_was_allowed_may_be_chosen(start: Callable[[str], Service]) -> None:
    service = start("checked")
    with program(ANNA) as pid:
        for more in ({"destination": "root@gamma:2222"}, {"options": {"addresses": ["192.0.2.10"]}}):
            assert asks(ANNA, service, "POST", "/v1/check", {**CHECK, "pid": pid, **more})[0] == 200


def test_a_user_cannot_be_another_one(start: Callable[[str], Service]) -> None:
    service = start("migrated")
    with program(BERT) as pid:
        for body in ({**MOVE, "pid": pid}, {**MOVE, "pid": pid, "owner": BERT}, {**MOVE, "pid": 1}):
            assert refused(asks(ANNA, service, "POST", "/v1/migrations", body))[:2] == (403, "forbidden")
    gone = {**MOVE, "pid": (1 << 22) - 7}
    there = {**MOVE, "pid": 1}
    texts = [refused(asks(ANNA, service, "POST", "/v1/migrations", b))[2] for b in (gone, there)]
    assert texts[0].replace(str(gone["pid"]), "1") == texts[1], "whether it is there is not said"


def test_somebody_else_s_migrations_are_not_there(start: Callable[[str], Service]) -> None:
    service = start("waits")
    with program(BERT) as pid:
        body = {**MOVE, "pid": pid, "on_disconnect": "continue"}
        theirs = asks(BERT, service, "POST", "/v1/migrations", body)[1]["id"]
        mine = service.good("POST", "/v1/migrations", {**MOVE, "pid": os.getpid()})["id"]
        for id in (theirs, mine, UNKNOWN):
            for method, path in (("GET", ""), ("GET", "/events"), ("POST", "/abort")):
                answer = refused(asks(ANNA, service, method, f"/v1/migrations/{id}{path}"))
                assert answer[:2] == (404, "not-found") and f"no migration {id}" in answer[2]
        assert asks(ANNA, service, "GET", "/v1/migrations")[1]["migrations"] == []
        assert asks(BERT, service, "POST", f"/v1/migrations/{theirs}/abort")[0] == 202
        until(lambda: service.good("GET", f"/v1/migrations/{theirs}")["status"] == "finished")
        assert service.good("GET", f"/v1/migrations/{mine}")["status"] == "running"


def test_pages_have_only_what_is_theirs(start: Callable[[str], Service]) -> None:
    service = start("migrated")
    theirs = []
    with program(ANNA) as pid:
        for _ in range(3):
            service.events(service.good("POST", "/v1/migrations", {**MOVE, "pid": os.getpid()})["id"])
            theirs.append(asks(ANNA, service, "POST", "/v1/migrations", {**MOVE, "pid": pid})[1]["id"])
            service.events(theirs[-1])
    first = asks(ANNA, service, "GET", "/v1/migrations?limit=2")[1]
    assert [each["id"] for each in first["migrations"]] == theirs[:0:-1]
    rest = asks(ANNA, service, "GET", f"/v1/migrations?limit=2&before={first['next']}")[1]
    assert [each["id"] for each in rest["migrations"]] == theirs[:1] and rest["next"] is None


def test_only_their_processes_are_looked_at(start: Callable[[str], Service]) -> None:
    service = start("ps-options")
    (process,) = asks(ANNA, service, "GET", "/v1/processes?measure=0")[1]
    assert process["command"] == f"--no-measure --owner {ANNA}"
    (process,) = service.good("GET", "/v1/processes?measure=0")
    assert process["command"] == "--no-measure"
    with program(ANNA) as pid, program(BERT):
        assert [each.pid for each in inventory.processes(False, ANNA)] == [pid]


def test_every_other_route_is_root_s_alone(start: Callable[[str], Service]) -> None:
    service = start("migrated")
    others = [route for route in ROUTES if not route.everyone]
    assert {route.path.rpartition("/")[2] for route in others} == {"select", "drain", "abort", "resolve"}
    for route in others:
        path = route.path.replace("{id}", UNKNOWN)
        answer = refused(asks(ANNA, service, route.method, path, {}))
        assert answer[:2] == (403, "forbidden") and "for root alone" in answer[2]
        assert 403 in route.errors
        assert service.ask(route.method, path, {})[0] != 403


# --- whose a process is ---


def test_whose_it_is() -> None:
    with program(ANNA) as pid:
        assert foreign(pid, ANNA) == ""
        assert "does not run as user" in foreign(pid, BERT)
    with pytest.raises(ProcessLookupError):
        foreign((1 << 22) - 7, ANNA)


@pytest.mark.parametrize("numbers", [(0, ANNA, ANNA), (ANNA, 0, ANNA), (ANNA, ANNA, 0)])
def test_each_of_its_user_ids_counts(numbers: tuple[int, int, int]) -> None:
    with forked(lambda: os.setresuid(*numbers)) as pid:
        assert "does not run as user" in foreign(pid, ANNA)


def test_a_process_that_changed_its_user_is_not_dumpable() -> None:
    """It may know what it learned before."""
    with forked(lambda: os.setresuid(ANNA, ANNA, ANNA)) as pid:
        assert "not dumpable" in foreign(pid, ANNA)


def test_capabilities_are_more_than_its_user_has() -> None:
    who = [f"--reuid={ANNA}", "--clear-groups", "--inh-caps=+net_raw", "--ambient-caps=+net_raw"]
    process = subprocess.Popen(["setpriv", *who, "sleep", "300"])
    try:
        wait_for(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n", "it to run")
        assert "capabilities" in foreign(process.pid, ANNA)
    finally:
        process.kill()
        process.wait()


def test_a_program_that_is_setuid_is_not_theirs(here: Path) -> None:
    path = here / "setuid"
    shutil.copy(compiled(SETUID), path)
    path.chmod(0o4755)
    process = subprocess.Popen([path], user=ANNA, group=ANNA, extra_groups=[], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.read(1) == b"r"
        assert foreign(process.pid, ANNA)
    finally:
        process.kill()
        process.communicate()


def test_the_engine_looks_again(here: Path) -> None:
    """Between the answer and the move its number may have become another's, and it another program."""
    with program(BERT) as pid:
        move = Move(pid, MoveOptions(), owner=ANNA)
        assert move.report is not None and move.report.outcome is Outcome.REFUSED
        (blocker,) = move.report.blockers
        assert blocker.kind == "not-owned"
        move = Move(pid, MoveOptions(), owner=ANNA, operation="check")
        assert move.report is not None and move.report.blockers == (blocker,)


def test_the_engine_looks_again_in_the_freeze(here: Path) -> None:
    """What closes itself to its user in pre-copy is theirs no more."""
    path = shutil.copy(compiled(CLOSES), here / "closes")
    process = subprocess.Popen([path], user=ANNA, group=ANNA, extra_groups=[], stdout=subprocess.PIPE)
    pid = process.pid

    def close(move: Move, state: str) -> None:
        if state == "freezing":
            os.kill(pid, signal.SIGUSR1)
            wait_for(lambda: os.stat(f"/proc/{pid}/mem").st_uid == 0, "it to be closed")

    try:
        assert process.stdout is not None and process.stdout.read(1) == b"r"
        process.stdout.close()
        message = Move(pid, MoveOptions(), owner=ANNA, on_state=close).rolled_back("not-owned", "source")
        assert message == f"pid {pid}: it is closed to its own user (not dumpable)"
        assert not ended(pid)
    finally:
        process.kill()
        process.wait()
