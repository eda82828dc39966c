"""A lab for tests: raised on entry, removed on exit, and removed too if the test process is killed."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab import plan, state

LAB = Path(__file__).with_name("lab")


def until(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    """Wait for `condition()` to be true and return it. Raises TimeoutError with `what` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout} s: {what}")
        time.sleep(0.01)
    return value


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The lab's command as a person runs it; `options` are subprocess.run's."""
    return subprocess.run([str(LAB), *arguments], capture_output=True, text=True, check=False, **options)


class Lab:
    """A lab of `hosts` hosts and a client, its name made unique to this process.

    >>> with Lab("demo", hosts=2, bandwidth="1gbit") as lab:
    ...     pid = lab.spawn("alpha", "sleep", "100")
    """

    def __init__(
        self,
        name: str = "test",
        hosts: int = 2,
        bandwidth: str | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`variables` are in the environment of every command in a host."""
        self.name = f"{name}-{os.getpid()}"
        self.shared: Path = plan.shared(self.name)  # while it is up: a directory of all hosts, and of ours
        self._options = ["--hosts", str(hosts), *(["--bandwidth", bandwidth] if bandwidth else [])]
        for variable, value in (variables or {}).items():
            self._options += ["--variable", f"{variable}={value}"]
        self._tether: int | None = None

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def up(self) -> None:
        """Raise it. The supervisor holds the other end of a pipe of ours, so the lab does not outlive us."""
        reader, self._tether = os.pipe()
        atexit.register(self.down)
        try:
            command = self._command("up", *self._options, "--tether", str(reader))
            done = subprocess.run(command, pass_fds=[reader], capture_output=True, text=True, check=False)
        finally:
            os.close(reader)
        if done.returncode != 0:
            self.down()
            raise RuntimeError(f"lab {self.name} does not come up: {done.stderr}")

    def down(self) -> None:
        """Remove it; does nothing the second time."""
        if self._tether is None:
            return
        subprocess.run(self._command("down"), check=True)
        os.close(self._tether)
        self._tether = None
        atexit.unregister(self.down)

    def exec(
        self, host: str, *command: str, input: str | None = None, check: bool = True, timeout: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run `command` in `host` and return its exit status and output, as text.

        Raises CalledProcessError, with all output, if `check` and it fails; TimeoutExpired.
        """
        line = self._command("exec", host, "--", *command)
        # No input means no input: tests must not read the terminal.
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        done = subprocess.run(line, capture_output=True, text=True, timeout=timeout, check=False, **source)
        if check and done.returncode != 0:
            error = subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
            error.add_note(f"on {host}: {done.stdout}{done.stderr}")
            raise error
        return done

    def spawn(self, host: str, *command: str) -> int:
        """Start `command` detached in `host` and return its pid there. Raises RuntimeError if that fails."""
        line = self._command("exec", "-d", host, "--", *command)
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{command} on {host}: {done.stderr}")
        return int(done.stdout)

    def popen(self, host: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start `command` in `host` as a child of ours; `options` are Popen's. It dies with that child."""
        return subprocess.Popen(self._command("exec", host, "--", *command), **options)

    def address(self, host: str, ipv6: bool = False) -> str:
        """The host's own address."""
        found = self._host(host)
        return found.ipv6 if ipv6 else found.ipv4

    def log(self, host: str, pid: int) -> str:
        """What the command started detached in `host`, as `pid`, wrote so far, wherever it is now."""
        return self._state().log(host, pid).read_text(errors="replace")

    def pid_outside(self, host: str, pid: int) -> int:
        """The machine's number of `pid` of `host`. Raises ProcessLookupError."""
        return self._host(host).outside(pid)

    def _host(self, name: str) -> state.HostState:
        return self._state().host(name)

    def _state(self) -> state.LabState:
        lab = state.load(self.name)
        if lab is None:
            raise RuntimeError(f"lab {self.name} is not up")
        return lab

    def _command(self, name: str, *rest: str) -> list[str]:
        return [sys.executable, str(LAB), name, "--name", self.name, *rest]
