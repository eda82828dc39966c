"""timerfd_create(2): clock, what remains, interval, and expirations nobody has read yet."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import struct
from collections.abc import Callable
from typing import Annotated, Final

import msgspec

from agent.api import Blocker
from agent.bounds import U31, U63, Nonblocking
from agent.descriptors import OpenFile, Rebuilding, SourceProcess
from agent.kernel import procfs
from agent.kernel.errors import check, libc
from agent.tracee import Tracee

NAME: Final = "timerfd"
TFD_TIMER_ABSTIME: Final = 1
TFD_TIMER_CANCEL_ON_SET: Final = 2
TFD_IOC_SET_TICKS: Final = 0x40085400
_PAIR: Final = re.compile(r"\((\d+), (\d+)\)")


class State(msgspec.Struct, frozen=True):
    clock: U31
    ticks: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
    flags: Nonblocking  # of the description
    settime_flags: U31
    remaining_ns: U63  # 0: disarmed
    interval_ns: U63


def recognise(file: OpenFile) -> bool:
    return file.link == "anon_inode:[timerfd]"


def blockers(file: OpenFile, process: SourceProcess) -> list[Blocker]:
    return []


def _nanoseconds(text: str) -> int:
    match = _PAIR.match(text)
    assert match is not None
    return int(match[1]) * 1_000_000_000 + int(match[2])


def capture(file: OpenFile, process: SourceProcess) -> State:
    # a periodic timer that expired stands still until asked: that counts its ticks and sets it going again
    ours = process.duplicate(file.fd)
    check(libc.timerfd_gettime(ours, ctypes.create_string_buffer(32)), file.name)
    info = dict(procfs.fdinfo(os.getpid(), ours))
    return State(
        clock=int(info["clockid"]),
        ticks=int(info["ticks"]),
        flags=file.flags & os.O_NONBLOCK,
        settime_flags=int(info["settime flags"], 8),
        remaining_ns=_nanoseconds(info["it_value"]),
        interval_ns=_nanoseconds(info["it_interval"]),
    )


def rebuild(state: State, context: Rebuilding) -> int:
    """Relative to now, so that no clock offset matters; only cancel-on-set insists on an absolute time."""
    fd = check(libc.timerfd_create(state.clock, os.O_CLOEXEC | state.flags), "timerfd")
    state, expired = after(state, context.elapsed_ns)
    if state.remaining_ns:
        _arm(fd, state)
    if state.ticks + expired:
        fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("<Q", state.ticks + expired))
    return fd


def rouse(state: State, fd: int, process: Tracee) -> Callable[[], None]:
    """Let it have an event (see `agent.silencing`): one expiration, taken away again."""
    fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("<Q", 1))

    def calm() -> None:
        (ticks,) = struct.unpack("<Q", os.read(fd, 8))
        if ticks > 1:  # it really expired meanwhile
            fcntl.ioctl(fd, TFD_IOC_SET_TICKS, struct.pack("<Q", ticks - 1))

    return calm


def after(state: State, elapsed_ns: int) -> tuple[State, int]:
    """The timer `elapsed_ns` later, and how often it expired meanwhile; its phase is kept."""
    remaining = state.remaining_ns
    if not remaining and state.ticks:  # it expired right between being set going and being read
        remaining = state.interval_ns
    if not remaining or elapsed_ns < remaining:
        left = remaining - elapsed_ns if remaining else 0
        return msgspec.structs.replace(state, remaining_ns=left), 0
    if not state.interval_ns:
        return msgspec.structs.replace(state, remaining_ns=0), 1
    times, over = divmod(elapsed_ns - remaining, state.interval_ns)
    return msgspec.structs.replace(state, remaining_ns=state.interval_ns - over), times + 1


def _arm(fd: int, state: State) -> None:
    flags, value = 0, state.remaining_ns
    if state.settime_flags & TFD_TIMER_CANCEL_ON_SET:
        import time

        flags = TFD_TIMER_ABSTIME | TFD_TIMER_CANCEL_ON_SET
        value += time.clock_gettime_ns(state.clock)
    second = 1_000_000_000
    setting = struct.pack(
        "<4q", state.interval_ns // second, state.interval_ns % second, value // second, value % second
    )
    check(libc.timerfd_settime(fd, flags, ctypes.create_string_buffer(setting, 32), None), "timerfd")
