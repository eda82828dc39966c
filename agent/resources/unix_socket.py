"""Unix sockets: pairs of which both ends are the process's, and datagram clients of a service of the host,
such as syslog: unix(7), socketpair(2).

What was sent over a pair and not yet read moves along. Ends are told apart by their inodes on the source.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from agent import holders
from agent.api import Blocker
from agent.bounds import U31, U64, Nonblocking
from agent.descriptors import OpenFile, Rebuilding, Refusal, SourceProcess, not_agreed
from agent.kernel import procfs, unix_diag
from agent.kernel.tcp_repair import borrow
from agent.kernel.unix_diag import SHUT_RECEIVE, SHUT_SEND, UnixSocket
from agent.unmovable import Unmovable

NAME: Final = "unix"
MAX_MESSAGES: Final = 1 << 16
MAX_MESSAGE: Final = 1 << 20  # bytes; a message may be as long as the send buffer
MAX_STREAM: Final = 64 << 20
_SO_PEEK_OFF: Final = 42  # socket(7)
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_FORCED: Final = {socket.SO_SNDBUF: _SO_SNDBUFFORCE, socket.SO_RCVBUF: _SO_RCVBUFFORCE}
# by number, socket(7) and unix(7): those that a pair can have besides its defaults
_OPTIONS: Final[dict[int, int]] = {
    socket.SO_LINGER: 8,
    socket.SO_PRIORITY: 4,
    socket.SO_RCVLOWAT: 4,
    socket.SO_RCVTIMEO: 16,
    socket.SO_SNDTIMEO: 16,
    29: 4,  # SO_TIMESTAMP
    35: 4,  # SO_TIMESTAMPNS
    socket.SO_PASSCRED: 4,
    34: 4,  # SO_PASSSEC
    _SO_PEEK_OFF: 4,
    socket.SO_SNDBUF: 4,
    socket.SO_RCVBUF: 4,
}
_DATAGRAM: Final = 2
_CONTROL: Final = socket.CMSG_SPACE(4 * 253) + socket.CMSG_SPACE(12)  # SCM_MAX_FD descriptors, credentials


class State(msgspec.Struct, frozen=True):
    """One end. `peer`: the other end's inode, 0 if that is closed, None if it has none."""

    inode: U64
    peer: U64 | None
    service: Annotated[str, Meta(max_length=107)]  # the path that it is connected to; "" for a pair
    kind: Literal[1, 2, 5]  # SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET
    flags: Nonblocking
    messages: Annotated[tuple[bytes, ...], Meta(max_length=MAX_MESSAGES)]  # a stream's are one
    shutdown: Annotated[int, Meta(ge=0, le=3)]
    failed: bool  # its next call says ECONNRESET: the other end was closed with something unread
    options: Annotated[dict[U31, Annotated[bytes, Meta(max_length=16)]], Meta(max_length=len(_OPTIONS))]


def validate(state: State) -> None:
    """ValueError for a received state that is none."""
    wrong = [number for number, value in state.options.items() if len(value) != _OPTIONS.get(number)]
    if wrong:
        raise ValueError(f"socket options {wrong}")
    if state.service and (state.kind != _DATAGRAM or state.messages or "\0" in state.service):
        raise ValueError("a client of a service that is more than that")
    if state.peer == state.inode:
        raise ValueError("a socket that is connected to itself")


def recognise(file: OpenFile) -> bool:
    return file.socket is not None and file.socket[0] == socket.AF_UNIX


# --- the source ---


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    why, hint = _stays(file, process)
    if why:
        return [Blocker(kind="unix-socket", what=file.name, why=why, hint=hint)]
    why = _first_message(file, process)
    hint = "let the program receive it first"
    return [Blocker(kind="unix-message", what=file.name, why=why, hint=hint)] if why else []


def _first_message(file: OpenFile, process: SourceProcess) -> str:
    """Why it cannot be sent again. No empty one is looked at: it is shown once. Nor those behind it."""
    with borrow(process.duplicate(file.fd)) as sock:
        try:
            if _queued(sock):
                _peek(sock, file.name)
        except Unmovable as error:
            return str(error).removeprefix(f"{file.name}: ")
        except OSError:  # it is closed, or something else by now
            return ""
    return ""


def _stays(file: OpenFile, process: SourceProcess) -> tuple[str, str]:
    """Why it cannot move, and what to do."""
    try:
        found = unix_diag.look(file.inode)
    except FileNotFoundError:
        return "a unix socket of another network namespace", "close it before moving"
    if found.state == unix_diag.LISTENING or found.name:
        what = "listens" if found.state == unix_diag.LISTENING else "is bound"
        return f"a unix socket that {what} as {_shown(found.name)}", "only TCP servers move; configure it so"
    if holder := process.holders.other(file.fd, file.link):
        return f"a unix socket that {holder} has too, which stays", "close it there"
    if not found.peer or service_of(found):
        return "", ""
    if f"socket:[{found.peer}]" in procfs.fds(process.pid).values():
        return "", ""
    holder = holders.of_socket(found.peer) or "nobody that is known"
    return f"a unix socket whose other end {holder} has, which stays", "close it before moving"


