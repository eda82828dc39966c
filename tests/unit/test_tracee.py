"""Making a stopped task do syscalls: nothing of it shows afterwards, and our death only delays the task."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from unit.children import Spinner, ended, puppet, spinner, wait_for

from agent import scratch
from agent import tracee as engine
from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.memory import RemoteMemory
from agent.resources import waits
from agent.tracee import ENTRIES, SCRATCH_SIZE, InjectedCallFailed, Tracee, stop, wait_event_stop
from agent.visit import Caller

NR_GETPID, NR_GETCWD, NR_CLOSE = 39, 79, 3


class Stopped:
    """A task that we have seized and stopped, with a scratch."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.memory = RemoteMemory(pid)
        self.tracee = Tracee(pid, self.memory, fragile=True)
        self.caller = Caller(pid, self.memory)
        self.call = partial(self.caller.call, pid)
        ptrace.seize(pid)
        self.stop()

    def stop(self) -> None:
        stop([self.pid], time.monotonic() + 5)

    def go_on(self) -> None:
        ptrace.cont(self.pid)

    def map(self) -> None:
        scratch.install(self.tracee, self.call, scratch.choose(procfs.maps(self.pid)))
        self.caller.sweep()

    def unmap(self) -> None:
        assert scratch.remove(self.pid, self.memory, self.call)
        self.caller.sweep()

    def picture(self) -> tuple[arch.Registers, bytes, int]:
        """All that must not change."""
        pid = self.pid
        return ptrace.get_registers(pid), ptrace.get_xstate(pid), ptrace.get_sigmask(pid)

    def run(self, calls: int) -> list[int]:
        batch = self.tracee.batch()
        for _ in range(calls):
            batch.call("getpid", NR_GETPID)
        return self.tracee.run(self.pid, batch).results


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[Stopped]:
    found = Stopped(pid)
    try:
        yield found
    finally:
        with contextlib.suppress(ProcessLookupError):
            ptrace.detach(pid)
        found.memory.close()


def asleep(task: Stopped) -> bool:
    return waits.interrupted(ptrace.get_registers(task.pid))


def running(task: Stopped) -> bool:
    return ptrace.get_registers(task.pid).syscall is None


def caught_while(task: Stopped, state: Callable[[Stopped], bool]) -> None:
    """Let the stopped task run and stop it until it is `state`."""
    deadline = time.monotonic() + 10
    pause = 0.0001
    while not state(task):
        assert time.monotonic() < deadline
        task.go_on()
        time.sleep(pause)
        pause = (pause * 1.7) % 0.03
        task.stop()


@pytest.mark.parametrize("state", [asleep, running])
def test_batches_leave_no_trace(state: Callable[[Stopped], bool]) -> None:
    with spinner() as target:
        with stopped(target.pid) as task:
            task.map()
            for _ in range(5):
                caught_while(task, state)
                before = task.picture()
                assert before[2] == 1 << 9 | 1 << (34 + 3 - 1)  # SIGUSR1 and SIGRTMIN + 3
                for calls in (1, 3, ENTRIES + 1):
                    assert task.run(calls) == [target.pid] * calls
                    assert task.picture() == before
                task.go_on()
                target.progress(1)
                task.stop()
            task.unmap()
        assert target.progress() == 0


def test_thousands_of_calls() -> None:
    with spinner() as target, stopped(target.pid) as task:
        task.map()
        assert task.run(5 * ENTRIES + 7) == [target.pid] * (5 * ENTRIES + 7)
        task.go_on()
        target.progress()
        task.stop()


def test_signals_that_arrive_meanwhile_are_delivered_afterwards() -> None:
    with spinner() as target:
        with stopped(target.pid) as task:
            task.map()
            for _ in range(10):
                os.kill(target.pid, signal.SIGRTMIN)
                assert task.run(2) == [target.pid] * 2
            assert len(ptrace.pending_signals(task.pid, shared=True)) == 10
        wait_for(lambda: target.progress(1) == 10, "the signals")


def test_arguments_and_results_in_memory() -> None:
    with spinner() as target, stopped(target.pid) as task:
        task.map()
        batch = task.tracee.batch()
        place = batch.space(256)
        index = batch.call("getcwd", NR_GETCWD, place, 256)
        text = batch.put(b"hello")
        outcome = task.tracee.run(target.pid, batch)
        there = os.readlink(f"/proc/{target.pid}/cwd").encode()
        assert outcome.read(place, outcome.results[index]) == there + b"\0"
        assert outcome.read(text, 5) == b"hello"
        assert place % 16 == text % 16 == 0


def test_more_data_than_there_is_room_for() -> None:
    with spinner() as target, stopped(target.pid) as task:
        task.map()
        batch = task.tracee.batch()
        batch.put(bytes(batch.room))
        assert batch.room == 0
        with pytest.raises(MemoryError):
            batch.put(b"x")


