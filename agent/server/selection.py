"""Which processes of this host somebody means, and which there are.

Kernel threads, what is dead, and our own (this service, what it started, the connections to it, the tool) are
no processes here: they cannot be moved, and `name: python3` does not mean them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pwd
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.hook_api import Select, Selected, Selection
from agent.kernel import procfs

MAX_PIDFILE: Final = 64  # bytes: a number and a line feed
_PROGRAMS: Final = frozenset({"migrate", "migrate-agent"})
_MODULES: Final = frozenset({"agent.main", "agent.worker", "migrate.cli"})
_DEAD: Final = frozenset("ZXx")


def find(select: Select) -> Selection:
    """The processes that are meant."""
    if select.pidfile is not None:
        return _by_pidfile(select.pidfile)
    if select.pid is not None:
        return _by_pid(select.pid, "")
    found = tuple(each for each in processes() if select.name in _names(each))
    return Selection(processes=found, why="" if found else f"no process is called {select.name!r}")


def is_still(process: Selected) -> bool:
    """Whether its number is its own yet."""
    try:
        return procfs.stat(process.pid).starttime == process.started
    except ProcessLookupError:
        return False


def processes() -> Iterator[Selected]:
    """Everything that runs here, by number."""
    ours = _family(os.getpid())
    for pid in sorted(procfs.processes()):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid not in ours and (found := _look(pid)) is not None:
                yield found


def _by_pidfile(path: str) -> Selection:
    if not os.path.isabs(path):
        return Selection(processes=(), why=f"{path}: it is not an absolute path")
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            words = file.read(MAX_PIDFILE).strip()
    except (OSError, ValueError) as error:  # ValueError: a null byte
        return Selection(processes=(), why=f"{path}: {getattr(error, 'strerror', None) or error}")
    if len(words) > 10 or not words.isdigit():
        return Selection(processes=(), why=f"{path}: there is no process number in it")
    return _by_pid(int(words), f"{path}: ")


def _by_pid(pid: int, whence: str) -> Selection:
    try:
        found = _look(pid)
    except ProcessLookupError:
        found = None
    if found is None or pid in _family(os.getpid()):
        return Selection(processes=(), why=f"{whence}there is no process {pid}")
    return Selection(processes=(found,))


def _look(pid: int) -> Selected | None:
    """None for what is no process that somebody could mean; ProcessLookupError."""
    stat = procfs.stat(pid)
    arguments = procfs.command_line(pid).decode("utf-8", "replace").rstrip("\0").split("\0")
    if stat.state in _DEAD or (arguments == [""] and not _executable(pid)):
        return None
    if _is_ours(arguments):
        return None
    uid = int(procfs.status(pid)["Uid"].split()[0])
    return Selected(
        pid=pid, name=stat.comm, command=" ".join(arguments), user=_user(uid), started=stat.starttime
    )


def _is_ours(arguments: list[str]) -> bool:
    """Whether it is one of our programs, run as a script or as `python -m MODULE` (agent/launch.py)."""
    words = arguments
    if Path(arguments[0]).name.startswith("python"):
        words = list(itertools.dropwhile(lambda word: word.startswith("-") and word != "-m", arguments[1:]))
    if words[:1] == ["-m"]:
        return words[1:2] != [] and words[1] in _MODULES
    return words != [] and Path(words[0]).name in _PROGRAMS


def _names(process: Selected) -> tuple[str, str]:
    """The kernel's, which has 15 bytes at most, and the executable's."""
    return process.name, _executable(process.pid)


def _executable(pid: int) -> str:
    """The file name; "" of a kernel thread, and of what is gone."""
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).name.removesuffix(" (deleted)")
    except OSError:
        return ""


def _family(pid: int) -> set[int]:
    """A process and everything that descends from it."""
    found = {pid}
    with contextlib.suppress(ProcessLookupError):
        for child in procfs.children(pid):
            found |= _family(child)
    return found


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
