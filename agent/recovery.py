"""Puts in order on this host, the source, what a dead engine or a lost link has left of a migration.

    open       nothing was committed: the process runs, and what the engine left in it is undone
    frozen     likewise, but it is stopped
    committed  it is stopped, and the destination decides (`migrate-agent settle` there): void, and it goes on
               here; live, and the copy here is killed
    live       the destination has said so: the copy here is killed

All of it may be done again, by anybody, at any time: by the front of a migration whose engine has ended, the
guardian, the service when it starts and now and then, and a person (`migrate-agent recover`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Final, Literal, NamedTuple

import msgspec

from agent import cleanup, journal, states
from agent.api import Outcome, SshOptions
from agent.bounds import MALFORMED
from agent.cleanup import Busy
from agent.journal import Departure, Entry
from agent.resources import service_address
from agent.settle import Verdict
from agent.states import Recovering, recovered
from agent.tracee import InjectedCallFailed
from transport.link_errors import PASSING, LinkError
from transport.process import ProcessEnd

Live = Literal["source", "destination"]
CALL_OFF_TIMEOUT: Final = 4.0  # seconds that a destination is sought for that; one that is found may be slow
ANSWER_TIMEOUT: Final = 60.0  # seconds; the other end may have to wait for its agent
REMEMBERED: Final = 86400.0  # seconds that a destination is sought to be told how it ended
_DEATH: Final = 30.0
_PAUSE: Final = 0.2  # seconds between two attempts
_LIVES: Final[dict[Live, str]] = {"source": "void", "destination": "live"}


class Recovery(msgspec.Struct, frozen=True):
    """What was found and done, in words; and how the migration ended by that, None if there was nothing to
    do.
    """

    outcome: Outcome | None
    message: str


class Asked(NamedTuple):
    """The destination's word; what tells it that nobody will ask again; the end of whoever said it."""

    verdict: Verdict
    settled: Callable[[], None]
    ended: asyncio.Future[ProcessEnd]


def recover(migration: str, live: Live | None = None) -> Recovery:
    """Put it in order. `live` is where it runs, by a person who knows; else the destination is asked.

    Busy if an engine works on it, or something cannot be undone now. OSError, InjectedCallFailed.
    """
    with journal.put_in_order("outgoing", migration):
        entry = journal.find(Departure, migration)
        if entry is None:
            return Recovery(None, "nothing is left of it here")
        if entry.content.agent.lives():
            raise Busy(f"an engine works on it (process {entry.content.agent.pid})")
        decision = recovered(entry.state, None if live is None else _LIVES[live])
        if decision is Recovering.ASK:
            return asyncio.run(_by_destination(entry))
        why = "nothing had been committed" if live is None else f"by a person's word: {live}"
        done = _act(entry, decision, why)
    if entry.content.awaited and decision is Recovering.RESUME and live is None:
        call_off(entry.content.destination, entry.content.ssh, migration)
    return done


async def _by_destination(entry: Entry[Departure]) -> Recovery:
    name, content = entry.content.destination, entry.content
    done: Recovery | None = None
    try:
        async with _verdict(name, content.ssh, entry.migration, content.boot) as asked:
            why = f"{name}: {asked.verdict.evidence}"
            done = _act(entry, recovered(entry.state, asked.verdict.state), why, keep=True)
            if done.outcome is not Outcome.IN_DOUBT:
                asked.settled()
        if done.outcome is Outcome.MIGRATED and asked.ended.result().clean:
            entry.remove()  # it has heard that nobody will ask again; else it is told another time
        return done
    except (LinkError, TimeoutError, EOFError) as error:
        if done is not None:
            return done
        keep = entry.age() < REMEMBERED  # it keeps its journal until it is told that nobody will ask
        return _act(entry, recovered(entry.state, "unknown"), f"{name} cannot be asked: {error}", keep)


def _act(entry: Entry[Departure], decision: Recovering, why: str, keep: bool = False) -> Recovery:
    match decision:
        case Recovering.RESUME:
            return _roll_back(entry, why)
        case Recovering.BURY:
            return _bury(entry, why, keep)
        case _:
            return Recovery(Outcome.IN_DOUBT, why)


def call_off(destination: str, options: SshOptions, migration: str) -> None:
    """Tell a destination that may wait for its source to come back that it will not.

    It would find out by itself, later: that it cannot be reached is no error.
    """
    asyncio.run(_call_off(destination, options, migration))


