"""A stopped task that stays stopped even if its tracer dies: a pending SIGSTOP that nobody has taken yet.

When a tracer ends, the kernel detaches its tasks. One that is in a ptrace-stop goes on inside get_signal(),
where the first of them finds the SIGSTOP and stops the whole group, before any of them is back in the program
(kernel/signal.c). It can be taken back without a trace as long as the tracer lives; later, SIGCONT lifts it.
"""

from __future__ import annotations

import os
import signal

from agent.kernel import ptrace
from agent.resources import signals


def put(pid: int) -> bool:
    """From now on the death of the tracer leaves it stopped.

    False if somebody else has sent the same already: then it is theirs too, and not to be lifted.
    """
    theirs = bool(pending(pid))
    os.kill(pid, signal.SIGSTOP)
    return not theirs


def pending(pid: int) -> list[bytes]:
    """The SIGSTOP that waits, if there is one: siginfo."""
    return [one for one in signals.pending_of_process(pid) if signals.number_of(one) == signal.SIGSTOP]


def lift(tid: int) -> None:
    """Take it back. The task is in a ptrace-stop before and afterwards, with the registers it goes on with.

    Signals that are due before it are delivered as if nobody had been there. ProcessLookupError: it has died.
    """
    deliver = 0
    while deliver != signal.SIGSTOP:
        ptrace.cont(tid, deliver)
        status = ptrace.wait(tid)
        deliver = 0 if ptrace.event(status) else os.WSTOPSIG(status)
