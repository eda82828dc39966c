"""Stopped tasks that stay stopped even if their tracer dies: a pending SIGSTOP that nobody has taken yet.

When a tracer ends, the kernel detaches its tasks. One that is in a ptrace-stop goes on inside get_signal(),
where it finds the SIGSTOP and stops the whole group, before it is back in the program (kernel/signal.c). It
can be taken back without a trace as long as the tracer lives; later, SIGCONT lifts it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from typing import Final

from agent.kernel import ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.resources import signals

_MOMENT: Final = 0.05  # seconds


def put(pid: int) -> bool:
    """From now on the death of the tracer leaves the process stopped. One signal, for all its threads.

    False if somebody else has sent the same already: then it is theirs too, and not to be lifted.
    """
    theirs = any(map(_is_stop, signals.pending_of_process(pid)))
    os.kill(pid, signal.SIGSTOP)
    return not theirs


def put_each(pid: int, tids: Iterable[int]) -> None:
    """The same with a signal for each thread, so that one that somebody else sends to the process is not
    lost in ours: of two that are alike the kernel keeps one.
    """
    for tid in tids:
        check(libc.syscall(arch.NR_tgkill, pid, tid, signal.SIGSTOP), f"SIGSTOP to task {tid}")


def is_ours(siginfo: bytes) -> bool:
    """Of what is pending for a thread."""
    return _is_stop(siginfo) and signals.code_of(siginfo) == signals.SI_TKILL


def lift(tid: int) -> None:
    """Take it back. The task is in a ptrace-stop before and afterwards, with the registers it goes on with.

    Signals that are due before it are delivered as if nobody had been there. If somebody takes it back at
    the same time (SIGCONT), the task runs for a moment. ProcessLookupError: it has died.
    """
    deliver = 0
    while any(map(_is_stop, (*signals.pending_of_thread(tid), *signals.pending_of_process(tid)))):
        ptrace.cont(tid, deliver)
        if not _stops(tid):
            ptrace.interrupt(tid)
        status = ptrace.wait(tid)
        deliver = 0 if ptrace.event(status) else os.WSTOPSIG(status)
        if deliver == signal.SIGSTOP:
            return


def _is_stop(siginfo: bytes) -> bool:
    return signals.number_of(siginfo) == signal.SIGSTOP


def _stops(tid: int) -> bool:
    """Within a moment; it is waited for by somebody else then."""
    deadline = time.monotonic() + _MOMENT
    options = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT | ptrace.WALL
    while os.waitid(os.P_PID, tid, options) is None:
        if time.monotonic() > deadline:
            return False
    return True
