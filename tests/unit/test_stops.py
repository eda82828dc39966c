"""Calls that answer EINTR to a mere stop (signal(7)): each is really stopped in, and goes on as before."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from unit.children import wait_for

from agent.kernel import procfs, ptrace
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.tracee import wait_event_stop

NR_SEMGET, NR_SEMCTL, NR_IO_SETUP, NR_IO_SUBMIT = 64, 66, 206, 209
AF_UNIX_PAIR = (socket.AF_UNIX, socket.SOCK_STREAM)
SIZE = 1 << 20
_kept: list[object] = []


class Call(NamedTuple):
    """One call that waits: its number and arguments, and what ends the wait (in the parent)."""

    number: int
    arguments: tuple[int, ...]
    finish: Callable[[int], object]  # is told the child's pid
    first: Callable[[], tuple[int, ...]] = tuple  # arguments before these, made in the child


def at(data: bytes) -> int:
    """The address of a copy, which the child inherits."""
    buffer = ctypes.create_string_buffer(data, len(data))
    _kept.append(buffer)
    return ctypes.addressof(buffer)


def vector(size: int = 16) -> int:
    return at(struct.pack("<QQ", at(bytes(size)), size))


def message(size: int = 16) -> int:
    return at(struct.pack("<QIxxxxQQQQi4x", 0, 0, vector(size), 1, 0, 0, 0) + bytes(16))


def limited(sock: socket.socket) -> socket.socket:
    """With a time limit in both directions, by which its calls answer EINTR."""
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("<qq", 600, 0))
    _kept.append(sock)
    return sock


def receiver() -> tuple[int, Callable[[int], object]]:
    ours, theirs = socket.socketpair(*AF_UNIX_PAIR)
    limited(theirs)
    _kept.append(ours)
    return theirs.fileno(), lambda _: ours.send(b"x")


def sender() -> tuple[int, Callable[[int], object]]:
    """A socket that has no room left until it is read."""
    ours, theirs = socket.socketpair(*AF_UNIX_PAIR)
    limited(theirs).setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4096))
    theirs.setblocking(True)
    limited(theirs)  # setblocking took the limits away
    ours.setblocking(False)
    _kept.append(ours)

    def drain(_: int) -> None:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            if select.select([ours], [], [], 0.05)[0]:
                ours.recv(SIZE)
            else:
                return

    return theirs.fileno(), drain


def receiving(number: int, *rest: int, first: Callable[[], int] | None = None) -> Callable[[], Call]:
    def make() -> Call:
        fd, finish = receiver()
        return Call(number, (fd, *((first(),) if first else ()), *rest), finish)

    return make


def sending(number: int, *rest: int, first: Callable[[], int] | None = None) -> Callable[[], Call]:
    def make() -> Call:
        fd, finish = sender()
        return Call(number, (fd, *((first(),) if first else ()), *rest), finish)

    return make


def splice_from_socket() -> Call:
    fd, finish = receiver()
    _, writing = os.pipe()
    return Call(arch.NR_splice, (fd, 0, writing, 0, 16, 0), finish)


def splice_to_socket() -> Call:
    fd, finish = sender()
    reading, writing = os.pipe()
    os.write(writing, b"x")
    return Call(arch.NR_splice, (reading, 0, fd, 0, 1, 0), finish)


def sendfile() -> Call:
    fd, finish = sender()
    file = tempfile.TemporaryFile()
    file.write(bytes(64))
    file.seek(0)
    _kept.append(file)
    return Call(arch.NR_sendfile, (fd, file.fileno(), 0, 16), finish)


def accepting(number: int) -> Callable[[], Call]:
    def make() -> Call:
        listener = limited(socket.create_server(("127.0.0.1", 0)))
        finish = lambda _: _kept.append(socket.create_connection(listener.getsockname()))  # noqa: E731
        return Call(number, (listener.fileno(), 0, 0, 0), finish)

    return make


def connecting() -> Call:
    listener = socket.socket(*AF_UNIX_PAIR)
    listener.bind("")  # an abstract name of the kernel's choice
    listener.listen(0)
    address = struct.pack("<H", socket.AF_UNIX) + listener.getsockname()
    first, second = socket.socket(*AF_UNIX_PAIR), limited(socket.socket(*AF_UNIX_PAIR))
    first.connect(listener.getsockname())  # there is room for one
    _kept.extend((first, listener))
    return Call(arch.NR_connect, (second.fileno(), at(address), len(address)), lambda _: listener.accept())


def epoll(number: int, *rest: int) -> Callable[[], Call]:
    def make() -> Call:
        watch, event = select.epoll(), os.eventfd(0)
        watch.register(event, select.EPOLLIN)
        _kept.append(watch)
        return Call(number, (watch.fileno(), at(bytes(64)), 4, *rest), lambda _: os.eventfd_write(event, 1))

    return make


def semaphore(number: int) -> Callable[[], Call]:
    def make() -> Call:
        semaphores = check(libc.syscall(NR_SEMGET, 0, 1, 0o600), "semget")
        _kept.append(Removed(semaphores))
        down, up = at(struct.pack("<Hhh", 0, -1, 0)), at(struct.pack("<Hhh", 0, 1, 0))

        def finish(_: int) -> None:
            check(libc.syscall(arch.NR_semop, semaphores, ctypes.c_void_p(up), 1), "semop")

        return Call(number, (semaphores, down, 1, at(struct.pack("<qq", 600, 0))), finish)

    return make


class Removed:
    """System V semaphores that are removed when nobody keeps this any more."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._owner = os.getpid()

    def __del__(self) -> None:
        if os.getpid() == self._owner:
            libc.syscall(NR_SEMCTL, self._number, 0, 0)


