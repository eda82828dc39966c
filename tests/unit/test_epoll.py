"""Epoll: every entry goes over, with its events and its data."""

from __future__ import annotations

import os
import select

from unit.descriptor_case import Make, captured_here
from unit.test_silencing import captured, of, rebuilt

from agent import kinds
from agent.descriptors import open_files
from agent.resources import epoll


def test_epoll(make: Make) -> None:
    events = select.EPOLLIN | select.EPOLLET

    def setup() -> list[int]:
        watch = select.epoll()
        first, second = os.eventfd(3), os.eventfd(0)
        watch.register(first, events)
        watch.register(second, select.EPOLLIN | select.EPOLLONESHOT)
        keep.append(watch)
        return [watch.fileno(), first, second]

    keep: list[object] = []
    case = make(setup)
    assert kinds.kind_of(case.files()[0]) is epoll
    assert kinds.blockers(case.files()[0], case.process) == []
    state = case.state()
    _watch, first, second = case.numbers
    # the kernel adds EPOLLERR and EPOLLHUP (epoll_ctl(2)); Python's data is the descriptor
    always = select.EPOLLERR | select.EPOLLHUP
    assert {(e.fd, e.events & ~always, e.data & 0xFFFFFFFF) for e in state.entries} == {
        (first, events, first),
        (second, select.EPOLLIN | select.EPOLLONESHOT, second),
    }
    made = captured(case)
    with rebuilt(case.context, made) as target:
        batch = target.batch()
        epoll.add_entries(batch, case.numbers[0], state, fired=False)
        target.run(target.pid, batch)
        with of(target, case.numbers[0]) as ours, select.epoll.fromfd(os.dup(ours)) as copy:
            assert set(captured_here(ours).entries) == set(state.entries)
            assert copy.poll(0) == [(first, select.EPOLLIN)]


def test_an_entry_whose_descriptor_was_closed_is_refused(make: Make) -> None:
    def setup() -> list[int]:
        watch = select.epoll()
        first = os.eventfd(3)
        other = os.dup(first)
        watch.register(first, select.EPOLLIN)
        os.close(first)
        keep.append(watch)
        return [watch.fileno(), other]

    keep: list[object] = []
    case = make(setup)
    (blocker,) = kinds.blockers(case.files()[0], case.process)
    assert blocker.kind == "epoll-stale-entry"
    assert epoll.stale(open_files(case.process), case.pid) == [case.files()[0].name]
