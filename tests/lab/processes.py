"""Small things every process of a lab does to itself."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from lab import kernel

_KEPT = 3  # standard input, output and error


def close_others(*keep: int) -> None:
    """Close every descriptor but the standard ones and `keep`."""
    bounds = [_KEPT - 1, *sorted(keep), os.sysconf("SC_OPEN_MAX")]
    for low, high in itertools.pairwise(bounds):
        os.closerange(low + 1, high)


def redirect(output: int | None = None) -> None:
    """Let standard input be /dev/null, and output and error be the descriptor `output`, or /dev/null too."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    for fd in (1, 2):
        os.dup2(null if output is None else output, fd)
    os.close(null)


def reset_signals() -> None:
    """Let a command start with the defaults, whatever Python and those before it did.

    Signals 32 and 33 too, which glibc keeps to itself and its posix_spawn hands on ignored.
    """
    for number in set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP}:
        kernel.default_action(number)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def fork_into(work: Callable[[], NoReturn]) -> int:
    """Run `work` in a child, which never returns from here; its pid."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pid
