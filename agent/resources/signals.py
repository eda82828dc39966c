"""Signal dispositions and queues: sigaction(2), sigqueue(3), signal(7)."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from typing import Final

from agent.kernel import pidfd, procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.tracee import Batch, Outcome

ACTION_SIZE: Final = 32  # struct kernel_sigaction: handler, flags, restorer, mask
STACK_T: Final = struct.Struct("<QiiQ")
_SIGINFO_SIZE: Final = 128
_INT_MAX: Final = (1 << 31) - 1
_SI_TIMER: Final = -2
SI_TKILL: Final = -6
_SI_KERNEL: Final = 0x80
# SIGALRM, SIGVTALRM, SIGPROF: of which interval timer (setitimer(2))
_ITIMER_SIGNALS: Final = {14: 0, 26: 1, 27: 2}


def _bits(mask: int) -> list[int]:
    return [n for n in range(1, 65) if mask >> (n - 1) & 1]


def ask_actions(batch: Batch, pid: int) -> Callable[[Outcome], list[tuple[int, bytes]]]:
    """The actions of all signals that are caught or ignored; the rest are at their default."""
    status = procfs.status(pid)
    numbers = _bits(int(status["SigCgt"], 16) | int(status["SigIgn"], 16))
    places = [batch.space(ACTION_SIZE) for _ in numbers]
    for number, place in zip(numbers, places, strict=True):
        batch.call(f"rt_sigaction {number}", arch.NR_rt_sigaction, number, 0, place, 8)
    return lambda answer: [(n, answer.read(p, ACTION_SIZE)) for n, p in zip(numbers, places, strict=True)]


def restore_actions(batch: Batch, actions: list[tuple[int, bytes]]) -> None:
    for number, action in actions:
        batch.call(f"rt_sigaction {number}", arch.NR_rt_sigaction, number, batch.put(action), 0, 8)


def ask_altstack(batch: Batch) -> Callable[[Outcome], bytes]:
    place = batch.space(STACK_T.size)
    batch.call("sigaltstack", arch.NR_sigaltstack, 0, place)
    return lambda answer: answer.read(place, STACK_T.size)


def restore_altstack(batch: Batch, stack: bytes) -> None:
    """SS_ONSTACK is the kernel's, from the stack pointer; only SS_DISABLE and SS_AUTODISARM are settings."""
    address, flags, _, size = STACK_T.unpack(stack)
    if flags & 2:  # SS_DISABLE: a new thread's default
        return
    batch.call("sigaltstack", arch.NR_sigaltstack, batch.put(STACK_T.pack(address, flags & ~1, 0, size)), 0)


def pending_of_process(pid: int) -> tuple[bytes, ...]:
    return tuple(ptrace.pending_signals(pid, shared=True))


def pending_of_thread(tid: int) -> tuple[bytes, ...]:
    return tuple(ptrace.pending_signals(tid, shared=False))


def number_of(siginfo: bytes) -> int:
    return int(struct.unpack_from("<i", siginfo)[0])


def code_of(siginfo: bytes) -> int:
    return int(struct.unpack_from("<i", siginfo, 8)[0])


def mask_of(queue: tuple[bytes, ...]) -> int:
    """The signals of a queue as a set."""
    result = 0
    for siginfo in queue:
        result |= 1 << (number_of(siginfo) - 1)
    return result


def by_timer(siginfo: bytes) -> bool:
    """Whether a POSIX timer (SI_TIMER) or an interval timer (SI_KERNEL) queued it, sigaction(2)."""
    return by_posix_timer(siginfo) or itimer_of(siginfo) is not None


def by_posix_timer(siginfo: bytes) -> bool:
    return bool(struct.unpack_from("<i", siginfo, 8)[0] == _SI_TIMER)


def itimer_of(siginfo: bytes) -> int | None:
    """Which interval timer (ITIMER_REAL ...) queued it; None if none did."""
    number, _, code = struct.unpack_from("<iii", siginfo)
    return _ITIMER_SIGNALS.get(number) if code == _SI_KERNEL else None


def timer_id(siginfo: bytes) -> int:
    """Of a signal with SI_TIMER: the number of its POSIX timer (si_timerid)."""
    return int(struct.unpack_from("<i", siginfo, 16)[0])


def by_kernel(number: int) -> bytes:
    """What an interval timer queues."""
    return struct.pack("<iii", number, 0, _SI_KERNEL).ljust(_SIGINFO_SIZE, b"\0")


def by_timer_number(number: int, timer: int, overrun: int, value: int) -> bytes:
    """What a POSIX timer queues: si_timerid, si_overrun, si_value."""
    siginfo = struct.pack("<iiixxxxiiQ", number, 0, _SI_TIMER, timer, min(overrun, _INT_MAX), value)
    return siginfo.ljust(_SIGINFO_SIZE, b"\0")


def requeue_process(batch: Batch, tgid: int, queue: tuple[bytes, ...]) -> None:
    """Only a process itself may queue any siginfo to itself (rt_sigqueueinfo(2))."""
    for siginfo in queue:
        batch.call("rt_sigqueueinfo", arch.NR_rt_sigqueueinfo, tgid, number_of(siginfo), batch.put(siginfo))


def requeue_thread(batch: Batch, tgid: int, tid: int, queue: tuple[bytes, ...]) -> None:
    for siginfo in queue:
        place = batch.put(siginfo)
        batch.call("rt_tgsigqueueinfo", arch.NR_rt_tgsigqueueinfo, tgid, tid, number_of(siginfo), place)


def send(process: int, pid: int, tid: int, siginfo: bytes) -> None:
    """Send it to a living process (`tid` 0), or to one of its threads; ProcessLookupError if it has ended.

    `process` is its pidfd: its number may be another's by now. With its siginfo as far as the kernel lets
    others (si_code < 0).
    """
    number, _, code = struct.unpack_from("<iii", siginfo)
    plain = code >= 0 or code == SI_TKILL
    if not tid:
        pidfd.send_signal(process, number, None if plain else siginfo)
        return
    pidfd.send_signal(process, 0)  # it is there
    if plain:
        result = libc.syscall(arch.NR_tgkill, pid, tid, number)
    else:
        info = ctypes.create_string_buffer(siginfo, len(siginfo))
        result = libc.syscall(arch.NR_rt_tgsigqueueinfo, pid, tid, number, info)
    check(result, f"signal {number} to {pid}")
