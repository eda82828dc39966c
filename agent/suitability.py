"""Whether this host can have a process at all: its directories, CPU and kernel, its memory and limits."""

from __future__ import annotations

import os

from agent import inventory, launch
from agent.api import Blocker
from agent.kernel import room
from agent.protocol import Offer


def blockers(offer: Offer, channel: int) -> list[Blocker]:
    """All that stands in the way. `channel`: a descriptor that the shadow has besides the process's."""
    found = _directory_blockers(offer)
    found += _cpu_blockers(offer)
    found += _memory_blockers(offer.memory)
    found += _descriptor_blockers(*offer.descriptors, channel)
    return found


def _directory_blockers(offer: Offer) -> list[Blocker]:
    return [
        Blocker(
            kind="directory-missing",
            what=path,
            why="the process works in it or has it open, and the destination does not have it",
            hint="create it there, or share the file system",
        )
        for path in dict.fromkeys(offer.directories)
        if not os.path.isdir(path)
    ]


def _cpu_blockers(offer: Offer) -> list[Blocker]:
    found: list[Blocker] = []
    absent = sorted(set(offer.cpu_flags) - set(inventory.cpu_flags()))
    if absent:
        why = f"the destination's CPU lacks {', '.join(absent)}"
        found.append(
            Blocker(kind="cpu-features", what="CPU", why=why, hint="choose a host with the same CPU")
        )
    if offer.vdso_digest and offer.vdso_digest != inventory.own_vdso_digest():
        why = "the destination's kernel has another vDSO"
        found.append(
            Blocker(kind="vdso-differs", what="vDSO", why=why, hint="run the same kernel on both hosts")
        )
    return found


def _memory_blockers(needed: int) -> list[Blocker]:
    there, whose = room.memory()
    if needed <= there:
        return []
    why = f"the process has {needed >> 20} MiB, and {whose} has room for {there >> 20} MiB"
    hint = "free memory there, or raise the limit of that cgroup"
    return [Blocker(kind="memory", what="memory", why=why, hint=hint)]


def _descriptor_blockers(count: int, highest: int, channel: int) -> list[Blocker]:
    """The shadow has those that arrive in the lowest numbers, then above all that are wanted."""
    arrived = count + 1  # the executable too
    needed = max(highest, arrived, channel) + arrived + 2
    allowed = launch.allow_descriptors(needed)
    if allowed >= needed:
        return []
    why = f"{count} open files, up to number {highest}, take {needed}, and the agent there may have {allowed}"
    hint = "raise the hard limit of open files (RLIMIT_NOFILE) of sshd's sessions there"
    return [Blocker(kind="descriptor-limit", what="descriptors", why=why, hint=hint)]
