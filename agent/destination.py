"""The destination's side of one migration: answers the offer, builds the shadow, and on COMMIT lets it live.

    offered -> answered -> preparing -> pre-copy -> rebuilding -> ready -> live -> done
                 \\____________\\___________\\____________\\________/
                 link closed, Failed, any error: the shadow is killed, nothing stays

The stream is hostile until proven otherwise: page ranges must lie in the declared layout, mapped files are
those that were compared, lengths are bounded by the decoder.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from agent import checks, journal, privileges, protocol, reasons, suitability
from agent.api import Blocker, Notice
from agent.clocks import boottime_ns
from agent.descriptors import Rebuilding, Refusal, not_agreed
from agent.doorway import Doorway, Duplex
from agent.finishing import Finish
from agent.guardian import Guardian
from agent.journal import Arrival, Entry, Overtaken, Rest, Socket, Task
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import PAGE
from agent.layout import Mapping, find_gap
from agent.link import Link, Resumption
from agent.network import DestinationNetwork
from agent.pageset import Range
from agent.phases import Phases
from agent.protocol import Pages, PeerFailed
from agent.resources import files as file_resource
from agent.resources import identity, pipe, unix_socket
from agent.resources.files import FileRef, IncomingFile
from agent.resources.tcp import TcpListener
from agent.resources.tcp_socket import bound_to
from agent.server.store import ID, new_id
from agent.shadow import Shadow
from agent.spawn import Wanted, spawn
from agent.states import Destination
from agent.tracee import SCRATCH_SIZE
from agent.verification import check_rest, check_verify
from transport.frames import LinkClosed, ProtocolError

T = TypeVar("T")
_CHANNEL_FD = 900
_MAX_NOTICES = 1000  # about what came late; more would be somebody's doing


def serve(reading: int, writing: int) -> None:
    """Serve one migration on a pair of descriptors (often the same socket); returns when it is over."""
    duplex: Any = Duplex(reading, writing)
    link = Link(duplex)
    migration = Incoming(link, duplex)
    try:
        migration.run()
    except (LinkClosed, PeerFailed) as error:
        print(f"migration ended: {error}", file=sys.stderr)
    except Exception as error:
        _say_failed(link, migration.why(error))
        raise
    finally:
        migration.close()


def _say_failed(link: Link, error: BaseException) -> None:
    with contextlib.suppress(LinkClosed, PeerFailed):
        link.send(protocol.Failed(reasons.kind(error), reasons.message(error)))


class Incoming:
    """One migration, from the destination's point of view."""

    def __init__(self, link: Link, duplex: Duplex | None = None) -> None:
        """Over `duplex` it can be found again if its source loses the link."""
        self.link = link
        self._duplex = duplex
        self.files: list[FileRef] = []
        self._fds: dict[int, int] = {}
        self.shadow: Shadow | None = None
        self.network = DestinationNetwork()
        self.context = Rebuilding()
        self.prepare_message: protocol.Prepare | None = None
        self.rebuild: protocol.Rebuild | None = None
        self._entry: Entry[Arrival] | None = None
        self._guardian: Guardian | None = None
        self._doorway: Doorway | None = None
        self._late: list[Notice] = []
        # of files that we have for ourselves, when compared
        self._stamps: dict[str, tuple[int, int, int] | None] = {}
        self._offer: protocol.Offer | None = None
        self._refused = True
        self._oom_kills = reasons.oom_kills()
        self._handlers: dict[type[Any], Callable[[Any], None]] = {
            protocol.Ping: self._ping,
            protocol.NewFiles: self._new_files,
            protocol.Also: self._also,
            protocol.Layout: self._layout,
            protocol.Discard: self._discard,
            protocol.Guards: self._guards,
            Pages: self._pages,
            protocol.RoundEnd: lambda m: self.link.send(protocol.RoundDone(m.number)),
        }

    def run(self) -> None:
        offer = self.link.expect(protocol.Offer)
        self._answer(offer)
        self._receive_until(protocol.Prepare, self._prepare)
        self._receive_until(protocol.Rebuild, self._rebuild)
        self._receive_until(protocol.Complete, self._complete)
        self._receive_until(protocol.Commit, self._commit)
        self._finish()

    def _receive_until(self, kind: type[Any], last: Callable[[Any], None]) -> None:
        """Handle messages up to and including the first `kind`."""
        while True:
            message = self.link.receive()
            if isinstance(message, protocol.Failed):
                raise PeerFailed(message)
            if isinstance(message, kind):
                last(message)
                return
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} while waiting for {kind.__name__}")
            handler(message)

    # --- the offer ---

    def _answer(self, offer: protocol.Offer) -> None:
        _check_offer(offer)
        blockers: list[Blocker] = []
        if not protocol.speaks(offer.version):
            why = f"the source speaks version {offer.version}, this agent {protocol.spoken()}"
            blockers.append(
                Blocker(kind="version", what="protocol", why=why, hint="install the same version on both")
            )
        self.files = list(offer.files)
        self._offer = offer
        wanted = [*offer.files, *offer.opened]
        compared = [file_resource.compare(f, offer.copy_files) for f in offer.files]
        compared += [file_resource.compare_opened(f, offer.copy_files) for f in offer.opened]
        blockers += [b for b in compared if b is not None]
        blockers += [b for b in map(pipe.compare, offer.fifos) if b is not None]
        blockers += [b for b in map(unix_socket.compare, offer.services) if b is not None]
        blockers += suitability.blockers(offer, _CHANNEL_FD)
        blockers += self.network.check(offer.addresses, offer.listeners, offer.connections)
        missing = tuple(dict.fromkeys(file_resource.missing(wanted))) if offer.copy_files else ()
        unshared = tuple(dict.fromkeys(f.path for f in wanted if not file_resource.shared(f)))
        self.link.send(
            protocol.Answer(
                # one before ours wants to hear its own
                version=offer.version if protocol.speaks(offer.version) else protocol.VERSION,
                host=platform.node(),
                blockers=tuple(blockers),
                notices=tuple(_notices(offer)),
                missing=missing,
                unshared=unshared,
                takes_more=True,
            )
        )
        if not blockers:
            self._receive_files(missing)
        self._stamps = {path: file_resource.stamp(path) for path in unshared}
        self._refused = bool(blockers)
        self._agree(offer.opened, offer.directories, offer.fifos, offer.listeners)
        self.context.addresses = frozenset(self.network.agreed)
        self.context.services = frozenset(offer.services)

    def _agree(
        self,
        opened: Iterable[FileRef],
        directories: Iterable[str],
        fifos: Iterable[pipe.Fifo],
        listeners: Iterable[TcpListener],
    ) -> None:
        """To what was compared and tried; nothing else will be opened, made or bound later."""
        context = self.context
        for file in opened:
            with contextlib.suppress(OSError):
                found = os.stat(file.path)
                context.agreed[file.path] = (found.st_dev, found.st_ino)
        context.directories |= set(directories)
        context.fifos |= {one.path: one for one in fifos}
        context.listening |= {bound_to(one) for one in listeners}

    def _receive_files(self, missing: tuple[str, ...]) -> None:
        assert self._offer is not None
        refs = {f.path: f for f in (*self._offer.files, *self._offer.opened)}
        for path in missing:
            incoming = IncomingFile(refs[path])
            while True:
                message = self.link.expect(protocol.FileData)
                if message.path != path:
                    raise ProtocolError(f"data of {message.path} while {path} was due")
                incoming.write(message.data)
                if message.last:
                    break
            incoming.finish()

    # --- pre-copy ---

    def _ping(self, _: protocol.Ping) -> None:
        self.link.send(protocol.Pong(time.monotonic_ns(), boottime_ns()))

    def _prepare(self, message: protocol.Prepare) -> None:
        assert self._offer is not None
        if self._refused:
            raise not_agreed("a process that was refused")
        offer = self._offer
        checks.apart(message.layout, offer.specials)
        self.prepare_message = message
        reserved = [Mapping(s.start, s.end, 0) for s in offer.specials]
        seed_at = find_gap([message.layout, reserved], SCRATCH_SIZE, arch.MMAP_MIN, arch.TASK_SIZE)
        seed, code = arch.seed_elf(seed_at, SCRATCH_SIZE - PAGE)
        wanted = Wanted(
            offer.pid,
            message.session_leader,
            message.monotonic_delta,
            message.boottime_delta,
            frozenset(offer.tids),
        )
        self.shadow = Shadow(spawn(wanted, seed, _CHANNEL_FD))
        privileges.leave_starting(privileges.DESTINATION)
        name = offer.migration or new_id()
        self._entry = Entry.begin(
            name,
            Destination.HELD,
            Arrival(process=Task.of(self.shadow.pid), agent=Task.of(os.getpid())),
        )
        self._guardian = Guardian("incoming", name)
        self.shadow.settle(offer.pid, code, seed_at, offer.specials, message.layout)
        self.shadow.make_threads(offer.tids)  # in the freeze only what changed
        self._be_found(name, message.reconnect_s)
        self.link.send(
            protocol.Prepared(
                pid=self.shadow.pid,
                new_pid_namespace=self.shadow.new_pid_namespace,
                boot=journal.boot_id(),
                resumable=self._doorway is not None,
            )
        )

    def _be_found(self, name: str, patience: float) -> None:
        """By a source that lost its link, until the freeze; only if it will come back."""
        if patience and self._duplex is not None:
            self._doorway = Doorway(name, patience)
            self._duplex.doorway = self._doorway
            renew: Any = self._doorway.wait
            self.link.make_resumable(Resumption(renew, reread=_no_pages))

    def _close_doorway(self) -> None:
        self.link.make_final()
        if self._doorway is not None:
            self._doorway.close()

    @property
    def _built(self) -> Shadow:
        if self.shadow is None:
            raise ProtocolError("pages before Prepare")
        return self.shadow

    def _new_files(self, message: protocol.NewFiles) -> None:
        _check_paths(file.path for file in message.files)
        for file in message.files:
            blocker = file_resource.compare(file, copy_files=False)
            if blocker is not None:
                raise Refusal(blocker.kind, f"{blocker.what}: {blocker.why}")
            self.files.append(file)

    def _also(self, message: protocol.Also) -> None:
        """What of it cannot be had may be closed again before the freeze."""
        _check_paths([*(file.path for file in message.opened), *(one.path for one in message.fifos)])
        opened = self._to_be_had(message.opened, _path, _compare_opened)
        unshared = tuple(dict.fromkeys(f.path for f in opened if not file_resource.shared(f)))
        self._agree(
            opened,
            filter(os.path.isdir, message.directories),
            self._to_be_had(message.fifos, _path, pipe.compare),
            self._to_be_had(message.listeners, bound_to, self._compare_listener),
        )
        self._stamps |= {path: file_resource.stamp(path) for path in unshared}
        self.link.send(protocol.Agreed(unshared))

    def _to_be_had(
        self, asked: Iterable[T], key: Callable[[T], object], compare: Callable[[T], Blocker | None]
    ) -> list[T]:
        """Those that are; why the others are not is said if they are still there in the freeze."""
        had = []
        for one in asked:
            blocker = compare(one)
            if blocker is None:
                had.append(one)
            else:
                self.context.refused[key(one)] = blocker
        return had

    def _compare_listener(self, one: TcpListener) -> Blocker | None:
        return next(iter(self.network.check((), (one,))), None)

    def _layout(self, message: protocol.Layout) -> None:
        assert self._offer is not None
        checks.apart(message.mappings, self._offer.specials)
        self._built.follow(message.mappings, self.open_file)

    def open_file(self, index: int) -> int:
        """Our descriptor of one of the agreed files, opened once. Its size must still be what was agreed."""
        if not 0 <= index < len(self.files):
            raise ProtocolError(f"file number {index} of {len(self.files)}")
        if index not in self._fds:
            file = self.files[index]
            fd = file_resource.open_regular(file.path)
            self._fds[index] = fd
            if os.fstat(fd).st_size != file.size:
                raise Refusal("file-differs", f"{file.path} changed during the migration")
        return self._fds[index]

    def _discard(self, message: protocol.Discard) -> None:
        self._check_ranges(message.ranges)
        self._built.discard_pages(message.ranges)

    def _guards(self, message: protocol.Guards) -> None:
        self._check_ranges(message.ranges)
        self._built.install_guards(message.ranges)

    def _pages(self, message: Pages) -> None:
        self._check_ranges(message.ranges)
        self._built.write_pages(message.ranges, message.data)

    def _check_ranges(self, ranges: list[Range]) -> None:
        """Every range lies in the declared layout; ProtocolError."""
        layout = self._built.layout
        index = 0
        for start, end in ranges:
            position = start
            while position < end:
                while index < len(layout) and layout[index].end <= position:
                    index += 1
                if index == len(layout) or layout[index].start > position:
                    raise ProtocolError(f"pages at {position:#x} are outside the declared layout")
                position = min(end, layout[index].end)

    # --- freeze ---

    def _rebuild(self, message: protocol.Rebuild) -> None:
        gc.disable()
        self._close_doorway()
        self.rebuild = message
        self._leave_stopped = message.leave_stopped
        for path, stamp in self._stamps.items():
            if file_resource.stamp(path) != stamp:
                raise Refusal("file-changed", f"{path} was written to during the migration")
        self._phases = Phases("destination")
        self._finishing = Finish(
            self._built, message.process, self.context, self.open_file, self._delta, self._phases
        )
        self._finishing.begin()
        self._handlers |= {
            protocol.Descriptors: self._descriptors,
            protocol.Threads: self._threads,
            Pages: self._last_pages,
        }

    def _descriptors(self, message: protocol.Descriptors) -> None:
        self._phases.begin()
        self._finishing.descriptors(message)

    def _threads(self, message: protocol.Threads) -> None:
        self._phases.begin()
        self._finishing.threads(message.threads)

    def _last_pages(self, message: Pages) -> None:
        self._phases.begin()
        self._pages(message)
        self._phases.mark("pages")

    def _complete(self, message: protocol.Complete) -> None:
        self._phases.begin()
        notices = self._finishing.end(message)
        self._handlers = {protocol.Verify: self._verify}
        self.link.send(protocol.Ready(phases=self._phases.taken(), notices=tuple(notices)))
        self._journal.put_rest(self._rest())

    def _rest(self) -> Rest:
        """What somebody else has to do if we die in the commit."""
        return Rest(
            leave_stopped=self._leave_stopped,
            sockets=tuple(Socket(self.context.placed[fd], state) for fd, state in self.context.sockets),
            addresses=tuple(self.network.places),
        )

    @property
    def _journal(self) -> Entry[Arrival]:
        assert self._entry is not None
        return self._entry

    @property
    def _delta(self) -> int:
        assert self.prepare_message is not None
        return self.prepare_message.monotonic_delta

    def _verify(self, message: protocol.Verify) -> None:
        assert self.rebuild is not None
        others = check_rest(self._built, message, self.rebuild) if message.last else []
        self.link.send(
            protocol.Verified(memory=check_verify(self._built, message), others=tuple(others[:20]))
        )

    def _commit(self, message: protocol.Commit) -> None:
        """From here on there is no way back: whatever fails is said, and the process lives.

        Overtaken if the source has settled it otherwise. If we die, the shadow does as long as no peer can
        have heard of it; from "released" on it waits, stopped, for somebody to do the rest (`agent.settle`).
        """
        assert self.rebuild is not None
        phases = Phases("destination")
        self._journal.to(Destination.COMMITTED)
        self._late = self._built.queue_signals(message.signals)
        if not self._built.outlive_us():
            self._leave_stopped = True
            self._journal.put_rest(self._rest())
        self._journal.to(Destination.RELEASED)
        self._late += self.network.take_over(self.context.sockets)
        phases.mark("take over network")
        self._wait_for_clock(self.rebuild.monotonic_at_freeze)
        self._built.release(self._leave_stopped)
        self._journal.to(Destination.LIVE)
        phases.mark("resume")
        self.link.send(protocol.Live(phases=phases.taken(), address_moved=self.network.moved))
        self._let_go()  # our duplicates would keep open what it closes

    def _wait_for_clock(self, at_freeze: int) -> None:
        """The process's CLOCK_MONOTONIC must not be behind what it last saw: at most half a round trip."""
        while (behind := at_freeze - (time.monotonic_ns() + self._delta)) > 0:
            time.sleep(min(behind / 1e9, 0.05))

    def _finish(self) -> None:
        last = False
        while not last:
            message = self.link.expect(protocol.Late)
            said = self._built.send_signals(message.signals)
            try:
                self.network.replay(message.packets)
            except (OSError, ValueError) as error:
                said.append(Notice(kind="network", message=f"packets of the pause: {error}"))
            self._late += said[: max(0, _MAX_NOTICES - len(self._late))]
            last = message.last
        self._journal.remove()  # the source copy is gone, so nobody will ask
        self.link.send(protocol.Done(notices=tuple(self._late)))
        self.network.announce_again()

    def why(self, error: Exception) -> BaseException:
        """What is behind a failure: the shadow may have been killed."""
        ended: reasons.Shortage | None = None
        if self.shadow is not None and (self._entry is None or self._entry.state is Destination.HELD):
            ended = reasons.killed(self.shadow.pid, self._oom_kills)
        return ended or reasons.explained(error)

    def close(self) -> None:
        """Roll back what is not committed; close what is ours. Rebuilt sockets, under repair, close
        silently.
        """
        if self.shadow is not None:
            lasts = self._lasts()
            (self.shadow.forget if lasts else self.shadow.destroy)()
            if not lasts and self._entry is not None:
                self._entry.remove()
        self._let_go()
        self.network.close()
        self._close_doorway()
        self.link.close()
        if self._guardian is not None:
            unsettled = self._entry is not None and self._entry.state == Destination.RELEASED
            (self._guardian.leave if unsettled else self._guardian.dismiss)()

    def _lasts(self) -> bool:
        """Whether it lives, or will. What is not committed never will be."""
        if self._entry is None:
            return False
        if self._entry.state in (Destination.HELD, Destination.COMMITTED):
            with contextlib.suppress(Overtaken):  # void already
                self._entry.to(Destination.VOID)
            return False
        return True

    def _let_go(self) -> None:
        """Close our duplicates of what the process has open. Idempotent."""
        self.context.close()
        while self.context.sockets:
            os.close(self.context.sockets.pop()[0])
        while self._fds:
            os.close(self._fds.popitem()[1])


