"""What a fault is: where it comes, and what it does. Pure data."""

from __future__ import annotations

import errno
import signal
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Side: TypeAlias = Literal["source", "destination"]
Way: TypeAlias = Literal["cable", "device"]

# The project's processes, and sshd's for the link, by their command lines as `hosts.look` has them.
ROLES: Final = {
    "coordinator": r"bin/migrate move",
    "connect": r"(migrate-agent|agent\.main) connect",
    "service": r"(migrate-agent|agent\.main) serve",
    "front": r"(migrate-agent|agent\.main) source",
    "engine": r"agent\.worker",
    "guardian": r"^\[migrate-guard\]",
    "recovery": r"(migrate-agent|agent\.main) recover",
    "destination": r"(migrate-agent|agent\.main) destination(?! --resume)",
    "resuming": r"(migrate-agent|agent\.main) destination --resume",
    "settling": r"(migrate-agent|agent\.main) settle",
    "session": r"^sshd(-session)?: root",
}
ENGINES: Final[dict[Side, str]] = {"source": "engine", "destination": "destination"}
SOURCE_ROLES: Final = ("service", "front", "engine", "connect", "coordinator", "recovery")
DESTINATION_ROLES: Final = ("session", "destination", "resuming", "settling")
GUARDIAN: Final = ("guardian",)
_BRIEF: Final = 0.5  # seconds
PROCESS: Final = "process"  # stands for the one that is moved, beside the roles


def other(side: Side) -> Side:
    return "destination" if side == "source" else "source"


@dataclass(frozen=True)
class Point:
    """A place in the code of one role's process (see inject/injection.py), reached for the `nth` time."""

    side: Side
    role: str
    name: str
    nth: int = 1
    since: str | None = None

    def __str__(self) -> str:
        since = f" since {self.since}" if self.since else ""
        nth = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.role} {self.name}{nth}{since}"


@dataclass(frozen=True)
class After:
    """So many seconds after the command was started."""

    seconds: float

    def __str__(self) -> str:
        return f"after {self.seconds:.3f} s"


@dataclass(frozen=True)
class Send:
    """A signal to all processes of these roles on one host, at the same time."""

    side: Side
    roles: tuple[str, ...]
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.signal.name} to {self.side}'s {', '.join(self.roles)}"


@dataclass(frozen=True)
class Hold:
    """SIGSTOP, and SIGCONT after so many seconds."""

    side: Side
    roles: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        return f"{self.side}'s {', '.join(self.roles)} held for {self.seconds:g} s"


@dataclass(frozen=True)
class Cut:
    """The host's link, at its switch ("cable") or at its own device; None: until the command has ended."""

    side: Side
    seconds: float | None
    way: Way = "cable"

    def __str__(self) -> str:
        span = "for good" if self.seconds is None else f"for {self.seconds:g} s"
        return f"{self.side}'s {self.way} cut {span}"


@dataclass(frozen=True)
class Fail:
    """The call at whose point this is fails."""

    number: int

    def __str__(self) -> str:
        return errno.errorcode[self.number]


@dataclass(frozen=True)
class Spoil:
    """One byte of the copy that is being made on this host becomes another one."""

    side: Side

    def __str__(self) -> str:
        return f"a byte of the copy on the {self.side} is changed"


Action: TypeAlias = Send | Hold | Cut | Fail | Spoil


@dataclass(frozen=True)
class Fault:
    at: Point | After
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        return f"{self.at}: {'; '.join(map(str, self.actions))}"


@dataclass(frozen=True)
class Case:
    """One run: a move in which this goes wrong."""

    name: str
    faults: tuple[Fault, ...]
    options: tuple[str, ...] = ()
    file_missing: bool = False  # the file that the process has open is not on the destination
    new_service: bool = False  # the service starts in this run: its faults are read then
    outcome: str = ""  # what it has to come to (`Verdict.outcome`), with every fault; "": whatever

    @property
    def kills_process(self) -> bool:
        """Whether it kills the process itself, of which then none is left unless it had moved."""
        return self.signals(PROCESS)

    def signals(self, role: str) -> bool:
        """Whether processes of this role are sent a signal."""
        sends = (one for fault in self.faults for one in fault.actions if isinstance(one, Send))
        return any(role in one.roles for one in sends)

    @property
    def cuts_for_good(self) -> bool:
        return any(
            isinstance(one, Cut) and one.seconds is None for fault in self.faults for one in fault.actions
        )

    @property
    def may_take_time(self) -> bool:
        """Whether those are gone who put things in order at once, or cannot reach each other.

        A destination that its source cannot tell of its end, or has nobody left to tell it, waits for it.
        """
        cuts = any(isinstance(one, Cut) for fault in self.faults for one in fault.actions)
        return cuts or self.signals("guardian") or (self.signals("front") and self.signals("engine"))

    @property
    def quick(self) -> bool:
        """Whether all goes on at once: nobody waits for a timeout, a service's next look or a new lab."""
        actions = [one for fault in self.faults for one in fault.actions]
        last = [one.seconds for one in actions if isinstance(one, Cut | Hold)]
        waits = any(seconds is None or seconds > _BRIEF for seconds in last)
        return not (waits or self.signals("guardian") or self.kills_process)

    @property
    def rules(self) -> list[tuple[int, Point]]:
        """The faults at points, by their place among all of them."""
        return [(n, fault.at) for n, fault in enumerate(self.faults) if isinstance(fault.at, Point)]
