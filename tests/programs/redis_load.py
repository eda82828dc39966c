#!/usr/bin/env python3
"""A redis client that is strict: it never reconnects, and one wrong or missing answer is a failure.

    redis_load.py fill   HOST:PORT --state FILE --megabytes N   load keys with values
    redis_load.py run    HOST:PORT --state FILE --seconds S     clients in a read/write loop
    redis_load.py verify HOST:PORT --state FILE                 every acknowledged write is there
    redis_load.py digest HOST:PORT --state FILE                 digest of the keys that `run` never touches

Each prints one JSON object; exit status 1 if "failures" is not empty. Only the standard library, raw RESP.

Values follow from the key and a generation, so the state file (what was acknowledged) stays small: key i had
its generation g written, counter c was incremented n times. `run` writes the first `--hot` share of the keys;
each client has keys of its own there, so it knows what a GET must answer at any time. Latencies are by
CLOCK_REALTIME, which no time namespace shifts; a stall is the time between a request and its answer.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import itertools
import json
import random
import socket
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POOL = random.Random(4711).randbytes(4 << 20)
TEXT = (b"the quick brown fox jumps over the lazy dog; " * 200)[:8192]
SMALLEST, LARGEST = 1024, 4096
BATCH = 256

Answer = bytes | int | None | list[Any]


class Failure(Exception):
    """Something that a client must not see."""


def value_of(key: int, generation: int) -> bytes:
    """What key `key` holds after its `generation`th write: random bytes, or (one in four) text."""
    choice = zlib.crc32(b"%d/%d" % (key, generation)) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    length = SMALLEST + choice % (LARGEST - SMALLEST)
    head = b"%d:%d:" % (key, generation)
    source = TEXT if choice >> 62 == 0 else POOL
    start = (choice >> 20) % (len(source) - LARGEST)
    return head + source[start : start + length - len(head)]


def key_name(key: int) -> bytes:
    return b"key:%d" % key


def counter_name(client: int) -> bytes:
    return b"counter:%d" % client


def encode(*words: bytes) -> bytes:
    """One command as an array of bulk strings (RESP 2)."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Decoder:
    """Answers out of a stream of bytes, however it is cut."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Answer]:
        self.buffer += data
        while (found := self._parse(0)) is not None:
            answer, end = found
            del self.buffer[:end]
            yield answer

    def _parse(self, at: int) -> tuple[Answer, int] | None:
        end = self.buffer.find(b"\r\n", at)
        if end < 0:
            return None
        kind, rest = self.buffer[at : at + 1], bytes(self.buffer[at + 1 : end])
        if kind == b"+":
            return rest, end + 2
        if kind == b":":
            return int(rest), end + 2
        if kind == b"$":
            return self._parse_bulk(int(rest), end + 2)
        if kind == b"*":
            return self._parse_array(int(rest), end + 2)
        raise Failure(f"the server answered {bytes(kind) + rest!r}")

    def _parse_bulk(self, length: int, at: int) -> tuple[Answer, int] | None:
        if length < 0:
            return None, at
        if len(self.buffer) < at + length + 2:
            return None
        return bytes(self.buffer[at : at + length]), at + length + 2

    def _parse_array(self, count: int, at: int) -> tuple[Answer, int] | None:
        items: list[Answer] = []
        for _ in range(count):
            found = self._parse(at)
            if found is None:
                return None
            items.append(found[0])
            at = found[1]
        return items, at


class Link:
    """One blocking connection for the commands that are not timed."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.socket = socket.create_connection(address, timeout=120)
        self.decoder = Decoder()

    def ask(self, commands: Sequence[bytes]) -> list[Answer]:
        """Send all, then read as many answers."""
        self.socket.sendall(b"".join(commands))
        answers: list[Answer] = []
        while len(answers) < len(commands):
            data = self.socket.recv(1 << 20)
            if not data:
                raise Failure("the server closed the connection")
            answers.extend(self.decoder.feed(data))
        return answers


@dataclass
class State:
    """What the server has acknowledged."""

    keys: int = 0
    generations: dict[int, int] = field(default_factory=dict)  # of keys that were written again
    counters: dict[int, int] = field(default_factory=dict)
    hot: int = 0  # keys below this number may be written by `run`

    @classmethod
    def load(cls, path: Path) -> State:
        raw = json.loads(path.read_text())
        return cls(
            keys=raw["keys"],
            hot=raw["hot"],
            generations={int(key): value for key, value in raw["generations"].items()},
            counters={int(key): value for key, value in raw["counters"].items()},
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.__dict__))


@dataclass
class Stall:
    ms: float = 0.0
    at: float = 0.0  # when the answer came
    client: int = -1
    command: str = ""


@dataclass
class Pending:
    sent: float
    command: str
    expected: Answer
    key: int = -1


