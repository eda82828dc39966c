"""A program that speaks as `migrate-agent` does, to test the tool alone: `stand_in_agent.py SCENARIO source|ps`."""

from __future__ import annotations

import json
import os
import sys
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


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def finish(**report: Any) -> None:
    say(event="finished", report={**REPORT, **report})


def source(scenario: str) -> int:
    request = json.loads(sys.stdin.readline())
    if path := os.environ.get("STAND_IN_REQUEST"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump(request, file)
    match scenario:
        case "dies-at-once":
            return 3
        case "noise":
            print("Welcome to alpha!", flush=True)
        case "checked":
            say(event="checked", result=CHECK)
        case "blocked":
            say(event="checked", result={**CHECK, "blockers": [BLOCKER]})
        case "migrated" | "rolled-back" | "in-doubt" | "refused":
            finish(outcome=scenario)
    if scenario in ("dies", "noise", "waits", "deaf"):
        say(event="state", state="pre-copy")
    if scenario == "dies":
        print("something is wrong here", file=sys.stderr, flush=True)
        return 9
    if scenario == "noise":
        finish()
    for line in sys.stdin:
        if scenario == "waits" and json.loads(line) == {"abort": True}:
            finish(
                outcome="rolled-back",
                error={"kind": "aborted", "message": "as asked", "where": "coordinator"},
            )
            break
    return 0


def ps(scenario: str) -> int:
    print(json.dumps(PROCESS))
    return 0 if scenario == "ps" else 4


if __name__ == "__main__":
    sys.exit(ps(sys.argv[1]) if sys.argv[2] == "ps" else source(sys.argv[1]))