def asynchronous() -> Call:
    reading, writing = os.pipe()
    # 5 is IOCB_CMD_POLL
    poll = at(struct.pack("<QIIHhIQQqQII", 0, 0, 0, 5, 0, reading, select.POLLIN, 0, 0, 0, 0, 0))
    place = at(struct.pack("<Q", poll))

    def submit() -> tuple[int, ...]:
        """A context belongs to an address space."""
        context = ctypes.c_ulong(0)
        check(libc.syscall(NR_IO_SETUP, 4, ctypes.byref(context)), "io_setup")
        check(libc.syscall(NR_IO_SUBMIT, context, 1, ctypes.c_void_p(place)), "io_submit")
        return (context.value,)

    return Call(arch.NR_io_getevents, (1, 1, at(bytes(64)), 0), lambda _: os.write(writing, b"x"), submit)


def a_signal() -> Call:
    mask = at(struct.pack("<Q", 1 << signal.SIGUSR2 - 1))
    return Call(arch.NR_rt_sigtimedwait, (mask, 0, 0, 8), lambda pid: os.kill(pid, signal.SIGUSR2))


sixteen = lambda: at(bytes(16))  # noqa: E731
CALLS: dict[str, Callable[[], Call]] = {
    "read": receiving(arch.NR_read, 16, first=sixteen),
    "readv": receiving(arch.NR_readv, 1, first=vector),
    "preadv2": receiving(arch.NR_preadv2, 1, -1, -1, 0, first=vector),
    "recvfrom": receiving(arch.NR_recvfrom, 16, 0, 0, 0, first=sixteen),
    "recvmsg": receiving(arch.NR_recvmsg, 0, first=message),
    "recvmmsg": receiving(arch.NR_recvmmsg, 1, 0, 0, first=message),
    "splice from": splice_from_socket,
    "accept": accepting(arch.NR_accept),
    "accept4": accepting(arch.NR_accept4),
    "write": sending(arch.NR_write, 16, first=sixteen),
    "writev": sending(arch.NR_writev, 1, first=vector),
    "pwritev2": sending(arch.NR_pwritev2, 1, -1, -1, 0, first=vector),
    "sendto": sending(arch.NR_sendto, 16, 0, 0, 0, first=sixteen),
    "sendmsg": sending(arch.NR_sendmsg, 0, first=message),
    "sendmmsg": sending(arch.NR_sendmmsg, 1, 0, first=message),
    "splice to": splice_to_socket,
    "sendfile": sendfile,
    "connect": connecting,
    "epoll_wait": epoll(arch.NR_epoll_wait, -1),
    "epoll_pwait": epoll(arch.NR_epoll_pwait, -1, 0, 8),
    "epoll_pwait2": epoll(arch.NR_epoll_pwait2, 0, 0, 8),
    "semop": semaphore(arch.NR_semop),
    "semtimedop": semaphore(arch.NR_semtimedop),
    "io_getevents": asynchronous,
    "rt_sigtimedwait": a_signal,
}


@contextlib.contextmanager
def making(call: Call) -> Iterator[tuple[int, int]]:
    """A child that makes the call; its pid, and where it writes what came of it."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
            arguments = (ctypes.c_long(a) for a in (*call.first(), *call.arguments))
            result = libc.syscall(call.number, *arguments)
            os.write(writing, struct.pack("<qi", result, ctypes.get_errno()))
        finally:
            os._exit(0)
    os.close(writing)
    try:
        yield pid, reading
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        _kept.clear()


def in_call(pid: int, number: int) -> bool:
    found = procfs.in_syscall(pid, pid)
    return found is not None and found.number == number and procfs.stat(pid).state == "S"


@pytest.mark.parametrize("name", CALLS)
def test_a_stop_in_a_call_does_not_show(name: str) -> None:
    call = CALLS[name]()
    with making(call) as (pid, answer):
        wait_for(lambda: in_call(pid, call.number), name)
        ptrace.seize(pid)
        ptrace.interrupt(pid)
        wait_event_stop(pid, time.monotonic() + 5)
        registers = ptrace.get_registers(pid)
        assert registers.result == -arch.EINTR, "the stop would show"
        ptrace.set_registers(pid, arch.hide_stop(registers, signal_pending=False))
        ptrace.detach(pid)
        wait_for(lambda: in_call(pid, call.number), f"{name}, again")
        call.finish(pid)
        result, errno = struct.unpack("<qi", os.read(answer, 12))
        assert result >= 0, os.strerror(errno)


def test_every_call_of_the_list_is_tried() -> None:
    tried = set()
    for make in CALLS.values():
        tried.add(make().number)
        _kept.clear()
    assert tried == arch.EINTR_ON_STOP
