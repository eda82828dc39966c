"""What a lab is to look like: names, addresses, clocks and paths. Pure data, nothing is touched here."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
CLIENT = "client"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROJECT = Path(__file__).resolve().parents[2]
LABS = Path("/run/migrate-lab")  # on the machine: one directory for each lab
SHARED = Path("/var/lib/migrate-lab")  # on its disk: one directory for each lab, shared by its hosts
HOST_DIRECTORY = Path("/run/lab")  # in each host: its sshd's and its configuration files

_DAY = 86_400
_UNITS = {"kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}


class LabError(Exception):
    """The lab cannot do what was asked; the message says what and why."""


@dataclass(frozen=True)
class Bandwidth:
    """A link limit in bits per second."""

    bits: int

    @classmethod
    def parse(cls, text: str) -> Bandwidth:
        """Read "100mbit", "1gbit", "2.5gbit" as tc(8) does. Raises ValueError."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", text.lower())
        if match is None or float(match[1]) == 0:
            raise ValueError(f"not a bandwidth: {text!r} (examples: 800kbit, 100mbit, 1gbit)")
        return cls(round(float(match[1]) * _UNITS[match[2]]))

    @property
    def burst(self) -> int:
        """Bytes that may pass at once: 4 ms of the rate, at least two 64 KiB segments of a virtual link."""
        return max(self.bits // 8 // 250, 128 * 1024)


def variable(text: str) -> tuple[str, str]:
    """Read "NAME=VALUE". Raises ValueError, also for what sshd_config(5) could not hold in quotes."""
    name, equals, value = text.partition("=")
    if not (equals and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)) or re.search(r'["\n]', value):
        raise ValueError(f"not a variable: {text!r} (example: NAME=value)")
    return name, value


@dataclass(frozen=True)
class Host:
    """One host to be. `index` is its place in the lab; the client's is past the last name."""

    name: str
    index: int

    @property
    def _number(self) -> int:
        return 9 if self.name == CLIENT else 11 + self.index

    @property
    def ipv4(self) -> str:
        return f"10.77.0.{self._number}"

    @property
    def ipv6(self) -> str:
        return f"fd77::{self._number}"

    @property
    def monotonic_offset(self) -> float:
        """Seconds that CLOCK_MONOTONIC is ahead of the machine's: days, and a fraction of a second."""
        return (7 + 13 * self.index) * _DAY + 0.137 * (self.index + 1)

    @property
    def boottime_offset(self) -> float:
        """As if the host had been suspended for some hours."""
        return self.monotonic_offset + 3600.5 * (self.index + 2)

    @property
    def first_pid(self) -> int:
        """Hosts hand out numbers from different ranges, as hosts of different age do."""
        return 1000 * (self.index + 1)


@dataclass(frozen=True)
class Plan:
    """One lab to be."""

    name: str
    hosts: tuple[Host, ...]
    bandwidth: Bandwidth | None
    programs: Path | None  # the directory of `migrate` and `migrate-agent`
    variables: Mapping[str, str] = field(default_factory=dict)  # of the environment of every command

    @classmethod
    def make(
        cls,
        name: str,
        hosts: int,
        bandwidth: Bandwidth | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> Plan:
        """Plan `hosts` hosts and a client. Raises LabError if there are too many, or `name` is no name."""
        if not 1 <= hosts <= len(NAMES):
            raise LabError(f"a lab has 1 to {len(NAMES)} hosts, not {hosts}")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
            raise LabError(f"not a lab's name: {name!r} (letters, digits, '_', '-')")
        named = [Host(each, index) for index, each in enumerate(NAMES[:hosts])]
        return cls(name, (*named, Host(CLIENT, len(NAMES))), bandwidth, find_programs(), variables or {})

    @property
    def environment(self) -> dict[str, str]:
        """What every command in a host starts with."""
        path = SYSTEM_PATH if self.programs is None else f"{self.programs}:{SYSTEM_PATH}"
        return {"PATH": path, "HOME": str(home()), "LANG": "C.UTF-8", **self.variables}

    @property
    def visible(self) -> tuple[Path, ...]:
        """Directories that hosts must see, even under a directory of which each host has its own."""
        paths = [PROJECT, shared(self.name)]
        if self.programs is not None:
            paths += [self.programs.parent, (self.programs / "python3").resolve().parent.parent]
        return tuple(paths)


def shared(name: str) -> Path:
    """The directory that all hosts of lab `name` share, at the same path in each and on the machine."""
    return SHARED / name


def home() -> Path:
    """Root's home directory."""
    return Path(pwd.getpwuid(0).pw_dir)


def find_programs() -> Path | None:
    """Where the project's commands are: with the running interpreter, in the checkout's .venv, or on PATH."""
    beside, checkout = Path(sys.executable).parent, PROJECT / ".venv" / "bin"
    if os.access(beside / "migrate-agent", os.X_OK):
        return beside
    if checkout.is_dir():
        return checkout
    found = shutil.which("migrate-agent")
    return Path(found).parent if found else None
