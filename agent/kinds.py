"""The registry: every kind of descriptor that can be moved, and the names of those that cannot.

Adding a kind is adding a module under agent.resources and its line here. docs/what-migrates.md lists both.
"""

from __future__ import annotations

import os
import socket
import stat
from typing import Any, Final

import msgspec

from agent.api import Blocker
from agent.bounds import MALFORMED
from agent.descriptors import Descriptor, OpenFile, Rebuilding, SourceProcess, common_blockers
from agent.resources import (
    char_device,
    epoll,
    eventfd,
    file_locks,
    memfd,
    pipe,
    regular_file,
    signalfd,
    tcp_socket,
    timerfd,
    unix_socket,
)
from transport.frames import ProtocolError

KINDS: Final[tuple[Any, ...]] = (
    regular_file,
    memfd,
    char_device,
    pipe,
    eventfd,
    timerfd,
    signalfd,
    epoll,
    tcp_socket,
    unix_socket,
)
_BY_NAME: Final = {kind.NAME: kind for kind in KINDS}
_DECODERS: Final = {kind.NAME: msgspec.msgpack.Decoder(kind.State) for kind in KINDS}

# anonymous inodes and special files that are refused: link prefix -> (kind, why, what to do)
REFUSED: Final = {
    "anon_inode:[io_uring]": ("io-uring", "an io_uring ring", "run the program without io_uring"),
    "anon_inode:inotify": ("inotify", "an inotify instance", "restart the watcher after the move"),
    "anon_inode:[userfaultfd]": ("userfaultfd", "it handles page faults itself", ""),
    "anon_inode:[fanotify]": ("fanotify", "a fanotify group", ""),
    "anon_inode:[perf_event]": ("perf-event", "a performance counter", "close it before moving"),
    "anon_inode:bpf": ("bpf", "a bpf object", ""),
    "anon_inode:kvm": ("kvm", "a virtual machine", "use the virtual machine monitor's own live migration"),
    "anon_inode:[pidfd]": ("pidfd", "it refers to another process, which stays", "close it before moving"),
    "pidfd:": ("pidfd", "it refers to another process, which stays", "close it before moving"),
    "mnt:[": ("namespace", "it holds a namespace of this host", "close it before moving"),
    "net:[": ("namespace", "it holds a namespace of this host", "close it before moving"),
}
_TTY_MAJORS: Final = frozenset({4, 5, *range(136, 144)})


def kind_of(file: OpenFile) -> Any | None:
    return next((kind for kind in KINDS if kind.recognise(file)), None)


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    """Everything that keeps one description from being moved; what is not known is refused."""
    kind = kind_of(file)
    if kind is None:
        return [_refusal(file)]
    locks = file_locks.blockers(file, kept=getattr(kind, "KEEPS_LOCKS", False))
    return [*locks, *common_blockers(file, process), *kind.blockers(file, process)]


def _refusal(file: OpenFile) -> Blocker:
    if file.socket is not None:
        return _socket_refusal(file)
    if stat.S_ISCHR(file.mode):
        if os.major(file.device) in _TTY_MAJORS:
            hint = "start it detached, with its output in a file"
            return Blocker(kind="terminal", what=file.name, why="a terminal of this host", hint=hint)
        return Blocker(
            kind="device", what=file.name, why="a device of this host", hint="close it before moving"
        )
    for prefix, (kind, why, hint) in REFUSED.items():
        if file.link.startswith(prefix):
            return Blocker(kind=kind, what=file.name, why=why, hint=hint)
    return Blocker(
        kind="unknown-descriptor", what=file.name, why="this kind is not known here", hint="close it"
    )


def _socket_refusal(file: OpenFile) -> Blocker:
    family, kind, protocol = file.socket or (0, 0, 0)
    names = {int(f): f.name.removeprefix("AF_").lower() for f in socket.AddressFamily}
    types = {1: "stream", 2: "datagram", 3: "raw", 5: "seqpacket"}
    name = names.get(family, f"family {family}")
    what = {
        "inet": "udp" if protocol == 17 else "raw",
        "inet6": "udp" if protocol == 17 else "raw",
    }
    return Blocker(
        kind=f"{what.get(name, name)}-socket",
        what=file.name,
        why=f"a socket of kind {name} {types.get(kind, str(kind))}, protocol {protocol}",
        hint="only TCP and some unix sockets move; configure the program without it or close it first",
    )


def capture(file: OpenFile, process: SourceProcess) -> Descriptor:
    """In the freeze. ValueError for a kind that is not known: it came into being after the check."""
    kind = kind_of(file)
    if kind is None:
        raise ValueError(_refusal(file).what)
    state = msgspec.msgpack.encode(kind.capture(file, process))
    return Descriptor(kind.NAME, file.numbers, file.flags, msgspec.Raw(state))


def decode(descriptor: Descriptor) -> Any:
    """Its state, checked; ProtocolError."""
    kind = _BY_NAME.get(descriptor.kind)
    if kind is None:
        raise ProtocolError(f"a descriptor of unknown kind {descriptor.kind!r}")
    try:
        state = _DECODERS[descriptor.kind].decode(descriptor.state)
        if hasattr(kind, "validate"):
            kind.validate(state)
    except (*MALFORMED, ValueError) as error:
        raise ProtocolError(f"a {descriptor.kind} descriptor that is not understood: {error}") from error
    return state


def rebuild(descriptor: Descriptor, context: Rebuilding) -> int:
    """A descriptor of ours with the description in it; ProtocolError."""
    state = decode(descriptor)
    return int(_BY_NAME[descriptor.kind].rebuild(state, context))
