"""What a run holds while nothing is under way: the services, the hosts, the process that is moved.

All figures of the hosts are sums over both: the process is on one of them, now this one, now that.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from faults.hosts import OPEN_FILE, Host
from faults.subject import Subject

Sample = dict[str, float]

_REPORTS: Final = "var/lib/migrate/reports/"
RECORDS: Final = "records of migrations"
MEMORY: Final = "KiB"  # the end of such figures


def sample(hosts: Iterable[Host], services: dict[str, int], subject: Subject) -> Sample:
    """`services`: the machine's number of each host's service; OSError if one has ended."""
    found = _workload(subject.pid)
    for name, pid in services.items():
        found |= {f"{name}'s service: {figure}": value for figure, value in process(pid).items()}
    total: Counter[str] = Counter()
    for host in hosts:
        total.update(_host(host, subject))
    return found | {f"hosts: {figure}": float(value) for figure, value in total.items()}


def more(now: Sample, before: Sample) -> list[str]:
    """Of what is there more than before; not of memory, nor of the records, which are kept."""
    steady = (figure for figure in now if not figure.endswith((MEMORY, RECORDS)))
    return [figure for figure in steady if now[figure] > before.get(figure, now[figure])]


def process(pid: int) -> Sample:
    """Of any process."""
    directory = Path(f"/proc/{pid}")
    rollup = (directory / "smaps_rollup").read_text()
    return {
        f"resident, {MEMORY}": _kib(rollup, "Rss"),
        f"anonymous, {MEMORY}": _kib(rollup, "Anonymous"),
        "descriptors": float(len(os.listdir(directory / "fd"))),
        "threads": float(len(os.listdir(directory / "task"))),
    }


def _workload(pid: int) -> Sample:
    directory = Path(f"/proc/{pid}")
    figures = process(pid) | {
        "mappings": float(len((directory / "maps").read_text().splitlines())),
        "pid namespaces within": float(_nesting((directory / "status").read_text())),
    }
    return {f"process: {figure}": value for figure, value in figures.items()}


def _kib(text: str, name: str) -> float:
    found = re.search(rf"^{name}: +(\d+) kB$", text, re.M)
    assert found is not None
    return float(found[1])


def _nesting(status: str) -> int:
    """How many pid namespaces it is in (proc_pid_status(5))."""
    return len(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()) - 1


def _host(host: Host, subject: Subject) -> Counter[str]:
    """Without the process itself, its file, and what a move made to hold its number."""
    picture = host.picture()
    files = [name for name in host.leavings() if f"/{name}" != str(OPEN_FILE)]
    reports = [name for name in files if name.startswith(_REPORTS)]
    others = [one for one in host.processes() if one.pid != subject.pid and not subject.is_reaper(one)]
    return Counter(
        {
            "files": len(files) - len(reports),
            RECORDS: len(reports),
            "addresses, routes, nft rules": len(picture["network"]),
            "mounts": len(picture["mounts"]),
            "packet and raw sockets": len(picture["packet sockets"]) + len(picture["raw sockets"]),
            "sockets": sockets(host.read("net/sockstat")),
            "processes": len(others),
            "zombies": zombies(host.root / "proc"),
        }
    )


def sockets(text: str) -> int:
    """All that are open in the network namespace, by /proc/net/sockstat."""
    found = re.search(r"^sockets: used (\d+)$", text, re.M)
    assert found is not None
    return int(found[1])


def zombies(proc: Path) -> int:
    count = 0
    for entry in proc.iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                count += (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return count
