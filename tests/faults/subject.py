"""What is moved, and who notices: a process that checks itself, and a client with one connection for life."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from e2e.support import SERVICE, Hosts, Place
from lab import state
from lab.fixture import until
from programs.status import BUILD, read_status, wait_for_status

from agent import cleanup
from agent.kernel import pidfd, procfs
from agent.kernel.memory import RemoteMemory
from faults.hosts import OPEN_FILE, SHADOW, Host, Process

PORT: Final = 7000
_PROGRAM: Final = BUILD / "heartbeat"
_MAPPED: Final = ("callers", "churn", "coroutines", "libchecktls.so", "selfcheck")
_OPTIONS: Final = (
    "--megabytes",
    8,
    "--rate",
    8,
    "--sweep",
    "--sleepers",
    2,
    "--unsettled",
    "--open",
    OPEN_FILE,
)
_REAPER: Final = "/memfd:migrate-reaper"
_SENT_BY_STOPS: Final = 1 << (signal.SIGTRAP - 1) | 1 << (signal.SIGSTOP - 1)
_TCP_REPAIR: Final = 19  # linux/tcp.h
_CLONE_NEWNET: Final = 0x40000000
_libc: Final = ctypes.CDLL(None, use_errno=True)


class Subject:
    """The process and its client; `where` is the host that it is on, `pid` the machine's number of it."""

    def __init__(self, lab: Hosts, hosts: dict[str, Host]) -> None:
        found = state.load(lab.name)
        assert found is not None
        self.where = "alpha"
        self.pid = 0
        self._lab = lab
        self._hosts = hosts
        self._place = Place()
        self._client = found.hosts["client"].init.pid
        self._caller = 0
        self._descriptors: dict[int, str] = {}
        self._asked_at = 0.0
        self._answers_before = 0

    def start(self) -> None:
        for host in self._hosts:
            self.place_file(host)
        self._hosts["alpha"].enter("ip", "address", "add", f"{SERVICE}/24", "dev", "eth0")
        mapped = [word for name in _MAPPED for word in ("--map", BUILD / name)]
        words = [*_OPTIONS, *mapped, "--listen", f"{SERVICE}:{PORT}", *self._files("heartbeat")]
        inside = self._lab.start("alpha", _PROGRAM, *words)
        wait_for_status(self._status("heartbeat"))
        self.pid = self._lab.pid_outside("alpha", inside)
        words = [BUILD / "callers", SERVICE, PORT, "--interval", 0.01, *self._files("callers")]
        self._caller = self._lab.pid_outside("client", self._lab.start("client", *words))
        until(lambda: self._answers() > 1, "the client has answers")
        until(self._remember_descriptors, "the process's descriptors")

    def close(self) -> None:
        self._place.close()

    def _files(self, program: str) -> tuple[object, ...]:
        return "--status", self._status(program), "--log", self._place.path / f"{program}.log"

    def _status(self, program: str) -> Path:
        return self._place.path / f"{program}.status"

    def place_file(self, host: str) -> None:
        """Let `host` have the file that the process has open."""
        path = self._hosts[host].root / OPEN_FILE.relative_to("/")
        if not path.exists():
            path.write_bytes(bytes(range(256)) * 1024)

    def remove_file(self, host: str) -> None:
        (self._hosts[host].root / OPEN_FILE.relative_to("/")).unlink(missing_ok=True)

    @property
    def number(self) -> int:
        """Its number on the host that it is on."""
        status = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("NSpid:")).split()[2])

    def new_window(self) -> None:
        """The longest gap counts from now on, and the client's longest wait."""
        os.kill(self.pid, signal.SIGUSR1)
        os.kill(self._caller, signal.SIGUSR1)

    def gap_ms(self) -> float:
        status = read_status(self._status("heartbeat"))
        return float(status["longest_gap_ms"]) if status else 0.0

    def wait_ms(self) -> float:
        """For an answer, of the client."""
        status = read_status(self._status("callers"))
        return float(status["counters"]["longest-us"]) / 1000 if status else 0.0

    def copies(self) -> list[tuple[str, Process]]:
        """Every process on either host that is it, or is being made into it."""
        found = [(host.name, one) for host in self._hosts.values() for one in host.processes()]
        return [(name, one) for name, one in found if one.executable.startswith((str(_PROGRAM), SHADOW))]

    def is_reaper(self, one: Process) -> bool:
        """Whether that is pid 1 of a namespace that the process was given with its number."""
        if not one.executable.startswith(_REAPER) or not self.pid:
            return False
        return os.readlink(f"/proc/{one.pid}/ns/pid") == os.readlink(f"/proc/{self.pid}/ns/pid")

    # --- how it is ---

    def ask(self) -> None:
        """What `complaints` says is from now on."""
        self._asked_at = time.time()
        self._answers_before = self._answers()

    def complaints(self) -> Iterator[str]:
        """What is wrong with it, or with its client, in words; `where` and `pid` say which process it is."""
        yield from self._own_complaints()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            yield from self._leftovers()
        yield from self._client_complaints()

    def _own_complaints(self) -> Iterator[str]:
        status = read_status(self._status("heartbeat"))
        if status is None or status["realtime"] < self._asked_at:
            yield "the process does not go on"
        elif status["complaints"]:
            yield f"the process: {status['complaints']} complaints, {status['first_complaint']}"
        elif status["host"] != self.where:
            yield f"the process says that it is on {status['host']}"

    def _client_complaints(self) -> Iterator[str]:
        status = read_status(self._status("callers"))
        if status is None:
            return
        if status["complaints"]:
            yield f"the client: {status['complaints']} complaints, {status['first_complaint']}"
        elif status["counters"]["answers"] <= self._answers_before:
            yield "the client gets no answers"
        else:
            yield from self._new_connection()

    def _new_connection(self) -> Iterator[str]:
        """Another client, which connects now."""
        try:
            answer = _in_network(self._client, lambda: _echo(b"are you there?"))
        except OSError as error:
            yield f"a new connection: {error}"
            return
        if answer != b"are you there?":
            yield f"a new connection: {answer!r}"

    def _leftovers(self) -> Iterator[str]:
        """What of a migration is in the process, or done to it."""
        memory = RemoteMemory(self.pid)
        try:
            left = cleanup.look(self.pid, memory)
        finally:
            memory.close()
        if left:
            yield f"in the process: {left}"
        for status in procfs.each_thread(self.pid, lambda tid: procfs.status(self.pid, tid)):
            if status["TracerPid"] != "0":
                yield f"thread {status['Pid']} is traced by {status['TracerPid']}"
            if (int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)) & _SENT_BY_STOPS:
                yield f"thread {status['Pid']} has a signal of a stop pending"
        yield from self._changed_descriptors()

    def _changed_descriptors(self) -> Iterator[str]:
        now = _descriptors(self.pid)
        for fd in sorted(now.keys() | self._descriptors):
            if now.get(fd) != self._descriptors.get(fd):
                yield f"descriptor {fd} of the process is {now.get(fd)}, was {self._descriptors.get(fd)}"

    def _remember_descriptors(self) -> bool:
        """Twice the same: its client is connected, and no file is open for a moment."""
        before, self._descriptors = self._descriptors, _descriptors(self.pid)
        return before == self._descriptors

    def _answers(self) -> int:
        """Of the client, which is never moved nor stopped."""
        return int(wait_for_status(self._status("callers"))["counters"]["answers"])


