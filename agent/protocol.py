"""What a source agent and a destination agent say to each other, in order.

    source                                   destination
    Offer             ------------------->   checks that it can have the process; touches nothing
                      <-------------------   Answer (blockers, notices)
    FileData ...      ------------------->   files that are missing, with --copy-files
    Ping              ------------------->   a few times: how far the clocks are apart
                      <-------------------   Pong
    Prepare           ------------------->   the shadow is born
                      <-------------------   Prepared
    NewFiles, Layout, Discard, pages ... ->  pre-copy; each round ends in
    RoundEnd          ------------------->
                      <-------------------   RoundDone
    Also              ------------------->   between two rounds: what the process has opened
                      <-------------------   Agreed
    Resumed           <------------------>   first of all over a new connection, if one breaks in pre-copy
                          (source frozen)
    Rebuild           ------------------->   the process
    Descriptors ...   ------------------->   as they are captured
    Layout, Discard, pages ... ----------->   once more
    Threads ...       ------------------->   as they are captured; they need all memory to be there
    Complete          ------------------->
                      <-------------------   Ready: rebuilt to the last register, still stopped
    Verify            ------------------->   optional; any number
                      <-------------------   Verified
    Commit            ------------------->   the point of no return
                      <-------------------   Live
    Late ...          ------------------->   packets and signals that arrived for it while it was frozen
                      <-------------------   Done

At any time before Commit either end may close the link, or send Failed, and the migration is off.

The Offer carries the source's version of the protocol. A destination understands its own and the one before,
and answers in that; of another one it says both. A field may come to a message with a default, so that the
message is read where it is missing, and ignored where it is not known.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from agent import checks
from agent.api import Blocker, Notice, Phase
from agent.bounds import (
    I63,
    MALFORMED,
    MAX_DESCRIPTORS,
    MAX_FILES,
    MAX_MAPPINGS,
    MAX_NOTES,
    MAX_QUEUED,
    MAX_RANGES,
    MAX_SOCKETS,
    MAX_THREADS,
    U31,
    U32,
    U63,
    U64,
    BootId,
    Digest,
    MigrationName,
    OwnThread,
    PathText,
    Pid,
    Siginfo,
    Text,
    Word,
)
from agent.descriptors import Descriptor
from agent.kernel.arch.x86_64 import Address
from agent.layout import Mapping
from agent.resources.files import FileRef
from agent.resources.pipe import Fifo
from agent.resources.service_address import ServiceAddress
from agent.resources.tcp import TcpConnection, TcpListener
from agent.shadow import Special
from agent.state import Limits, LockFuture, ProcessState, ThreadState, Tids
from transport.frames import ProtocolError

VERSION: Final = 2
MIN_VERSION: Final = VERSION - 1  # of those that are understood

MAX_PIECES: Final = 1 << 14
MAX_PACKETS: Final = 1 << 16

Files = Annotated[list[FileRef], Meta(max_length=MAX_FILES)]
Mappings = Annotated[list[Mapping], Meta(max_length=MAX_MAPPINGS)]
Paths = Annotated[tuple[PathText, ...], Meta(max_length=2 * MAX_FILES)]
Ranges = Annotated[list[tuple[Address, Address]], Meta(max_length=MAX_RANGES)]
Signals = Annotated[list[tuple[OwnThread, Siginfo]], Meta(max_length=2 * MAX_QUEUED)]
Packet = Annotated[bytes, Meta(max_length=1 << 17)]  # an IP packet, headers and all
Phases = Annotated[tuple[Phase, ...], Meta(max_length=1024)]
Notices = Annotated[tuple[Notice, ...], Meta(max_length=MAX_NOTES)]


def speaks(version: int) -> bool:
    """Whether what another agent of this version says is understood."""
    return MIN_VERSION <= version <= VERSION


def spoken() -> str:
    return f"{MIN_VERSION} to {VERSION}"


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    version: int = VERSION
    migration: MigrationName = ""  # its name; "": it cannot be asked for later
    host: Text
    pid: Pid
    tids: Tids
    files: Files  # mapped: executables and libraries
    opened: Files
    copy_files: bool
    specials: Annotated[list[Special], Meta(max_length=8)]
    vdso_digest: Digest
    cpu_flags: Annotated[tuple[Word, ...], Meta(max_length=4096)]
    limits: Limits
    memory: U63 = 0  # bytes that are no file's
    descriptors: tuple[U32, U32] = (0, 0)  # open files, and the highest number
    directories: Paths  # cwd and opened directories
    fifos: Annotated[tuple[Fifo, ...], Meta(max_length=MAX_FILES)] = ()
    listeners: Annotated[tuple[TcpListener, ...], Meta(max_length=MAX_SOCKETS)]
    # outlines: nothing in their queues
    connections: Annotated[tuple[TcpConnection, ...], Meta(max_length=MAX_SOCKETS)] = ()
    addresses: Annotated[tuple[ServiceAddress, ...], Meta(max_length=1024)]
    services: Annotated[tuple[PathText, ...], Meta(max_length=1024)] = ()  # of unix sockets


class Answer(msgspec.Struct, frozen=True, kw_only=True, tag="answer"):
    version: int = VERSION
    host: Text
    blockers: Annotated[tuple[Blocker, ...], Meta(max_length=2 * MAX_SOCKETS)]
    notices: Notices
    missing: Paths  # files to be sent
    unshared: Paths  # files that the destination has, or will have, for itself
    takes_more: bool = False  # it understands Also


class FileData(msgspec.Struct, frozen=True, kw_only=True, tag="file-data"):
    path: PathText
    data: bytes
    last: bool


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    pass


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    monotonic: I63  # nanoseconds
    boottime: I63


class Prepare(msgspec.Struct, frozen=True, kw_only=True, tag="prepare"):
    monotonic_delta: I63  # nanoseconds that the process's clocks are ahead of the destination's
    boottime_delta: I63
    session_leader: bool
    layout: Mappings
    reconnect_s: Annotated[int, Meta(ge=0, le=100_000)] = 0  # wait so long for a source that lost its link


class Prepared(msgspec.Struct, frozen=True, kw_only=True, tag="prepared"):
    pid: U31
    new_pid_namespace: bool
    boot: BootId = ""  # the host's boot id, proc_sys_kernel(5)
    resumable: bool = False  # it waits for a source that lost its link


class NewFiles(msgspec.Struct, frozen=True, tag="new-files"):
    """Files mapped since the Offer; they extend its list."""

    files: Files


class Also(msgspec.Struct, frozen=True, kw_only=True, tag="also"):
    """What the process has opened since the Offer. What cannot be had is simply not agreed to."""

    opened: Files = []
    directories: Paths = ()
    fifos: Annotated[tuple[Fifo, ...], Meta(max_length=MAX_FILES)] = ()
    listeners: Annotated[tuple[TcpListener, ...], Meta(max_length=MAX_SOCKETS)] = ()


class Agreed(msgspec.Struct, frozen=True, tag="agreed"):
    unshared: Paths  # as in an Answer


class Layout(msgspec.Struct, frozen=True, tag="layout"):
    mappings: Mappings


class Discard(msgspec.Struct, frozen=True, tag="discard"):
    ranges: Ranges


class Guards(msgspec.Struct, frozen=True, tag="guards"):
    """Pages with MADV_GUARD_INSTALL on them (Linux 6.13)."""

    ranges: Ranges


class RoundEnd(msgspec.Struct, frozen=True, tag="round-end"):
    number: U31


class RoundDone(msgspec.Struct, frozen=True, tag="round-done"):
    number: U31


class Resumed(msgspec.Struct, frozen=True, tag="resumed"):
    """The first frame over another connection. `received`: how many frames came whole over those before."""

    received: U63


class Rebuild(msgspec.Struct, frozen=True, kw_only=True, tag="rebuild"):
    """Everything but memory, descriptors and the threads after the first."""

    process: ProcessState
    monotonic_at_freeze: I63  # of the process, nanoseconds: its clock must not be behind this when it goes on
    leave_stopped: bool


class Descriptors(msgspec.Struct, frozen=True, tag="descriptors"):
    """Some open file descriptions, in the order to rebuild them: listeners before connections."""

    descriptors: Annotated[list[Descriptor], Meta(max_length=MAX_DESCRIPTORS)]
    captured_at: I63  # CLOCK_MONOTONIC of the process, nanoseconds: right before
    last: bool


class Threads(msgspec.Struct, frozen=True, tag="threads"):
    threads: Annotated[list[ThreadState], Meta(max_length=MAX_THREADS)]


class Complete(msgspec.Struct, frozen=True, tag="complete"):
    """All pages and threads were sent; and what is asked last."""

    brk: Address  # the end of the heap, brk(2)
    lock_future: LockFuture  # flags of mlockall(2), 0 if memory that is mapped from now on is not locked


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    phases: Phases
    notices: Notices


class Verify(msgspec.Struct, frozen=True, kw_only=True, tag="verify"):
    """Digests of pieces of the frozen source's memory: (start, end, BLAKE2b of 16 bytes).

    The last message asks for the rest too: pages outside `present`, mappings, registers.
    """

    pieces: Annotated[list[tuple[Address, Address, Digest]], Meta(max_length=MAX_PIECES)]
    masked: Annotated[list[tuple[U64, U64]], Meta(max_length=2 * MAX_THREADS)]  # anywhere: the process's word
    last: bool
    present: Ranges = []


class Verified(msgspec.Struct, frozen=True, kw_only=True, tag="verified"):
    memory: Annotated[list[tuple[Address, Address]], Meta(max_length=MAX_PIECES)]  # pieces that differ
    others: Annotated[tuple[Text, ...], Meta(max_length=MAX_NOTES)] = ()


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """`signals`: (thread, 0 for the process; siginfo) that were queued since the Rebuild was sent."""

    signals: Signals


class Live(msgspec.Struct, frozen=True, kw_only=True, tag="live"):
    phases: Phases
    address_moved: Annotated[tuple[Word, ...], Meta(max_length=1024)]


class Late(msgspec.Struct, frozen=True, tag="late"):
    """What still arrived at the source: packets for the addresses, and signals as in Commit."""

    packets: Annotated[list[Packet], Meta(max_length=MAX_PACKETS)]
    signals: Signals
    last: bool


class Done(msgspec.Struct, frozen=True, tag="done"):
    notices: Notices


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    kind: Text
    message: Text


Message = (
    Offer
    | Answer
    | FileData
    | Ping
    | Pong
    | Prepare
    | Prepared
    | NewFiles
    | Also
    | Agreed
    | Layout
    | Discard
    | Guards
    | RoundEnd
    | RoundDone
    | Resumed
    | Rebuild
    | Threads
    | Descriptors
    | Complete
    | Ready
    | Verify
    | Verified
    | Commit
    | Live
    | Late
    | Done
    | Failed
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class Pages(msgspec.Struct, frozen=True):
    """A frame of pages, decoded: `data` is the content of `ranges`, one after another."""

    ranges: list[tuple[int, int]]
    data: bytes | memoryview


class OtherVersion(ProtocolError):
    """The other agent is of a version that is not understood here."""

    kind = "version"

    def __init__(self, theirs: int) -> None:
        super().__init__(
            f"the other agent speaks version {theirs} of the protocol, this one {spoken()}: "
            "install the same version of migrate on both"
        )


class PeerFailed(Exception):
    """The other agent gave up, and said why."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.kind = failed.kind


class _Greeting(msgspec.Struct):
    """What an Offer and an Answer have in every version."""

    type: Literal["offer", "answer"]
    version: U32


_greetings: Final = msgspec.msgpack.Decoder(_Greeting)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(body: memoryview | bytes) -> Message:
    """A message; ProtocolError, OtherVersion. What it may cost is bounded by its types."""
    try:
        message = _decoder.decode(body)
        checks.check(message)
    except (*MALFORMED, ValueError) as error:
        _check_version(body)
        raise ProtocolError(f"a message that is not understood: {error}") from error
    return message


def _check_version(body: memoryview | bytes) -> None:
    """OtherVersion if it is the first message of an agent that we cannot understand for that reason."""
    try:
        version = _greetings.decode(body).version
    except MALFORMED:
        return
    if not speaks(version):
        raise OtherVersion(version)
