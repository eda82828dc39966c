"""How an engine gets a new link from its front, which opens links: over a socket pair with messages.

engine -- event: reconnecting --> front -- ssh --> destination
       <-- the new link's socket (SCM_RIGHTS), or why there is none --
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final

from transport.frames import LinkClosed

_LINK: Final = b"link"
_MAX_REASON: Final = 4096
_GLANCE: Final = 0.1  # seconds between two looks whether somebody has given up


class Asking:
    """The engine's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def next(self, aborted: Callable[[], bool]) -> socket.socket | None:
        """The next link; None if `aborted`, LinkClosed if there is none."""
        while not select.select([self._socket], [], [], _GLANCE)[0]:
            if aborted():
                return None
        try:
            said, links, _, _ = socket.recv_fds(self._socket, _MAX_REASON, 1)
        except OSError as error:
            raise LinkClosed(f"the front is gone: {error}") from error
        if links:
            return socket.socket(fileno=links[0])
        raise LinkClosed(said.decode("utf-8", "replace") or "the front is gone")


class Giving:
    """The front's end."""

    def __init__(self) -> None:
        self._socket, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def give(self, link: socket.socket) -> None:
        """It is the engine's from then on."""
        with link:
            self._send(_LINK, [link.fileno()])

    def refuse(self, why: str) -> None:
        self._send(why.encode()[:_MAX_REASON] or b"no reason", [])

    def _send(self, said: bytes, links: list[int]) -> None:
        try:
            socket.send_fds(self._socket, [said], links)
        except OSError:  # an engine that is gone asks for nothing; another one must not wait
            self._socket.close()

    def close(self) -> None:
        self._socket.close()
        self.theirs.close()
