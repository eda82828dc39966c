"""Event descriptors: the count and the mode go over."""

from __future__ import annotations

import os

import pytest
from unit.descriptor_case import Make, captured_here

from agent import kinds
from agent.kernel import procfs
from agent.resources import eventfd


@pytest.mark.parametrize("count", [0, 1, 77, (1 << 64) - 2])
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK, os.EFD_SEMAPHORE, os.EFD_SEMAPHORE | os.EFD_NONBLOCK])
def test_eventfd(make: Make, count: int, flags: int) -> None:
    def setup() -> list[int]:
        fd = os.eventfd(0, flags)
        if count:
            os.eventfd_write(fd, count)
        return [fd]

    case = make(setup)
    assert kinds.kind_of(case.files()[0]) is eventfd
    assert case.state() == eventfd.State(count, bool(flags & os.EFD_SEMAPHORE), flags & os.EFD_NONBLOCK)
    ours = case.move()
    assert captured_here(ours) == case.state()
    os.set_blocking(ours, False)
    if not count:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(ours)
    else:
        assert os.eventfd_read(ours) == (1 if flags & os.EFD_SEMAPHORE else count)


@pytest.mark.parametrize("count", [0, 1, 2, 77, (1 << 64) - 2])
@pytest.mark.parametrize("flags", [0, os.EFD_NONBLOCK, os.EFD_SEMAPHORE, os.EFD_SEMAPHORE | os.EFD_NONBLOCK])
def test_where_the_kernel_does_not_say_it_is_tried_out(count: int, flags: int) -> None:
    fd = os.eventfd(0, flags)
    if count:
        os.eventfd_write(fd, count)
    assert eventfd.acts_as_semaphore(fd, count) == bool(flags & os.EFD_SEMAPHORE)
    assert dict(procfs.fdinfo(os.getpid(), fd))["eventfd-count"] == f"{count:16x}".strip()
    os.close(fd)