class Client(asyncio.Protocol):
    """One connection with a few requests in flight, each with the answer that it must get."""

    def __init__(self, number: int, state: State, options: argparse.Namespace) -> None:
        self.number, self.state, self.depth = number, state, options.depth
        self.mine = range(number, state.hot, options.clients)
        self.random = random.Random(options.seed * 1000 + number)
        self.decoder = Decoder()
        self.pending: deque[Pending] = deque()
        self.issued_generation: dict[int, int] = {}
        self.issued_counter = state.counters.get(number, 0)
        self.worst = Stall(client=number)
        self.over: dict[int, int] = dict.fromkeys((5, 20, 50, 100, 200, 500, 1000), 0)
        self.requests = self.written = 0
        self.latency_sum = 0.0
        self.stopping = False
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            reason = exc or "closed by the server"
            self.done.set_exception(Failure(f"client {self.number}: connection lost: {reason}"))

    def data_received(self, data: bytes) -> None:
        now = time.time()
        try:
            for answer in self.decoder.feed(data):
                self._take(answer, now)
        except Failure as failure:
            if not self.done.done():
                self.done.set_exception(failure)
        self._finish_if_idle()

    def stop(self) -> None:
        """Send nothing more; done when the last answer is in."""
        self.stopping = True
        self._finish_if_idle()

    def _finish_if_idle(self) -> None:
        if self.stopping and not self.pending and not self.done.done():
            self.done.set_result(None)

    def _take(self, answer: Answer, now: float) -> None:
        if not self.pending:
            raise Failure(f"client {self.number}: an answer that nobody asked for")
        request = self.pending.popleft()
        if answer != request.expected:
            wrong = f"{short(answer)}, not {short(request.expected)}"
            raise Failure(f"client {self.number}: {request.command} {request.key}: {wrong}")
        self._account(request, now)
        if request.command == "SET":
            self.state.generations[request.key] = self.state.generations.get(request.key, 0) + 1
        elif request.command == "INCR":
            self.state.counters[self.number] = self.state.counters.get(self.number, 0) + 1

    def _account(self, request: Pending, now: float) -> None:
        ms = (now - request.sent) * 1e3
        self.requests += 1
        self.latency_sum += ms
        if ms > self.worst.ms:
            self.worst = Stall(ms=ms, at=now, client=self.number, command=request.command)
        for limit in self.over:
            self.over[limit] += ms > limit

    def send_some(self) -> int:
        """Fill up to the depth; returns the bytes of values sent."""
        assert self.transport is not None
        parts: list[bytes] = []
        before = self.written
        while len(self.pending) < self.depth and not self.stopping:
            parts.append(self._next_request())
        if parts:
            self.transport.write(b"".join(parts))
        return self.written - before

    def _next_request(self) -> bytes:
        choice = self.random.random()
        now = time.time()
        if choice < 0.1:
            self.issued_counter += 1
            self.pending.append(Pending(now, "INCR", self.issued_counter))
            return encode(b"INCR", counter_name(self.number))
        key = self.random.choice(self.mine)
        generation = self.issued_generation.get(key, self.state.generations.get(key, 0))
        if choice < 0.4:
            self.pending.append(Pending(now, "GET", value_of(key, generation), key))
            return encode(b"GET", key_name(key))
        self.issued_generation[key] = generation + 1
        value = value_of(key, generation + 1)
        self.written += len(value)
        self.pending.append(Pending(now, "SET", b"OK", key))
        return encode(b"SET", key_name(key), value)


def short(answer: Answer) -> str:
    text = repr(answer)
    return text if len(text) < 80 else text[:60] + f"... ({len(text)} characters)"


async def drive(clients: list[Client], rate: float, until: float, stop_file: Path | None) -> None:
    """Keep the clients busy at `rate` bytes of values a second in all, until it is time or one failed."""
    begin, sent, turns = time.monotonic(), 0.0, itertools.cycle(clients)
    while time.monotonic() < until and not (stop_file and stop_file.exists()):
        if any(client.done.done() for client in clients):
            return
        allowed = rate * (time.monotonic() - begin)
        # In turn: at a low rate there is not enough for everyone at once.
        for _ in clients:
            if sent < allowed:
                sent += next(turns).send_some()
        # What a stall has held up is not made up for in one burst.
        sent = max(sent, allowed - rate * 0.25)
        await asyncio.sleep(0.0005)


async def connect(address: tuple[str, int], state: State, options: argparse.Namespace) -> list[Client]:
    loop = asyncio.get_running_loop()
    clients = [Client(number, state, options) for number in range(options.clients)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, *address)  # type: ignore[misc]
    return clients


async def end(clients: list[Client], patience: float) -> list[str]:
    """Let the last answers in; returns what went wrong."""
    for client in clients:
        client.stop()
    await asyncio.wait([client.done for client in clients], timeout=patience)
    failures = []
    for client in clients:
        if not client.done.done():
            failures.append(f"client {client.number}: {len(client.pending)} requests were never answered")
        elif problem := client.done.exception():
            failures.append(str(problem))
    return failures


