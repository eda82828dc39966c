"""Signal descriptors: the set of signals and the mode go over."""

from __future__ import annotations

import ctypes
import os
import signal
import struct

from unit.descriptor_case import Make, captured_here

from agent import kinds
from agent.kernel.errors import check, libc
from agent.resources import signalfd


def test_signalfd(make: Make) -> None:
    wanted = {signal.SIGUSR2, signal.SIGCHLD, signal.SIGRTMAX, signal.SIGHUP}
    mask = sum(1 << (n - 1) for n in wanted)

    def setup() -> list[int]:
        words = ctypes.c_uint64(mask)
        return [
            check(libc.syscall(289, -1, ctypes.byref(words), 8, flags), "signalfd")
            for flags in (0, os.O_NONBLOCK)
        ]

    case = make(setup)
    assert [kinds.kind_of(f) for f in case.files()] == [signalfd, signalfd]
    for index, flags in enumerate((0, os.O_NONBLOCK)):
        assert case.state(index) == signalfd.State(mask, flags)
        ours = case.move(index)
        assert captured_here(ours) == case.state(index)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    os.kill(os.getpid(), signal.SIGUSR2)
    assert struct.unpack_from("<I", os.read(case.ours[1], 128))[0] == signal.SIGUSR2
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