def test_a_failure_names_the_call_and_all_calls_are_made() -> None:
    with spinner() as target, stopped(target.pid) as task:
        task.map()
        before = task.picture()
        batch = task.tracee.batch()
        batch.call("close what is not open", NR_CLOSE, 777, optional=True)
        place = batch.space(256)
        batch.call("close of 888", NR_CLOSE, 888)
        batch.call("close of 999", NR_CLOSE, 999)
        batch.call("getcwd", NR_GETCWD, place, 256)
        with pytest.raises(InjectedCallFailed, match=rf"close of 888 \(task {target.pid}\)") as failed:
            task.tracee.run(target.pid, batch)
        assert failed.value.errno == errno.EBADF
        assert task.picture() == before
        written = task.memory.read(place, 8)
        assert written.startswith(b"/")


@pytest.mark.parametrize("state", [asleep, running])
def test_a_batch_that_cannot_be_watched_is_left(
    state: Callable[[Stopped], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task is not in the scratch any more when that is removed."""

    def fails(*_: object) -> int:
        raise OSError(errno.ENOMEM, "reads nothing")

    with spinner() as target:
        with stopped(target.pid) as task:
            task.map()
            caught_while(task, state)
            before = task.picture()
            with monkeypatch.context() as patched, pytest.raises(OSError, match="reads nothing"):
                patched.setattr(RemoteMemory, "read_into", fails)
                task.run(3)
            assert task.picture() == before
            assert not task.tracee.adrift
            task.unmap()
        goes_on(target)


def test_a_failing_single_call_leaves_no_trace() -> None:
    with spinner() as target, stopped(target.pid) as task:
        before = task.picture()
        with pytest.raises(InjectedCallFailed, match="close it"):
            task.call("close it", NR_CLOSE, 777)
        assert task.picture() == before
        assert task.call("pid", NR_GETPID) == target.pid
        assert task.picture() == before


def test_the_scratch_comes_and_goes() -> None:
    with puppet() as target, stopped(target.pid) as task:
        before = procfs.maps(target.pid)
        task.map()
        there = [m for m in procfs.maps(target.pid) if m not in before]
        assert sum(m.end - m.start for m in there) >= SCRATCH_SIZE
        task.unmap()
        assert procfs.maps(target.pid) == before


def test_a_task_that_ended() -> None:
    with puppet() as target, stopped(target.pid) as task:
        os.kill(target.pid, signal.SIGKILL)
        with pytest.raises(ProcessLookupError):
            task.map()
    with puppet() as target:
        ptrace.seize(target.pid)
        os.kill(target.pid, signal.SIGKILL)
        with pytest.raises(ptrace.TaskEnded) as failed:
            stop([target.pid], time.monotonic() + 5)
        assert os.WTERMSIG(failed.value.status) == signal.SIGKILL


# --- the death of the tracer ---

# what `Tracee.run` does to a task, in the order it does them; death comes right after one of these
POINTS = ("set_registers", "set_sigmask", "cont", "interrupt", "wait_event_stop")


def die_after(count: int) -> None:
    """From here on the count'th of these operations is this process's last."""
    left = itertools.count(count, -1)

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            if next(left) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in POINTS[:-1]:
        setattr(ptrace, name, deadly(getattr(ptrace, name)))
    engine.wait_event_stop = deadly(wait_event_stop)
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def tracer(pid: int, state: Callable[[Stopped], bool], count: int) -> int:
    """A process that dies after `count` operations of a batch on `pid`; its pid. Status 0: it lived."""
    child = os.fork()
    if child:
        return child
    try:
        task = Stopped(pid)
        task.map()
        caught_while(task, state)
        die_after(count)
        task.run(3)
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("state", [asleep, running])
def test_a_tracer_killed_in_the_middle_of_a_batch(state: Callable[[Stopped], bool]) -> None:
    """At every point; all at once, for each costs the time that a task waits for its tracer."""
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(spinner()) for _ in range(10)]
        tracers = [tracer(t.pid, state, count) for count, t in enumerate(targets)]
        statuses = [os.waitpid(pid, 0)[1] for pid in tracers]
        died = time.monotonic()
        killed = [os.WIFSIGNALED(s) and os.WTERMSIG(s) == signal.SIGKILL for s in statuses]
        # eight operations and the moment before them; the ninth never comes
        assert killed == [True] * 9 + [False], statuses
        assert os.WEXITSTATUS(statuses[-1]) == 0
        for target in targets:
            goes_on(target)
        assert time.monotonic() - died < engine.PARK_SECONDS + 15


def goes_on(target: Spinner) -> None:
    target.progress(5)
    assert procfs.status(target.pid)["TracerPid"] == "0"
    assert not ended(target.pid)


def test_a_tracer_that_dies_while_the_task_is_parked() -> None:
    """In the time between the last call and the tracer's return: the task waits in ppoll for nobody."""
    with spinner() as target:
        child = os.fork()
        if child == 0:
            task = Stopped(target.pid)
            task.map()
            engine.Tracee._await_flag = lambda *_: parked_then_die(task)  # type: ignore[method-assign]
            task.run(1)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        goes_on(target)


def parked_then_die(task: Stopped) -> None:
    def in_ppoll() -> bool:
        with open(f"/proc/{task.pid}/syscall") as file:
            return file.read().startswith(f"{arch.NR_ppoll} ")

    wait_for(in_ppoll, "the task to park")
    flag = struct.unpack("<Q", task.memory.read(task.tracee.scratch + engine.CONTROL, 8))[0]
    assert flag == 1
    os.kill(os.getpid(), signal.SIGKILL)
