"""Running commands in a host that is up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from lab import kernel, processes
from lab.plan import LabError
from lab.state import HostState

_SI_KERNEL = 0x80  # asm-generic/siginfo.h: sent by the kernel, as a terminal's signals are
_PASSED_ON = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
_AWAITED = (*_PASSED_ON, signal.SIGIO)
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell has it


def enter(host: HostState) -> None:
    """Move this process into the host: network, files and names at once, pids and clocks for its children."""
    directory, here = os.getcwd(), os.stat(".")
    fd = host.init.open()
    kernel.setns(fd, kernel.OWN | kernel.CHILDREN)
    os.close(fd)
    os.chdir(directory if _is_at(directory, here) else "/")


def _is_at(path: str, status: os.stat_result) -> bool:
    """Whether the very directory that `status` is of is at `path` here: then it is so in all hosts."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(path), status)
    return False


def run(command: list[str], environment: Mapping[str, str]) -> int:
    """Run `command` in the entered host with our standard streams; its exit status, 128 + N for signal N.

    Signals sent to us go to it, and it does not outlive us. Its parent is an attendant in the host, not us: a
    zombie whose parent is outside would keep the host's pid namespace from ending until someone reaps it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    ours, theirs = socket.socketpair()

    def attendant() -> NoReturn:
        ours.close()
        _attend(theirs, command, environment)

    _fork_orphan(attendant)
    theirs.close()
    return _relay(ours)


def _relay(attendant: socket.socket) -> int:
    """Pass signals on to the command until its exit status comes.

    Both are waited for as signals: sigwaitinfo tells who sent one, and no thread can be started by a process
    whose children will be in another pid namespace (clone(2), EINVAL).
    """
    _announce_by_signal(attendant)
    while True:
        with contextlib.suppress(BlockingIOError):
            status = attendant.recv(1)
            return status[0] if status else 128 + signal.SIGKILL  # the host is gone
        received = signal.sigwaitinfo(_AWAITED)
        if received.si_signo != signal.SIGIO and received.si_code != _SI_KERNEL:
            # A terminal's signals go to the command anyway.
            with contextlib.suppress(BrokenPipeError):
                attendant.send(bytes([received.si_signo]))


def _announce_by_signal(end: socket.socket) -> None:
    """Have SIGIO sent to this process when there is something to receive (fcntl(2), F_SETOWN)."""
    end.setblocking(False)
    fcntl.fcntl(end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_ASYNC)


def _attend(caller: socket.socket, command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Be the parent of `command`: send it the signals that `caller` names, and tell its exit status."""

    def work() -> NoReturn:
        kernel.set_death_signal(signal.SIGKILL)
        processes.close_others()
        _execute(command, environment)

    processes.close_others(caller.fileno())
    child = processes.fork_into(work)
    ended = os.pidfd_open(child)
    while ended not in select.select([ended, caller.fileno()], [], [])[0]:
        received = caller.recv(1)
        os.kill(child, received[0] if received else signal.SIGKILL)
        if not received:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        caller.send(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def _fork_orphan(work: Callable[[], NoReturn]) -> None:
    """Run `work` in a process of the entered host that is a child of its pid 1."""

    def middle() -> NoReturn:
        processes.fork_into(work)
        os._exit(0)

    os.waitpid(processes.fork_into(middle), 0)


def start(command: list[str], environment: Mapping[str, str], log: Callable[[int], Path]) -> int:
    """Start `command` in the entered host, detached, and return its pid there.

    It leads a session of its own, is a child of the host's pid 1, reads /dev/null and writes to
    `log` of its pid. Raises LabError if it cannot be executed, or the log not be written.
    """
    reader, writer = os.pipe()

    def leader() -> NoReturn:
        os.setsid()
        _write_to(log(os.getpid()), writer)
        processes.close_others(writer)
        os.write(writer, f"pid {os.getpid()}\n".encode())
        _execute(command, environment, report=writer)

    _fork_orphan(leader)
    os.close(writer)
    with open(reader) as answers:
        told = dict(line.rstrip("\n").split(" ", 1) for line in answers)
    if "error" in told or "pid" not in told:
        raise LabError(told.get("error", f"{command[0]} was not started"))
    return int(told["pid"])


def _write_to(path: Path, report: int) -> None:
    """Let standard output and error be the file `path`, emptied. If that fails, tell `report` and exit."""
    try:
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    except OSError as err:
        os.write(report, f"error {path}: {err.strerror}\n".encode())
        os._exit(1)
    processes.redirect(log)


def _execute(command: list[str], environment: Mapping[str, str], report: int | None = None) -> NoReturn:
    """Become `command`. If that fails, say so (on `report` if given) and exit as a shell would."""
    processes.reset_signals()
    try:
        os.execvpe(command[0], command, dict(environment))
    except OSError as err:
        message = f"{command[0]}: {err.strerror}"
        if report is None:
            print(f"lab: {message}", file=sys.stderr, flush=True)
        else:
            os.write(report, f"error {message}\n".encode())
        os._exit(NOT_FOUND if isinstance(err, FileNotFoundError) else NOT_EXECUTABLE)
