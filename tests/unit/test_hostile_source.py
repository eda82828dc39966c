"""A source that lies: the real engine at either end, and somebody in between who changes what it says.

Each attack of the table is made, refused for the reason that docs/threat-model.md gives, and has left
nothing: no process, no file, no socket, no address; and the program at the source goes on.
"""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from unit.children import forked, gone, wait_for
from unit.moving import Move, Moving

from agent import inventory, offering, protocol
from agent.api import MoveOptions, Outcome
from agent.descriptors import Descriptor
from agent.journal import Arrival, Entry, Task
from agent.kernel import addresses, clone, pidfd
from agent.kernel.packet import tcp_packet
from agent.layout import Flag, Mapping
from agent.link import Link
from agent.resources import char_device, pipe, regular_file, signals, tcp, tcp_socket
from agent.resources.files import FileRef
from agent.resources.service_address import ServiceAddress, place
from agent.server.store import new_id
from agent.states import Destination

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root's destination can be misused")

PAGE = 4096
CLONE_NEWNET = 0x40000000
DOCS = Path(__file__).parents[2] / "docs" / "threat-model.md"
PROGRAM = r"""
#include <stdio.h>
#include <time.h>
int main(void)
{
    struct timespec time = {0, 3000000};
    for (long round = 0;; round++) {
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""
VICTIM = b"not to be written to"
ANYWHERE = 0x7000_0000_0000


class Victim:
    """What an attack aims at, and how it was before."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "victim"
        self.directory.mkdir()
        self.file = self.directory / "file"
        self.file.write_bytes(VICTIM)
        self.file.chmod(0o600)
        self.private = self.directory / "private"
        self.private.mkdir()
        self.fifo = self.directory / "fifo"
        os.mkfifo(self.fifo, 0o600)
        self.absent = self.directory / "absent"
        agent = Task.of(os.getpid())
        self.arrival = Entry.begin(new_id(), Destination.HELD, Arrival(process=agent, agent=agent))
        self.before = self.picture()

    def picture(self) -> tuple[object, ...]:
        entries = {path: path.lstat() for path in sorted(self.directory.rglob("*"))}
        files = {p: (s.st_mode, s.st_uid, s.st_gid, s.st_size) for p, s in entries.items()}
        return files, self.file.read_bytes(), addresses.addresses(), self.arrival.path.read_bytes()

    @property
    def state(self) -> regular_file.State:
        """Of the file, as a source would capture it that has it open."""
        found = self.file.stat()
        return regular_file.State(str(self.file), os.O_RDWR, 0, found.st_size, found.st_ino, 0o600)


