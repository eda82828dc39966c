"""Small things every process of a lab does to itself."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

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
    """Undo what Python did to signals at its start, so that a command starts with the defaults."""
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):  # SIGKILL, SIGSTOP
            signal.signal(number, signal.SIG_DFL)
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
