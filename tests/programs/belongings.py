#!/usr/bin/env python3
"""A program that has things of many kinds, and looks at all of them again and again: `belongings.py STATUS`.

Pairs of unix sockets with something unread, a memory file, locks on a file of the host, a service of the
host that it writes lines to (/run/belongings-log). What it finds wrong is a complaint in its status, as
with the other programs.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable, Coroutine
from typing import Any

SERVICE = "/run/belongings-log"
LOCKED = "/tmp/belongings-locked"
ADD_SEALS, GET_SEALS, OFD_SETLK = 1033, 1034, 37
SHRINK = 0x2
PERIOD = 0.05  # seconds

Check = Callable[[int], Coroutine[Any, Any, None]]


class Wrong(Exception):
    """What is not as it was."""


def expect(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r}, not {wanted!r}")


class Pairs:
    """In each of them one message is always unread, the latest."""

    def __init__(self) -> None:
        kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
        self._pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in kinds]
        self._half_shut = socket.socketpair()
        self._half_shut[0].sendall(b"last words")
        self._half_shut[0].shutdown(socket.SHUT_WR)
        for sender, _ in self._pairs:
            sender.send(self._message(0))

    @staticmethod
    def _message(number: int) -> bytes:
        return struct.pack("<q", number) * (1 + number % 500)

    async def check(self, number: int) -> None:
        for sender, receiver in self._pairs:
            expect("unread message", receiver.recv(1 << 16), self._message(number - 1))
            sender.send(self._message(number))
        expect("shut stream", self._half_shut[1].recv(100, socket.MSG_PEEK), b"last words")
        try:
            self._half_shut[0].send(b"x", socket.MSG_NOSIGNAL)
        except BrokenPipeError:
            return
        raise Wrong("a stream that was shut takes more")


class Memory:
    """A sealed memory file, by two descriptions."""

    def __init__(self) -> None:
        self._writing = os.memfd_create("belongings", os.MFD_ALLOW_SEALING)
        os.ftruncate(self._writing, 1 << 24)
        fcntl.fcntl(self._writing, ADD_SEALS, SHRINK)
        self._reading = os.open(f"/proc/self/fd/{self._writing}", os.O_RDONLY)
        os.pwrite(self._writing, struct.pack("<q", 0), 1 << 23)

    async def check(self, number: int) -> None:
        expect("memory file", os.pread(self._reading, 8, 1 << 23), struct.pack("<q", number - 1))
        os.pwrite(self._writing, struct.pack("<q", number), 1 << 23)
        expect("seals", fcntl.fcntl(self._reading, GET_SEALS), SHRINK)


class Locks:
    """One of each kind, by what the kernel says of our own descriptors."""

    def __init__(self) -> None:
        self._files = [open(f"{LOCKED}-{name}", "r+b") for name in ("flock", "posix", "ofd")]
        whole, posix, ofd = self._files
        fcntl.flock(whole, fcntl.LOCK_EX)
        fcntl.lockf(posix, fcntl.LOCK_EX, 10, 5)
        fcntl.fcntl(ofd, OFD_SETLK, struct.pack("hhxxxxqqixxxx", fcntl.F_RDLCK, 0, 3, 0, 0))

    async def check(self, number: int) -> None:
        for file, kind in zip(self._files, ("FLOCK", "POSIX", "OFDLCK"), strict=True):
            with open(f"/proc/self/fdinfo/{file.fileno()}") as info:
                held = [line.split()[2] for line in info if line.startswith("lock:")]
            expect(f"lock of {file.name}", held, [kind])


class Service:
    """Lines to whoever has the service on this host."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.connect(SERVICE)

    async def check(self, number: int) -> None:
        self._socket.send(b"%d" % number)


class Loop:
    """asyncio's own way to be woken, a pair of sockets: by another thread."""

    async def check(self, number: int) -> None:
        done = await asyncio.wait_for(asyncio.to_thread(lambda: number), 30)
        expect("answer of a thread", done, number)


def write_status(path: str, number: int, complaints: list[str]) -> None:
    names = {name: os.readlink(f"/proc/self/ns/{name}") for name in ("net", "mnt", "time")}
    first = complaints[0] if complaints else ""
    status = {"seq": number, "complaints": len(complaints), "first_complaint": first}
    status |= {"host": os.uname().nodename, **names, "end": number}
    with open(f"{path}.new", "w") as file:
        json.dump(status, file)
    os.rename(f"{path}.new", path)


async def main(path: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    kinds = (Pairs(), Memory(), Locks(), Service(), Loop())
    checks: list[Check] = [kind.check for kind in kinds]
    complaints: list[str] = []
    number = 0
    while not ended.is_set():
        number += 1
        for check in checks:
            try:
                await check(number)
            except Exception as error:
                complaints.append(f"{check.__qualname__} {number}: {error}")
        write_status(path, number, complaints)
        await asyncio.sleep(PERIOD)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
