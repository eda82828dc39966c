"""Every case that there is by the protocol: each message and state, each moment, each thing that may die."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from faults.fault import (
    DESTINATION_ROLES,
    ENGINES,
    GUARDIAN,
    PROCESS,
    SOURCE_ROLES,
    Action,
    Case,
    Cut,
    Fail,
    Fault,
    Hold,
    Point,
    Send,
    Side,
    other,
)

# Who sends which message of `agent.protocol`, in the order of a move; "Pages" are frames of pages.
SENDERS: Final[dict[str, tuple[Side, ...]]] = {
    "Offer": ("source",),
    "Answer": ("destination",),
    "FileData": ("source",),
    "Ping": ("source",),
    "Pong": ("destination",),
    "Prepare": ("source",),
    "Prepared": ("destination",),
    "NewFiles": ("source",),
    "Layout": ("source",),
    "Discard": ("source",),
    "Pages": ("source",),
    "RoundEnd": ("source",),
    "RoundDone": ("destination",),
    "Also": ("source",),
    "Agreed": ("destination",),
    "Resumed": ("source", "destination"),
    "Rebuild": ("source",),
    "Descriptors": ("source",),
    "Guards": ("source",),
    "Threads": ("source",),
    "Complete": ("source",),
    "Ready": ("destination",),
    "Verify": ("source",),
    "Verified": ("destination",),
    "Commit": ("source",),
    "Live": ("destination",),
    "Late": ("source",),
    "Done": ("destination",),
    "Failed": ("source", "destination"),
}
# What the source says that it enters.
# (agent.states.Source, but for the two in which no engine is)
STATES: Final = (
    "examining",
    "offering",
    "copying",
    "preparing",
    "pre-copy",
    "reconnecting",
    "freezing",
    "committing",
    "committed",
    "live",
    "migrated",
    "rolled-back",
)
# The steps of either journal (agent.states.Departure, Destination), by who makes them.
STEPS: Final = {
    "engine": ("open", "frozen", "committed", "live"),
    "destination": ("held", "rest", "committed", "released", "live", "void"),
}
STEP_MOMENTS: Final = ("before-step", "after-step")
MOMENTS: Final = ("before-send", "mid-send", "after-send", "after-receive")
SHORT, LONG, OVER_LIMIT = 0.1, 5.0, 4.0  # seconds; the last is longer than a freeze may take


def actions(side: Side) -> dict[str, tuple[Action, ...]]:
    """What may go wrong when the engine of `side` is at a point."""
    own, peer = (ENGINES[side],), (ENGINES[other(side)],)
    everything = (Send("source", SOURCE_ROLES), Send("destination", DESTINATION_ROLES))
    guarded = (Send("source", SOURCE_ROLES + GUARDIAN), Send("destination", DESTINATION_ROLES + GUARDIAN))
    return {
        "kill-self": (Send(side, own),),
        "kill-peer": (Send(other(side), peer),),
        "kill-both-engines": (Send(side, own), Send(other(side), peer)),
        "kill-front": (Send("source", ("front",)),),
        "kill-front-and-engine": (Send("source", ("front", "engine")),),
        "kill-service": (Send("source", ("service",)),),
        "kill-coordinator": (Send("source", ("coordinator", "connect")),),
        "kill-session": (Send("destination", ("session",)),),
        "kill-source": (everything[0],),
        "kill-destination": (everything[1],),
        "kill-all": everything,
        "kill-source-and-guardian": (guarded[0],),
        "kill-destination-and-guardian": (guarded[1],),
        "kill-all-and-guardians": guarded,
        "hold-self": (Hold(side, own, OVER_LIMIT),),
        "hold-self-briefly": (Hold(side, own, SHORT),),
        "hold-peer": (Hold(other(side), peer, OVER_LIMIT),),
        "hold-front": (Hold("source", ("front",), OVER_LIMIT),),
        "cut-briefly": (Cut(side, SHORT),),
        "cut": (Cut(side, LONG),),
        "cut-for-good": (Cut(side, None),),
        "cut-and-kill-self": (Cut(side, LONG), Send(side, own)),
        "cut-and-kill-peer": (Cut(side, LONG), Send(other(side), peer)),
        "abort": (Send("source", ("coordinator",), signal.SIGINT),),
        "process-dies": (Send("source", (PROCESS,)),),
    }


def _needs(message: str) -> dict[str, object]:
    """Of a case, so that the message is sent at all."""
    if message == "FileData":
        return {"options": ("--copy-files",), "file_missing": True}
    return {"options": ("--verify",)} if message in ("Verify", "Verified") else {}


# What breaks the link when another one can be had.
_BREAK: Final = Fault(Point("source", "engine", "state:pre-copy"), (Send("destination", ("session",)),))
# What makes an end give up, and say so.
_CAUSE: Final[dict[Side, Fault]] = {
    "source": Fault(
        Point("source", "engine", "state:pre-copy"), (Send("source", ("engine",), signal.SIGTERM),)
    ),
    "destination": Fault(
        Point("destination", "destination", "call:os:fork", since="after-receive:Prepare"),
        (Fail(errno.EAGAIN),),
    ),
}


def before_message(message: str, sender: Side) -> tuple[Fault, ...]:
    """What has to go wrong for the message to be sent at all."""
    if message == "Failed":
        return (_CAUSE[sender],)
    return (_BREAK,) if message == "Resumed" else ()


def before_state(state: str) -> tuple[Fault, ...]:
    """What has to go wrong for the state to be entered at all."""
    if state == "rolled-back":
        return (_CAUSE["source"],)
    return (_BREAK,) if state == "reconnecting" else ()


def at_messages() -> Iterator[Case]:
    for message, senders in SENDERS.items():
        for sender in senders:
            before = before_message(message, sender)
            for moment in MOMENTS:
                side = other(sender) if moment == "after-receive" else sender
                point = Point(side, ENGINES[side], f"{moment}:{message}")
                for what, done in actions(side).items():
                    name = f"{message}/{sender}/{moment}/{what}"
                    yield replace(Case(name, (*before, Fault(point, done))), **_needs(message))  # type: ignore[arg-type]


def at_states() -> Iterator[Case]:
    for state in STATES:
        needs = _needs("FileData") if state == "copying" else {}
        before = before_state(state)
        point = Point("source", "engine", f"state:{state}")
        for what, done in actions("source").items():
            name = f"state/{state}/{what}"
            yield replace(Case(name, (*before, Fault(point, done))), **needs)  # type: ignore[arg-type]


def at_steps() -> Iterator[Case]:
    """Each step of a journal, and what it takes that it is made."""
    for role, steps in STEPS.items():
        side: Side = "destination" if role == "destination" else "source"
        for step in steps:
            before = (_CAUSE["source"],) if step == "void" else ()
            for moment in STEP_MOMENTS:
                point = Point(side, role, f"{moment}:{step}")
                for what, done in actions(side).items():
                    yield Case(f"step/{role}-{step}/{moment}/{what}", (*before, Fault(point, done)))


def reconnecting() -> Iterator[Case]:
    """The link breaks in pre-copy; then something else fails, too, on the way to another one."""
    for role, side, call in _WHO_RECONNECTS:
        point = Point(side, role, f"call:{call}", since=_SINCE.get(role))
        for what, done in _way_actions(side, role).items():
            yield Case(f"reconnect/{role}/{call}/{what}", (_BREAK, Fault(point, done)))


_WHO_RECONNECTS: Final[tuple[tuple[str, Side, str], ...]] = (
    ("engine", "source", "socket:recv_fds"),
    ("front", "source", "socket:socketpair"),
    ("front", "source", "socket:socket.connect"),
    ("front", "source", "socket:send_fds"),
    ("resuming", "destination", "socket:socket.connect"),
    ("resuming", "destination", "socket:send_fds"),
    ("destination", "destination", "socket:socket.accept"),
    ("destination", "destination", "socket:recv_fds"),
)
_SINCE: Final = {"front": "call:agent.reconnecting:reopen"}


def in_doubt() -> Iterator[Case]:
    """The link breaks before Commit has left, or before it is answered; then something else fails, too."""
    for name, point in _DOUBTS.items():
        lost = Fault(point, (Send("destination", ("session",)),))
        for role, side, call in _WHO_SETTLES:
            settling = Point(side, role, f"call:{call}")
            for what, done in _way_actions(side, role).items():
                yield Case(f"doubt/{name}/{role}/{call}/{what}", (lost, Fault(settling, done)))


_DOUBTS: Final = {
    "Commit": Point("source", "engine", "before-send:Commit"),
    "Live": Point("destination", "destination", "before-send:Live"),
}
_WHO_SETTLES: Final[tuple[tuple[str, Side, str], ...]] = (
    ("recovery", "source", "fcntl:flock"),
    ("recovery", "source", "asyncio:run"),
    ("recovery", "source", "os:kill"),
    ("settling", "destination", "fcntl:flock"),
    ("settling", "destination", "os:kill"),
    ("settling", "destination", "os:rename"),
    ("settling", "destination", "os:unlink"),
)


def _way_actions(side: Side, role: str) -> dict[str, tuple[Action, ...]]:
    everybody = Send("source", (*SOURCE_ROLES, "guardian"))
    return {
        "kill-self": (Send(side, (role,)),),
        "kill-front": (Send("source", ("front",)),),
        "kill-source": (everybody,),
        "kill-destination": (Send("destination", DESTINATION_ROLES),),
        "kill-session": (Send("destination", ("session",)),),
        "hold-self": (Hold(side, (role,), OVER_LIMIT),),
        "cut": (Cut(side, LONG),),
        "cut-for-good": (Cut(side, None),),
        "EIO": (Fail(errno.EIO),),
    }


# --- calls that fail ---

_FILES: Final = {
    "os:open": errno.EMFILE,
    "io:open": errno.ENFILE,
    "builtins:open": errno.EMFILE,
    "os:write": errno.ENOSPC,
    "os:mkdir": errno.ENOSPC,
    "os:replace": errno.EROFS,
    "os:rename": errno.ENOSPC,
    "os:fsync": errno.EIO,
    "os:unlink": errno.EROFS,
    "os:pread": errno.EIO,
    "os:pwrite": errno.ENOMEM,
    "os:readlink": errno.ENOMEM,
    "os:listdir": errno.ENOMEM,
    "os:dup": errno.EMFILE,
    "mmap:mmap": errno.ENOMEM,
}
_SOCKETS: Final = {
    "socket:socket.__init__": errno.EMFILE,
    "socket:socket.setsockopt": errno.ENOMEM,
    "socket:socket.getsockopt": errno.ENOBUFS,
    "socket:socket.sendmsg": errno.EPIPE,
    "socket:socket.recv_into": errno.ECONNRESET,
    "socket:socket.bind": errno.EADDRINUSE,
    "socket:socket.connect": errno.ENETUNREACH,
    "agent.kernel.netlink:Netlink.request": errno.EPERM,
}
_TRACING: Final = {
    "agent.kernel.ptrace:seize": errno.EPERM,
    "agent.kernel.ptrace:interrupt": errno.EIO,
    "agent.kernel.ptrace:cont": errno.EIO,
    "agent.kernel.ptrace:get_registers": errno.EIO,
    "agent.kernel.ptrace:set_registers": errno.EIO,
    "agent.kernel.ptrace:set_options": errno.EINVAL,
    "agent.kernel.ptrace:detach": errno.EIO,
    "agent.kernel.ptrace:pending_signals": errno.EIO,
    "agent.kernel.memory:RemoteMemory.__init__": errno.EACCES,
    "agent.kernel.memory:RemoteMemory.read": errno.EIO,
    "agent.kernel.memory:RemoteMemory.write": errno.ENOMEM,
    "agent.kernel.memory:RemoteMemory.read_into": errno.ENOMEM,
    "agent.kernel.memory:RemoteMemory.write_from": errno.ENOMEM,
}
CALLS: Final[dict[str, dict[str, int]]] = {
    "engine": {
        **_FILES,
        **_SOCKETS,
        **_TRACING,
        "os:fork": errno.EAGAIN,
        "os:pidfd_open": errno.EMFILE,
        "socket:recv_fds": errno.ECONNRESET,
        "agent.kernel.pidfd:getfd": errno.EMFILE,
        "agent.kernel.pagemap:Pagemap.scan": errno.ENOMEM,
        "agent.kernel.userfaultfd:handshake": errno.EINVAL,
        "agent.kernel.userfaultfd:register": errno.ENOMEM,
    },
    "destination": {
        **_FILES,
        **_SOCKETS,
        **_TRACING,
        "os:fork": errno.EAGAIN,
        "os:readv": errno.EIO,
        "os:writev": errno.EPIPE,
        "os:link": errno.ENOSPC,
        "os:dup2": errno.EMFILE,
        "socket:socket.accept": errno.EMFILE,
        "socket:recv_fds": errno.ECONNRESET,
        "agent.kernel.clone:fork_as": errno.EAGAIN,
        "agent.kernel.clone:unshare": errno.ENOSPC,
    },
    "front": {
        "os:pipe": errno.EMFILE,
        "os:write": errno.EPIPE,
        "os:read": errno.EIO,
        "socket:socketpair": errno.EMFILE,
        "socket:send_fds": errno.ETOOMANYREFS,
        "socket:socket.connect": errno.ENETUNREACH,
        "subprocess:_fork_exec": errno.EAGAIN,
        "builtins:open": errno.EMFILE,
    },
    "service": {
        "subprocess:_fork_exec": errno.EAGAIN,
        "os:open": errno.ENOSPC,
        "os:write": errno.ENOSPC,
        "os:replace": errno.EROFS,
        "os:mkdir": errno.EROFS,
        "io:open": errno.EMFILE,
        "socket:socket.bind": errno.EADDRINUSE,
    },
    "connect": {"subprocess:_fork_exec": errno.EAGAIN, "os:open": errno.ENOSPC},
    "coordinator": {"subprocess:_fork_exec": errno.EAGAIN, "os:write": errno.EPIPE},
}
# From which point on, so that a case fails a call in this part of the way.
PHASES: Final[dict[str, tuple[str | None, ...]]] = {
    "engine": (
        None,
        "before-send:Offer",
        "before-send:Prepare",
        "after-receive:Prepared",
        "state:pre-copy",
        "state:reconnecting",
        "state:freezing",
        "before-send:Rebuild",
        "before-send:Complete",
        "state:committing",
        "after-send:Commit",
        "after-receive:Live",
    ),
    "destination": (
        None,
        "after-receive:Offer",
        "after-receive:Prepare",
        "after-receive:Layout",
        "before-send:Resumed",
        "after-receive:Rebuild",
        "after-receive:Complete",
        "after-receive:Commit",
        "before-send:Live",
        "after-send:Live",
    ),
}
TIMES: Final = (1, 3)
_AFTER_A_BREAK: Final = ("state:reconnecting", "before-send:Resumed")
_SIDES: Final[dict[str, Side]] = {"destination": "destination"}


def before_phase(since: str | None) -> tuple[Fault, ...]:
    """What has to go wrong for that part of the way to be gone at all."""
    return (_BREAK,) if since in _AFTER_A_BREAK else ()


def at_calls() -> Iterator[Case]:
    for role, calls in CALLS.items():
        for since in PHASES.get(role, (None,)):
            for call, number in calls.items():
                for nth in TIMES:
                    point = Point(_SIDES.get(role, "source"), role, f"call:{call}", nth, since)
                    name = f"call/{role}/{since or 'start'}/{call}/{nth}"
                    fresh = role in ("service", "connect")
                    faults = (*before_phase(since), Fault(point, (Fail(number),)))
                    yield Case(name, faults, new_service=fresh)


def matrix() -> list[Case]:
    """All of them, in a fixed order."""
    return [*at_messages(), *at_states(), *at_steps(), *reconnecting(), *in_doubt(), *at_calls()]


def stratum(case: Case) -> str:
    """Cases of one stratum are alike: of a sample, each has its share."""
    kind, *rest = case.name.split("/")
    return "/".join([kind, *rest[: 2 if kind == "call" else 1]])
