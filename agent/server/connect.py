"""`migrate-agent connect`: standard input and output become a connection to the service.

    migrate -- ssh --> migrate-agent connect -- unix socket --> migrate-agent serve

Where no service answers, one is started that ends by itself when it is not used any more. Any number of
`connect`s at once end up at one service: each may start one, and of those only the one that gets the lock
stays (`service.py`). A connection counts once the service has answered on it, so one that it closes while it
ends is tried again.

The first line on standard output is MARK and a `Connected`; what a login script printed before it is not
ours. From then on bytes pass both ways untouched.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Final

import msgspec

from agent.api import Connected, Health
from agent.bounds import MALFORMED
from agent.server.places import Places, UnsafeDirectory, is_of_root, make_private, open_log

MARK: Final = b"migrate-agent connected "
EXIT_FAILED: Final = 1
EXIT_LOCKED: Final = 75  # EX_TEMPFAIL: a service that finds another one
IDLE_EXIT: Final = 30  # seconds without a migration or a connection until a service on demand ends
START_TIMEOUT: Final = 30.0
ANSWER_TIMEOUT: Final = 10.0
PAUSE: Final = 0.02
_ASK: Final = b"GET /v1/health HTTP/1.1\r\nHost: agent\r\n\r\n"
_LENGTH: Final = re.compile(rb"(?i)^content-length: *([0-9]{1,6})\r?$", re.M)
# Of the session that happens to start the service; what matters of it comes with each request.
_OF_ONE_SESSION: Final = ("SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "SSH_AUTH_SOCK", "SSH_ORIGINAL_COMMAND")


class CannotConnect(Exception):
    """No service answers, and none can be started; the message is for a person."""


def bridge(places: Places, service: list[str], environment: dict[str, str]) -> int:
    """Be the connection until either end closes it; the exit status. `service` starts one if none answers."""
    try:
        connection, health = find(places, service, environment)
    except CannotConnect as error:
        print(f"migrate-agent: {error}", file=sys.stderr)
        return EXIT_FAILED
    hello = Connected(health=health, reached_at=reached_at())
    _write(1, MARK + msgspec.json.encode(hello) + b"\n")
    threading.Thread(target=_send, args=(connection,), daemon=True).start()
    with contextlib.suppress(OSError):
        _copy(connection.fileno(), 1)
    return 0


def reached_at() -> str | None:
    """This host's address at which the session's ssh connection arrived (ssh(1), SSH_CONNECTION)."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else None


def find(places: Places, service: list[str], environment: dict[str, str]) -> tuple[socket.socket, Health]:
    """A connection on which the service has answered; CannotConnect."""
    if is_of_root(places.socket.parent):  # not ours to start
        found = _answering(places)
        if found is None:
            raise CannotConnect(f"root's service does not answer at {places.socket}: root has to start it")
        return found
    try:
        make_private(places.socket.parent)
    except (OSError, UnsafeDirectory) as error:
        raise CannotConnect(str(error)) from error
    deadline = time.monotonic() + START_TIMEOUT
    started: subprocess.Popen[bytes] | None = None
    written = 0
    while (found := _answering(places)) is None:
        if time.monotonic() > deadline:
            raise CannotConnect(f"no service answers at {places.socket}, see {places.log}")
        if started is None or started.poll() == EXIT_LOCKED:
            started, written = _start(places, service, environment)
        elif started.poll() is not None:
            raise CannotConnect(f"the service cannot be started: {_last_words(places, written)}")
        time.sleep(PAUSE)
    return found


def _start(
    places: Places, service: list[str], environment: dict[str, str]
) -> tuple[subprocess.Popen[bytes], int]:
    """A service with a session and a log of its own, and how long the log was before."""
    environment = {name: value for name, value in environment.items() if name not in _OF_ONE_SESSION}
    try:
        log = open_log(places)
        try:
            process = subprocess.Popen(
                service, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/",
                start_new_session=True,
            )  # fmt: skip
            return process, os.fstat(log).st_size
        finally:
            os.close(log)
    except Exception as error:
        raise CannotConnect(f"the service cannot be started: {error}") from error


def _last_words(places: Places, written: int) -> str:
    with open(places.log, "rb") as log:
        log.seek(written)
        lines = log.read().decode("utf-8", "replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), f"it says nothing in {places.log}")


def _answering(places: Places) -> tuple[socket.socket, Health] | None:
    """A connection and the service's answer on it; None if there is no service, or it is about to end."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ANSWER_TIMEOUT)
        connection.connect(str(places.socket))
        connection.sendall(_ASK)
        health = _read_health(connection)
        connection.settimeout(None)
        return connection, health
    except (FileNotFoundError, ConnectionError):
        connection.close()
        return None
    except (OSError, *MALFORMED) as error:
        connection.close()
        raise CannotConnect(f"the service at {places.socket}: {error}") from error


def _read_health(connection: socket.socket) -> Health:
    """The body of one HTTP answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    length = _LENGTH.search(head)
    if length is None or not head.startswith(b"HTTP/1.1 200 "):
        raise OSError("what answers there is not this agent")
    while len(body) < int(length[1]):
        body += _receive(connection)
    return msgspec.json.decode(body, type=Health)


def _receive(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionResetError("closed without an answer")
    return data


def _send(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        try:
            _copy(0, connection.fileno())
        finally:  # whoever dies with something unread is no end but an error (unix(7), ECONNRESET)
            connection.shutdown(socket.SHUT_WR)


def _copy(reading: int, writing: int) -> None:
    while data := os.read(reading, 65536):
        _write(writing, data)


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
