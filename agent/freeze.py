"""The frozen source: stopped, locked, captured — and thawed or buried.

Until `commit` the tasks are held by plain PTRACE_SEIZE: if we die the kernel lets them run. `commit` sets EXITKILL on
every one: from then on our death is theirs, never their resumption (docs/architecture.md, "Exactly one live copy").
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Final

from agent import capture, inventory, kinds, protocol
from agent.api import MoveOptions, Round
from agent.descriptors import SourceProcess, open_files
from agent.kernel import procfs, ptrace
from agent.kernel.arch.x86_64 import Registers
from agent.network import SourceNetwork
from agent.phases import Phases
from agent.resources import epoll, signals, threads, waits
from agent.resources.tcp_socket import recognise as is_tcp
from agent.rounds import Pending, Rounds
from agent.tracee import stop

_ATTEMPTS: Final = 20
_RETRY_SECONDS: Final = 0.01


class NotStill(Exception):
    """Something that cannot be captured is under way; it ends by itself in a moment."""


class FrozenProcess:
    """One process between its first stop and its end or its resumption."""

    def __init__(
        self, process: SourceProcess, rounds: Rounds, network: SourceNetwork, options: MoveOptions
    ) -> None:
        self._process = process
        self._rounds = rounds
        self._network = network
        self._options = options
        self.pid = process.pid
        self.tids: list[int] = []
        self.committed = False
        self.facts: capture.Frozen | None = None
        self.phases = Phases("source")
        self.deadline = 0.0
        self.began = 0.0
        self.pending: Pending | None = None
        self.state: protocol.Rebuild | None = None

    # --- freeze ---

    def stop(self) -> None:
        """Stop every task and lock the network; tried again while a connection is being accepted or a child lives."""
        for attempt in range(_ATTEMPTS):
            try:
                self._stop_once()
                return
            except NotStill:
                self.thaw()
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_RETRY_SECONDS * (attempt + 1))

    def _stop_once(self) -> None:
        self._process.forget_duplicates()
        asleep = {tid: waits.observe(tid) for tid in procfs.threads(self.pid)}
        self._network.start_capture()
        self.phases = Phases("source")
        self.began = time.perf_counter()
        self.deadline = time.monotonic() + self._options.freeze_timeout_ms / 1000
        self._seize_all()
        self.phases.mark("stop")
        self.monotonic = time.monotonic_ns() + capture.namespace_offset(self.pid)[0]
        if procfs.children(self.pid):
            raise NotStill("it has a child process")
        self.files = open_files(self._process)
        self._network.lock([self._process.duplicate(f.fd) for f in self.files if is_tcp(f)])
        if self._network.busy():
            raise NotStill("a connection is being accepted")
        self.phases.mark("lock sockets")
        self.facts = capture.Frozen(self._rounds.tracee, self.tids, asleep)
        self.phases.mark("registers")

    def _seize_all(self) -> None:
        """Seize and stop until no task is left that is not: a running thread may make another."""
        while True:
            fresh = [tid for tid in procfs.threads(self.pid) if tid not in self.tids]
            if not fresh:
                return
            seized = [tid for tid in fresh if self._seize(tid)]
            self.tids += seized
            stop(seized, self.deadline)

    def _seize(self, tid: int) -> bool:
        try:
            ptrace.seize(tid)
        except ProcessLookupError:
            if tid == self.pid:  # its number stays listed until its parent has noticed
                raise
            return False
        return True

    # --- capture ---

    def send_pages(self, number: int, dirty_rate: float) -> Round:
        """The last round: everything written since the last scan; the destination does not answer."""
        link, rounds = self._rounds.link, self._rounds
        began, bytes_before = time.perf_counter(), link.bytes_sent
        self.pending = rounds.last()
        self.phases.mark("scan")
        sent, discarded = rounds.send_memory(self.pending, True, _nothing)
        if rounds.guards:
            link.send(protocol.Guards(rounds.guards))
        self.phases.mark("send pages")
        return Round(
            number=number,
            pages_sent=sent,
            pages_discarded=discarded,
            bytes=link.bytes_sent - bytes_before,
            seconds=round(time.perf_counter() - began, 4),
            dirty_rate=round(dirty_rate, 1),
        )

    def capture(self, found: inventory.Inventory) -> protocol.Rebuild:
        """Everything but memory."""
        assert self.facts is not None
        process = capture.capture_process(self._rounds.tracee, self.facts, found.executable)
        self.phases.mark("threads")
        stale = epoll.stale(self.files, self.pid)
        if stale:
            raise ValueError(f"{stale[0]} watches a descriptor that was closed")
        descriptors = [kinds.capture(file, self._process) for file in self.files]
        self.phases.mark("descriptors")
        self.state = protocol.Rebuild(
            process=process,
            descriptors=descriptors,
            monotonic_at_freeze=self.monotonic,
            leave_stopped=self._options.leave_stopped,
        )
        return self.state

    def pause_ms(self) -> float:
        return (time.perf_counter() - self.began) * 1000

    # --- the end ---

    def thaw(self) -> None:
        """Everything back as it was, and on it goes. Safe in any state, also when the process is gone."""
        try:
            self._network.unlock()
        finally:
            for tid in self.tids:
                with contextlib.suppress(ProcessLookupError):
                    self._resume(tid)
            self.tids.clear()
            self.facts = None

    def _resume(self, tid: int) -> None:
        try:
            ptrace.set_registers(tid, self._registers(tid))
        finally:
            ptrace.detach(tid)

    def _registers(self, tid: int) -> Registers:
        """With which a thread goes on as if it had not been stopped, also if the freeze ended before it knew."""
        if self.facts is not None and tid in self.facts.registers:
            return self.facts.registers[tid]
        pending = signals.pending_of_process(self.pid) + signals.pending_of_thread(tid)
        return threads.settled_registers(tid, self._rounds.memory, signals.mask_of(pending))

    def commit(self) -> None:
        """The point of no return on this host."""
        for tid in self.tids:
            ptrace.set_options(tid, ptrace.PTRACE_O_EXITKILL)
        self.committed = True

    def bury(self) -> None:
        """Kill the source copy: its sockets are under repair, so nothing is sent. Idempotent."""
        if not self.tids:
            return
        os.kill(self.pid, signal.SIGKILL)
        for tid in [*(t for t in self.tids if t != self.pid), self.pid]:
            _reap(tid)
        self.tids.clear()
        self._process.forget_duplicates()

    def leave_in_doubt(self) -> None:
        """Nobody knows whether the other copy lives: this one stays stopped until a person decides."""
        self._network.unlock(give_back=False)
        os.kill(self.pid, signal.SIGSTOP)
        for tid in self.tids:
            ptrace.set_options(tid, 0)
            if self.facts is not None:
                ptrace.set_registers(tid, self.facts.registers[tid])
            ptrace.detach(tid)
        self.tids.clear()


def _nothing(pages: int, sent: int) -> None:
    """Nothing paces the freeze."""


def _reap(tid: int) -> None:
    try:
        while True:
            _, status = os.waitpid(tid, ptrace.WALL)
            if not os.WIFSTOPPED(status):
                return
    except ChildProcessError:
        return

