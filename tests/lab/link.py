"""What lab processes say to each other while a lab comes up: one JSON object a line on a socketpair."""

from __future__ import annotations

import json
import socket
from typing import Any

from lab.plan import LabError


class Link:
    """One end. Messages are {"step": NAME, ...} or {"error": MESSAGE}."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._file = end.makefile("r", encoding="utf-8")

    @classmethod
    def pair(cls) -> tuple[Link, Link]:
        ours, theirs = socket.socketpair()
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._socket.fileno()

    def say(self, step: str, **content: Any) -> None:
        """Tell the other end. Raises LabError if it is gone."""
        self._send({"step": step, **content})

    def fail(self, message: str) -> None:
        self._send({"error": message})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as err:
            raise LabError("the other end is gone") from err

    def expect(self, step: str) -> dict[str, Any]:
        """Wait for the other end to say `step`. Raises LabError with its error, or if it is gone."""
        line = self._file.readline()
        message: dict[str, Any] = json.loads(line) if line else {"error": f"ended before {step!r}"}
        if message.get("step") != step:
            raise LabError(message.get("error", f"said {message!r} where {step!r} was due"))
        return message

    def close(self) -> None:
        self._file.close()
        self._socket.close()
