"""Why something failed, in words for a person: above all what a host has run out of, and what to do then."""

from __future__ import annotations

import errno
import signal
import time
from typing import Final

from agent.kernel import procfs
from agent.kernel.clone import LimitReached

_MOMENT: Final = 0.5  # seconds that the kernel may take to end what it has chosen to kill
_SPACE: Final = ("disk-full", "no space is left there (free some, or raise the quota)")
_FILES: Final = ("file-limit", "no more files can be open (raise the limit of open files, RLIMIT_NOFILE)")
_MEMORY: Final = ("out-of-memory", "there is no more memory (free some, or raise the limit of the cgroup)")
_PROCESSES: Final = (
    "process-limit",
    "no more processes, threads or namespaces can be made (raise the limit of the agent's cgroup, pids.max, "
    "or those of the host, kernel.threads-max, kernel.pid_max and user.max_*_namespaces)",
)
_BY_ERRNO: Final = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.ENOMEM: _MEMORY,
}


class Shortage(Exception):
    """A host has not enough of something. `kind` is stable and goes into reports."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def explained(error: BaseException) -> BaseException:
    """The Shortage that is behind it, or the error itself."""
    if isinstance(error, LimitReached):
        found: tuple[str, str] | None = _PROCESSES
    elif isinstance(error, OSError):
        found = _BY_ERRNO.get(error.errno or 0)
    else:
        found = _MEMORY if type(error) is MemoryError and not error.args else None
    if found is None:
        return error
    kind, why = found
    subject = getattr(error, "filename", None)
    return Shortage(kind, f"{subject}: {why}" if subject else why)


def message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def kind(error: BaseException) -> str:
    return str(getattr(error, "kind", None) or type(error).__name__.lower())


# --- the end of a process that is being built ---


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, in any cgroup, since it was started."""
    with open("/proc/vmstat") as file:
        counters = dict(line.split() for line in file)
    return int(counters.get("oom_kill", 0))


def killed(pid: int, kills: int) -> Shortage | None:
    """Why process `pid` has ended, which never ends by itself; None if it lives.

    `kills` is oom_kills() from before it was made.
    """
    for_memory = oom_kills() > kills
    deadline = time.monotonic() + (_MOMENT if for_memory else 0.0)
    while not _ending(pid):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)
    if for_memory:
        why = "the destination ran out of memory: its kernel killed the copy that was being built"
        return Shortage("out-of-memory", f"{why} (free some there, or raise the limit of the cgroup)")
    return Shortage("shadow-killed", f"somebody killed process {pid}, the copy that was being built")


def _ending(pid: int) -> bool:
    """Dead, or about to be: without memory, or with a SIGKILL that it has not taken yet."""
    try:
        status = procfs.status(pid)
    except ProcessLookupError:
        return True
    pending = int(status["ShdPnd"], 16) | int(status["SigPnd"], 16)
    return "VmSize" not in status or bool(pending >> (signal.SIGKILL - 1) & 1)