def _shown(name: bytes) -> str:
    return procfs.printable(name.replace(b"\0", b"@").decode("utf-8", "replace")) or "no name"


def service_of(found: UnixSocket) -> str:
    """The path of the datagram service that a socket without a name of its own is connected to; or "" """
    if found.kind != socket.SOCK_DGRAM or not found.peer or found.name:
        return ""
    try:
        name = unix_diag.look(found.peer).name
    except FileNotFoundError:
        return ""
    path = os.fsdecode(name.rstrip(b"\0"))
    return path if path.startswith("/") and procfs.is_text(path) else ""


def services(files: list[OpenFile]) -> tuple[str, ...]:
    """Which services the process is a client of, for the offer."""
    found: list[str] = []
    for file in filter(recognise, files):
        try:
            found.append(service_of(unix_diag.look(file.inode)))
        except OSError:
            continue  # closed since
    return tuple(dict.fromkeys(filter(None, found)))


def capture(file: OpenFile, process: SourceProcess) -> State:
    found = unix_diag.look(file.inode)
    service = service_of(found)
    with borrow(process.duplicate(file.fd)) as sock:
        failed = _has_failed(sock)
        if failed and found.kind != socket.SOCK_STREAM:  # looking for messages would take the error away
            raise Unmovable("unix-message", f"{file.name}: an error waits in it")
        return State(
            inode=file.inode,
            peer=found.peer,
            service=service,
            kind=found.kind,  # type: ignore[arg-type]
            flags=file.flags & os.O_NONBLOCK,
            messages=() if service or found.peer is None else _unread(sock, file.name),
            shutdown=found.shutdown if found.peer else 0,
            failed=failed,
            options=_unusual(sock),
        )


def _unread(sock: socket.socket, name: str) -> tuple[bytes, ...]:
    """What was sent to it, without taking it out: SO_PEEK_OFF goes from one message to the next
    (socket(7)).
    """
    before = sock.getsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF)
    sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, 0)
    try:
        return _stream(sock, name) if sock.type == socket.SOCK_STREAM else _messages(sock, name)
    finally:
        sock.setsockopt(socket.SOL_SOCKET, _SO_PEEK_OFF, before)


def _messages(sock: socket.socket, name: str) -> tuple[bytes, ...]:
    found: list[bytes] = []
    while (message := _peek(sock, name)) is not None:
        found.append(message)
    return tuple(found)


def _stream(sock: socket.socket, name: str) -> tuple[bytes, ...]:
    """In one piece. Beyond its end nothing is read: that would take an error away that waits there."""
    size = _queued(sock)
    if size > MAX_STREAM:
        raise Unmovable("unix-message", f"{name}: more than {MAX_STREAM} bytes wait in it")
    content = bytearray()
    while len(content) < size and (piece := _peek(sock, name)) is not None:
        content += piece
    return (bytes(content),) if content else ()


def _peek(sock: socket.socket, name: str) -> bytes | None:
    """The next message that was not seen yet; None at the end. Unmovable if it is one that cannot be sent
    again.
    """
    flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
    try:
        data, control, said, _ = sock.recvmsg(MAX_MESSAGE, _CONTROL, flags)
    except (BlockingIOError, ConnectionError):
        return None
    passed = [struct.unpack(f"{len(c[2]) // 4}i", c[2]) for c in control if c[1] == socket.SCM_RIGHTS]
    for fd in sum(passed, ()):
        os.close(fd)
    if passed:
        raise Unmovable("unix-message", f"{name}: descriptors are on their way in it (SCM_RIGHTS)")
    if any(c[1] == socket.SCM_CREDENTIALS for c in control):
        raise Unmovable("unix-message", f"{name}: a message with its sender's credentials waits in it")
    if said & socket.MSG_TRUNC:
        raise Unmovable("unix-message", f"{name}: a message of more than {MAX_MESSAGE} bytes waits in it")
    if not data and sock.type == socket.SOCK_DGRAM:  # shown once, and then not again
        raise Unmovable("unix-message", f"{name}: an empty message waits in it")
    return data or None


def _queued(sock: socket.socket) -> int:
    """Bytes of a stream, or of its first message (SIOCINQ, unix(7))."""
    return int.from_bytes(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)), "little")


