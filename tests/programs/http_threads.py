#!/usr/bin/env python3
"""A CPython program with threads and an HTTP server: `http_threads.py ADDRESS PORT`.

GET /NUMBER answers "NUMBER COUNT DIGEST\\n" and then the body: COUNT is how many requests this process has
answered, DIGEST is the SHA-256 of NUMBER, the body a text made from it. Other threads compute, sleep,
allocate and pass messages meanwhile; GET /health says "ok" while they all do.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import random
import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

served = itertools.count(1)
alarms: list[str] = []
seen: dict[str, float] = {}


def body_of(number: bytes) -> bytes:
    """Some 10 KiB."""
    return hashlib.sha256(number).hexdigest().encode() * 160


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        number = self.path.strip("/").encode()
        if number == b"health":
            self.answer(self.health())
        else:
            digest = hashlib.sha256(number).hexdigest().encode()
            self.answer(b"%b %d %b\n" % (number, next(served), digest) + body_of(number))

    def health(self) -> bytes:
        late = [name for name, at in seen.items() if time.monotonic() - at > 10]
        return f"{late} {alarms}".encode() if late or alarms else b"ok"

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def compute() -> None:
    """The same sum again and again: it may never differ."""
    wanted = sum(i * i for i in range(20_000))
    while True:
        if sum(i * i for i in range(20_000)) != wanted:
            alarms.append("sum")
        seen["compute"] = time.monotonic()
        time.sleep(0.05)


def allocate() -> None:
    generator = random.Random(1)
    kept: dict[int, tuple[bytes, bytes]] = {}
    while True:
        key = generator.randrange(200)
        content = generator.randbytes(generator.randrange(1, 50_000))
        if key in kept and hashlib.md5(kept[key][0]).digest() != kept[key][1]:
            alarms.append("bytes")
        kept[key] = (content, hashlib.md5(content).digest())
        seen["allocate"] = time.monotonic()
        time.sleep(0.005)


def produce(messages: queue.Queue[int]) -> None:
    for number in itertools.count():
        messages.put(number)
        seen["produce"] = time.monotonic()
        time.sleep(0.01)


def consume(messages: queue.Queue[int]) -> None:
    for wanted in itertools.count():
        if messages.get() != wanted:
            alarms.append("queue")
        seen["consume"] = time.monotonic()


def main() -> None:
    messages: queue.Queue[int] = queue.Queue(5)
    for work in (compute, allocate, partial(produce, messages), partial(consume, messages)):
        threading.Thread(target=work, daemon=True).start()
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()


if __name__ == "__main__":
    main()
