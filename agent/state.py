"""The state of a frozen process: what the source captures and the destination rebuilds, besides memory.

Everything is plain data (msgspec structs, msgpack on the link). Kernel structures travel as the kernel's own
bytes where they mean the same on both hosts.
"""

from __future__ import annotations

import msgspec

from agent.kernel.arch.x86_64 import Registers
from agent.kernel.procfs import PosixTimer


class Scheduling(msgspec.Struct, frozen=True):
    """`struct sched_attr` (sched(7)) of one thread, and where it may run."""

    attributes: bytes
    affinity: tuple[int, ...]


class ThreadState(msgspec.Struct):
    """One thread, stopped. Addresses are the process's own."""

    tid: int
    registers: Registers
    xstate: bytes
    sigmask: int
    comm: str
    scheduling: Scheduling
    pending: tuple[bytes, ...] = ()  # siginfo_t, oldest first
    altstack: bytes = b""  # stack_t
    robust_list: tuple[int, int] = (0, 0)  # head, length
    clear_child_tid: int = 0
    rseq: tuple[int, int, int] = (0, 0, 0)  # address, size, signature
    timer_slack: int = 50_000
    pdeathsig: int = 0
    remaining_ns: int | None = None  # of an interrupted relative wait; None: not in one, or not known


class Credentials(msgspec.Struct, frozen=True):
    """What credentials(7) and capabilities(7) say of the process."""

    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    securebits: int
    no_new_privs: bool


class TimerState(msgspec.Struct, frozen=True):
    """One POSIX timer and how it stood when captured."""

    timer: PosixTimer
    setting: bytes  # struct itimerspec: interval, remaining
    overrun: int


class MemoryFields(msgspec.Struct):
    """`struct prctl_mm_map` without its pointers, in the kernel's order (PR_SET_MM_MAP, prctl(2))."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_brk: int
    brk: int  # on the link it comes with `protocol.Complete`
    start_stack: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int


class ProcessState(msgspec.Struct):
    """Everything of the process that is not a thread, a page or a descriptor."""

    threads: list[ThreadState]  # the first one first; on the link the others follow (`protocol.Threads`)
    tids: tuple[int, ...]  # of all threads, the first one first, in the process's own numbers
    actions: list[tuple[int, bytes]]  # signal, kernel sigaction (32 bytes)
    pending: tuple[bytes, ...]
    itimers: tuple[bytes, bytes, bytes]  # struct itimerval of REAL, VIRTUAL, PROF
    timers: list[TimerState]
    credentials: Credentials
    limits: tuple[tuple[int, int], ...]
    memory: MemoryFields
    auxv: bytes
    executable: int  # index into the migration's files
    cwd: str
    umask: int
    personality: int
    oom_score_adj: int
    dumpable: int
    child_subreaper: int
    thp_disable: int
    captured_at: int  # CLOCK_MONOTONIC of the source when timers were read, nanoseconds
    lock_future: int = 0  # flags of mlockall(2); on the link it comes with `protocol.Complete`
