"""What the source asks the destination for: a process as it was found, and what it has opened since.

The destination opens, makes and binds nothing that it was not asked for before the freeze, when there is
time to compare files and to try ports. So the descriptors are looked at again between two rounds. What
cannot be had over there may be closed again by then: only the freeze decides.
"""

from __future__ import annotations

import platform
import stat
from collections.abc import Callable

from agent import checks, inventory, protocol
from agent.api import MoveOptions
from agent.descriptors import OpenFile, SourceProcess, open_file
from agent.inventory import Inventory
from agent.kernel import procfs
from agent.link import Link
from agent.network import SourceNetwork
from agent.resources import pipe, regular_file, tcp, tcp_socket, unix_socket
from agent.resources.files import FileRef, read_chunks, stamp
from agent.unmovable import Unmovable
from transport.frames import ProtocolError

_MAX_LATE = 64 << 20  # bytes of a file that is read between two rounds, to compare it


class Offering:
    """One migration's."""

    def __init__(
        self, process: SourceProcess, found: Inventory, network: SourceNetwork, options: MoveOptions
    ) -> None:
        self._process, self._found, self._network, self._options = process, found, network, options
        self._opened = inventory.opened_files(found, process)
        self._missing: tuple[str, ...] = ()
        self._unshared: set[str] = set()  # paths that the destination compared by content
        self._takes_more = False
        # what is not looked at again; a socket may have begun to listen when it is
        settled = (file for file in found.descriptors if file.socket is None)
        self._links = {fd: file.link for file in settled for fd, _ in file.numbers}

    def offer(self, name: str) -> protocol.Offer:
        found, pid, network = self._found, self._found.pid, self._network
        numbers = inventory.own_numbers(pid, found.tids)
        return protocol.Offer(
            migration=name,
            host=platform.node(),
            pid=numbers[pid],
            tids=tuple(numbers.values()),
            files=found.files.with_build_ids(),
            opened=self._opened,
            copy_files=self._options.copy_files,
            specials=found.specials,
            vdso_digest=found.vdso_digest,
            cpu_flags=inventory.cpu_flags(),
            limits=tuple(procfs.limits(pid)),
            memory=_own_memory(pid),
            descriptors=_counted(found.descriptors),
            directories=inventory.directories(found),
            fifos=inventory.fifos(found),
            listeners=tuple(network.listeners),
            connections=tuple(network.connections),
            addresses=tuple(network.addresses),
            services=unix_socket.services(found.descriptors),
        )

    def answered(self, offer: protocol.Offer, answer: protocol.Answer) -> None:
        """ProtocolError if it does not fit; OtherVersion."""
        if not protocol.speaks(answer.version):
            raise protocol.OtherVersion(answer.version)
        checks.answer_fits(answer, offer)
        self._missing, self._takes_more = answer.missing, answer.takes_more
        self._unshared.update(answer.unshared)

    def send_files(self, link: Link, say: Callable[[str], None]) -> None:
        """Those that are missing over there; `say` hears each path."""
        offered: dict[str, FileRef] = {}
        if self._options.copy_files:
            offered = {f.path: f for f in (*self._found.files.refs, *self._opened)}
        for path in self._missing:
            if path not in offered:
                raise ProtocolError(f"the destination wants {path}, which was not offered")
            say(path)
            for data in read_chunks(offered[path]):
                link.send(protocol.FileData(path=path, data=data, last=False))
            link.send(protocol.FileData(path=path, data=b"", last=True))

    def add(self, link: Link) -> None:
        """Ask for what the process has opened since the last time."""
        if not self._takes_more:
            return
        now = procfs.fds(self._process.pid)
        fresh = [fd for fd, name in now.items() if self._links.get(fd) != name]
        self._links = now
        also = self._also([file for fd in fresh if (file := self._open(fd, now[fd])) is not None])
        if also is not None:
            link.send(also)
            self._opened += also.opened
            self._unshared.update(link.expect(protocol.Agreed).unshared)

    def _open(self, fd: int, name: str) -> OpenFile | None:
        try:
            return open_file(self._process, fd, name)
        except OSError:  # closed since
            return None

    def _also(self, files: list[OpenFile]) -> protocol.Also | None:
        """None if there is nothing among them that is to be agreed to."""
        named = [file for file in files if procfs.is_text(file.link)]
        opened = [self._reference(file) for file in named if regular_file.recognise(file)]
        fifos = [pipe.fifo(file) for file in named]
        listeners = [self._listener(file) for file in files if tcp_socket.recognise(file)]
        self._process.forget_duplicates()  # one would keep open what the program closes
        also = protocol.Also(
            opened=[one for one in opened if one is not None],
            directories=tuple(file.link for file in named if stat.S_ISDIR(file.mode)),
            fifos=tuple(one for one in fifos if one is not None),
            listeners=tuple(one for one in listeners if one is not None),
        )
        return also if also != protocol.Also() else None

    def _reference(self, file: OpenFile) -> FileRef | None:
        try:
            return regular_file.reference(file, self._process) if file.size <= _MAX_LATE else None
        except OSError:
            return None

    def _listener(self, file: OpenFile) -> tcp.TcpListener | None:
        """What is bound, or listens. It may be closed, or change, while we look."""
        try:
            ours = self._process.duplicate(file.fd)
            if tcp.blockers(ours, file.name) or tcp.inspect(ours).peer is not None:
                return None
            state = tcp.capture(ours)
        except OSError:
            return None
        if not isinstance(state, tcp.TcpListener):
            return None
        if state.backlog is None:
            del self._links[file.fd]  # it may listen when it is looked at again
        return state

    def check_files(self) -> None:
        """In the freeze: a file that the destination has for itself must still be what was compared.
        Unmovable.
        """
        for file in (*self._found.files.refs, *self._opened):
            if file.path in self._unshared and stamp(file.path) != file.stamp:
                why = f"{file.path} was written to during the migration; it is not shared"
                raise Unmovable("file-changed", why)


def _counted(files: list[OpenFile]) -> tuple[int, int]:
    """How many open files there are, and the highest descriptor."""
    return len(files), max((fd for file in files for fd, _ in file.numbers), default=0)


def _own_memory(pid: int) -> int:
    """Bytes that it has for itself, swapped out or not; 0 if it has just ended."""
    try:
        status = procfs.status(pid)
    except ProcessLookupError:
        return 0
    return sum(int(status.get(name, "0 kB").split()[0]) << 10 for name in ("RssAnon", "VmSwap"))
