"""Small processes that tests look at: a puppet that makes the calls it is told, a self-checking spinner."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.kernel.arch import x86_64 as arch

DEADLINE = 20.0
PAGE = 4096
_directory = tempfile.TemporaryDirectory(prefix="migrate-unit-")

PUPPET = r"""
#include <string.h>
#include <unistd.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
int main(void)
{
    long call[7], result;
    prctl(PR_SET_PDEATHSIG, 9);
    while (read(0, call, sizeof call) == sizeof call) {
        if (call[0] < 0)
            result = (long)memset((void *)call[1], call[2], call[3]);
        else
            result = syscall(call[0], call[1], call[2], call[3], call[4], call[5], call[6]);
        write(1, &result, sizeof result);
    }
    return 0;
}
"""

_GENERAL = ("rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")


def _spin() -> str:
    """Assembler: known values into registers, a while of counting, and are they still there (rdx = 0)?"""
    lines = ["xor %%rdx, %%rdx"]
    for number in range(16):
        lines += [f"mov ${0x1234567890 * (number + 1)}, %%rax", f"movq %%rax, %%xmm{number}"]
    for number, name in enumerate(_GENERAL):
        lines.append(f"mov ${0x0101010101010101 * (number + 1)}, %%{name}")
    lines.append("1: dec %%rcx; jnz 1b")
    for number, name in enumerate(_GENERAL):
        lines += [
            f"mov ${0x0101010101010101 * (number + 1)}, %%rax",
            f"xor %%{name}, %%rax",
            "or %%rax, %%rdx",
        ]
    for number in range(16):
        lines += [f"movq %%xmm{number}, %%rbx", f"mov ${0x1234567890 * (number + 1)}, %%rax"]
        lines += ["xor %%rbx, %%rax", "or %%rax, %%rdx"]
    return "\n".join(f'"{line}\\n"' for line in lines)


SPINNER = (
    r"""
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
static volatile int caught;
static void on_signal(int number) { (void)number; caught++; }
static void complain(const char *what) { dprintf(1, "wrong %s\n", what); exit(1); }
static void spin(long count)
{
    long bad;
    asm volatile(
"""
    + _spin()
    + r"""
        : "=&d"(bad), "+c"(count) :
        : "rax", "rbx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
          "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
          "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "cc", "memory");
    if (bad)
        complain("registers");
}
static void nap(long milliseconds)
{
    struct timespec time = {0, milliseconds * 1000000}, rest = {0, 0}, before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    while (nanosleep(&time, &rest)) {
        if (errno != EINTR || !caught)
            complain("sleep");
        time = rest;
    }
    clock_gettime(CLOCK_MONOTONIC, &after);
    long passed = (after.tv_sec - before.tv_sec) * 1000000000L + after.tv_nsec - before.tv_nsec;
    if (passed < milliseconds * 1000000)
        complain("time");
}
int main(void)
{
    sigset_t wanted, now;
    struct sigaction action = {.sa_handler = on_signal};
    prctl(PR_SET_PDEATHSIG, 9);
    sigaction(SIGRTMIN, &action, NULL);
    sigemptyset(&wanted);
    sigaddset(&wanted, SIGUSR1);
    sigaddset(&wanted, SIGRTMIN + 3);
    sigprocmask(SIG_SETMASK, &wanted, NULL);
    for (;;) {
        spin(3000000);
        nap(20);
        sigprocmask(SIG_SETMASK, NULL, &now);
        for (int n = 1; n < 65; n++)
            if (sigismember(&now, n) != sigismember(&wanted, n))
                complain("signal mask");
        dprintf(1, "%d\n", caught);
    }
}
"""
)


@functools.cache
def compiled(source: str, *options: str) -> Path:
    """The program of a C source, compiled once."""
    name = Path(_directory.name) / f"program-{abs(hash((source, options))):x}"
    subprocess.run(
        ["gcc", "-O1", "-x", "c", "-", "-o", name, *options],
        input=source.encode(),
        check=True,
        capture_output=True,
    )
    return name


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Until the condition holds; AssertionError when it does not in time."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.002)


def gone(pid: int) -> bool:
    """Whether there is no such process any more, not even as a zombie."""
    return not os.path.exists(f"/proc/{pid}")


def ended(pid: int) -> bool:
    """Whether the process is gone or a zombie that its parent has not noticed yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text[text.rindex(")") + 2] in "ZX"


def free_number() -> int:
    """A pid that nobody has: one that was just given back."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


class Puppet:
    """A process that makes the system calls it is told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [compiled(PUPPET)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self.pid = self._process.pid
        self.call(39)  # it is there when it answers

    def call(self, number: int, *arguments: int) -> int:
        """What the call returned; OSError if it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        words = [a & ((1 << 64) - 1) for a in (number, *arguments, 0, 0, 0, 0, 0, 0)][:7]
        self._process.stdin.write(struct.pack("<7Q", *words))
        result = int(struct.unpack("<q", self._process.stdout.read(8))[0])
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result), f"call {number}")
        return result

    def fill(self, address: int, byte: int, size: int = 1) -> None:
        """It writes `size` bytes."""
        self.call(-1, address, byte, size)

    def map(self, size: int, address: int = 0, protection: int = 3, flags: int = 0x22, fd: int = -1) -> int:
        """mmap(2): private anonymous memory unless told otherwise."""
        fixed = 0x100000 if address else 0
        found = self.call(arch.NR_mmap, address, size, protection, flags | fixed, fd, 0)
        assert not address or found == address
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@contextlib.contextmanager
def puppet() -> Iterator[Puppet]:
    found = Puppet()
    try:
        yield found
    finally:
        found.close()


class Spinner:
    """A process that checks its registers, signal mask and sleep, and says a number each time round."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([compiled(SPINNER)], stdout=subprocess.PIPE, bufsize=0)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._data = b""
        self.progress()

    def lines(self) -> list[str]:
        """What it has said so far."""
        assert self._process.stdout is not None
        self._data += self._process.stdout.read() or b""
        return self._data.decode().split("\n")[:-1]

    def progress(self, rounds: int = 2) -> int:
        """It goes round some more times; how many signals it caught so far."""
        start = len(self.lines())
        wait_for(
            lambda: len(self.lines()) >= start + rounds or ended(self.pid), f"process {self.pid} to go on"
        )
        found = self.lines()
        assert found and found[-1].isdigit() and not ended(self.pid), f"it complains: {found[-1:]}"
        return int(found[-1])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def spinner() -> Iterator[Spinner]:
    found = Spinner()
    try:
        yield found
    finally:
        found.close()


@contextlib.contextmanager
def forked(setup: Callable[[], object]) -> Iterator[int]:
    """A fork of this process that did `setup` and waits; its pid."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            kept = setup()
            os.write(writing, b"r")
            while True:
                signal.pause()
        finally:
            del kept
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 1) == b"r", "the child failed in its setup"
        yield pid
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
