"""Hosts on one Ethernet segment, as network namespaces without names: they vanish with their descriptors."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
T = TypeVar("T")


def _call(result: int) -> None:
    if result:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def wait_for(condition: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)
    return value


class Host:
    """A network namespace. `with host:` puts this thread into it."""

    def __init__(self, name: str) -> None:
        self.name = name
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call(_libc.unshare(CLONE_NEWNET))
            self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _call(_libc.setns(before, CLONE_NEWNET))
            os.close(before)
        self._local = threading.local()
        self.run("ip", "link", "set", "lo", "up")

    def __enter__(self) -> Host:
        self._local.stack = [
            *getattr(self._local, "stack", []),
            os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC),
        ]
        _call(_libc.setns(self._fd, CLONE_NEWNET))
        return self

    def __exit__(self, *_: object) -> None:
        before = self._local.stack.pop()
        _call(_libc.setns(before, CLONE_NEWNET))
        os.close(before)

    def run(self, *command: str) -> str:
        with self:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def sysctl(self, name: str, value: str | None = None) -> str:
        path = Path("/proc/sys/net", name.replace(".", "/"))
        with self:
            if value is not None:
                path.write_text(value)
            return path.read_text().strip()

    def counter(self, name: str) -> int:
        """A counter of /proc/net/snmp or netstat, as "Tcp.OutRsts"."""
        group, _, field = name.partition(".")
        with self:
            text = Path("/proc/thread-self/net/snmp").read_text() + Path("/proc/thread-self/net/netstat").read_text()
        rows = [line.split() for line in text.splitlines() if line.startswith(group + ":")]
        return int(dict(zip(rows[0], rows[1], strict=True))[field])

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> socket.socket:
        with self:
            return socket.socket(family, kind, protocol)

    def mac(self) -> str:
        with self:
            return Path("/proc/thread-self/net/dev") and self.run("cat", "/sys/class/net/eth0/address").strip()

    def close(self) -> None:
        os.close(self._fd)


class Segment:
    """A bridge in a namespace of its own, and hosts on it: 10.77.0.N/24 and fd77::N/64, N from 1."""

    def __init__(self, *names: str) -> None:
        self.switch = Host("switch")
        self.switch.run("ip", "link", "add", "br0", "type", "bridge")
        self.switch.run("ip", "link", "set", "br0", "up")
        self.hosts = [self._attach(name, number) for number, name in enumerate(names, 1)]

    def _attach(self, name: str, number: int) -> Host:
        host = Host(name)
        pair = f"port{number}"
        self.switch.run(
            "ip", "link", "add", pair, "type", "veth", "peer", "name", "eth0",
            "netns", f"/proc/{os.getpid()}/fd/{host._fd}",
        )  # fmt: skip
        self.switch.run("ip", "link", "set", pair, "master", "br0", "up")
        host.sysctl("ipv6.conf.eth0.accept_dad", "0")
        host.run("ip", "link", "set", "eth0", "up")
        host.run("ip", "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
        host.run("ip", "addr", "add", f"fd77::{number}/64", "dev", "eth0", "nodad")
        return host

    def close(self) -> None:
        for host in [*self.hosts, self.switch]:
            host.close()


@contextmanager
def segment(*names: str) -> Iterator[list[Host]]:
    built = Segment(*names)
    try:
        yield built.hosts
    finally:
        built.close()
