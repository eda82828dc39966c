"""A program in the place of the engine's process: `stand_in_engine.py SCENARIO LINK_FD EVENTS_FD`.

It reads the request, enters the states that the scenario names, and then does what the scenario ends with.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from typing import Any


def main() -> None:
    """SCENARIO: STATE,STATE...:ENDING"""
    states, _, ending = sys.argv[1].partition(":")
    link, events = socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3])
    deaf = ending in ("deaf", "eof", "ends-late")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: finish())
    request = json.loads(sys.stdin.readline() or "null")

    def say(**event: Any) -> None:
        os.write(events, json.dumps(event).encode() + b"\n")

    def finish(outcome: str = "rolled-back", kind: str = "aborted", where: str = "coordinator") -> None:
        end = {"host": "x", "pid": None}
        error = {"kind": kind, "message": "from the engine", "where": where}
        say(event="finished", report={"outcome": outcome, "source": end, "destination": end, "error": error})
        os._exit(0)

    if request is None:
        os._exit(0)
    for state in filter(None, states.split(",")):
        say(event="state", state=state)
    match ending:
        case "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kills-source":
            os.kill(request["pid"], signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        case "fails":
            say(event="log", level="error", message="division by zero")
            os._exit(70)
        case "nonsense":
            os.write(events, b"not an event\n")
            finish("migrated")
        case "twice":
            hosts = {"source": {"host": "x"}, "destination": {"host": "y"}}
            say(event="finished", report={"outcome": "migrated", **hosts})
            finish("refused")
        case "link":
            link.recv(1)
            finish(kind="link-closed", where="link")
        case "eof":
            link.recv(1)
            finish()
        case "ends-late":
            sys.stdin.read()
            link.recv(1)
            finish("migrated")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