async def _call_off(destination: str, options: SshOptions, migration: str) -> None:
    deadline = asyncio.get_running_loop().time() + CALL_OFF_TIMEOUT
    with contextlib.suppress(LinkError, TimeoutError, EOFError, OSError):
        while not await _told(destination, options, migration, deadline):
            await asyncio.sleep(_PAUSE)


async def _told(destination: str, options: SshOptions, migration: str, reach_by: float) -> bool:
    """Whether the destination could be. LinkError, TimeoutError, EOFError: nor can it be in a moment."""
    try:
        async with _verdict(destination, options, migration, "", reach_by) as asked:
            if asked.verdict.state == "void":
                asked.settled()
    except PASSING:
        return False
    return True


@contextlib.asynccontextmanager
async def _verdict(
    destination: str, options: SshOptions, migration: str, boot: str, reach_by: float | None = None
) -> AsyncIterator[Asked]:
    """LinkError, TimeoutError, EOFError. `reach_by` is the loop's time."""
    from transport import ssh
    from transport.target import parse_host

    target, said = parse_host(destination), [""]
    if options.auth_socket:
        os.environ["SSH_AUTH_SOCK"] = options.auth_socket
    ours, theirs = socket.socketpair()
    command = ssh.agent_command(options, ("settle", migration, "--boot", boot))
    async with asyncio.timeout(ANSWER_TIMEOUT):
        async with asyncio.timeout_at(reach_by):
            connection = await ssh.connect(target, options)
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
            bridge = await ssh.open_bridge(connection, target, command, theirs, said.append)
            line = await _line(reader)
            if not line:
                raise EOFError(f"its agent does not settle it: {said[-1] or 'no answer'}")
            yield Asked(verdict_of(line), lambda: writer.write(b"done\n"), bridge.ended)
            writer.write_eof()
            await bridge.ended
        finally:
            connection.abort()


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.readline()
    except ValueError:  # beyond the reader's limit
        raise EOFError("what its agent answers is not understood") from None


def verdict_of(line: bytes) -> Verdict:
    """EOFError if it is none."""
    try:
        return msgspec.json.decode(line, type=Verdict)
    except MALFORMED as error:
        raise EOFError(f"what its agent answers is not understood: {error}") from None


def _roll_back(entry: Entry[Departure], why: str) -> Recovery:
    """It goes on here."""
    content = entry.content
    if entry.state is states.Departure.COMMITTED:
        for address in content.addresses:
            service_address.restore(address)
    if not content.process.lives():
        entry.remove()
        return Recovery(Outcome.ROLLED_BACK, f"{why}; process {content.process.pid} has ended by itself")
    held = entry.state is not states.Departure.OPEN
    done = cleanup.clean(content.process.pid, content.process.born, resume=held)
    entry.remove()
    return Recovery(Outcome.ROLLED_BACK, f"{why}; cleaned up ({', '.join(done) or 'nothing was left'})")


def _bury(entry: Entry[Departure], why: str, keep: bool) -> Recovery:
    """It lives elsewhere: the copy here ends without a word to its peers, as its sockets are held."""
    process = entry.content.process
    for address in entry.content.addresses:
        service_address.withdraw(address)
    deadline = time.monotonic() + _DEATH
    while process.lives():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Busy(f"the copy here, process {process.pid}, does not end")
        time.sleep(0.01)
    if not keep:
        entry.remove()
    elif entry.state is not states.Departure.LIVE:
        entry.to(states.Departure.LIVE)
    return Recovery(Outcome.MIGRATED, f"{why}; the copy here is gone")


def main(migration: str, live: Live | None) -> int:
    """One Recovery as a line of JSON. The exit status: 0 if it is in order, cleanup.EXIT_BUSY, 1."""
    try:
        done = recover(migration, live)
    except Busy as error:
        print(error, file=sys.stderr)
        return cleanup.EXIT_BUSY
    except (OSError, ValueError, InjectedCallFailed, RuntimeError) as error:
        print(f"migration {migration}: {error}", file=sys.stderr)
        return 1
    print(msgspec.json.encode(done).decode())
    return cleanup.EXIT_BUSY if done.outcome is Outcome.IN_DOUBT else 0
