"""What became of a migration on this host, the destination, after its source lost sight of it:
`migrate-agent settle`.

The answer is final. A shadow that was not committed is void from then on, whatever its agent still
receives; a process that was committed is brought to life if its agent died over that. So the source may let
its copy run on, or kill it. See `agent/journal.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Final, Literal

import msgspec

from agent import journal
from agent.journal import Arrival, Entry, Overtaken, Rest, Task
from agent.kernel import pidfd, procfs
from agent.resources import service_address, tcp
from agent.states import Destination, Settling, settled

PATIENCE: Final = 5.0  # seconds that an agent which has committed may take to finish
_POLL: Final = 0.01
_DEATH: Final = 30.0  # that the kernel may take to end a process
_DYING: Final = 2.0
_ANNOUNCEMENTS: Final = 3


class Verdict(msgspec.Struct, frozen=True):
    """`live`: the process went over, it is this host's. `void`: it never ran here and never will."""

    state: Literal["live", "void", "unknown"]
    evidence: str
    pid: int | None = None


def settle(migration: str, boot: str = "") -> Verdict:
    """Decide it. `boot`: the boot id that this host had when the migration began. OSError, ValueError."""
    if boot and boot != journal.boot_id():
        return Verdict("unknown", "this host was started anew since")
    with journal.put_in_order("incoming", migration):
        while True:
            entry = journal.find(Arrival, migration)
            with contextlib.suppress(Overtaken):  # its agent has just made another step
                if (verdict := _step(entry)) is not None:
                    return verdict


def sweep() -> None:
    """Settle what dead agents have left. Entries that are live stay: their source is to be told."""
    for entry in list(journal.every(Arrival)):
        if entry.state is not Destination.LIVE and not entry.content.agent.lives():
            with contextlib.suppress(OSError, ValueError):  # somebody else does, or will
                if settle(entry.migration).state == "void":
                    forget(entry.migration)


def _step(entry: Entry[Arrival] | None) -> Verdict | None:
    """Do what is to be done next; the verdict once there is one. Overtaken."""
    if entry is None:
        return Verdict("void", "there is no shadow of it")
    agent, process = entry.content.agent, entry.content.process
    # looked at in this order: with its agent, a shadow that it held is dead
    working = agent.lives()
    living: bool = _lives_on(process)
    match settled(entry.state, working, living):
        case Settling.WAIT:
            _await_step(entry)
        case Settling.MAKE_VOID:
            entry.to(Destination.VOID)
        case Settling.VOID:
            _end(agent)  # which would find out by itself; perhaps it hangs
            _end(process)
            return Verdict("void", "the shadow was never let go, and has been removed")
        case Settling.FINISH:
            _finish(entry)
        case Settling.LIVE:
            ended = "" if living else ", and has ended"
            return Verdict("live", f"it lives as process {process.pid}{ended}", process.pid)
    return None


def forget(migration: str) -> None:
    """The source knows: nobody will ask again, and an agent that still waits for it waits in vain."""
    with journal.put_in_order("incoming", migration):
        entry = journal.find(Arrival, migration)
        if entry is not None:
            agent = entry.content.agent
            if not _await(lambda: not agent.lives(), _DYING):
                _end(agent)
            entry.remove()


def _await_step(entry: Entry[Arrival]) -> None:
    """Until its agent has made another one, or is dead; one that makes none is ended."""
    agent = entry.content.agent

    def moved() -> bool:
        return journal.state_of("incoming", entry.migration) != str(entry.state)

    if not _await(lambda: moved() or not agent.lives(), PATIENCE):
        _end(agent)


def _lives_on(process: Task) -> bool:
    """A process that is being killed takes a moment."""
    return process.lives() and not _await(lambda: not process.lives(), _DYING if _is_killed(process) else 0.0)


def _is_killed(process: Task) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return bool(int(procfs.status(process.pid)["ShdPnd"], 16) >> (signal.SIGKILL - 1) & 1)
    return True


def _end(task: Task) -> None:
    """TimeoutError if the kernel does not end it."""
    if task.lives():
        with contextlib.suppress(ProcessLookupError):
            os.kill(task.pid, signal.SIGKILL)
    if not _await(lambda: not task.lives(), _DEATH):
        raise TimeoutError(f"process {task.pid} does not end")


def _await(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL)
    return True


def _finish(entry: Entry[Arrival]) -> None:
    """What its agent did not get to: addresses here, sockets live, and on it goes."""
    if entry.state == Destination.COMMITTED:
        entry.to(Destination.RELEASED)
    rest = entry.rest()
    if rest is not None and entry.content.process.lives():
        _let_go(entry.content.process.pid, rest)
    entry.to(Destination.LIVE)


def _let_go(pid: int, rest: Rest) -> None:
    for address, interface in rest.addresses:
        service_address.install(address, interface)
    process = pidfd.open_process(pid)
    try:
        for one in rest.sockets:
            ours = pidfd.getfd(process, one.fd)
            try:
                tcp.activate(ours, one.state)
            finally:
                os.close(ours)
    finally:
        os.close(process)
    if not rest.leave_stopped:
        os.kill(pid, signal.SIGCONT)
    for address, interface in rest.addresses * _ANNOUNCEMENTS:
        service_address.announce(address, interface)


def main(migration: str, boot: str) -> int:
    """One Verdict as a line of JSON; "done" on standard input means that nobody will ask again."""
    try:
        verdict = settle(migration, boot)
    except (OSError, ValueError) as error:
        print(f"migration {migration} cannot be settled: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(verdict).decode(), flush=True)
    if sys.stdin.readline().strip() == "done":
        forget(migration)
    return 0