def _descriptors(pid: int) -> dict[int, str]:
    """What a process has open, without the numbers of sockets; of TCP, also whether it is under repair."""
    process = os.pidfd_open(pid)
    try:
        return {fd: _describe(process, fd, link) for fd, link in procfs.fds(pid).items()}
    finally:
        os.close(process)


def _describe(process: int, fd: int, link: str) -> str:
    if not link.startswith("socket:"):
        return link
    try:
        with socket.socket(fileno=pidfd.getfd(process, fd)) as ours:
            repair = ours.getsockopt(socket.SOL_TCP, _TCP_REPAIR)
    except OSError as error:
        return f"socket ({error.strerror})"
    return "socket under repair" if repair else "socket"


def _echo(message: bytes) -> bytes:
    with socket.create_connection((SERVICE, PORT), timeout=2) as connection:
        connection.sendall(message)
        return connection.recv(64)


def _in_network(pid: int, work: Callable[[], bytes]) -> bytes:
    """`work`'s result, done by a thread in the network of process `pid`."""
    results: list[bytes | BaseException] = []

    def run() -> None:
        try:
            with open(f"/proc/{pid}/ns/net") as namespace:
                if _libc.setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            results.append(work())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def pictures(subject: Subject) -> dict[str, Any]:
    """For a person who looks at a violation."""
    found: dict[str, Any] = {}
    for host, one in subject.copies():
        status = Path(f"/proc/{one.pid}/status")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[f"{host}: {one}"] = re.sub(r"\t+", " ", status.read_text()).splitlines()
    return found