def _has_failed(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _unusual(sock: socket.socket) -> dict[int, bytes]:
    """Options that a new socket of its kind does not have."""
    with socket.socket(socket.AF_UNIX, sock.type) as fresh:
        pairs = ((n, _option(sock, n, size), _option(fresh, n, size)) for n, size in _OPTIONS.items())
        return {number: value for number, value, usual in pairs if value != usual}


def _option(sock: socket.socket, number: int, size: int) -> bytes:
    return sock.getsockopt(socket.SOL_SOCKET, number, size)


# --- the destination ---


def compare(service: str) -> Blocker | None:
    """What stands in the way of being a client of the service of that path here."""
    try:
        os.close(_look_at(service))
        return None
    except OSError as error:
        why = error.strerror or str(error)
    return Blocker(kind="unix-service", what=service, why=f"on the destination: {why}", hint="start it there")


def _look_at(service: str) -> int:
    """An O_PATH descriptor of the socket of that path. OSError if there is none that anybody may send to."""
    looked = os.open(service, os.O_PATH | os.O_CLOEXEC)
    mode = os.fstat(looked).st_mode
    if stat.S_ISSOCK(mode) and mode & 0o002:
        return looked
    os.close(looked)
    raise PermissionError(errno.EACCES, "it is not a socket that anybody may send to", service)


def rebuild(state: State, context: Rebuilding) -> int:
    if state.service:
        fd = _client(state, context)
    elif state.peer is None:
        fd = socket.socket(socket.AF_UNIX, state.kind).detach()
    else:
        fd = _end_of_pair(state, context)
    with borrow(fd) as sock:
        for number, value in state.options.items():
            _set(sock, number, value)
    os.set_blocking(fd, not state.flags & os.O_NONBLOCK)
    return fd


def _client(state: State, context: Rebuilding) -> int:
    """We are root: only to what anybody may send to, and that is the socket looked at, not what the path is
    later.
    """
    if state.service not in context.services:
        raise not_agreed(f"the service {state.service}")
    try:
        looked = _look_at(state.service)
    except OSError as error:
        raise Refusal("unix-service", f"{state.service}: {error.strerror}") from error
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(f"/proc/self/fd/{looked}")
            return sock.detach()
    finally:
        os.close(looked)


def _end_of_pair(state: State, context: Rebuilding) -> int:
    """The pair is made by the first of its ends to come by; the other one is of no use until all of it is
    here.
    """
    low, high = sorted((state.inode, state.peer or 0))
    key = ("unix", (low << 64) | high)
    if key not in context.shared:
        pair = socket.socketpair(socket.AF_UNIX, state.kind)
        context.shared[key] = tuple(end.detach() for end in pair)
    index = int(state.inode != low) if state.peer else 0
    ours, theirs = context.shared[key][index], context.shared[key][1 - index]
    if not state.peer:
        _lose_peer(state, context, key, ours, theirs)
        return os.dup(ours)
    _fill(theirs, state)
    first = context.ends.pop(key, None)
    if first is None:
        context.ends[key] = state
    else:
        with borrow(ours) as here, borrow(theirs) as there:
            _shut(here, state.shutdown)
            _shut(there, first.shutdown)
    return os.dup(ours)


def _lose_peer(
    state: State, context: Rebuilding, key: tuple[str, int], ours: int, theirs: int
) -> None:
    _fill(theirs, state)
    if state.failed:
        os.write(ours, b"\0")
    os.close(theirs)
    context.shared[key] = (ours,)


def _fill(sender: int, state: State) -> None:
    """Send what is to be unread at the other end. Refusal if this host lets less wait there."""
    with borrow(sender) as sock:
        before = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        _set_size(sock, socket.SO_SNDBUF, 2 * MAX_STREAM)
        try:
            for message in state.messages:
                _send(sock, message)
        finally:
            _set_size(sock, socket.SO_SNDBUF, before // 2)


def _send(sock: socket.socket, message: bytes) -> None:
    view = memoryview(message)
    try:
        while view:
            view = view[sock.send(view, socket.MSG_DONTWAIT) :]
    except BlockingIOError:
        limit = "net.unix.max_dgram_qlen"
        raise Refusal("unix-socket", f"fewer messages may wait in a unix socket here ({limit})") from None


def _shut(sock: socket.socket, how: int) -> None:
    if how & SHUT_SEND:
        sock.shutdown(socket.SHUT_WR)
    if how & SHUT_RECEIVE:
        sock.shutdown(socket.SHUT_RD)


def _set(sock: socket.socket, number: int, value: bytes) -> None:
    """The kernel doubles buffer sizes that it is told, and says the doubled ones."""
    if number in _FORCED:
        _set_size(sock, number, int.from_bytes(value, "little") // 2)
    else:
        sock.setsockopt(socket.SOL_SOCKET, number, value)


def _set_size(sock: socket.socket, number: int, size: int) -> None:
    """Beyond what the host allows to everybody, where we may (CAP_NET_ADMIN)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _FORCED[number], size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, number, size)

