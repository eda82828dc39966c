"""Running commands in a host that is up."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import NoReturn

from lab import kernel, processes
from lab.plan import HOST_DIRECTORY, LabError
from lab.state import HostState

_SI_KERNEL = 0x80  # asm-generic/siginfo.h: sent by the kernel, as a terminal's signals are
_PASSED_ON = {
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
}
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as a shell has it


def enter(host: HostState) -> None:
    """Move this process into the host: network, files and names at once, pids and clocks for its children."""
    directory = os.getcwd()
    fd = host.init.open()
    kernel.setns(fd, kernel.OWN | kernel.CHILDREN)
    os.close(fd)
    # The caller's directory where the host has the same one.
    os.chdir(directory if os.path.isdir(directory) else "/")


def run(command: list[str], environment: Mapping[str, str]) -> int:
    """Run `command` in the entered host with our standard streams; its exit status, 128 + N for signal N.

    Signals sent to us go to it, and it does not outlive us.
    """
    signals = {*_PASSED_ON, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def work() -> NoReturn:
        kernel.set_death_signal(signal.SIGKILL)
        processes.close_others()
        _execute(command, environment)

    child = processes.fork_into(work)
    while True:
        received = signal.sigwaitinfo(signals)
        if received.si_signo == signal.SIGCHLD:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif received.si_code != _SI_KERNEL:  # the terminal's went to it too
            os.kill(child, received.si_signo)


def start(command: list[str], environment: Mapping[str, str]) -> int:
    """Start `command` in the entered host, detached, and return its pid there.

    It leads a session of its own, is a child of the host's pid 1, reads /dev/null and writes to
    HOST_DIRECTORY/PID.log. Raises LabError if it cannot be executed.
    """
    reader, writer = os.pipe()

    def leader() -> NoReturn:
        os.setsid()
        path = HOST_DIRECTORY / f"{os.getpid()}.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        processes.redirect(log)
        processes.close_others(writer)
        os.write(writer, f"pid {os.getpid()}\n".encode())
        _execute(command, environment, report=writer)

    def middle() -> NoReturn:
        processes.fork_into(leader)  # orphaned at once, in the host: so pid 1 adopts it
        os._exit(0)

    os.waitpid(processes.fork_into(middle), 0)
    os.close(writer)
    with open(reader) as answers:
        told = dict(line.rstrip("\n").split(" ", 1) for line in answers)
    if "error" in told or "pid" not in told:
        raise LabError(told.get("error", f"{command[0]} was not started"))
    return int(told["pid"])


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
