"""The source's side of one migration: check, pre-copy, freeze, commit — or everything back as it was.

    examining -> offering -> preparing -> pre-copy -> freezing -> ready -> committed -> live -> done
         \\___________\\____________\\____________\\___________\\________/
                           any failure: rolled back, the process runs on

The engine is synchronous and runs on the worker's main thread, which is the tracer of everything it stops.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import platform
import socket
import time
from collections.abc import Callable
from functools import partial

import msgspec

from agent import inventory, journal, protocol, reasons, recovery, states
from agent.api import Blocker as ApiBlocker
from agent.api import (
    Checked,
    CheckResult,
    Endpoint,
    ErrorInfo,
    Event,
    Finished,
    Log,
    Notice,
    Outcome,
    Progress,
    Report,
    Request,
    RoundFinished,
    StateChanged,
)
from agent.clocks import measure_delta
from agent.descriptors import SourceProcess
from agent.dirty_tracking import mechanism
from agent.freeze import FrozenProcess
from agent.guardian import Guardian
from agent.journal import Departure, Entry, Task
from agent.kernel.memory import RemoteMemory
from agent.link import Link, Resumption
from agent.network import SourceNetwork
from agent.offering import Offering
from agent.ownership import foreign
from agent.precopy import Convergence, Decision, Measured
from agent.protocol import PeerFailed
from agent.rounds import Rounds
from agent.server.store import new_id
from agent.states import Source, Steps
from agent.unmovable import Unmovable
from agent.verify import verify
from transport.codec import Encoder
from transport.frames import LinkClosed, ProtocolError

Emit = Callable[[Event], None]
# aborted -> the socket of a new link; None if it was aborted; LinkClosed if there is none
Renewal = Callable[[Callable[[], bool]], socket.socket | None]

_SHOWN = 5  # of what stands in the way, in one line; the report has all
NOTICING_S = 25.0  # that we may know of a broken link later than the destination does: three keepalives
STALL_SECONDS = 120.0  # that nothing at all moves on the link before the freeze
FIXED_COST_MS = 15.0  # of a freeze before this migration has measured anything


class Refused(Exception):
    def __init__(self, blockers: list[ApiBlocker]) -> None:
        shown = [f"{b.what}: {b.why}" for b in blockers[:_SHOWN]]
        rest = [f"and {len(blockers) - _SHOWN} more"] if len(blockers) > _SHOWN else []
        super().__init__("; ".join([*shown, *rest]))
        self.blockers = blockers


class Aborted(Exception):
    """A person, or the one who asked, does not want it any more."""


def run(
    request: Request,
    link: socket.socket,
    emit: Emit,
    aborted: Callable[[], bool],
    name: str | None = None,
    renewal: Renewal | None = None,
) -> None:
    """Do what was asked and say how it went: every way out emits exactly one Checked or Finished.

    `name` is the migration's, for the journals of both hosts. Without a `renewal` a link that breaks is the
    end.
    """
    migration = Migration(request, Link(link), emit, aborted, name or new_id(), renewal)
    try:
        migration.run()
    finally:
        migration.close()


class Migration:
    """One migration, from the source's point of view."""

    def __init__(
        self,
        request: Request,
        link: Link,
        emit: Emit,
        aborted: Callable[[], bool],
        name: str,
        renewal: Renewal | None = None,
    ) -> None:
        self.name = name
        self._renewal = renewal
        self.request = request
        self.options = request.options
        self.link = link
        self.emit = emit
        self._aborted = aborted
        self.started = time.monotonic()
        self.process: SourceProcess | None = None
        self._examined: RemoteMemory | None = None  # the program that the examination is about
        self.frozen: FrozenProcess | None = None
        self.rounds: Rounds | None = None
        self.network = SourceNetwork()
        self._steps: Steps[Source] = Steps(states.SOURCE, Source.EXAMINING)
        self._journal: Entry[Departure] | None = None
        self._guardian: Guardian | None = None
        self._patience = 0  # seconds that the destination waits for us if the link breaks
        self._unheard = False  # by the destination, that it is over
        self.dirty_rate = 0.0  # bytes per second, as last measured
        self._signals: list[tuple[int, bytes]] = []  # that came while the destination rebuilt
        self.report = Report(
            outcome=Outcome.REFUSED,
            source=Endpoint(host=platform.node(), pid=request.pid),
            destination=Endpoint(host=request.destination),
        )

    # --- the way through ---

    def run(self) -> None:
        touched = False
        try:
            found = self._examine()
            self._agree(found)
            if self.request.operation == "check":
                return
            touched = True
            self._prepare(found)
            self._precopy()
            self._freeze(found)
            self._commit()
        except Refused as refused:
            self._finish(Outcome.REFUSED, refused, "refused", "source", blockers=tuple(refused.blockers))
        except BaseException as error:
            self._failed(error, touched)

    def _failed(self, error: BaseException, touched: bool) -> None:
        """Undo everything that is not committed; say what happened."""
        error = reasons.explained(error)
        kind, where = _classify(error)
        if self.frozen is not None and self.frozen.committed:
            self.frozen.leave_in_doubt()
            self._finish(Outcome.IN_DOUBT, error, kind, where)
            return
        if self._program_changed():
            error = _executed()
        self._roll_back()
        if self.process is not None and _exited(self.process.pidfd):
            error = Unmovable(
                "process-ended", f"process {self.request.pid} ended by itself during the migration"
            )
        kind, where = _classify(error)
        self._finish(Outcome.ROLLED_BACK if touched else Outcome.REFUSED, error, kind, where)
        if not isinstance(error, Exception):
            raise error

    def _program_changed(self) -> bool:
        if self._examined is not None and not self._examined.lasts():
            return True
        return self.rounds is not None and self.rounds.program_changed()

    def _roll_back(self) -> None:
        """Each step is done, whatever the others raise: what fails is said, the report comes in any case.

        The journal stays then, and with it the guardian, who puts in order what we could not.
        """
        steps: list[tuple[str, Callable[[], None]]] = []
        if self.frozen is not None:
            steps.append(("resuming the process", self.frozen.thaw))
        steps.append(("letting the network go", self.network.release))
        if self.rounds is not None:
            steps += [("removing the scratch", self.rounds.remove_scratch), ("closing", self.rounds.close)]
        done = True
        for what, step in steps:
            try:
                step()
            except Exception as error:
                done = False
                self.emit(Log(level="error", message=f"rolling back, {what}: {reasons.message(error)}"))
        self._tell_off()
        if done:
            self._forget()

    def _forget(self) -> None:
        """Nothing of this migration is left to be put in order."""
        if self._journal is not None:
            self._journal.remove()

    def _tell_off(self) -> None:
        self.link.make_final()
        try:
            self.link.send(protocol.Failed("rolled-back", "the source gave up"))
        except PeerFailed:
            pass
        except LinkClosed:
            self._unheard = self._patience > 0

    def _finish(
        self,
        outcome: Outcome,
        error: BaseException | None = None,
        kind: str = "",
        where: str = "source",
        blockers: tuple[ApiBlocker, ...] = (),
    ) -> None:
        info = None
        if error is not None:
            info = ErrorInfo(kind=kind, message=reasons.message(error), where=where)  # type: ignore[arg-type]
        self._state(Source(outcome), reasons.message(error) if error else "")
        self.report = msgspec.structs.replace(
            self.report,
            outcome=outcome,
            error=info,
            blockers=blockers,
            bytes_sent=self.link.bytes_sent,
            longest_stop_ms=self._longest_stop_ms(),
            total_s=round(time.monotonic() - self.started, 4),
        )
        if self.request.operation == "check" and outcome is Outcome.REFUSED and not blockers:
            blocker = ApiBlocker(
                kind=kind, what=f"pid {self.request.pid}", why=reasons.message(error) if error else ""
            )
            self.emit(Checked(result=self._check_result(None, [blocker], [])))
            return
        self.emit(Finished(report=self.report))

    def _longest_stop_ms(self) -> float | None:
        """Before the freeze, or in one that was given up and tried again."""
        if self.rounds is None:
            return None
        given_up = self.frozen.longest_attempt_ms if self.frozen is not None else 0.0
        return round(max(self.rounds.longest_stop_ms, given_up), 3)

    def _state(self, state: Source, detail: str = "") -> None:
        if state is not Source.EXAMINING:
            self._steps.to(state)
        self.emit(StateChanged(state=str(state), detail=detail))

    def close(self) -> None:
        if self._guardian is not None:
            settled = journal.state_of("outgoing", self.name) is None
            (self._guardian.dismiss if settled else self._guardian.leave)()
        if self.rounds is not None:
            self.rounds.close()
        if self.process is not None:
            self.process.close()
        if self._examined is not None:
            self._examined.close()
        self.network.close()
        self.link.close()
        if self._unheard:
            recovery.call_off(self.request.destination, self.request.ssh, self.name)

    # --- before anything is touched ---

    def _examine(self) -> inventory.Inventory:
        self._state(Source.EXAMINING, f"pid {self.request.pid}")
        try:
            self.process = SourceProcess(self.request.pid)
        except ProcessLookupError:
            blocker = ApiBlocker(
                kind="no-such-process",
                what=f"pid {self.request.pid}",
                why="there is no such process on this host",
                hint="see `migrate ps`",
            )
            raise Refused([blocker]) from None
        with contextlib.suppress(ProcessLookupError):  # a zombie has none, which is found below
            self._examined = RemoteMemory(self.request.pid)
        if why := self._foreign():
            what = f"pid {self.request.pid}"
            raise Refused([ApiBlocker(kind="not-owned", what=what, why=why, hint="ask root to move it")])
        found = inventory.examine(self.process)
        self.network.plan(found, self.process, self.options.addresses, self.request.reached_at)
        # a duplicate that stays would keep a connection open that the program closes
        self.process.forget_duplicates()
        self.report = msgspec.structs.replace(self.report, memory_bytes=found.memory_bytes)
        return found

    def _foreign(self) -> str:
        """Asked for by a user: why it is not wholly theirs (any more)."""
        uid = self.request.owner
        return foreign(self.request.pid, uid) if uid is not None else ""

    def _agree(self, found: inventory.Inventory) -> None:
        """Ask the destination; raise Refused with both ends' blockers, or report the check."""
        self._state(Source.OFFERING, self.request.destination)
        assert self.process is not None
        blockers = [*found.blockers, *self.network.blockers]
        notices = [*found.notices, *self.network.notices]
        self.offering = Offering(self.process, found, self.network, self.options)
        offer = self.offering.offer(self.name)
        self.link.send(offer)
        answer = self.link.expect(protocol.Answer)
        self.offering.answered(offer, answer)
        self.report = msgspec.structs.replace(self.report, destination=Endpoint(host=answer.host))
        blockers += answer.blockers
        notices += answer.notices
        self.report = msgspec.structs.replace(self.report, notices=tuple(notices))
        if self.request.operation == "check":
            self.emit(Checked(result=self._check_result(found, blockers, notices)))
            return
        if blockers:
            raise Refused(blockers)
        self.offering.send_files(self.link, partial(self._state, Source.COPYING))

    def _check_result(
        self, found: inventory.Inventory | None, blockers: list[ApiBlocker], notices: list[Notice]
    ) -> CheckResult:
        return CheckResult(
            source=self.report.source,
            destination=self.report.destination,
            command=found.command if found else "",
            memory_bytes=found.memory_bytes if found else 0,
            threads=len(found.tids) if found else 0,
            mappings=len(found.layout) if found else 0,
            descriptors=len(found.descriptors) if found else 0,
            connections=found.connections if found else 0,
            dirty_tracking=str(mechanism()),
            addresses=tuple(a.address for a in self.network.addresses),
            blockers=tuple(blockers),
            notices=tuple(notices),
        )

    # --- pre-copy ---

    def _prepare(self, found: inventory.Inventory) -> None:
        self._state(Source.PREPARING)
        assert self.process is not None
        self.link.set_timeout(STALL_SECONDS)
        delta = measure_delta(self.link, self.request.pid)
        if self._renewal is not None and self.options.reconnect_ms:
            self._patience = math.ceil(self.options.reconnect_ms / 1000 + NOTICING_S)
        self._open_journal()
        self.link.send(
            protocol.Prepare(
                monotonic_delta=delta[0],
                boottime_delta=delta[1],
                session_leader=found.session_leader,
                layout=found.layout,
                reconnect_s=self._patience,
            )
        )
        prepared = self.link.expect(protocol.Prepared)
        self.report = msgspec.structs.replace(
            self.report, destination=Endpoint(host=self.report.destination.host, pid=prepared.pid)
        )
        assert self._journal is not None
        known = msgspec.structs.replace(
            self._journal.content, boot=prepared.boot, awaited=prepared.resumable
        )
        self._journal.rewrite(known)
        encoder = Encoder(self.options.compression, self.options.compression_level, self.options.bandwidth)
        self.rounds = Rounds(self.process, self.link, encoder, found.files)
        self.rounds.sender.drop = _page_to_drop()
        if prepared.resumable:
            self.link.make_resumable(Resumption(renew=self._renew, reread=self.rounds.sender.reread))
        # what the freeze needs is opened and cleaned up now: between the last scan and the freeze each
        # millisecond is one more of dirty pages
        self.network.prepare()
        gc.collect()
        gc.freeze()
        self.rounds.start_tracking()  # another program is noticed from here on
        if self._program_changed():
            raise _executed()

    def _open_journal(self) -> None:
        """Before there is a shadow, which waits for us if we die: somebody has to tell it."""
        self._journal = Entry.begin(
            self.name,
            states.Departure.OPEN,
            Departure(
                process=Task.of(self.request.pid),
                agent=Task.of(os.getpid()),
                destination=self.request.destination,
                ssh=self.request.ssh,
                awaited=self._patience > 0,
                addresses=tuple(self.network.addresses),
            ),
        )
        self._guardian = Guardian("outgoing", self.name)

    def _precopy(self) -> None:
        assert self.rounds is not None
        self._state(Source.PRE_COPY)
        policy = Convergence(self.options.downtime_limit_ms, self.options.max_rounds, FIXED_COST_MS)
        pacer = _Pacer(self, policy)
        pending = self.rounds.first()
        while True:
            number = len(self.rounds.history) + 1
            pacer.begin(number, pending.pages)
            round_ = self.rounds.send(number, pending, self.dirty_rate, pacer.after_chunk)
            self.offering.add(self.link)
            pending = self.rounds.scan()
            self.dirty_rate = pending.pages * 4096 / max(pending.seconds, 1e-6)
            memory = round_.pages_sent * 4096
            policy.record(Measured(memory, round_.seconds, pending.pages))
            self.emit(
                RoundFinished(
                    round=round_,
                    remaining_pages=pending.pages,
                    estimated_pause_ms=round(policy.estimated_pause_ms(pending.pages), 2),
                )
            )
            decision = policy.decide()
            if decision is not Decision.CONTINUE or not self.rounds.incremental:
                break
        if decision is Decision.FREEZE_STUCK:
            estimate = policy.estimated_pause_ms(pending.pages)
            self.emit(
                Log(
                    level="warning",
                    message=f"rounds no longer shorten the pause: about {estimate:.0f} ms, "
                    f"limit {self.options.downtime_limit_ms:.0f} ms",
                )
            )
        self.rounds.pending = pending

    def check_abort(self) -> None:
        """Between two chunks, and before the commit: has somebody given up?"""
        if self._aborted():
            raise Aborted("aborted by request")
        message = self.link.heard()
        if isinstance(message, protocol.Failed):
            raise PeerFailed(message)
        if message is not None:
            raise ProtocolError(f"unexpected {type(message).__name__}")

    def _renew(self, broken: LinkClosed) -> socket.socket:
        """A new link in the middle of pre-copy. LinkClosed if there is none, Aborted."""
        assert self._renewal is not None
        self._state(Source.RECONNECTING, str(broken))
        sock = self._renewal(self._aborted)
        if sock is None:
            raise Aborted("aborted by request")
        self.report = msgspec.structs.replace(self.report, reconnects=self.report.reconnects + 1)
        self._state(Source.PRE_COPY, "over a new link")
        return sock

    # --- freeze and commit ---

    def _freeze(self, found: inventory.Inventory) -> None:
        assert self.rounds is not None and self.process is not None and self._journal is not None
        self._state(Source.FREEZING)
        gc.disable()
        self.link.make_final()  # it must not stand still until there is another one
        self.link.set_timeout(self.options.freeze_timeout_ms / 1000)
        self.frozen = FrozenProcess(
            self.process, self.rounds, self.network, self.options, found, self._journal
        )
        frozen = self.frozen
        frozen.stop()
        if why := self._foreign():
            raise Unmovable("not-owned", f"pid {self.request.pid}: {why}")
        self.offering.check_files()
        self.link.send(frozen.capture())
        frozen.phases.mark("send state")
        frozen.send_descriptors()
        frozen.capture_threads()
        last = frozen.send_pages(len(self.rounds.history) + 1, self.dirty_rate)
        frozen.send_threads()
        self.link.send(frozen.complete())
        frozen.silence()
        frozen.check_settings()
        self._signals = frozen.late_signals(of_threads=True)
        ready = self.link.expect(protocol.Ready, frozen.deadline)
        frozen.phases.mark("wait for ready")
        verified = None
        if self.options.verify:
            verified = verify(self.link, frozen, self.rounds)
            frozen.phases.mark("verify")
        self.report = msgspec.structs.replace(
            self.report,
            rounds=(*self.rounds.history, last),
            verified_pages=verified,
            notices=(*self.report.notices, *ready.notices),
        )
        self._ready_phases = ready.phases
        self.check_abort()  # a destination that is gone by now is no doubt yet

    def _commit(self) -> None:
        assert self.frozen is not None and self._journal is not None
        frozen = self.frozen
        self._state(Source.COMMITTING)
        signals = [*self._signals, *frozen.late_signals(of_threads=False)]
        frozen.commit(lambda: self.link.send(protocol.Commit(signals)))
        self.network.withdraw()
        self._send_late(last=False, of_threads=False)
        # one that hangs is asked again, another way (`agent.recovery`)
        live = self.link.expect(protocol.Live, time.monotonic() + self.options.freeze_timeout_ms / 1000)
        self._journal.to(states.Departure.LIVE)
        frozen.phases.mark("commit")
        self.report = msgspec.structs.replace(
            self.report,
            pause_ms=round(frozen.pause_ms(), 3),
            phases=(*frozen.phases.taken(), *self._ready_phases, *live.phases),
            address_moved=live.address_moved,
        )
        self._state(Source.COMMITTED)
        self._state(Source.LIVE, f"{self.report.destination.host}:{self.report.destination.pid}")
        notices = self._afterwards(frozen)
        self.report = msgspec.structs.replace(self.report, notices=(*self.report.notices, *notices))
        self._finish(Outcome.MIGRATED)

    def _send_late(self, last: bool, of_threads: bool = True) -> None:
        assert self.frozen is not None
        signals: list[tuple[int, bytes]] = []
        with contextlib.suppress(ProcessLookupError):  # somebody killed it: the copy lives already
            signals = self.frozen.late_signals(of_threads)
        self.link.send(protocol.Late(self.network.captured(), signals, last))

    def _afterwards(self, frozen: FrozenProcess) -> tuple[Notice, ...]:
        """It lives over there: late packets, the old copy, the destination's last word.

        Nothing here can undo that.
        """
        assert self.rounds is not None
        gc.enable()
        try:
            self.link.set_timeout(30)
            self._send_late(last=False)
            frozen.bury()
            self.rounds.close()
            self._send_late(last=True)
            self.network.close()
            notices = self.link.expect(protocol.Done, time.monotonic() + 30).notices
            self._forget()
            return notices
        except Exception as error:
            frozen.bury()
            return (Notice(kind="link", message=f"after the process was live: {reasons.message(error)}"),)


