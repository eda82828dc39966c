"""What a plan is, once read: every value checked, in the units of agent/api.py, defaults filled in."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from agent.api import MoveOptions, SshOptions
from agent.hook_api import Select

VERSION: Final = 1
LOCAL: Final = "local"  # as a source: the host where the plan is applied, without ssh
MAX_PARALLEL: Final = 16

OnFailure = Literal["stop", "continue"]


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One process and where to. `source`, `destination`: as on the command line, or LOCAL as a source."""

    select: Select
    source: str
    destination: str
    name: str | None = None
    options: MoveOptions = MoveOptions()

    @property
    def label(self) -> str:
        """What it is called in messages; one of a kind in its plan."""
        return self.name or f"{self.select} on {self.source}"


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Processes that may leave a host which is emptied, and where to, the best place first."""

    select: Select
    destinations: tuple[str, ...]
    name: str | None = None
    options: MoveOptions = MoveOptions()

    @property
    def label(self) -> str:
        return self.name or str(self.select)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    moves: tuple[Move, ...] = ()
    drain: tuple[Rule, ...] = ()
    ssh: SshOptions = SshOptions()
    on_failure: OnFailure = "stop"
    parallel: int = 1
