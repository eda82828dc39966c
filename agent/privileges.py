"""What each process of an agent keeps of root's capabilities; why each, is in docs/threat-model.md.

Effective is what the process needs itself. Permitted and bounding set also have what those need that it
starts: a program executed by root gets its bounding set (capabilities(7)), and what has once left that set
does not come back. So a destination keeps the bounding set whole until the shadow is there, which executes
its seed with it and may become whatever the process was; then it gives up the rest itself.
"""

from __future__ import annotations

import os
from typing import Final

import msgspec

from agent.kernel import capabilities
from agent.kernel.capabilities import NAMES, Sets, numbers


class Role(msgspec.Struct, frozen=True):
    """Names of capabilities without CAP_. `starts`: what processes that it starts need besides its own."""

    own: frozenset[str]
    starts: frozenset[str] = frozenset()


ENGINE: Final = Role(
    frozenset({"SYS_PTRACE", "SYS_ADMIN", "NET_ADMIN", "NET_RAW", "KILL", "DAC_OVERRIDE", "SYS_RESOURCE"})
)
FRONT: Final = Role(frozenset({"DAC_OVERRIDE", "SYS_PTRACE"}), ENGINE.own | {"SETUID", "SETGID"})
SERVICE: Final = Role(frozenset({"DAC_READ_SEARCH", "SYS_PTRACE"}), FRONT.own | FRONT.starts)
DESTINATION: Final = Role(
    frozenset(
        {
            *("SYS_PTRACE", "NET_ADMIN", "NET_RAW", "NET_BIND_SERVICE", "KILL", "DAC_OVERRIDE", "FOWNER"),
            *("CHOWN", "SYS_RESOURCE", "SYS_NICE", "WAKE_ALARM"),
        }
    ),
    frozenset(NAMES),
)
NOTHING: Final = Role(frozenset())


def enter(role: Role) -> None:
    """From now on the calling thread, and threads it starts, have no more than the role's. Root only."""
    if os.geteuid() == 0:
        _keep(role.own, role.own | role.starts)


def take_back() -> None:
    """For a process that was started: effective is what is permitted."""
    have = capabilities.get()
    capabilities.put(have._replace(effective=have.permitted))


def leave_starting(role: Role) -> None:
    """It starts nothing any more: what that needed goes too, for good."""
    if os.geteuid() == 0:
        _keep(role.own, role.own)


def _keep(effective: frozenset[str], permitted: frozenset[str]) -> None:
    """Of what there is: in a container root has less."""
    have = capabilities.get().permitted
    most = numbers(permitted) & have
    if have & numbers(("SETPCAP",)):
        capabilities.put(Sets(have, have, 0))
        capabilities.drop_bounding(numbers(permitted))
    capabilities.clear_ambient()
    capabilities.put(Sets(numbers(effective) & most, most, 0))
