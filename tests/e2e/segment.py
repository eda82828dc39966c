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
T = TypeVar("T")
_libc = ctypes.CDLL(None, use_errno=True)


def _call(result: int) -> None:
    if result:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def wait_for(condition: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)
    return value


class Host:
    """A network namespace. `with host:` puts the calling thread into it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._before = threading.local()
        before = _current()
        try:
            _call(_libc.unshare(CLONE_NEWNET))
            self.fd = _current()
        finally:
            _call(_libc.setns(before, CLONE_NEWNET))
            os.close(before)

    def __enter__(self) -> Host:
        before = _current()
        _call(_libc.setns(self.fd, CLONE_NEWNET))
        self._before.stack = [*getattr(self._before, "stack", []), before]
        return self

    def __exit__(self, *_: object) -> None:
        before = self._before.stack.pop()
        _call(_libc.setns(before, CLONE_NEWNET))
        os.close(before)

    def run(self, *command: str) -> str:
        with self:
            done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def ip(self, *lines: str) -> None:
        """Several commands of ip(8) at once."""
        given, command = "\n".join(lines) + "\n", ["ip", "-batch", "-"]
        with self:
            done = subprocess.run(command, input=given, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def sysctl(self, name: str, value: str) -> None:
        with self:
            Path("/proc/sys/net", name.replace(".", "/")).write_text(value)

    def counter(self, name: str) -> int:
        """A counter of /proc/net/snmp or netstat, as "Tcp.OutRsts"."""
        group, _, field = name.partition(".")
        with self:
            text = "".join(Path("/proc/thread-self/net", file).read_text() for file in ("snmp", "netstat"))
        rows = [line.split() for line in text.splitlines() if line.startswith(group + ":")]
        return int(dict(zip(rows[0], rows[1], strict=True))[field])

    def socket(self, family: int = socket.AF_INET, protocol: int = 0) -> socket.socket:
        """A TCP socket; nothing that waits on it waits for ever."""
        with self:
            made = socket.socket(family, socket.SOCK_STREAM, protocol)
        made.settimeout(20)
        return made

    def connections(self) -> str:
        """Of TCP, whatever their state, but for TIME_WAIT; as ss(8) shows them."""
        return self.run("ss", "-Htn", "state", "connected", "exclude", "time-wait")

    def mac(self) -> str:
        return self.run("ip", "-o", "link", "show", "eth0").partition("link/ether ")[2].split()[0]

    def neighbour(self, address: str) -> str:
        """The hardware address that this host believes `address` is at."""
        words = self.run("ip", "neigh", "show", address).split()
        return words[words.index("lladdr") + 1] if "lladdr" in words else ""

    def close(self) -> None:
        os.close(self.fd)


class Segment:
    """A bridge in a namespace of its own, and hosts on it: 10.77.0.N/24 and fd77::N/64, N from 1."""

    def __init__(self, *names: str) -> None:
        self.switch = Host("switch")
        self.hosts = [Host(name) for name in names]
        cables = []
        for number, host in enumerate(self.hosts, 1):
            namespace = f"/proc/{os.getpid()}/fd/{host.fd}"
            cables.append(f"link add port{number} type veth peer name eth0 netns {namespace}")
            cables.append(f"link set port{number} master br0 up")
        self.switch.ip("link add br0 type bridge", "link set br0 up", *cables)
        for number, host in enumerate(self.hosts, 1):
            host.ip(
                "link set lo up",
                "link set eth0 up",
                f"addr add 10.77.0.{number}/24 dev eth0",
                f"addr add fd77::{number}/64 dev eth0 nodad",
            )

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
