"""Locked memory stays locked, also where nothing can be touched, and so does memory that is yet to come."""

from __future__ import annotations

import ctypes
import itertools
import resource
import signal
import struct
from pathlib import Path

import pytest
from unit.children import PAGE
from unit.moving import running
from unit.test_shadow import BASE, call, no_files, shadow

from agent.descriptors import Refusal
from agent.kernel import capabilities, procfs
from agent.kernel.arch import x86_64 as arch
from agent.kernel.errors import check, libc
from agent.layout import Flag, Mapping

LOCKED, ON_FAULT = Flag.LOCKED, Flag.LOCKED | Flag.LOCKONFAULT
CAP_IPC_LOCK = 14


def flags_of(pid: int, address: int) -> frozenset[str]:
    return next(m.vmflags for m in procfs.smaps(pid) if m.start <= address < m.end)


@pytest.mark.parametrize("flags", [LOCKED, ON_FAULT])
def test_guards_between_locked_memory(flags: Flag) -> None:
    """As after mlockall(MCL_CURRENT): mlock2(2) answers ENOMEM for what cannot be touched, yet locks it."""
    layout = [
        Mapping(BASE + n * PAGE, BASE + (n + 1) * PAGE, p, int(flags)) for n, p in enumerate((0, 3, 0, 1, 0))
    ]
    with shadow(planned=layout) as target:
        target.follow(layout, no_files)
        for mapping in layout:
            found = flags_of(target.pid, mapping.start)
            assert "lo" in found and ("lf" in found) == (flags == ON_FAULT)
        opened = [Mapping(m.start, m.end, 3, m.flags) for m in layout]
        target.follow(opened, no_files)
        target.follow([Mapping(m.start, m.end, 0) for m in layout], no_files)
        assert not any("lo" in flags_of(target.pid, m.start) for m in layout)


def test_more_than_may_be_locked_is_refused_by_name() -> None:
    wanted = [Mapping(BASE, BASE + 8 * PAGE, 3, int(LOCKED))]
    with shadow(planned=wanted) as target:
        _, hard = resource.prlimit(target.pid, resource.RLIMIT_MEMLOCK)
        resource.prlimit(target.pid, resource.RLIMIT_MEMLOCK, (4 * PAGE, hard))
        batch = target.batch()
        others = int(procfs.status(target.pid)["CapPrm"], 16) & ~(1 << CAP_IPC_LOCK)
        header = batch.put(struct.pack("<II", capabilities.VERSION_3, 0))
        data = batch.put(capabilities.packed(capabilities.Sets(others, others, 0)))
        batch.call("capset", arch.NR_capset, header, data)
        target.run(target.pid, batch)
        effective = int(procfs.status(target.pid)["CapEff"], 16)
        assert not effective >> CAP_IPC_LOCK & 1
        with pytest.raises(Refusal, match=f"{BASE:#x}.*{4 * PAGE} bytes may be locked") as refused:
            target.follow(wanted, no_files)
        assert refused.value.kind == "memory-lock"


def test_the_shadow_may_lock_as_much_as_its_hard_limit() -> None:
    with shadow() as target:
        soft, hard = resource.prlimit(target.pid, resource.RLIMIT_MEMLOCK)
        assert soft == hard


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.permutations((Flag.RANDOM, Flag.SEQUENTIAL, Flag(0)), 2)]
)
def test_advice_that_excludes_other_advice(first: Flag, second: Flag) -> None:
    with shadow() as target:
        target.follow([Mapping(BASE, BASE + PAGE, 3, int(first))], no_files)
        target.follow([Mapping(BASE, BASE + PAGE, 3, int(second))], no_files)
        assert call(target, 39) == target.pid
        expected = {Flag.RANDOM: {"rr"}, Flag.SEQUENTIAL: {"sr"}, Flag(0): set()}[second]
        assert flags_of(target.pid, BASE) & {"rr", "sr"} == expected


# It locks as the signals say, and maps a page each round: what that is like, it is asked from outside.
LOCKS = r"""
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
static volatile int wanted = -1;
static void on_signal(int number, siginfo_t *info, void *unused)
{
    (void)number;
    (void)unused;
    wanted = info->si_value.sival_int;
}
int main(void)
{
    struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO};
    struct timespec time = {0, 2000000};
    char *guard = mmap(0, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    sigaction(SIGUSR1, &action, 0);
    dprintf(1, "guard %lx\nready\n", (unsigned long)guard);
    for (long round = 0;; round++) {
        nanosleep(&time, 0);
        if (wanted >= 0) {
            int now = wanted;
            wanted = -1;
            if (now ? mlockall(now) && errno != ENOMEM : munlockall())
                dprintf(1, "wrong mlockall\n");
            dprintf(1, "locked %d\n", now);
        }
        char *fresh = mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        unsigned char there = 0;
        int refused = madvise(fresh, 4096, MADV_DONTNEED) && errno == EINVAL;
        munmap(fresh, 4096);
        fresh = mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        mincore(fresh, 4096, &there);
        munmap(fresh, 4096);
        dprintf(1, "new %d %d\n", refused, there & 1);
    }
}
"""

MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT = 1, 2, 4


@pytest.mark.parametrize(
    ("flags", "new"),
    [
        (0, "new 0 0"),
        (MCL_CURRENT, "new 0 0"),
        (MCL_FUTURE, "new 1 1"),
        (MCL_FUTURE | MCL_ONFAULT, "new 1 0"),
        (MCL_CURRENT | MCL_FUTURE, "new 1 1"),
    ],
)
def test_memory_that_is_yet_to_come(tmp_path: Path, flags: int, new: str) -> None:
    def tell(value: int) -> None:
        check(libc.sigqueue(program.pid, signal.SIGUSR1, ctypes.c_void_p(value)), "sigqueue")
        program.wait_for(f"locked {value}")

    with running(tmp_path, LOCKS) as program:
        guard = int(program.lines()[0].split()[1], 16)
        if flags:
            tell(flags)
        program.move(verify=True)
        assert set(program.next_lines(3)) == {new}
        assert ("lo" in flags_of(program.pid, guard)) == bool(flags & MCL_CURRENT)
        if flags:
            tell(0)
            program.move(verify=True)
            assert set(program.next_lines(3)) == {"new 0 0"}
            assert "lo" not in flags_of(program.pid, guard)