class Liar:
    """Between the engine and its link: changes some messages, and adds others before them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changes: list[tuple[type[Any], Callable[[Any], Sequence[Any]]]] = []
        send = Link.send

        def lying(link: Link, message: Any) -> None:
            said: Sequence[Any] = [message]
            for kind, change in self._changes:
                if isinstance(message, kind):
                    said = change(message)
            for one in said:
                send(link, one)

        monkeypatch.setattr(Link, "send", lying)
        self._monkeypatch = monkeypatch

    def instead(self, kind: type[Any], **fields: Any) -> None:
        """Other fields; a function makes one of the message."""

        def change(message: Any) -> Sequence[Any]:
            new = {name: make(message) if callable(make) else make for name, make in fields.items()}
            return [msgspec.structs.replace(message, **new)]

        self._changes.append((kind, change))

    def before(self, kind: type[Any], *messages: Any) -> None:
        """These first, once."""
        left = [list(messages)]
        self._changes.append((kind, lambda message: [*(left.pop() if left else []), message]))

    def also_open(self, kind: str, state: msgspec.Struct) -> None:
        """One more descriptor."""
        raw = msgspec.Raw(msgspec.msgpack.encode(state))
        more = [Descriptor(kind, ((77, False),), 0, raw)]
        self.instead(protocol.Descriptors, descriptors=lambda m: m.descriptors + (more if m.last else []))

    def knows(self, file: FileRef) -> None:
        """The program has this one open, too."""
        found = inventory.opened_files
        self._monkeypatch.setattr(inventory, "opened_files", lambda *all: [*found(*all), file])

    def hear_no_blockers(self) -> None:
        expect = Link.expect

        def deaf(link: Link, *what: Any) -> Any:
            answer = expect(link, *what)
            if isinstance(answer, protocol.Answer):
                return msgspec.structs.replace(answer, blockers=())
            return answer

        self._monkeypatch.setattr(Link, "expect", deaf)


class Attack(NamedTuple):
    name: str
    tried: str
    got: str
    lie: Callable[[Liar, Victim], None]
    kind: str  # of the error, or of a blocker
    message: str = ""


def offered(victim: Victim, path: str, **more: Any) -> FileRef:
    found = FileRef(path, len(VICTIM), 0o600, b"d" * 32)
    return msgspec.structs.replace(found, **more)


def also_opened(liar: Liar, ref: FileRef, **more: Any) -> None:
    liar.instead(protocol.Offer, opened=lambda m: [*m.opened, ref], **more)


def _deaf(liar: Liar, victim: Victim) -> None:
    liar.instead(protocol.Offer, cpu_flags=("no-such-instruction",))
    liar.hear_no_blockers()


def _changed(victim: Victim, **fields: Any) -> regular_file.State:
    return msgspec.structs.replace(victim.state, **fields)


def _listener(host: str, port: int) -> tcp_socket.State:
    listener = tcp.TcpListener(
        family=2, local=tcp.SocketAddress(host, port), backlog=5, options={}, reuse_address=False, device=b"",
        buffers=(131072, 16384, 0), filter=b"", uid=0,
    )  # fmt: skip
    return tcp_socket.State(listener, 0)


def _connection(host: str) -> tcp_socket.State:
    connection = tcp.TcpConnection(
        family=2, state=1, local=tcp.SocketAddress(host, 5000), peer=tcp.SocketAddress("192.0.2.9", 5000),
        queues=tcp.Queues(receive_seq=1, unread=b"", send_seq=1, sent=b"", unsent=b""), mss_clamp=1000,
        wscale=(0, 0), sack=False, timestamp=None, timestamp_usec=False, captured_at=0.0,
        window=(1, 1000, 1000, 1000, 1), window_clamp=1000, options={}, reuse_address=False, device=b"",
        buffers=(131072, 16384, 0), filter=b"", uid=0,
    )  # fmt: skip
    return tcp_socket.State(connection, 0)


def _fifo(path: Path, content: bytes = b"") -> pipe.State:
    return pipe.State(1, str(path), 0o666, os.O_RDWR, 65536, content)


ATTACKS = (
    Attack(
        "blockers-ignored",
        "goes on with a process that the destination has refused",
        "`not-agreed`: nothing is begun",
        _deaf,
        "not-agreed",
    ),
    Attack(
        "path-relative",
        "offers an open file by a path that does not begin at the root",
        "a protocol error: no such path is looked at",
        lambda liar, v: also_opened(liar, offered(v, "etc/passwd")),
        "protocolerror",
    ),
    Attack(
        "path-dots",
        "offers a file to be copied by a path with `..` in it",
        "a protocol error",
        lambda liar, v: also_opened(liar, offered(v, f"{v.private}/../absent"), copy_files=True),
        "protocolerror",
    ),
    Attack(
        "path-device",
        "offers a device as an open file",
        "`file-differs`: it was looked at (O_PATH), not opened",
        lambda liar, v: also_opened(liar, offered(v, "/dev/zero")),
        "file-differs",
    ),
    Attack(
        "journal-path",
        "names the migration by a path, so that its journal would be written elsewhere",
        "a protocol error",
        lambda liar, v: liar.instead(protocol.Offer, migration=f"../../../..{v.absent}"),
        "protocolerror",
        r"at `\$\.migration`",
    ),
    Attack(
        "journal-taken",
        "names the migration as another one that is under way here",
        "a protocol error",
        lambda liar, v: liar.instead(protocol.Offer, migration=v.arrival.migration),
        "protocolerror",
        "is not the name of a new migration",
    ),
    Attack(
        "tids",
        "offers a process whose threads are not its own, or twice the same",
        "a protocol error",
        lambda liar, v: liar.instead(protocol.Offer, tids=lambda m: (*m.tids, *m.tids)),
        "protocolerror",
    ),
    Attack(
        "address-network",
        "offers a service address with a prefix that would lead all of the network to one interface",
        "`address-no-place`",
        lambda liar, v: liar.instead(protocol.Offer, addresses=(service("198.51.100.7", 0),)),
        "address-no-place",
    ),
    Attack(
        "new-file-unnamed",
        "maps a file of which it says only path and size",
        "`file-differs`: without digest or build id nothing is the same",
        lambda liar, v: liar.before(
            protocol.RoundEnd, protocol.NewFiles([offered(v, str(v.file), digest=b"")])
        ),
        "file-differs",
    ),
    Attack(
        "file-truncated",
        "opens a file with O_CREAT and O_TRUNC",
        "a protocol error: flags that make or cut off are none that a descriptor has",
        lambda liar, v: liar.also_open("regular-file", _changed(v, flags=os.O_CREAT | os.O_TRUNC)),
        "protocolerror",
        "not understood: flags",
    ),
    Attack(
        "file-unknown",
        "opens a file for writing that was not offered",
        "`file-differs`",
        lambda liar, v: liar.also_open("regular-file", v.state),
        "file-differs",
    ),
    Attack(
        "file-other-owner",
        "opens a file that belongs to another user here, as through a symbolic link of that user's",
        "`file-owner`: no descriptor gives more than it gave there",
        lambda liar, v: liar.also_open("regular-file", _changed(v, owner=(64001, 64001))),
        "file-owner",
    ),
    Attack(
        "file-made",
        "opens a file that does not exist",
        "an error: nothing is made",
        lambda liar, v: liar.also_open("regular-file", _changed(v, path=str(v.absent))),
        "file-missing",
    ),
    Attack(
        "device-as-file",
        "opens a device, calling it a regular file",
        "`not-agreed`: it was looked at, not opened",
        lambda liar, v: liar.also_open("regular-file", _changed(v, path="/dev/zero")),
        "not-agreed",
        "neither file nor directory",
    ),
    Attack(
        "device-other",
        "opens a memory device that is none of null, zero, full, random, urandom",
        "a protocol error",
        lambda liar, v: liar.also_open("character-device", char_device.State(1, os.O_RDWR)),
        "protocolerror",
        "not understood: device 1",
    ),
    Attack(
        "fifo-made",
        "makes a FIFO that was not offered",
        "an error: nothing is made",
        lambda liar, v: liar.also_open("pipe", _fifo(v.absent)),
        "filenotfounderror",
    ),
    Attack(
        "fifo-is-file",
        "fills a FIFO that is a regular file, to write to it",
        "`not-agreed`: it is not opened",
        lambda liar, v: liar.also_open("pipe", _fifo(v.file, b"overwritten")),
        "not-agreed",
        "is no FIFO",
    ),
    Attack(
        "fifo-other-owner",
        "opens a FIFO that another user's rights guard",
        "`file-owner`",
        lambda liar, v: liar.also_open("pipe", _fifo(v.fifo)),
        "file-owner",
    ),
    Attack(
        "listener-new",
        "listens on a port that was not offered",
        "`not-agreed`",
        lambda liar, v: liar.also_open("tcp", _listener("127.0.0.1", 47111)),
        "not-agreed",
        "tcp 127.0.0.1:47111",
    ),
    Attack(
        "connection-address",
        "has a connection from an address that is not taken over",
        "`not-agreed`",
        lambda liar, v: liar.also_open("tcp", _connection("192.0.2.77")),
        "not-agreed",
        "tcp 192.0.2.77:5000",
    ),
    Attack(
        "descriptor-kind",
        "has a descriptor of a kind that does not exist",
        "a protocol error",
        lambda liar, v: liar.also_open("door", _fifo(v.absent)),
        "protocolerror",
    ),
    Attack(
        "file-index",
        "names an executable that is not among the files compared",
        "a protocol error",
        lambda liar, v: liar.instead(
            protocol.Rebuild, process=lambda m: msgspec.structs.replace(m.process, executable=4711)
        ),
        "protocolerror",
    ),
    Attack(
        "file-mapped-writable",
        "maps an agreed file shared and writable",
        "an error: agreed files are open for reading",
        lambda liar, v: liar.before(
            protocol.RoundEnd, protocol.Layout([Mapping(ANYWHERE, ANYWHERE + PAGE, 3, Flag.SHARED, 0)])
        ),
        "injectedcallfailed",
        "Permission denied",
    ),
    Attack(
        "pages-outside",
        "sends pages for addresses that are not mapped",
        "a protocol error",
        lambda liar, v: liar.before(protocol.RoundEnd, protocol.Discard([(ANYWHERE, ANYWHERE + PAGE)])),
        "protocolerror",
        "outside the declared layout",
    ),
    Attack(
        "kernel-addresses",
        "maps at addresses of the kernel",
        "a protocol error",
        lambda liar, v: liar.before(
            protocol.RoundEnd, protocol.Layout([Mapping(1 << 47, (1 << 47) + PAGE, 3)])
        ),
        "protocolerror",
    ),
    Attack(
        "thread-foreign",
        "sets the registers of a task that is not the shadow's",
        "an error: only threads that the shadow has are known by number",
        lambda liar, v: liar.instead(
            protocol.Rebuild,
            process=lambda m: msgspec.structs.replace(
                m.process, threads=[msgspec.structs.replace(m.process.threads[0], tid=1)]
            ),
        ),
        "protocolerror",
    ),
    Attack(
        "too-early",
        "commits before the process is whole",
        "a protocol error",
        lambda liar, v: liar.before(protocol.Rebuild, protocol.Commit([])),
        "protocolerror",
        "Commit while waiting for Rebuild",
    ),
    Attack(
        "twice",
        "makes a second offer when the first is agreed",
        "a protocol error",
        lambda liar, v: liar.before(protocol.RoundEnd, _another_offer()),
        "protocolerror",
        "Offer while waiting for Rebuild",
    ),
)


def _another_offer() -> protocol.Offer:
    return protocol.Offer(
        host="", pid=1, tids=(1,), files=[], opened=[], copy_files=False, specials=[], vdso_digest=b"",
        cpu_flags=(), limits=(), directories=(), listeners=(), addresses=(),
    )  # fmt: skip


def service(address: str, prefix: int) -> ServiceAddress:
    return ServiceAddress(
        address=address, prefix_length=prefix, family=2, interface="eth0", scope=0, flags=0, broadcast="",
        label="", preferred=0xFFFFFFFF, valid=0xFFFFFFFF, metric=0,
    )  # fmt: skip


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    made = Victim(tmp_path)
    yield made
    made.arrival.remove()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Moving]:
    found = Moving(tmp_path, PROGRAM)
    found.progress()
    yield found
    found.close()


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> Liar:
    return Liar(monkeypatch)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_gets_nothing(attack: Attack, liar: Liar, victim: Victim, program: Moving) -> None:
    if attack.name == "fifo-other-owner":
        os.chown(victim.fifo, 64001, 64001)
        victim.before = victim.picture()
    attack.lie(liar, victim)
    report = Move(program, MoveOptions()).report
    assert report is not None and report.outcome in (Outcome.REFUSED, Outcome.ROLLED_BACK), report
    kinds = {b.kind for b in report.blockers}
    if not kinds:
        assert report.error is not None
        kinds = {report.error.kind}
        assert report.error.where == "destination", report.error
        assert re.search(attack.message, report.error.message), report.error
    assert attack.kind in kinds, (kinds, report.error)
    if report.destination.pid:
        wait_for(lambda: gone(report.destination.pid or 0), "the shadow to end")
    assert victim.picture() == victim.before
    program.progress()


def test_nothing_of_it_is_in_the_way_without_the_lie(liar: Liar, program: Moving) -> None:
    report = Move(program, MoveOptions()).migrated
    assert report.outcome is Outcome.MIGRATED
    program.progress()


def test_the_table_is_what_is_tried() -> None:
    rows = [f"| {attack.tried} | {attack.got} |" for attack in ATTACKS]
    text = DOCS.read_text()
    table = text[text.index("| what a source tries | what it gets |") :].split("\n\n")[0].splitlines()[2:]
    assert table == rows


# --- what goes through, and gives nothing ---


def test_a_deleted_file_is_never_setuid(liar: Liar, victim: Victim, program: Moving) -> None:
    """It would be a program that everybody may run as the agent's user."""
    path = str(victim.directory / "gone")
    state = _changed(victim, path=path, size=4, mode=0o6755, content=b"#!/x", owner=(64001, 64002))
    liar.also_open("regular-file", state)
    report = Move(program, MoveOptions()).migrated
    found = os.stat(f"/proc/{report.destination.pid}/fd/77")
    assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (0o755, 64001, 64002)
    assert victim.picture() == victim.before


