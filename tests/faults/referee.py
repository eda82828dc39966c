"""Makes happen what a case says, at the moment that a process at its point asks for it, or at a time.

Faults are made from outside: signals to the machine's numbers of the hosts' processes, cables at the lab's
switch. A process that asks waits for the answer, so a fault comes exactly where its point is; its own death
is one answer.
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from agent.kernel import procfs
from agent.kernel.memory import RemoteMemory
from faults.fault import PROCESS, ROLES, Action, After, Case, Cut, Fail, Hold, Point, Send, Side, Spoil
from faults.hosts import SHADOW, Host

_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


@dataclass(frozen=True)
class Fired:
    """A fault that came."""

    fault: int  # its place in the case
    seconds: float  # since the beginning of the run
    asked: str  # the process at the point


class Referee:
    """Of one run. `subject` tells the machine's number of the process that is moved."""

    def __init__(
        self, directory: Path, case: Case, hosts: dict[Side, Host], subject: Callable[[], int]
    ) -> None:
        self.fired: list[Fired] = []
        self._directory = directory
        self._case = case
        self._hosts = hosts
        self._subject = subject
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._threads: list[threading.Thread] = []
        self._clocks: list[threading.Timer] = []  # of faults that come at a time
        self._ends: list[threading.Timer] = []  # of faults that last some time
        self._until_over: list[Callable[[], None]] = []  # ends those that last until the command has ended
        self._lock = threading.Lock()
        self._began = time.monotonic()

    def __enter__(self) -> Referee:
        rules = [self._rule(number, point) for number, point in self._case.rules]
        path = self._directory / "referee"
        path.unlink(missing_ok=True)
        self._listening.bind(str(path))
        self._listening.listen(64)
        (self._directory / "rules.json").write_text(json.dumps(rules))
        self._thread(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()

    def begin(self) -> None:
        """The command starts now."""
        self._began = time.monotonic()
        for number, fault in enumerate(self._case.faults):
            if isinstance(fault.at, After):
                work = functools.partial(self._fire, number, "the clock")
                self._clocks.append(threading.Timer(fault.at.seconds, work))
        for clock in self._clocks:
            clock.start()

    def finish(self) -> None:
        """The command has ended: no fault comes any more; returns when the last one is over."""
        (self._directory / "rules.json").unlink(missing_ok=True)
        for clock in self._clocks:
            clock.cancel()
            clock.join()
        with self._lock:
            ends, steps = list(self._ends), self._until_over
            self._until_over = []
        for step in steps:
            step()
        for end in ends:
            end.join()

    def _rule(self, number: int, point: Point) -> dict[str, object]:
        return {
            "id": number,
            "host": self._hosts[point.side].name,
            "process": ROLES[point.role],
            "point": point.name,
            "nth": point.nth,
            "since": point.since,
        }

    # --- who asks ---

    def _listen(self) -> None:
        while True:
            try:
                asking, _ = self._listening.accept()
            except OSError:
                return
            self._thread(functools.partial(self._answer, asking))

    def _answer(self, asking: socket.socket) -> None:
        with asking:
            credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid = _CREDENTIALS.unpack(credentials)[0]
            number = int(asking.recv(16))
            answer = self._fire(number, f"process {pid}")
            with contextlib.suppress(OSError):  # it is dead
                asking.send(b"%d\n" % answer)

    def _fire(self, number: int, asked: str) -> int:
        """Make the fault, once; the error number that the call shall fail with.

        A process that forks hands its rules on, so that two may get to the same point.
        """
        with self._lock:
            if any(one.fault == number for one in self.fired):
                return 0
            self.fired.append(Fired(number, round(time.monotonic() - self._began, 3), asked))
        failing = 0
        for action in self._case.faults[number].actions:
            if isinstance(action, Fail):
                failing = action.number
            else:
                self._do(action)
        return failing

    # --- what is done ---

    def _do(self, action: Action) -> None:
        if isinstance(action, Send):
            self._hosts[action.side].signal(self._pids(action.side, action.roles), action.signal)
        elif isinstance(action, Hold):
            self._hold(action)
        elif isinstance(action, Cut):
            self._cut(action)
        elif isinstance(action, Spoil):
            self._spoil(self._hosts[action.side])

    def _pids(self, side: Side, roles: tuple[str, ...]) -> list[int]:
        pids = [one.pid for one in self._hosts[side].agents(roles)]
        return [*pids, self._subject()] if PROCESS in roles else pids

    def _hold(self, hold: Hold) -> None:
        host = self._hosts[hold.side]
        pids = self._pids(hold.side, hold.roles)
        host.signal(pids, signal.SIGSTOP)
        self._later(hold.seconds, lambda: host.signal(pids, signal.SIGCONT))

    def _cut(self, cut: Cut) -> None:
        host = self._hosts[cut.side]
        host.link(cut.way, up=False)
        if cut.seconds is None:
            with self._lock:
                self._until_over.append(lambda: host.link(cut.way, up=True))
        else:
            self._later(cut.seconds, lambda: host.link(cut.way, up=True))

    def _spoil(self, host: Host) -> None:
        """In the first page of the copy's longest writable mapping."""
        names = (SHADOW, os.readlink(f"/proc/{self._subject()}/exe"))
        copy = next(one.pid for one in host.processes() if one.executable.startswith(names))
        writable = [one for one in procfs.maps(copy) if one.protection & mmap.PROT_WRITE]
        start = max(writable, key=lambda one: one.end - one.start).start
        memory = RemoteMemory(copy)
        try:
            memory.write(start, bytes([memory.read(start, 1)[0] ^ 0xFF]))
        finally:
            memory.close()

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        end = threading.Timer(seconds, work)
        with self._lock:
            self._ends.append(end)
        end.start()

    def _thread(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()
