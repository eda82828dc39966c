"""Root's service, used by people who are not root: they move what is theirs, by root's ssh, nothing else.

With curl: the interpreter that the tests run with may be in a directory of root's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from e2e.support import Hosts, Moved
from lab.fixture import until

USER, OTHER, GROUP = "games", "backup", "users"
SOCKET = "/run/migrate/agent.sock"


@pytest.fixture
def served(lab: Hosts) -> Iterator[Hosts]:
    """On alpha, a service for the group, which may move to beta."""
    command = ["migrate-agent", "serve", "--group", GROUP, "--allow-destination", "beta"]
    pid = lab.start("alpha", *command)
    until(lambda: not lab.ask("alpha", "test", "-S", SOCKET).returncode, "the service")
    yield lab
    lab.kill("alpha", pid, "TERM")
    until(lambda: not lab.alive("alpha", pid), "the end of the service")


def become(user: str) -> list[str]:
    return ["setpriv", f"--reuid={user}", f"--regid={user}", f"--groups={GROUP}"]


def ask(lab: Hosts, user: str, path: str, body: object = None) -> tuple[int, Any]:
    """Status and answer, the last line of it where there are many."""
    url = f"http://agent/v1/{path}"
    words = ["curl", "-sS", "--unix-socket", SOCKET, url, "-w", "\n%{http_code}"]
    data = [] if body is None else ["-d", json.dumps(body)]
    *lines, status = lab.run("alpha", *become(user), *words, *data).splitlines()
    return int(status), json.loads([line for line in lines if line][-1])


def start(lab: Hosts, user: str) -> int:
    pid = lab.start("alpha", *become(user), "sleep", 600)
    until(lambda: lab.proc("alpha", pid, "comm") == "sleep\n", "sleep")
    return pid


def wanted(pid: int, operation: str = "move", **more: object) -> dict[str, object]:
    return {"operation": operation, "pid": pid, "destination": "beta", "on_disconnect": "continue", **more}


def test_a_user_moves_what_is_theirs(served: Hosts) -> None:
    process = Moved(served, "alpha", start(served, USER))
    others = start(served, OTHER)
    listed = ask(served, USER, "processes?measure=0")[1]  # and whoever asks
    assert process.pid in {p["pid"] for p in listed} and {p["user"] for p in listed} == {USER}
    status, result = ask(served, USER, "check", wanted(process.pid, "check"))
    assert (status, result["blockers"]) == (200, [])
    status, record = ask(served, USER, "migrations", wanted(process.pid))
    assert status == 201
    status, last = ask(served, USER, f"migrations/{record['id']}/events")
    assert (status, last["report"]["outcome"]) == (200, "migrated"), last
    source, process.host, process.pid = process.pid, "beta", last["report"]["destination"]["pid"]
    process.assert_only_here("alpha", source)
    uids = served.proc("beta", process.pid, "status").partition("\nUid:")[2].split("\n")[0].split()
    assert set(uids) == {served.run("beta", "id", "-u", USER).strip()}
    for user, seen in ((USER, [record["id"]]), (OTHER, []), ("root", [record["id"]])):
        assert [each["id"] for each in ask(served, user, "migrations")[1]["migrations"]] == seen
    for host, pid in (("beta", process.pid), ("alpha", others)):
        served.kill(host, pid)


def test_and_nothing_else(served: Hosts) -> None:
    own, others = start(served, USER), start(served, OTHER)
    attempts: list[tuple[dict[str, object], str]] = [
        (wanted(others), "is not there, or not yours alone"),
        (wanted(1), "is not there, or not yours alone"),
        (wanted(own, destination="client"), "users may not move to client (allowed: beta)"),
        (wanted(own, options={"copy_files": True}), "copy_files would write files as root"),
        (wanted(own, ssh={"config": ["/tmp/config"]}), "ssh.config would be used by root"),
        (wanted(own, ssh={"agent_command": "touch /tmp/it;"}), "ssh.agent_command would be used by root"),
    ]
    for body, why in attempts:
        status, answer = ask(served, USER, "migrations", body)
        assert status == 403 and why in answer["error"]["message"], answer
    _, record = ask(served, OTHER, "migrations", wanted(others))
    assert ask(served, USER, f"migrations/{record['id']}")[0] == 404
    assert ask(served, USER, f"migrations/{record['id']}/abort", {})[0] == 404
    _, last = ask(served, OTHER, f"migrations/{record['id']}/events")
    assert last["report"]["outcome"] == "migrated", last
    assert served.alive("alpha", own) and served.ask("alpha", "test", "-e", "/tmp/it").returncode
    served.kill("alpha", own)
    served.kill("beta", last["report"]["destination"]["pid"])