def test_a_copied_file_is_never_setuid_and_its_owner_s(
    liar: Liar, victim: Victim, program: Moving, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = victim.directory / "own"
    own.mkdir()
    os.chown(own, 64001, 64002)
    new = own / "new" / "file"
    ref = offered(victim, str(new), mode=0o6755, digest=sha256(VICTIM).digest(), owner=(64001, 64002))
    liar.knows(ref)
    monkeypatch.setattr(offering, "read_chunks", lambda _: iter([VICTIM]))
    Move(program, MoveOptions(copy_files=True))
    for path, mode in ((new, 0o755), (new.parent, 0o755)):
        found = path.stat()
        assert (found.st_mode & 0o7777, found.st_uid, found.st_gid) == (mode, 64001, 64002)


@pytest.mark.parametrize(
    ("changes", "data", "why"),
    [
        ({"owner": (64001, 64001)}, [VICTIM], "is not a directory of user 64001"),
        ({}, [VICTIM, b"x"], "more than the 20 bytes announced"),
        ({}, [VICTIM[:-1]], "does not match"),
        ({"digest": b""}, [VICTIM], "does not match"),
    ],
)
def test_a_copy_that_is_not_as_agreed(
    liar: Liar,
    victim: Victim,
    program: Moving,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    data: list[bytes],
    why: str,
) -> None:
    """A user's file in a directory that only root may write to; too long, too short, other than announced."""
    path = str(victim.absent)
    ref = msgspec.structs.replace(offered(victim, path, digest=sha256(VICTIM).digest()), **changes)
    liar.knows(ref)
    monkeypatch.setattr(offering, "read_chunks", lambda _: iter(data))
    report = Move(program, MoveOptions(copy_files=True)).report
    assert report is not None and report.error is not None and why in report.error.message
    assert victim.picture() == victim.before
    program.progress()


def test_what_comes_late_reaches_the_process_alone(liar: Liar, program: Moving) -> None:
    """Packets for other addresses, and signals for tasks that are not its own, are left out and said."""
    packet = tcp_packet(("192.0.2.9", 5), ("127.0.0.1", 6), 1, 1, 2, 100)
    siginfo = struct.pack("<iii", signal.SIGKILL, 0, 0).ljust(128, b"\0")
    first = [True]

    def late(message: protocol.Late) -> list[tuple[int, bytes]]:
        return [(os.getpid(), siginfo), (1, siginfo)] if first and first.pop() else []

    liar.instead(protocol.Late, packets=[packet], signals=late)
    report = Move(program, MoveOptions()).migrated
    said = [notice.message for notice in report.notices]
    assert sum("which is not being taken over" in text for text in said) >= 1
    assert sum(text.startswith("signal 9, sent in the pause") for text in said) == 2
    program.progress()


def test_a_signal_is_for_the_process_not_for_its_number() -> None:
    with forked(lambda: None) as other:
        child = os.fork()
        if child == 0:
            os._exit(0)
        ended = pidfd.open_process(child)
        os.waitpid(child, 0)
        try:
            for tid in (0, other):
                for code in (0, -1):
                    siginfo = struct.pack("<iii", signal.SIGKILL, 0, code).ljust(128, b"\0")
                    with pytest.raises(ProcessLookupError):
                        signals.send(ended, other, tid, siginfo)
        finally:
            os.close(ended)
        assert os.waitpid(other, os.WNOHANG) == (0, 0)


@pytest.mark.parametrize(
    ("address", "prefix", "fits"),
    [
        ("198.51.100.7", 24, True),
        ("198.51.100.7", 32, True),
        ("198.51.100.7", 23, False),
        ("198.51.100.7", 33, False),
        ("198.51.100.0", 24, False),
        ("198.51.100.255", 24, False),
        ("203.0.113.7", 24, False),
        ("127.0.0.7", 8, False),
    ],
)
def test_where_an_address_may_go(address: str, prefix: int, fits: bool) -> None:
    def look() -> bool:
        clone.unshare(CLONE_NEWNET)
        for words in ("tuntap add eth0 mode tap", "address add 198.51.100.1/24 dev eth0", "link set eth0 up"):
            subprocess.run(["ip", *words.split()], check=True)
        return place(service(address, prefix)) == "eth0"

    assert in_child(look) is fits


def in_child(function: Callable[[], bool]) -> bool:
    pid = os.fork()
    if pid == 0:
        code = 2
        try:
            code = int(function())
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 1)
    return bool(code)


def test_a_piece_to_verify_has_its_size(liar: Liar, program: Moving) -> None:
    liar.instead(protocol.Verify, pieces=[(0, 1 << 46, b"")])
    message = Move(program, MoveOptions(verify=True)).rolled_back("protocolerror", "destination")
    assert "not understood: a piece" in message
    program.progress()
