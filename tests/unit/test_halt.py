"""Stopping a running process for a moment: it stands still, and does not notice."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unit.children import compiled, spinner, wait_for

from agent.halt import Halt
from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.resources import waits
from agent.tracee import wait_event_stop

# Threads that come and go, and threads that wait in each kind of call that a stop interrupts.
CROWD = r"""
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
static volatile long beats;
static int pipes[2];
static void expect(const char *what, int right)
{
    if (!right) {
        dprintf(1, "wrong %s %d\n", what, errno);
        exit(1);
    }
}
static void *sleeper(void *unused)
{
    struct timespec time = {0, 3000000};
    for (;;)
        expect("nanosleep", nanosleep(&time, 0) == 0);
    return unused;
}
static void *poller(void *unused)
{
    struct pollfd one = {pipes[0], POLLIN, 0};
    for (;;)
        expect("poll", poll(&one, 1, 5) == 0);
    return unused;
}
static void *waiter(void *unused)
{
    struct epoll_event event;
    int fd = epoll_create1(0);
    for (;;)
        expect("epoll_wait", epoll_wait(fd, &event, 1, 4) == 0);
    return unused;
}
static void *reader(void *unused)
{
    char byte;
    expect("read", read(pipes[0], &byte, 1) == 1);
    return unused;
}
static void *guest(void *unused)
{
    beats++;
    return unused;
}
int main(void)
{
    pthread_t thread;
    prctl(PR_SET_PDEATHSIG, 9);
    expect("pipe", pipe(pipes) == 0);
    pthread_create(&thread, 0, sleeper, 0);
    pthread_create(&thread, 0, poller, 0);
    pthread_create(&thread, 0, waiter, 0);
    pthread_create(&thread, 0, reader, 0);
    for (long n = 0;; n++) {
        expect("thread", pthread_create(&thread, 0, guest, 0) == 0);
        pthread_join(thread, 0);
        if (n % 50 == 0)
            dprintf(1, "%ld\n", n);
    }
}
"""


@contextlib.contextmanager
def halting(pid: int) -> Iterator[Halt]:
    memory = RemoteMemory(pid)
    try:
        yield Halt(pid, memory)
    finally:
        memory.close()


def states(pid: int) -> set[str]:
    return set(procfs.each_thread(pid, lambda tid: procfs.stat(pid, tid).state))


def test_it_stands_still_and_goes_on() -> None:
    with spinner() as process, halting(process.pid) as halt:
        for _ in range(50):
            with halt:
                assert states(process.pid) == {"t"}
        process.progress()
        assert procfs.status(process.pid)["TracerPid"] == "0"
        assert halt.longest_ms > 0


def test_a_crowd_of_threads(tmp_path: Path) -> None:
    """None of them sees an interrupted call, and no new one escapes."""
    output = tmp_path / "output"
    with output.open("wb") as file:
        program = subprocess.Popen([compiled(CROWD, "-pthread")], stdout=file)

    def told() -> list[str]:
        return output.read_text().split()

    try:
        wait_for(lambda: len(told()) > 2, "it to begin")
        with halting(program.pid) as halt:
            for _ in range(100):
                with halt:
                    assert states(program.pid) == {"t"}
        count = len(told())
        wait_for(lambda: len(told()) > count + 2 or program.poll() is not None, "it to go on")
        assert "wrong" not in told(), told()[-3:]
        assert program.poll() is None
    finally:
        program.kill()
        program.wait()


def test_a_wait_is_known_however_often_it_was_interrupted() -> None:
    """Which call it is, and since when; the kernel itself only tells of the last interruption."""
    source = (
        "#include <poll.h>\n#include <sys/prctl.h>\n"
        "int main(void) { prctl(PR_SET_PDEATHSIG, 9); poll(0, 0, 600000); }"
    )
    program = subprocess.Popen([compiled(source)])

    def asleep() -> waits.Asleep | None:
        """As soon as it is in its call, by what the kernel says of it."""
        in_poll = Path(f"/proc/{program.pid}/syscall").read_text().split()[0] in ("7", "219")
        return waits.observe(program.pid) if in_poll and states(program.pid) == {"S"} else None

    try:
        wait_for(lambda: asleep() is not None, "it to sleep")
        first = asleep()
        assert first is not None
        with halting(program.pid) as halt:
            for _ in range(3):
                with halt:
                    registers = ptrace.get_registers(program.pid)
                wait_for(lambda: asleep() is not None, "it to sleep again")
            assert registers.orig_rax == arch.NR_restart_syscall
            now = asleep()
            assert now is not None and now.switches > first.switches
            registers, since = halt.waits.recall(program.pid, registers, now)
        assert registers.orig_rax == arch.NR_poll
        assert since is not None and since.since == first.since
    finally:
        program.kill()
        program.wait()


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    assert child.stdin is not None
    with halting(child.pid) as halt:
        child.stdin.close()
        wait_for(lambda: procfs.stat(child.pid).state == "Z", "its end")
        with pytest.raises(ProcessLookupError), halt:
            pass
        child.wait()
        with pytest.raises(ProcessLookupError), halt:
            pass


def test_what_goes_wrong_meanwhile_does_not_leave_it_stopped() -> None:
    with spinner() as process, halting(process.pid) as halt:
        with pytest.raises(ValueError), halt:
            raise ValueError
        process.progress()


def test_a_stopped_process_stays_stopped() -> None:
    with spinner() as process, halting(process.pid) as halt:
        os.kill(process.pid, signal.SIGSTOP)
        wait_for(lambda: states(process.pid) == {"T"}, "it to be stopped")
        with halt:
            pass
        wait_for(lambda: states(process.pid) == {"T"}, "it to be stopped again")
        os.kill(process.pid, signal.SIGCONT)
        process.progress()


def test_one_that_cannot_stop_is_waited_for() -> None:
    """A thread in the kernel that no signal reaches: the parent of a vfork(2) until its child is done."""
    source = r"""
    #include <sys/prctl.h>
    #include <unistd.h>
    int main(void)
    {
        prctl(PR_SET_PDEATHSIG, 9);
        for (int n = 0;; n++)
            if (vfork() == 0) {
                usleep(150000);
                _exit(0);
            }
    }
    """
    program = subprocess.Popen([compiled(source)])
    try:
        wait_for(lambda: bool(procfs.children(program.pid)), "its child")
        with halting(program.pid) as halt:
            began = time.monotonic()
            with halt:
                assert states(program.pid) == {"t"}
                assert not [c for c in procfs.children(program.pid) if procfs.stat(c).state not in "ZX"]
            assert time.monotonic() - began < 30
    finally:
        program.kill()
        program.wait()


def test_giving_up_leaves_nobody_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal of our own comes while threads are being stopped."""
    with spinner() as process, halting(process.pid) as halt:
        monkeypatch.setattr("agent.halt.wait_event_stop", _interrupted_once())
        with pytest.raises(KeyboardInterrupt), halt:
            pass
        process.progress()
        assert procfs.status(process.pid)["TracerPid"] == "0"
        with halt:
            assert states(process.pid) == {"t"}
        process.progress()


def _interrupted_once() -> Callable[[int, float], None]:
    calls: list[int] = []

    def wait(tid: int, deadline: float) -> None:
        calls.append(tid)
        if len(calls) == 1:
            raise KeyboardInterrupt
        wait_event_stop(tid, deadline)

    return wait