def summarize(clients: list[Client], seconds: float, failures: list[str]) -> dict[str, Any]:
    worst = max((client.worst for client in clients), key=lambda stall: stall.ms)
    requests = sum(client.requests for client in clients)
    over = {str(limit): sum(client.over[limit] for client in clients) for limit in clients[0].over}
    return {
        "failures": failures,
        "clients": len(clients),
        "seconds": round(seconds, 3),
        "requests": requests,
        "written_bytes": sum(client.written for client in clients),
        "mean_latency_ms": round(sum(client.latency_sum for client in clients) / max(requests, 1), 3),
        "longest_stall": worst.__dict__,
        "stalls": [client.worst.__dict__ for client in clients],
        "requests_over_ms": over,
    }


async def run_clients(address: tuple[str, int], state: State, options: argparse.Namespace) -> dict[str, Any]:
    clients = await connect(address, state, options)
    if options.ready_file:
        options.ready_file.write_text("connected\n")
    begin = time.monotonic()
    until = begin + (options.seconds or float("inf"))
    await drive(clients, options.rate * 1e6, until, options.until_file)
    seconds = time.monotonic() - begin
    failures = await end(clients, patience=60)
    return summarize(clients, seconds, failures)


def run(address: tuple[str, int], options: argparse.Namespace) -> dict[str, Any]:
    state = State.load(options.state)
    result = asyncio.run(run_clients(address, state, options))
    state.save(options.state)
    return result


def fill(address: tuple[str, int], options: argparse.Namespace) -> dict[str, Any]:
    link, state, loaded = Link(address), State(), 0
    begin = time.monotonic()
    while loaded < options.megabytes << 20:
        keys = range(state.keys, state.keys + BATCH)
        values = [value_of(key, 0) for key in keys]
        pairs = zip(keys, values, strict=True)
        answers = link.ask([encode(b"SET", key_name(key), value) for key, value in pairs])
        if any(answer != b"OK" for answer in answers):
            raise Failure("SET was refused")
        state.keys += BATCH
        loaded += sum(map(len, values))
    state.hot = int(state.keys * options.hot)
    state.save(options.state)
    seconds = round(time.monotonic() - begin, 3)
    return {"failures": [], "keys": state.keys, "bytes": loaded, "seconds": seconds}


def batches(numbers: range) -> Iterator[range]:
    for start in range(0, len(numbers), BATCH):
        yield numbers[start : start + BATCH]


def digest(address: tuple[str, int], options: argparse.Namespace) -> dict[str, Any]:
    """SHA-256 over what DEBUG DIGEST-VALUE tells of every untouched key, in order."""
    link, state = Link(address), State.load(options.state)
    total = hashlib.sha256()
    untouched = range(state.hot, state.keys)
    for batch in batches(untouched):
        (answers,) = link.ask([encode(b"DEBUG", b"DIGEST-VALUE", *map(key_name, batch))])
        assert isinstance(answers, list)
        total.update(b"".join(answers))
    return {"failures": [], "keys": len(untouched), "digest": total.hexdigest()}


def wrong_keys(link: Link, state: State) -> Iterator[str]:
    for batch in batches(range(state.keys)):
        answers = link.ask([encode(b"GET", key_name(key)) for key in batch])
        for key, answer in zip(batch, answers, strict=True):
            wanted = value_of(key, state.generations.get(key, 0))
            if answer != wanted:
                yield f"key {key}: {short(answer)}, not {short(wanted)}"


def wrong_counters(link: Link, state: State) -> Iterator[str]:
    for client, acknowledged in state.counters.items():
        (answer,) = link.ask([encode(b"GET", counter_name(client))])
        if answer != b"%d" % acknowledged:
            yield f"counter {client}: {short(answer)}, but {acknowledged} increments were acknowledged"


def verify(address: tuple[str, int], options: argparse.Namespace) -> dict[str, Any]:
    link, state = Link(address), State.load(options.state)
    failures = [*wrong_keys(link, state), *wrong_counters(link, state)]
    (size,) = link.ask([encode(b"DBSIZE")])
    if size != state.keys + len(state.counters):
        failures.append(f"{size!r} keys instead of {state.keys + len(state.counters)}")
    return {
        "failures": failures[:20],
        "wrong": len(failures),
        "keys": state.keys,
        "rewritten": len(state.generations),
        "increments": sum(state.counters.values()),
    }


COMMANDS = {"fill": fill, "run": run, "digest": digest, "verify": verify}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--state", type=Path, required=True, help="what was acknowledged; made by fill")
    parser.add_argument("--megabytes", type=int, default=64, help="fill: how much to load")
    parser.add_argument("--hot", type=float, default=0.25, help="fill: the share of keys that run may write")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--depth", type=int, default=4, help="requests in flight per client")
    parser.add_argument("--rate", type=float, default=30.0, help="MB of values written per second, in all")
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--until-file", type=Path, help="stop when this file exists")
    parser.add_argument("--ready-file", type=Path, help="made when every client is connected")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.command == "run" and not options.seconds and not options.until_file:
        parser.error("run needs --seconds or --until-file")
    return options


def main() -> int:
    options = parse()
    host, _, port = options.address.rpartition(":")
    try:
        result = COMMANDS[options.command]((host, int(port)), options)
    except (Failure, OSError) as problem:
        result = {"failures": [f"{type(problem).__name__}: {problem}"]}
    print(json.dumps(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
