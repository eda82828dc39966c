"""Interval timers and POSIX timers: setitimer(2), timer_create(2).

Time goes on while a process is frozen: what remains is reduced by the pause, and what ran out in it fires at
once. A periodic timer keeps its beat: it is armed for its next time, and the notification of those it missed
is queued by hand. What timer_getoverrun(2) says of a notification that is still queued is not kept.
"""

from __future__ import annotations

import functools
import signal
import struct
import time
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from agent.kernel import procfs
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import libc
from agent.kernel.procfs import PosixTimer
from agent.resources import signals
from agent.state import ProcessState, TimerState
from agent.tracee import Batch, Outcome

ITIMER_SIZE: Final = 32  # struct itimerval, and struct itimerspec: interval, then value
_PAIR: Final = struct.Struct("<4q")
_SECOND: Final = 1_000_000_000
ITIMER_REAL: Final = 0
SIGEV_THREAD_ID: Final = 4
SIGEV_NONE: Final = 1
PR_TIMER_CREATE_RESTORE_IDS: Final = 77  # Linux 6.16
_RESTORE_IDS_GET: Final = 2
_MANY: Final = 10_000  # timers that are made and deleted only to be counted
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


def restore_itimers(batch: Batch, process: ProcessState, own_pid: int, elapsed_ns: int) -> None:
    for which, timer in enumerate(process.itimers):
        if any(timer):
            setting, missed = later(timer, elapsed_ns if which == ITIMER_REAL else 0, unit=1000)
            batch.call("setitimer", arch.NR_setitimer, which, batch.put(setting), 0)
            if missed:
                signals.requeue_process(batch, own_pid, (signals.by_kernel(signal.SIGALRM),))


def later(setting: bytes, elapsed_ns: int, unit: int) -> tuple[bytes, int]:
    """A timer `elapsed_ns` later, and of one that goes on, how often it ran out meanwhile.

    `setting`: an interval and what remains (seconds, 1/unit of nanoseconds). One that has run out for good
    is set to do so at once.
    """
    interval_s, interval_f, value_s, value_f = _PAIR.unpack(setting)
    interval = interval_s * _SECOND + interval_f * unit
    # with an interval and no value the signal is queued, and the kernel arms it again when that is taken
    remaining = (value_s * _SECOND + value_f * unit or interval) - elapsed_ns
    missed = 0
    if remaining <= 0 and interval:
        missed, over = divmod(-remaining, interval)
        missed, remaining = missed + 1, interval - over
    remaining = max(remaining, unit)
    return _PAIR.pack(interval_s, interval_f, remaining // _SECOND, remaining % _SECOND // unit), missed


def ask_posix(batch: Batch, pid: int, numbers: Mapping[int, int]) -> Callable[[Outcome], list[TimerState]]:
    """`numbers`: of each thread as we see it, the process's own."""
    timers = [_own_thread(timer, numbers) for timer in procfs.timers(pid)]
    places = [batch.space(ITIMER_SIZE) for _ in timers]
    overruns = []
    for timer, place in zip(timers, places, strict=True):
        batch.call(f"timer_gettime {timer.id}", arch.NR_timer_gettime, timer.id, place)
        overruns.append(batch.call(f"timer_getoverrun {timer.id}", arch.NR_timer_getoverrun, timer.id))
    return lambda answer: [
        TimerState(timer, answer.read(place, ITIMER_SIZE), answer.results[index])
        for timer, place, index in zip(timers, places, overruns, strict=True)
    ]


def _own_thread(timer: PosixTimer, numbers: Mapping[int, int]) -> PosixTimer:
    """/proc has the threads that timers tell in its reader's numbers. One that has ended is told nothing."""
    if not timer.notify & SIGEV_THREAD_ID:
        return timer
    if timer.thread not in numbers:
        return msgspec.structs.replace(timer, notify=SIGEV_NONE, thread=0)
    return msgspec.structs.replace(timer, thread=numbers[timer.thread])


def runs_on(process: ProcessState, siginfo: bytes) -> bool:
    """Whether a queued signal is of a timer armed in the captured state, which will therefore fire again."""
    if not signals.by_timer(siginfo):
        return False
    which = signals.itimer_of(siginfo)
    if which is not None:
        return any(process.itimers[which][16:])
    number = signals.timer_id(siginfo)
    return any(any(t.setting[16:]) for t in process.timers if t.timer.id == number)


@functools.cache
def _numbers_can_be_chosen() -> bool:
    return bool(libc.prctl(PR_TIMER_CREATE_RESTORE_IDS, _RESTORE_IDS_GET, 0, 0, 0) >= 0)


def create_posix(batch: Batch, timers: list[TimerState]) -> list[int]:
    """Create timers under their numbers; the places where the kernel writes what each got, in the same order.

    Older kernels count a process's timers from 0 on (posix_timer_add): those gone since are made and deleted.
    """
    if not timers:
        return []
    chosen = _numbers_can_be_chosen()
    if chosen:
        batch.call("timer ids on", arch.NR_prctl, PR_TIMER_CREATE_RESTORE_IDS, 1)
    places, following = dict[int, int](), 0
    for timer in sorted((state.timer for state in timers), key=lambda timer: timer.id):
        if not chosen and timer.id - following <= _MANY:
            _skip(batch, range(following, timer.id))
        following = timer.id + 1
        event = struct.pack("<Qiii", timer.value, timer.signal, timer.notify, timer.thread).ljust(64, b"\0")
        places[timer.id] = batch.put(struct.pack("<i", timer.id))
        batch.call(
            f"timer_create {timer.id}", arch.NR_timer_create, timer.clock, batch.put(event), places[timer.id]
        )
    if chosen:
        batch.call("timer ids off", arch.NR_prctl, PR_TIMER_CREATE_RESTORE_IDS, 0)
    return [places[state.timer.id] for state in timers]


def _skip(batch: Batch, numbers: range) -> None:
    place = batch.space(4)
    for number in numbers:
        batch.call(f"timer_create for {number}", arch.NR_timer_create, time.CLOCK_MONOTONIC, 0, place)
        batch.call(f"timer_delete {number}", arch.NR_timer_delete, number)


def arm_posix(batch: Batch, process: ProcessState, own_pid: int, elapsed_ns: int) -> None:
    queued = {signals.timer_id(s) for s in process.pending if signals.by_posix_timer(s)}
    for state in process.timers:
        if any(state.setting[16:]):
            timer = state.timer
            setting, missed = later(state.setting, elapsed_ns if timer.clock in _WALL_CLOCKS else 0, unit=1)
            batch.call(f"timer_settime {timer.id}", arch.NR_timer_settime, timer.id, 0, batch.put(setting), 0)
            if missed and timer.id not in queued:  # a second notification of one timer is never queued
                _notify(batch, timer, own_pid, missed)


def _notify(batch: Batch, timer: PosixTimer, own_pid: int, missed: int) -> None:
    """What the timer would have queued when it first ran out."""
    siginfo = signals.by_timer_number(timer.signal, timer.id, missed - 1, timer.value)
    if timer.notify & SIGEV_THREAD_ID:
        signals.requeue_thread(batch, own_pid, timer.thread, (siginfo,))
    elif timer.notify != SIGEV_NONE:
        signals.requeue_process(batch, own_pid, (siginfo,))
