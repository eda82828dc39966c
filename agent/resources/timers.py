"""Interval timers and POSIX timers: setitimer(2), timer_create(2).

Time goes on while a process is frozen: what remains is reduced by the pause, and what ran out in it fires at once.
A timer's overrun count of a notification that is still queued is not kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.state import TimerState
from agent.tracee import Batch, Outcome

ITIMER_SIZE: Final = 32  # struct itimerval, and struct itimerspec: interval, then value
_PAIR: Final = struct.Struct("<4q")
SIGEV_THREAD_ID: Final = 4
SIGEV_NONE: Final = 1
PR_TIMER_CREATE_RESTORE_IDS: Final = 77  # Linux 6.16
# clocks that run with the wall; the others count CPU time, which stands still in a freeze
_WALL_CLOCKS: Final = frozenset({0, 1, 7, 8, 9, 11})


def ask_itimers(batch: Batch) -> Callable[[Outcome], tuple[bytes, bytes, bytes]]:
    places = [batch.space(ITIMER_SIZE) for _ in range(3)]
    for which, place in enumerate(places):
        batch.call("getitimer", arch.NR_getitimer, which, place)

    def answer(outcome: Outcome) -> tuple[bytes, bytes, bytes]:
        real, virtual, prof = (outcome.read(place, ITIMER_SIZE) for place in places)
        return real, virtual, prof

    return answer


def restore_itimers(batch: Batch, timers: tuple[bytes, bytes, bytes], elapsed_ns: int) -> None:
    for which, timer in enumerate(timers):
        if any(timer):
            setting = _later(timer, elapsed_ns if which == 0 else 0, unit=1000)
            batch.call("setitimer", arch.NR_setitimer, which, batch.put(setting), 0)


def _later(setting: bytes, elapsed_ns: int, unit: int) -> bytes:
    """An interval and value (seconds, 1/unit of nanoseconds) after `elapsed_ns` more; never disarmed by that."""
    interval_s, interval_f, value_s, value_f = _PAIR.unpack(setting)
    # with an interval and no value the signal is queued, and the kernel arms it again when that is taken
    remaining = value_s * 1_000_000_000 + value_f * unit or interval_s * 1_000_000_000 + interval_f * unit
    remaining = max(remaining - elapsed_ns, unit)
    return _PAIR.pack(interval_s, interval_f, remaining // 1_000_000_000, remaining % 1_000_000_000 // unit)


def ask_posix(batch: Batch, pid: int) -> Callable[[Outcome], list[TimerState]]:
    timers = procfs.timers(pid)
    places = [batch.space(ITIMER_SIZE) for _ in timers]
    overruns = []
    for timer, place in zip(timers, places, strict=True):
        batch.call(f"timer_gettime {timer.id}", arch.NR_timer_gettime, timer.id, place)
        overruns.append(batch.call(f"timer_getoverrun {timer.id}", arch.NR_timer_getoverrun, timer.id))
    return lambda answer: [
        TimerState(timer, answer.read(place, ITIMER_SIZE), answer.results[index])
        for timer, place, index in zip(timers, places, overruns, strict=True)
    ]


def create_posix(batch: Batch, timers: list[TimerState]) -> list[int]:
    """Create timers under their numbers; the places where the kernel writes the number each got."""
    if not timers:
        return []
    batch.call("timer ids on", arch.NR_prctl, PR_TIMER_CREATE_RESTORE_IDS, 1, optional=True)
    places = []
    for state in timers:
        timer = state.timer
        event = struct.pack("<Qiii", timer.value, timer.signal, timer.notify, timer.thread).ljust(64, b"\0")
        place = batch.put(struct.pack("<i", timer.id))
        batch.call(f"timer_create {timer.id}", arch.NR_timer_create, timer.clock, batch.put(event), place)
        places.append(place)
    batch.call("timer ids off", arch.NR_prctl, PR_TIMER_CREATE_RESTORE_IDS, 0, optional=True)
    return places


def arm_posix(batch: Batch, timers: list[TimerState], elapsed_ns: int) -> None:
    for state in timers:
        if any(state.setting[16:]):
            elapsed = elapsed_ns if state.timer.clock in _WALL_CLOCKS else 0
            setting = batch.put(_later(state.setting, elapsed, unit=1))
            batch.call(f"timer_settime {state.timer.id}", arch.NR_timer_settime, state.timer.id, 0, setting, 0)
