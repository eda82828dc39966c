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
from agent.journal import Arrival, Entry, Overtaken, Rest
from agent.kernel import pidfd
from agent.resources import service_address, tcp

PATIENCE: Final = 5.0  # seconds that an agent which has committed may take to finish
_POLL: Final = 0.01
_DEATH: Final = 30.0  # that the kernel may take to end a process
_ANNOUNCEMENTS: Final = 3


class Verdict(msgspec.Struct, frozen=True):
    """`live`: the process went over, it is this host's. `void`: it never ran here and never will."""

    state: Literal["live", "void", "unknown"]
    evidence: str
    pid: int | None = None


def settle(migration: str, boot: str) -> Verdict:
    """Decide it. `boot`: the boot id that this host had when the migration began. OSError, ValueError."""
    if boot and boot != journal.boot_id():
        return Verdict("unknown", "this host was started anew since")
    while True:
        entry = journal.find(Arrival, migration)
        if entry is None:
            return Verdict("void", "there is no shadow of it")
        # Overtaken: its agent has just made another step
        with contextlib.suppress(Overtaken):
            return _STEPS[entry.state](entry)


def forget(migration: str) -> None:
    """The source knows: nobody will ask again."""
    entry = journal.find(Arrival, migration)
    if entry is not None:
        entry.remove()


def _held(entry: Entry[Arrival]) -> Verdict:
    entry.to("void")
    return _void(entry)


def _void(entry: Entry[Arrival]) -> Verdict:
    """Its agent would find out by itself; perhaps it hangs."""
    _end(entry.content.agent)
    _end(entry.content.process)
    return Verdict("void", "the shadow was not committed, and has been removed")


def _committed(entry: Entry[Arrival]) -> Verdict:
    """It lives if the agent came as far as to give up its hold on it, which would have killed it."""
    if _await_agent(entry) != entry.state:
        raise Overtaken
    if _await(lambda: not entry.content.process.lives(), 1.0):
        entry.to("void")
        return Verdict("void", "its agent died in the commit, and the shadow with it")
    entry.to("released")
    return _released(entry)


def _released(entry: Entry[Arrival]) -> Verdict:
    if _await_agent(entry) != entry.state:
        raise Overtaken
    rest = entry.rest()
    process = entry.content.process
    if rest is not None and process.lives():
        _finish(process.pid, rest)
    entry.to("live")
    return _live(entry)


def _live(entry: Entry[Arrival]) -> Verdict:
    process = entry.content.process
    if process.lives():
        return Verdict("live", f"it runs as process {process.pid}", process.pid)
    return Verdict("live", f"it has run as process {process.pid}, and has ended", process.pid)


_STEPS: Final[dict[str, Callable[[Entry[Arrival]], Verdict]]] = {
    "held": _held,
    "void": _void,
    "committed": _committed,
    "released": _released,
    "live": _live,
}


def _await_agent(entry: Entry[Arrival]) -> str | None:
    """Until the agent has made another step, or is dead; one that makes none is ended. The state then."""
    agent = entry.content.agent

    def moved() -> bool:
        return journal.state_of("incoming", entry.migration) != entry.state

    if not _await(lambda: moved() or not agent.lives(), PATIENCE):
        _end(agent)
    return journal.state_of("incoming", entry.migration)


def _end(task: journal.Task) -> None:
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


def _finish(pid: int, rest: Rest) -> None:
    """What its agent did not get to: addresses here, sockets live, and on it goes."""
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
