"""Has a migration put in order by a process of its own (`agent.recovery`), and waits for what comes of it."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Callable
from typing import Final

import msgspec

from agent import launch
from agent.api import Outcome
from agent.bounds import MALFORMED
from agent.recovery import Live, Recovery

TIMEOUT: Final = 60.0  # seconds that a migration may be in doubt before its report says so
_PAUSE: Final = 2.0


async def settle(name: str, say: Callable[[str], None], timeout: float = TIMEOUT) -> Recovery:
    """What became of migration `name`, once that is known; `say` hears why it is not yet.

    In doubt if the destination could not be asked, or the engine has not ended, for `timeout` seconds.
    """
    loop = asyncio.get_running_loop()
    deadline, last = loop.time() + timeout, ""
    while True:
        done = await recover(name)
        if done.outcome is not Outcome.IN_DOUBT or loop.time() > deadline:
            return done
        if done.message != last:
            last = done.message
            say(f"in doubt: {last}; trying again")
        await asyncio.sleep(_PAUSE)


async def recover(name: str, live: Live | None = None) -> Recovery:
    """Once."""
    command, environment = launch.module("agent.main")
    options = ["--live", live] if live else []
    process = await asyncio.create_subprocess_exec(
        *command, "recover", *options, name, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, env=environment
    )
    output, errors = await process.communicate()
    try:
        return msgspec.json.decode(output, type=Recovery)
    except MALFORMED:
        why = errors.decode("utf-8", "replace").strip().rpartition("\n")[2]
        return Recovery(Outcome.IN_DOUBT, why or f"the recovery ended with status {process.returncode}")
