"""A lab's network: one bridge in a network namespace of its own, and each host's link to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lab.plan import Bandwidth, Host, LabError

BRIDGE = "br0"


def _run(*command: str, given: str = "") -> None:
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _ip(*lines: str) -> None:
    _run("ip", "-batch", "-", given="\n".join(lines) + "\n")


def _sysctl(name: str, value: int) -> None:
    path = Path("/proc/sys/net") / name
    if path.exists():
        path.write_text(str(value))


def make_bridge() -> None:
    """Make the bridge in the current network namespace: it forwards at once and floods multicast."""
    _sysctl("ipv6/conf/default/disable_ipv6", 1)
    _ip(
        "link set lo up",
        f"link add {BRIDGE} type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
        f"link set {BRIDGE} up",
    )


def connect(host: Host, pid: int, bandwidth: Bandwidth | None) -> None:
    """Lay the cable: `host`'s eth0 in the network namespace of `pid`, its other end in the bridge."""
    port = f"port{host.index}"
    _ip(
        f"link add {port} type veth peer name eth0 netns {pid}",
        f"link set {port} master {BRIDGE}",
        f"link set {port} up",
    )
    limit(port, bandwidth)


def configure(host: Host, bandwidth: Bandwidth | None) -> None:
    """Inside the host: loopback and eth0 up, addresses usable at once (no duplicate address detection)."""
    for scope in ("all", "default", "eth0"):
        _sysctl(f"ipv6/conf/{scope}/accept_dad", 0)
        _sysctl(f"ipv6/conf/{scope}/accept_ra", 0)
    _ip(
        "link set lo up",
        f"address add {host.ipv4}/24 broadcast + dev eth0",
        f"address add {host.ipv6}/64 dev eth0 nodad",
        "link set eth0 up",
    )
    limit("eth0", bandwidth)


def limit(device: str, bandwidth: Bandwidth | None) -> None:
    """Let `device` send at most `bandwidth` (tc-tbf(8)). Done at both ends, it limits both directions."""
    if bandwidth is not None:
        shape = ("rate", f"{bandwidth.bits}bit", "burst", str(bandwidth.burst), "latency", "50ms")
        _run("tc", "qdisc", "add", "dev", device, "root", "tbf", *shape)
