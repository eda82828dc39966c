"""The agent's service for a test: the real one, with a stand-in for what carries out a request."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from agent.server.places import SOCKET_VARIABLE, STATE_VARIABLE, Places

STAND_IN = Path(__file__).with_name("stand_in_agent.py")
DEADLINE = 30.0
MOVE = {"operation": "move", "pid": 4711, "destination": "beta"}
CHECK = {**MOVE, "operation": "check"}


def until(condition: Callable[[], Any], what: str = "") -> Any:
    """Wait for `condition()` to be true, and return it."""
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return value


class Connection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("agent", timeout=DEADLINE)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(str(self._path))


class Service:
    """A running service whose socket and records are in `here`; `command` starts it."""

    def __init__(self, here: Path, command: list[str], **environment: str) -> None:
        self.places = Places(here / "run" / "agent.sock", here / "state")
        self.environment = {
            **os.environ,
            SOCKET_VARIABLE: str(self.places.socket),
            STATE_VARIABLE: str(self.places.state),
            **environment,
        }
        self._command = command
        self.process = self.start()

    @classmethod
    def playing(
        cls,
        scenario: str,
        here: Path,
        idle_exit: float = 300.0,
        deserted_after: float = 300.0,
        environment: dict[str, str] | None = None,
    ) -> Self:
        return cls(
            here,
            [sys.executable, str(STAND_IN), scenario, "serve"],
            STAND_IN_IDLE_EXIT=str(idle_exit),
            STAND_IN_DESERTED_AFTER=str(deserted_after),
            PYTHONPATH=str(STAND_IN.parents[2]),
            **(environment or {}),
        )

    def start(self) -> subprocess.Popen[str]:
        """Start it (again), and wait until it answers."""
        self.process = subprocess.Popen(
            self._command, env=self.environment, stderr=subprocess.PIPE, text=True
        )
        until(self.answers, "the service answers")
        return self.process

    def answers(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1]
        with contextlib.suppress(OSError):
            return self.ask("GET", "/v1/health")[0] == 200
        return False

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Status and body of one answer; `body` as it is, or as JSON."""
        with contextlib.closing(Connection(self.places.socket)) as connection:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def good(self, method: str, path: str, body: object = None) -> Any:
        status, answer = self.ask(method, path, body)
        assert status < 300, answer
        return answer

    @contextlib.contextmanager
    def stream(self, method: str, path: str, body: object = None) -> Iterator[Iterator[dict[str, Any]]]:
        """Events as they come, for as long as the block lasts."""
        with contextlib.closing(Connection(self.places.socket)) as connection:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, path, data, {"Accept": "application/x-ndjson"})
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("Content-Type")) == (200, "application/x-ndjson")
            yield map(json.loads, answer)

    def events(self, id: str, start: int = 0) -> list[dict[str, Any]]:
        """All of them, to the end."""
        with self.stream("GET", f"/v1/migrations/{id}/events?from={start}") as lines:
            return list(lines)

    def close(self) -> str:
        """End it; what it said."""
        self.process.send_signal(signal.SIGTERM)
        said = self.process.communicate(timeout=DEADLINE)[1]
        assert not self.places.socket.exists() and not self.places.lock.exists()
        return said
