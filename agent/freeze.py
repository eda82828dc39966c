"""The frozen source: stopped, locked, captured — and thawed or buried.

Until `silence` the tasks are held by plain PTRACE_SEIZE: if we die the kernel lets them run. From then on our
death leaves them stopped, until it is known what became of the copy (docs/architecture.md, "Exactly one live
copy").
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from agent import capture, hold, inventory, kinds, protocol, states
from agent.api import Blocker, MoveOptions, Round
from agent.descriptors import SourceProcess, open_files
from agent.journal import Departure, Entry
from agent.kernel import procfs, ptrace
from agent.kernel.arch.x86_64 import Registers
from agent.network import SourceNetwork
from agent.phases import Phases
from agent.resources import epoll, signals, threads, timers, waits
from agent.resources.tcp_socket import is_connection
from agent.resources.tcp_socket import recognise as is_tcp
from agent.rounds import Pending, Rounds, unpaced
from agent.state import ThreadState
from agent.tracee import wait_event_stop
from agent.unmovable import NotStill, Unmovable
from agent.visit import Pause
from transport.frames import LinkClosed

_ATTEMPTS: Final = 20
_DESCRIPTORS_A_MESSAGE: Final = 100
_THREADS_A_MESSAGE: Final = 50
_RETRY_SECONDS: Final = 0.01
_UNINTERRUPTIBLE_SECONDS: Final = 5.0  # that a rollback waits for a task to stop; it is let go when we end


class FrozenProcess:
    """One process between its first stop and its end or its resumption."""

    def __init__(
        self,
        process: SourceProcess,
        rounds: Rounds,
        network: SourceNetwork,
        options: MoveOptions,
        found: inventory.Inventory,
        journal: Entry[Departure],
    ) -> None:
        """`found`: what was found when it was checked."""
        self._journal = journal
        self._held = self._lifted = False
        self._process = process
        self._rounds = rounds
        self._network = network
        self._options = options
        self._found = found
        # of a connection that was checked, what could have changed since shows when it is captured
        self._known = {file.inode for file in found.descriptors if is_tcp(file)}
        self.pid = process.pid
        self.tids: list[int] = []
        self.committed = False
        self.facts: capture.Frozen | None = None
        self.phases = Phases("source")
        self.deadline = 0.0
        self.began = 0.0
        self.longest_attempt_ms = 0.0  # of stops that were given up
        self.pending: Pending | None = None
        self.state: protocol.Rebuild | None = None
        # signals that the destination has, by thread; 0: the process's
        self._queued: dict[int, Counter[bytes]] = {}
        self._states: Iterator[ThreadState] = iter(())  # of the threads, as they are captured
        self._captured: list[ThreadState] = []  # and not yet sent

    # --- freeze ---

    def stop(self) -> None:
        """Stop every task and lock the network.

        Tried again while a connection is being accepted or a child lives.
        """
        for attempt in range(_ATTEMPTS):
            try:
                with contextlib.closing(waits.Sleepers(procfs.threads(self.pid))) as sleepers:
                    self._stop_once(sleepers)
                return
            except NotStill:
                self.thaw()
                if self.began:
                    self.longest_attempt_ms = max(self.longest_attempt_ms, self.pause_ms())
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(_RETRY_SECONDS * (attempt + 1))

    def _stop_once(self, sleepers: waits.Sleepers) -> None:
        self._process.forget_duplicates()
        self.began = 0.0
        _refuse(inventory.lasting_blockers(self.pid))
        self._process.holders.look()
        self._network.start_capture()
        self.phases = Phases("source")
        self.began = time.perf_counter()
        self.deadline = time.monotonic() + self._options.freeze_timeout_ms / 1000
        self._seize_all()
        self._rounds.look()
        self._mark("stop")
        self.monotonic = time.monotonic_ns() + capture.namespace_offset(self.pid)[0]
        self._look_again()
        self._mark("check again")
        self._network.lock([self._process.duplicate(f.fd) for f in self.files if is_tcp(f)])
        if self._network.busy():
            raise NotStill("tcp-connecting", "a connection is being accepted")
        self._mark("lock sockets")
        self.facts = capture.Frozen(self._rounds.tracee, self.tids, sleepers, self._rounds.waits)
        self._mark("registers")

    def _mark(self, phase: str) -> None:
        """End a phase; TimeoutError once the freeze has lasted longer than it may."""
        self.phases.mark(phase)
        if time.monotonic() > self.deadline:
            raise TimeoutError(
                f"the freeze takes longer than its limit of {self._options.freeze_timeout_ms:.0f} ms"
            )

    def _look_again(self) -> None:
        """What was checked must still hold; it had all of the pre-copy to change. NotStill, Unmovable."""
        if self._rounds.program_changed():
            raise Unmovable("process-executed", "it made itself another program (execve)")
        if self._stopped_by != {signal.SIGTRAP}:
            raise NotStill("stopped", "it is stopped by a signal (job control)")
        self.files = open_files(self._process)
        new = (file for file in self.files if not (is_tcp(file) and file.inode in self._known))
        _refuse(b for file in new for b in kinds.blockers(file, self._process))

    def check_settings(self) -> None:
        """Children, seccomp, credentials, namespaces: asked before the stop, when it costs nothing, and here,
        while the destination rebuilds, for what came in between. NotStill.
        """
        assert self.facts is not None
        # those that slept since are as they were then, all alike: one of them stands for them
        slept = self.facts.slept
        ran = [tid for tid in self.tids if tid not in slept]
        _refuse(inventory.lasting_blockers(self.pid, [*ran, *sorted(slept)[:1]], self.facts.has_children))

    def _seize_all(self) -> None:
        """Seize and stop until no task is left that is not: a running thread may make another."""
        self._stopped_by: set[int] = set()
        while True:
            fresh = [tid for tid in procfs.threads(self.pid) if tid not in self.tids]
            if not fresh:
                return
            seized = [tid for tid in fresh if self._seize(tid)]
            self.tids += seized
            for tid in seized:
                with contextlib.suppress(ProcessLookupError):
                    ptrace.interrupt(tid)
            for tid in seized:
                self._await_stop(tid)

    def _await_stop(self, tid: int) -> None:
        """A thread may have ended instead: the process goes without it. TaskEnded if it was the process."""
        try:
            self._stopped_by.add(wait_event_stop(tid, self.deadline))
        except ptrace.TaskEnded:
            if tid == self.pid:
                raise
            self.tids.remove(tid)

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
        self._mark("scan")
        sent, discarded = rounds.send_memory(self.pending, True, unpaced)
        self._mark("send pages")
        sent += rounds.settle_flags()
        if rounds.guards:
            link.send(protocol.Guards(rounds.guards))
        self._mark("mapping flags")
        return Round(
            number=number,
            pages_sent=sent,
            pages_discarded=discarded,
            bytes=link.bytes_sent - bytes_before,
            seconds=round(time.perf_counter() - began, 4),
            dirty_rate=round(dirty_rate, 1),
        )

    def capture(self) -> protocol.Rebuild:
        """Everything but memory, descriptors and the threads after the first."""
        assert self.facts is not None
        process = capture.capture_process(self._rounds.tracee, self.facts, self._found.executable)
        self._mark("process")
        self.state = protocol.Rebuild(
            process=process,
            monotonic_at_freeze=self.monotonic,
            leave_stopped=self._options.leave_stopped,
        )
        self._queued = {0: Counter(self.facts.shared_pending)}
        self._queued |= {tid: Counter(thread.pending) for tid, thread in self.facts.stopped.items()}
        return self.state

    def send_descriptors(self) -> None:
        """Some at a time, listeners first: the destination rebuilds them meanwhile."""
        stale = epoll.stale(self.files, self.pid)
        if stale:
            raise ValueError(f"{stale[0]} watches a descriptor that was closed")
        files = sorted(self.files, key=lambda file: is_connection(file, self._process))
        ahead = capture.namespace_offset(self.pid)[0]
        for first in range(0, len(files) or 1, _DESCRIPTORS_A_MESSAGE):
            some = files[first : first + _DESCRIPTORS_A_MESSAGE]
            now = time.monotonic_ns() + ahead
            captured = [kinds.capture(file, self._process) for file in some]
            last = first + _DESCRIPTORS_A_MESSAGE >= len(files)
            self._rounds.link.send(protocol.Descriptors(captured, now, last))
        self._mark("descriptors")

    def silence(self) -> None:
        """Nothing is asked any more: from now on it stays stopped whoever dies, and its sockets are
        silent.
        """
        self._journal.to(states.Departure.FROZEN)  # before it is held: who finds it held must know why
        self._held = True
        hold.put_each(self.pid, self.tids)
        self._network.silence()

    def capture_threads(self) -> None:
        """The other threads, of which the first are captured now, while the last scan is made."""
        assert self.facts is not None
        self._states = capture.capture_threads(self._rounds.tracee, self.facts)
        self._captured = list(itertools.islice(self._states, _THREADS_A_MESSAGE))
        self._mark("threads")

    def send_threads(self) -> None:
        """Some at a time: the destination rebuilds them meanwhile. It needs all memory for that."""
        assert self.state is not None
        while self._captured:
            self._rounds.link.send(protocol.Threads(self._captured))
            self.state.process.threads += self._captured
            self._captured = list(itertools.islice(self._states, _THREADS_A_MESSAGE))
        self._mark("threads")

    def complete(self) -> protocol.Complete:
        """What is asked when nobody looks at the page tables any more."""
        assert self.facts is not None and self.state is not None
        process = self.state.process
        capture.capture_last(self._rounds.tracee, self.facts, process)
        self._mark("last questions")
        return protocol.Complete(process.memory.brk, process.lock_future)

    def late_signals(self, of_threads: bool) -> list[tuple[int, bytes]]:
        """What was queued since the capture or the last call: (thread's own number, 0: the process; siginfo).

        Captured timers go on over there, so what they queue here meanwhile would be theirs twice. To look
        into the queues of all threads, too, takes some microseconds for each.
        """
        found: list[tuple[int, bytes]] = []
        if not self.tids or self.state is None:  # buried, or not captured
            return found
        process = self.state.process
        for tid, known in self._queued.items() if of_threads else [(0, self._queued[0])]:
            queue = signals.pending_of_thread(tid) if tid else signals.pending_of_process(self.pid)
            if not queue:
                continue
            new = Counter(siginfo for siginfo in queue if not (tid and hold.is_ours(siginfo))) - known
            known.update(new)
            number = self.facts.numbers[tid] if tid and self.facts is not None else 0
            found += [(number, siginfo) for siginfo in new.elements() if not timers.runs_on(process, siginfo)]
        return found

    def pause_ms(self) -> float:
        return (time.perf_counter() - self.began) * 1000

    # --- the end ---

    def thaw(self) -> None:
        """Everything back as it was, and on it goes. Safe in any state, also when the process is gone."""
        deadline = time.monotonic() + _UNINTERRUPTIBLE_SECONDS
        with contextlib.ExitStack() as steps:  # each is done, whatever the others raise; the network first
            steps.callback(self._forget_tasks)
            steps.callback(self._rounds.forget_look)
            for tid in self.tids:
                steps.callback(self._resume, tid, deadline)
            steps.callback(self._go_on, deadline)
            steps.callback(self._network.unlock)

    def _go_on(self, deadline: float) -> None:
        """Not held any more, if it was: before the first thread is let go, which would stop them all."""
        if self._held:
            self._held, self._lifted = False, True
            with contextlib.ExitStack() as steps:  # one that fails is no reason to leave the others held
                for tid in self.tids:
                    steps.callback(self._lift, tid, deadline)

    def _lift(self, tid: int, deadline: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._put_back(tid, deadline)
            hold.lift(tid)

    def _forget_tasks(self) -> None:
        self.tids.clear()
        self.facts = None

    def _resume(self, tid: int, deadline: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            try:
                if not self._lifted:  # it may be on its way into a handler already
                    self._put_back(tid, deadline)
            finally:
                ptrace.detach(tid)

    def _put_back(self, tid: int, deadline: float) -> None:
        if tid in self._rounds.tracee.adrift:  # it is on its own way back, and its registers are its own
            ptrace.interrupt(tid)
            wait_event_stop(tid, deadline)
            Pause(tid, self._rounds.memory)  # that was one more stop, which does not show
            return
        try:
            ptrace.set_registers(tid, self._registers(tid))
        except ProcessLookupError:
            # not stopped yet: asleep where nothing interrupts it (vfork, a hanging file system)
            wait_event_stop(tid, deadline)
            ptrace.set_registers(tid, self._registers(tid))

    def _registers(self, tid: int) -> Registers:
        """With which a thread goes on as if never stopped, also if the freeze ended before it knew."""
        if self.facts is not None and tid in self.facts.registers:
            return self.facts.registers[tid]
        pending = signals.pending_of_process(self.pid) + signals.pending_of_thread(tid)
        return threads.settled_registers(tid, self._rounds.memory, signals.mask_of(pending))

    def commit(self, send: Callable[[], None]) -> None:
        """The point of no return on this host: `send` sends COMMIT. LinkClosed if nothing was committed."""
        self._journal.to(states.Departure.COMMITTED)
        self.committed = True
        try:
            send()
        except LinkClosed:  # not all of it left this host, so it was never understood
            self.committed = False
            self._journal.to(states.Departure.FROZEN)
            raise

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
        """Nobody knows whether the other copy lives: this one stays stopped until `agent.recovery` does.

        Its sockets stay locked and under repair, so that they are silent even if it is killed.
        """
        with contextlib.ExitStack() as steps:
            for tid in self.tids:
                steps.callback(self._resume, tid, time.monotonic())  # as far as to the SIGSTOP
            steps.callback(self._network.give_up)
        self.tids.clear()


def _refuse(found: Iterable[Blocker]) -> None:
    for blocker in found:
        raise NotStill(blocker.kind, f"{blocker.what}: {blocker.why}")


def _reap(tid: int) -> None:
    try:
        while True:
            _, status = os.waitpid(tid, ptrace.WALL)
            if not os.WIFSTOPPED(status):
                return
    except ChildProcessError:
        return
