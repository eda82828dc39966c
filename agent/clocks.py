"""How far a process's clocks are ahead of the other host's: measured over the link, shortest round trip wins.

The error is at most half that round trip; what it could make the clock step back is waited out before the
process goes on, so CLOCK_MONOTONIC never goes back (`agent.destination`).
"""

from __future__ import annotations

import time
from typing import Final

from agent.capture import namespace_offset
from agent.link import Link
from agent.protocol import Ping, Pong

_SAMPLES: Final = 8


def boottime_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def measure_delta(link: Link, pid: int) -> tuple[int, int]:
    """(monotonic, boottime): nanoseconds to add to the other host's clock to get the process's."""
    best: tuple[int, int, int] | None = None
    for _ in range(_SAMPLES):
        boot_ahead = boottime_ns() - time.monotonic_ns()
        before = time.monotonic_ns()
        link.send(Ping())
        pong = link.expect(Pong)
        after = time.monotonic_ns()
        middle = (before + after) // 2
        sample = (after - before, middle - pong.monotonic, middle + boot_ahead - pong.boottime)
        best = min(best, sample) if best else sample
    assert best is not None
    monotonic, boottime = namespace_offset(pid)
    return best[1] + monotonic, best[2] + boottime
