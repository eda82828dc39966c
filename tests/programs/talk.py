#!/usr/bin/env python3
"""Talk to a server on one connection, and never on a second: `talk.py KIND HOST:PORT --until-file F`.

Kinds:
    counting    HTTP of http_threads.py and http_server.js: the count goes up by one, digest and body fit
    file        HTTP: GET /file is the content of `--content PATH`, by SHA-256
    memcached   set, get, incr: each answer is what this client, who owns its keys, expects

Prints one JSON object: requests, failures, longest_stall_ms and longest_stall_at by CLOCK_REALTIME. Exit
status 1 if anything was wrong: there is no reconnecting, a lost connection is a failure.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path


class Failure(Exception):
    """Something that a client must not see."""


class Connection:
    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise Failure("the server closed the connection")
        self.buffer += data

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            self._more()
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    def exactly(self, length: int) -> bytes:
        while len(self.buffer) < length:
            self._more()
        found, self.buffer = self.buffer[:length], self.buffer[length:]
        return found


def require(condition: bool, what: str) -> None:
    if not condition:
        raise Failure(what)


def get(connection: Connection, path: str) -> bytes:
    """The content at `path`; the connection stays open."""
    connection.send(f"GET {path} HTTP/1.1\r\nHost: service\r\nConnection: keep-alive\r\n\r\n".encode())
    status, *fields = connection.until(b"\r\n\r\n").decode().split("\r\n")
    require(status.split(" ")[1] == "200", status)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in fields)}
    if headers.get("transfer-encoding") == "chunked":
        return read_chunks(connection)
    return connection.exactly(int(headers["content-length"]))


def read_chunks(connection: Connection) -> bytes:
    content = b""
    while length := int(connection.until(b"\r\n"), 16):
        content += connection.exactly(length)
        connection.until(b"\r\n")
    connection.until(b"\r\n")
    return content


Turn = Callable[[int], None]


def counting(connection: Connection, options: argparse.Namespace) -> Turn:
    def turn(number: int) -> None:
        if number % 20 == 0:
            answer = get(connection, "/health")
            require(answer == b"ok", f"health: {answer[:200]!r}")
            return
        head, _, body = get(connection, f"/{number}").partition(b"\n")
        digest = hashlib.sha256(b"%d" % number).hexdigest().encode()
        # Every 20th request asked for something else.
        require(head == b"%d %d %b" % (number, number - number // 20, digest), f"answer {number}: {head!r}")
        require(body == digest * 160, f"body of answer {number}")

    return turn


def file(connection: Connection, options: argparse.Namespace) -> Turn:
    wanted = hashlib.sha256(options.content.read_bytes()).digest()

    def turn(number: int) -> None:
        require(hashlib.sha256(get(connection, "/file")).digest() == wanted, f"content of answer {number}")

    return turn


def memcached(connection: Connection, options: argparse.Namespace) -> Turn:
    generator, kept, count = random.Random(5), {}, [0]
    connection.send(b"set count 0 0 1\r\n0\r\n")
    require(connection.until(b"\r\n") == b"STORED", "set")

    def turn(number: int) -> None:
        key, value = generator.randrange(2000), generator.randbytes(generator.randrange(10, 9000))
        connection.send(b"set key%d 7 0 %d\r\n%b\r\n" % (key, len(value), value))
        answer = connection.until(b"\r\n")
        require(answer == b"STORED", f"set: {answer!r}")
        kept[key] = value
        wanted = generator.choice(list(kept))
        connection.send(b"get key%d\r\n" % wanted)
        head = connection.until(b"\r\n")
        require(head == b"VALUE key%d 7 %d" % (wanted, len(kept[wanted])), f"get: {head!r}")
        require(connection.exactly(len(kept[wanted])) == kept[wanted], f"value of key {wanted}")
        require(connection.exactly(7) == b"\r\nEND\r\n", "end of a value")
        connection.send(b"incr count 1\r\n")
        count[0] += 1
        require(connection.until(b"\r\n") == b"%d" % count[0], f"incr {count[0]}")

    return turn


KINDS: dict[str, Callable[[Connection, argparse.Namespace], Turn]] = {
    "counting": counting,
    "file": file,
    "memcached": memcached,
}


def connect(address: tuple[str, int]) -> Connection:
    """The server may have been started this moment; once there was a connection there is no second."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return Connection(address)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def talk(turn: Turn, options: argparse.Namespace, result: dict[str, object]) -> None:
    longest, number = 0.0, 0
    while not options.until_file.exists():
        number += 1
        begin = time.time()
        turn(number)
        took = (time.time() - begin) * 1e3
        if took > longest:
            longest = took
            result.update(longest_stall_ms=round(took, 3), longest_stall_at=time.time())
        result["requests"] = number
        if options.progress:
            options.progress.write_text(f"{number}\n")
        time.sleep(options.pause)


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--until-file", type=Path, required=True)
    parser.add_argument("--progress", type=Path, help="file that holds the number of right answers so far")
    parser.add_argument("--content", type=Path)
    parser.add_argument("--pause", type=float, default=0.002, help="seconds between two requests")
    options = parser.parse_args()
    host, _, port = options.address.rpartition(":")
    result: dict[str, object] = {"failures": [], "requests": 0}
    try:
        connection = connect((host, int(port)))
        talk(KINDS[options.kind](connection, options), options, result)
    except (Failure, OSError) as problem:
        result["failures"] = [f"after {result['requests']} requests: {type(problem).__name__}: {problem}"]
    print(json.dumps(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