def _path(one: FileRef | pipe.Fifo) -> str:
    return one.path


def _compare_opened(file: FileRef) -> Blocker | None:
    return file_resource.compare_opened(file, copy_files=False)


def _no_pages(ranges: list[Range]) -> tuple[list[Range], bytearray]:
    raise AssertionError("a destination sends no pages")


def _check_offer(offer: protocol.Offer) -> None:
    """What no source says that is one; ProtocolError."""
    _check_paths([*(file.path for file in (*offer.files, *offer.opened)), *(one.path for one in offer.fifos)])
    if offer.migration and (
        not ID.fullmatch(offer.migration) or journal.state_of("incoming", offer.migration) is not None
    ):
        raise ProtocolError(f"{offer.migration!r} is not the name of a new migration")
    if offer.pid not in offer.tids or len(set(offer.tids)) < len(offer.tids) or min(offer.tids) < 1:
        raise ProtocolError(f"process {offer.pid} with threads {offer.tids[:5]} ...")


def _check_paths(paths: Iterable[str]) -> None:
    """As the kernel writes them: from the root, straight; ProtocolError."""
    for path in paths:
        if not path.startswith("/") or path != os.path.normpath(path) or "\0" in path:
            raise ProtocolError(f"{path!r} is not the path of an open file")


def _notices(offer: protocol.Offer) -> list[Notice]:
    return identity.limit_notices(offer.limits)
