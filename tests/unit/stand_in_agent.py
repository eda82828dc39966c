"""In the place of `migrate-agent`, to test tool and service alone: `stand_in_agent.py SCENARIO COMMAND`.

`connect` and `serve` are the real ones; what carries out a request, `source`, and `ps` play the scenario.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

REPORT: dict[str, Any] = {
    "outcome": "migrated",
    "source": {"host": "alpha", "pid": 1},
    "destination": {"host": "beta", "pid": 2},
}
CHECK: dict[str, Any] = {
    "source": {"host": "alpha", "pid": 1},
    "destination": {"host": "beta", "pid": None},
    "command": "redis-server",
    "memory_bytes": 1 << 30,
    "threads": 5,
    "mappings": 50,
    "descriptors": 12,
    "connections": 3,
    "dirty_tracking": "userfaultfd",
}
BLOCKER = {"kind": "unix-socket", "what": "fd 7", "why": "its peer stays", "hint": "close it"}
PROCESS = {
    "pid": 7,
    "command": "redis-server",
    "user": "redis",
    "memory_bytes": 1 << 20,
    "threads": 4,
    "sockets": 2,
    "dirty_rate": None,
    "blockers": [BLOCKER],
}
IDLE_EXIT = "STAND_IN_IDLE_EXIT"  # seconds until the service ends that nobody uses
DESERTED_AFTER = "STAND_IN_DESERTED_AFTER"
USERS = "STAND_IN_USERS"  # JSON: what `serve --group` and its companions say


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def finish(**report: Any) -> None:
    say(event="finished", report={**REPORT, **report})


def program(scenario: str) -> tuple[list[str], dict[str, str]]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    return [sys.executable, __file__, scenario], {**os.environ, "PYTHONPATH": path}


def connect(scenario: str) -> int:
    if scenario == "noise":
        print("Welcome to alpha!", flush=True)
    if scenario == "another-version":
        health = '{"version": "9.9", "protocol": 99, "host": "alpha", "pid": 1, "running": 0}'
        print('migrate-agent connected {"health": ' + health + "}", flush=True)
        return int(bool(sys.stdin.read(1)))
    if scenario == "older":
        print("Usage: migrate-agent\n\nError: No such command 'connect'.", file=sys.stderr)
        return 2
    from agent.server import places
    from agent.server.connect import bridge

    argv, environment = program(scenario)
    return bridge(places.default(), [*argv, "serve"], environment)


def serve(scenario: str) -> int:
    from agent.server import access, log, places, service

    users = json.loads(os.environ.get(USERS, "null"))
    log.set_up(2, "text")
    return service.run(
        service.Settings(
            places=places.default(),
            program=program(scenario),
            idle_exit=float(os.environ.get(IDLE_EXIT, "0.4")),
            deserted_after=float(os.environ.get(DESERTED_AFTER, "0.4")),
            users=None if users is None else access.Users(**users),
        )
    )


def source(scenario: str) -> int:
    request = json.loads(sys.stdin.readline())
    if path := os.environ.get("STAND_IN_REQUEST"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(request, file)
    if scenario == "by-destination":  # as in "checked.migrated": what a check plays, what a move plays
        scenario = request["destination"].split(".")[request["operation"] == "move"]
    match scenario:
        case "dies-at-once":
            return 3
        case "checked":
            say(event="checked", result=CHECK)
        case "blocked":
            say(event="checked", result={**CHECK, "blockers": [BLOCKER]})
        case "migrated" | "rolled-back" | "in-doubt" | "refused":
            finish(outcome=scenario)
        case "committed":
            say(event="state", state="committed")
    if scenario in ("dies", "noise", "waits", "deaf"):
        say(event="state", state="pre-copy")
    if scenario == "dies":
        print("something is wrong here", file=sys.stderr, flush=True)
        return 9
    if scenario == "noise":
        finish()
    return until_aborted(scenario)


def until_aborted(scenario: str) -> int:
    """The end of input, or a wish to abort; "deaf" does not hear people's."""
    for line in sys.stdin:
        reason = json.loads(line)["reason"]
        if scenario == "waits" or "nobody" in reason:
            error = {"kind": "aborted", "message": reason, "where": "coordinator"}
            finish(outcome="rolled-back", error=error)
            break
    return 0


def ps(scenario: str) -> int:
    print(json.dumps({**PROCESS, "command": " ".join(sys.argv[3:])} if scenario == "ps-options" else PROCESS))
    return 0 if scenario.startswith("ps") and scenario != "ps-fails" else 4


if __name__ == "__main__":
    sys.exit(globals()[sys.argv[2]](sys.argv[1]))
