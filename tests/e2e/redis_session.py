"""A redis-server on the service address with strict clients at work: for the test and for the demo."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from e2e.support import SERVICE, Hosts, Moved, Place
from lab.fixture import until
from programs.status import PROGRAMS

PORT = 6379
LOAD = PROGRAMS / "redis_load.py"


class RedisSession:
    """The server starts on alpha; the clients run in the host "client", each on one connection for life."""

    def __init__(self, lab: Hosts, place: Place, megabytes: int, rate: float = 30.0) -> None:
        self.lab, self.place, self.megabytes, self.rate = lab, place, megabytes, rate
        self.state = place.path / "redis.state"
        self.stop_file = place.path / "stop"
        self.clients: subprocess.Popen[str] | None = None
        lab.run("alpha", "ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
        self.server = Moved(lab, "alpha", self._start_server())
        until(lambda: lab.ask("client", *self._cli("PING")).stdout == "PONG\n", "redis-server")
        self.before = self.info()

    def _start_server(self) -> int:
        options = [
            "--save",
            "",
            "--appendonly",
            "no",
            "--enable-debug-command",
            "yes",
            "--dir",
            self.place.path,
        ]
        bind = ["--bind", SERVICE, "127.0.0.1", "--port", PORT, "--protected-mode", "no"]
        return self.lab.start("alpha", "redis-server", *bind, *options)

    def _cli(self, *command: str) -> list[str]:
        return ["redis-cli", "-h", SERVICE, "-p", str(PORT), *command]

    def info(self) -> dict[str, str]:
        """INFO, as seen by a client."""
        lines = self.lab.run("client", *self._cli("INFO")).splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def load(self, command: str, *options: object) -> dict[str, Any]:
        """One command of redis_load.py that ends by itself; it must find nothing wrong."""
        words = [LOAD, command, f"{SERVICE}:{PORT}", "--state", self.state, *options]
        result: dict[str, Any] = json.loads(self.lab.run("client", *words, timeout=600))
        assert result["failures"] == []
        return result

    def fill(self) -> dict[str, Any]:
        return self.load("fill", "--megabytes", self.megabytes)

    def digest(self) -> str:
        """Of the keys that the clients do not write."""
        return str(self.load("digest")["digest"])

    def start_clients(self) -> None:
        ready = self.place.path / "ready"
        options = ["--until-file", self.stop_file, "--ready-file", ready, "--rate", self.rate]
        words = [LOAD, "run", f"{SERVICE}:{PORT}", "--state", self.state, *options]
        self.clients = self.lab.attend("client", *words)
        until(ready.exists, "the clients' connections", 60)
        self.wait_for_commands(2000)

    def wait_for_commands(self, count: int) -> None:
        """Until the server has answered so many more."""


        def processed() -> int:
            return int(self.info()["total_commands_processed"])

        begin = processed()
        until(lambda: processed() > begin + count, "the clients' commands", 60)

    def stop_clients(self) -> dict[str, Any]:
        """What the clients saw, all the time since they started."""
        assert self.clients is not None
        self.stop_file.touch()
        output, errors = self.clients.communicate(timeout=120)
        assert output, errors
        result: dict[str, Any] = json.loads(output)
        return result

    def close(self) -> None:
        """End what this session has started."""
        if self.clients is not None and self.clients.poll() is None:
            self.stop_file.touch()
            try:
                self.clients.wait(90)
            except subprocess.TimeoutExpired:
                self.clients.kill()
        self.lab.kill(self.server.host, self.server.pid)
        for host in ("alpha", "beta"):
            self.lab.ask(host, "ip", "address", "del", f"{SERVICE}/24", "dev", "eth0")
