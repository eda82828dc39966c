"""A new link for a migration that has lost its own in pre-copy: to the agent that waits over there with the
shadow.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

from agent.api import SshOptions
from transport import link_errors, ssh
from transport.link import Link, socket_pair
from transport.ssh import OnLine
from transport.target import HostTarget

_PAUSE: Final = 0.2  # seconds between two attempts


async def reopen(
    target: HostTarget, options: SshOptions, name: str, patience: float, on_stderr: OnLine
) -> tuple[Link, socket.socket]:
    """A link to the agent of migration `name`, and the engine's end of it.

    LinkError: the latest reason after `patience` seconds, or at once if another attempt cannot help.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + patience
    while True:
        ours, theirs = socket_pair()
        try:
            async with asyncio.timeout_at(deadline):
                return await ssh.open_link(target, options, ours, on_stderr, resume=name), theirs
        except TimeoutError:
            theirs.close()
            raise link_errors.HostUnreachable(str(target), f"no answer within {patience:g} s") from None
        except link_errors.PASSING:
            theirs.close()
            if loop.time() + _PAUSE > deadline:
                raise
        except BaseException:
            theirs.close()
            raise
        await asyncio.sleep(_PAUSE)
