"""Epoll entries that have fired (EPOLLONESHOT) are silent after the move until the program rearms them."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from unit.children import wait_for
from unit.descriptor_case import Case, Make, captured_here
from unit.moving import running
from unit.test_shadow import SECOND, shadow

from agent import kinds
from agent.descriptors import Descriptor, Rebuilding, Refusal
from agent.kernel import pidfd, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.resources import epoll, pipe, signalfd, tcp_socket, timerfd
from agent.resources.tcp import activate
from agent.shadow import Shadow
from agent.silencing import add_fired_entries

EPOLL_CTL_MOD = 3
ONESHOT = select.EPOLLONESHOT
EVERYTHING = 0x27FF

Opened = tuple[list[int], list[int], list[object]]  # watched descriptors, others of the process, what to keep


def fire(watch: select.epoll, fd: int, extra: int = 0) -> None:
    """An entry that has fired: an event, whichever, is made and collected."""
    watch.register(fd, EVERYTHING | ONESHOT | extra)
    assert watch.poll(0)


def an_eventfd() -> Opened:
    return [os.eventfd(0)], [], []


def an_empty_pipe() -> Opened:
    reading, writing = os.pipe()
    os.write(writing, b"x")
    return [reading], [writing], [lambda: os.read(reading, 1)]


def a_full_pipe() -> Opened:
    reading, writing = os.pipe2(os.O_NONBLOCK)

    def fill() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)

    return [writing], [reading], [fill]


def a_pipe_without_writers() -> Opened:
    reading, writing = os.pipe()
    os.close(writing)
    return [reading], [], []


def a_timer() -> Opened:
    state = timerfd.State(time.CLOCK_MONOTONIC, 1, 0, 0, 1000 * SECOND, 7 * SECOND)
    timer = timerfd.rebuild(state, Rebuilding())
    return [timer], [], [lambda: os.read(timer, 8)]


def a_signalfd() -> Opened:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    fd = signalfd.rebuild(signalfd.State(1 << signal.SIGUSR1 - 1, 0), Rebuilding())
    return [fd], [], [lambda: signal.sigtimedwait({signal.SIGUSR1}, 0)]


def an_epoll() -> Opened:
    inner = select.epoll()
    event = os.eventfd(1)
    inner.register(event, select.EPOLLIN)
    return [inner.fileno()], [event], [lambda: os.read(event, 8), inner]


def a_listener() -> Opened:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1000)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, 20_000)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 5)
    listener.bind(("127.0.0.1", 0))

    def listen() -> None:  # as it does not listen yet, it is hung up: an event
        listener.listen(7)

    return [listener.fileno()], [], [listen, listener]


OPENERS: list[Callable[[], Opened]] = [
    an_eventfd,
    an_empty_pipe,
    a_full_pipe,
    a_pipe_without_writers,
    a_timer,
    a_signalfd,
    an_epoll,
    a_listener,
]


def fired_in_a_child(opener: Callable[[], Opened], kept: list[object], extra: int) -> list[int]:
    """For a child: [epoll, watched ..., others ...], every entry fired, and what made it fire taken away."""
    watched, others, rest = opener()
    watch = select.epoll()
    for fd in watched:
        fire(watch, fd, extra)
    for step in rest:
        if callable(step):
            step()
    kept += [watch, *rest]
    return [watch.fileno(), *watched, *others]


def captured(case: Case) -> list[Descriptor]:
    """All of it; and the child, which may have a port that is needed, ends."""
    made = [case.capture(index) for index in range(len(case.numbers))]
    case.process.forget_duplicates()
    case.end()
    return made


@contextlib.contextmanager
def rebuilt(context: Rebuilding, made: list[Descriptor]) -> Iterator[Shadow]:
    """A shadow with these descriptors in place."""
    with shadow() as target:
        ours = [kinds.rebuild(one, context) for one in made]
        target.place(target.receive(ours), [d.numbers for d in made])
        context.close()
        for fd in ours:
            os.close(fd)
        ptrace.set_sigmask(target.pid, ((1 << 64) - 1) & ~(1 << 4))  # as in the finish
        yield target


@contextlib.contextmanager
def of(target: Shadow, fd: int) -> Iterator[int]:
    """A duplicate of its descriptor."""
    process = pidfd.open_process(target.pid)
    ours = pidfd.getfd(process, fd)
    os.close(process)
    try:
        yield ours
    finally:
        os.close(ours)


@pytest.mark.parametrize("extra", [0, select.EPOLLET])
@pytest.mark.parametrize("opener", OPENERS)
def test_a_fired_entry_is_silent_and_can_be_armed(
    make: Make, opener: Callable[[], Opened], extra: int
) -> None:
    kept: list[object] = []
    case = make(lambda: fired_in_a_child(opener, kept, extra))
    made = captured(case)
    states = [kinds.decode(d) for d in made]
    (entry,) = states[0].entries
    assert entry.fired
    with rebuilt(case.context, made) as target:
        add_fired_entries(target, made)
        assert ptrace.pending_signals(target.pid, shared=True) == []
        with of(target, case.numbers[0]) as ours, select.epoll.fromfd(os.dup(ours)) as watch:
            assert captured_here(ours) == states[0]
            assert watch.poll(0) == []
            batch = target.batch()
            for number, state in zip(case.numbers, states, strict=True):
                if isinstance(state, epoll.State):
                    epoll.add_entries(batch, number, state, fired=False)
            target.run(target.pid, batch)
            for number, state in zip(case.numbers[1:], states[1:], strict=True):  # all is as it was
                with of(target, number) as copy:
                    assert_like(copy, state)
            batch = target.batch()
            event = batch.put(struct.pack("<IQ", EVERYTHING | ONESHOT, 7))
            batch.call("epoll_ctl", arch.NR_epoll_ctl, case.numbers[0], EPOLL_CTL_MOD, entry.fd, event)
            target.run(target.pid, batch)
            assert not captured_here(ours).entries[0].fired


def assert_like(fd: int, wanted: Any) -> None:
    if isinstance(wanted, tcp_socket.State):
        activate(fd, wanted.tcp)
    found = captured_here(fd)
    if isinstance(wanted, timerfd.State):  # time goes on
        assert wanted.remaining_ns - 60 * SECOND < found.remaining_ns <= wanted.remaining_ns
        found = msgspec.structs.replace(found, remaining_ns=wanted.remaining_ns)
    if isinstance(wanted, pipe.State):
        found = msgspec.structs.replace(found, inode=wanted.inode)
    assert found == wanted


def test_an_entry_that_nothing_silences_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[object] = []
    case = make(lambda: fired_in_a_child(an_empty_pipe, kept, 0))
    made = captured(case)
    monkeypatch.delattr(pipe, "rouse")
    with (
        rebuilt(case.context, made) as target,
        pytest.raises(Refusal, match="cannot be made silent") as refused,
    ):
        add_fired_entries(target, made)
    assert refused.value.kind == "epoll-entry"


def test_entries_without_events_are_told_from_those_that_have_some() -> None:
    for events, fired in (
        (ONESHOT, True),
        (ONESHOT | select.EPOLLET, True),
        (ONESHOT | 1 << 29, True),
        (ONESHOT | select.EPOLLERR | select.EPOLLHUP, False),
        (select.EPOLLET, False),
        (0, False),
    ):
        assert epoll.Entry(3, events, 0).fired is fired, hex(events)


# A pipe that is hung up under an entry that fired: the program reports whatever epoll_wait says of it.
HUNG_UP = r"""
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>
#include <signal.h>
static volatile int again;
static void arm(int number) { again = number; }
int main(void)
{
    int ends[2], watch = epoll_create1(0), alive;
    struct epoll_event event = {EPOLLIN | EPOLLONESHOT, {.u64 = 0x1122334455667788}}, found;
    struct sigaction action = {.sa_handler = arm};
    sigaction(SIGUSR1, &action, 0);
    pipe(ends);
    write(ends[1], "x", 1);
    epoll_ctl(watch, EPOLL_CTL_ADD, ends[0], &event);
    if (epoll_wait(watch, &found, 1, -1) != 1 || read(ends[0], &alive, 1) != 1)
        dprintf(1, "wrong start\n");
    close(ends[1]);
    dprintf(1, "ready\n");
    for (int round = 0;; round++) {
        if (epoll_wait(watch, &found, 1, 10) > 0)
            dprintf(1, "event %x %lx\n", found.events, found.data.u64);
        dprintf(1, "round\n");
        if (again) {
            again = 0;
            epoll_ctl(watch, EPOLL_CTL_MOD, ends[0], &event);
            dprintf(1, "armed\n");
        }
    }
}
"""


def test_a_program_hears_nothing_of_a_fired_entry_until_it_arms_it(tmp_path: Path) -> None:
    with running(tmp_path, HUNG_UP) as program:
        for _ in range(2):
            program.move()
            before = len(program.lines())
            wait_for(lambda before=before: len(program.lines()) > before + 5, "some rounds")  # type: ignore[misc]
            assert not [line for line in program.lines() if line.startswith(("event", "wrong"))]
        program.kill(signal.SIGUSR1)
        program.wait_for("armed")
        program.wait_for(f"event {select.EPOLLHUP:x} 1122334455667788")
