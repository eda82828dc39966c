"""How much memory there is for a process of ours: /proc/meminfo, and the limits of our cgroups(7)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_UNLIMITED: Final = 1 << 62  # version 1 has a number for it, a little less than 1 << 63
# limit, usage, and in memory.stat what of it the kernel can take back: of version 1, of version 2
_CACHED: Final = ("total_inactive_file", "total_active_file")
_FIRST: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", _CACHED)
_SECOND: Final = ("memory.max", "memory.current", ("inactive_file", "active_file"))


def memory() -> tuple[int, str]:
    """Bytes that it could have, swap included, and what it is that has no more: "the host", or a cgroup."""
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    info = {name: int(value) << 10 for name, value, *_ in words}
    swap = info["SwapFree:"]
    rooms = [(info["MemAvailable:"], "the host")]
    for group, files in _groups():
        with contextlib.suppress(OSError, ValueError):  # the uppermost has none, and "max" is no number
            rooms.append((_room(group, *files), f"the agent's cgroup {group}"))
    free, whose = min(rooms)
    return free + swap, whose


def _room(group: Path, limit: str, usage: str, cached: tuple[str, ...]) -> int:
    most = int((group / limit).read_text())
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    if most >= _UNLIMITED:
        return _UNLIMITED
    used = int((group / usage).read_text()) - sum(int(stat[name]) for name in cached)
    return max(0, most - used)


def _groups() -> Iterator[tuple[Path, tuple[str, str, tuple[str, ...]]]]:
    """Those that we are in, up to the uppermost that is seen here."""
    ours = dict(_memberships())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        files = _SECOND if kind == "cgroup2" else _FIRST
        name = "" if kind == "cgroup2" else "memory"
        if not kind.startswith("cgroup") or (name and name not in options.split(",")) or name not in ours:
            continue
        root, place = (Path(word) for word in before.split()[3:5])
        if ours[name].is_relative_to(root):
            group = place / ours[name].relative_to(root)
            yield from ((one, files) for one in (group, *group.parents) if one.is_relative_to(place))


def _memberships() -> Iterator[tuple[str, Path]]:
    """Controller ("": all of version 2), and our place in its hierarchy."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        yield from ((name, Path(path)) for name in controllers.split(","))
