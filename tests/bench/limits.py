"""What the machine does without us: ssh's pipe, memory read and written across processes, a scan of pages.

`python -m bench.limits` measures the memory's, in a process of its own, and prints them as JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from e2e.support import Hosts

from agent.kernel import userfaultfd
from agent.kernel.arch.x86_64 import NR_userfaultfd
from agent.kernel.errors import libc
from agent.kernel.memory import RemoteMemory
from agent.kernel.pagemap import PAGE_IS_PRESENT, PAGE_IS_WRITTEN, Pagemap
from bench.results import Limit

GIB: Final = 1 << 30
CHUNK: Final = 512 * 1024
CIPHERS: Final = {"ssh": "", "ssh aes128-gcm": "-c aes128-gcm@openssh.com "}
# How much goes through a link in some seconds.
PIPED: Final = {"unlimited": 768 << 20, "1gbit": 256 << 20, "100mbit": 32 << 20}
SINK: Final = Path(__file__).with_name("sink.py")


def ssh(lab: Hosts, bandwidth: str | None, repeat: int) -> list[Limit]:
    """MB/s of incompressible bytes from alpha to beta, from the first to the last that arrive."""
    link = bandwidth or "unlimited"
    lab.run("alpha", "sh", "-c", f"head -c {PIPED[link]} /dev/urandom >/tmp/bytes")
    try:
        return [_pipe(lab, f"{name}, {link}", options, repeat) for name, options in CIPHERS.items()]
    finally:
        lab.run("alpha", "rm", "/tmp/bytes")


def _pipe(lab: Hosts, name: str, options: str, repeat: int) -> Limit:
    how = f"alpha$ ssh {options}beta 'cat >/dev/null' <bytes"
    command = f"ssh {options}beta python3 -IS {SINK} </tmp/bytes"
    try:
        rates = tuple(float(lab.run("alpha", "sh", "-c", command)) / 1e6 for _ in range(repeat))
    except subprocess.CalledProcessError as error:
        return Limit(name=name, unit="MB/s", values=(), error=str(error.stderr).strip(), how=how)
    return Limit(name=name, unit="MB/s", values=rates, how=how)


def memory(repeat: int) -> list[Limit]:
    """In a process of its own: it holds 1 GiB, and a child of it another one."""
    command = [sys.executable, "-m", "bench.limits", str(repeat)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [Limit(**each) for each in json.loads(done.stdout)]


class Memory:
    """A gigabyte that is there, and its address."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, GIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.fill()

    @property
    def end(self) -> int:
        return self.start + GIB

    def fill(self) -> None:
        content = os.urandom(CHUNK)
        for offset in range(0, GIB, CHUNK):
            self.map[offset : offset + CHUNK] = content

    def empty(self) -> None:
        self.map.madvise(mmap.MADV_DONTNEED)


def _timed(
    repeat: int, work: Callable[[], object], before: Callable[[], object] = lambda: None
) -> list[float]:
    """Seconds of each of `repeat` times, after one that does not count."""
    times = []
    for _ in range(repeat + 1):
        before()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return times[1:]


def _remote(repeat: int) -> dict[str, list[float]]:
    """Reading a child's memory, writing it where it is there, and where it is not yet."""
    held = Memory()
    pid = os.fork()
    if pid == 0:
        held.fill()  # its own copy of every page
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    try:
        return _transfers(held, pid, repeat)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _transfers(held: Memory, pid: int, repeat: int) -> dict[str, list[float]]:
    remote, buffer = RemoteMemory(pid), bytearray(CHUNK)
    at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    parts = [(start, start + CHUNK) for start in range(held.start, held.end, CHUNK)]
    found = {
        "memory read, process_vm_readv": _timed(
            repeat, lambda: [remote.read_into(at, [part]) for part in parts]
        ),
        "memory write, process_vm_writev, pages that are there": _timed(
            repeat, lambda: [remote.write_from(at, [part]) for part in parts]
        ),
    }
    remote.close()
    return found


def _fresh(repeat: int) -> list[float]:
    """Writing pages that are not there yet: in our own process, by the same call."""
    held, remote, buffer = Memory(), RemoteMemory(os.getpid()), bytearray(CHUNK)
    at = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    parts = [(start, start + CHUNK) for start in range(held.start, held.end, CHUNK)]
    times = _timed(repeat, lambda: [remote.write_from(at, [part]) for part in parts], held.empty)
    remote.close()
    return times


def _scans(repeat: int) -> dict[str, list[float]]:
    """PAGEMAP_SCAN of a watched gigabyte: all of it written since the last, and none."""
    held = Memory()
    watcher = libc.syscall(NR_userfaultfd, os.O_CLOEXEC | userfaultfd.UFFD_USER_MODE_ONLY)
    userfaultfd.handshake(watcher)
    if not userfaultfd.register(watcher, held.start, held.end):
        raise OSError("the kernel does not watch this memory")
    pagemap = Pagemap(os.getpid())

    def scan() -> None:
        wanted = {"any_of": PAGE_IS_WRITTEN, "returned": PAGE_IS_WRITTEN | PAGE_IS_PRESENT}
        list(pagemap.scan(held.start, held.end, write_protect=True, **wanted))

    found = {"scan, all written": _timed(repeat, scan, held.fill), "scan, none written": _timed(repeat, scan)}
    pagemap.close()
    os.close(watcher)
    return found


def _measure(repeat: int) -> list[dict[str, object]]:
    speeds = _remote(repeat)
    speeds["memory write, process_vm_writev, new pages"] = _fresh(repeat)
    limits: list[dict[str, object]] = [
        {
            "name": name,
            "unit": "GB/s",
            "values": [GIB / 1e9 / each for each in times],
            "how": "512 KiB a call",
        }
        for name, times in speeds.items()
    ]
    return limits + [
        {"name": name, "unit": "ms per GiB", "values": [each * 1e3 for each in times], "how": "PAGEMAP_SCAN"}
        for name, times in _scans(repeat).items()
    ]


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]))))