def _executed() -> Unmovable:
    return Unmovable("process-executed", "it made itself another program (execve)")


class _Pacer:
    """After each chunk: progress for the person, the bandwidth limit, and a look whether to go on."""

    def __init__(self, migration: Migration, policy: Convergence) -> None:
        self._migration = migration
        self._policy = policy
        self._limit = migration.options.bandwidth
        self._round = self._total = self._done = 0
        self._last_emit = 0.0
        self._allowed_at = self._began = time.monotonic()

    def begin(self, number: int, pages: int) -> None:
        self._round, self._total, self._done = number, pages, 0
        self._allowed_at = self._began = time.monotonic()

    def after_chunk(self, pages: int, sent: int) -> None:
        self._done += pages
        self._migration.check_abort()
        now = time.monotonic()
        if self._limit:
            self._allowed_at = max(self._allowed_at, now - 0.05) + sent / self._limit
            while self._allowed_at > time.monotonic():
                time.sleep(min(0.1, max(0.0, self._allowed_at - time.monotonic())))
                self._migration.check_abort()
        if now - self._last_emit >= 0.1:
            self._last_emit = now
            self._migration.emit(
                Progress(
                    round=self._round,
                    pages_done=self._done,
                    pages_total=self._total,
                    bytes_sent=self._migration.link.bytes_sent,
                    rate=self._done * 4096 / max(now - self._began, 1e-6),
                    estimated_pause_ms=self._estimate(now),
                )
            )

    def _estimate(self, now: float) -> float | None:
        """The pause if the freeze came right after this round; None while no rate of dirtying is known."""
        if not self._migration.dirty_rate:
            return None
        dirty = self._migration.dirty_rate * (now - self._began) / 4096
        return round(self._policy.estimated_pause_ms(int(dirty)), 2)


def _page_to_drop() -> int | None:
    """A test's way to make --verify fail: the address of a page that is left out, in the environment."""
    text = os.environ.get("MIGRATE_TEST_DROP_PAGE")
    return int(text, 0) if text else None


def _exited(pidfd: int) -> bool:
    import select

    return bool(select.select([pidfd], [], [], 0)[0])


_KINDS: tuple[tuple[type[BaseException], str, str], ...] = (
    (LinkClosed, "link-closed", "link"),
    (ProtocolError, "protocol", "link"),
    (Aborted, "aborted", "coordinator"),
    (KeyboardInterrupt, "aborted", "coordinator"),
    (TimeoutError, "timeout", "source"),
    (ProcessLookupError, "process-ended", "source"),
)


def _classify(error: BaseException) -> tuple[str, str]:
    """(kind, where) of a failure."""
    if isinstance(error, PeerFailed):
        return error.kind, "destination"
    for type_, kind, where in _KINDS:
        if isinstance(error, type_):
            return kind, where
    return reasons.kind(error), "source"
