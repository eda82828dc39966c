"""The state of a frozen process: what the source captures and the destination rebuilds, besides memory.

Everything is plain data (msgspec structs, msgpack on the link). Kernel structures travel as the kernel's own
bytes where they mean the same on both hosts.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta

from agent.bounds import (
    I32,
    I63,
    MAX_THREADS,
    U31,
    U32,
    U63,
    U64,
    Index,
    Itimer,
    PathText,
    Pid,
    SignalNumber,
    SigQueue,
)
from agent.kernel.arch.x86_64 import Address, Registers
from agent.kernel.procfs import PosixTimer
from agent.kernel.sched import SCHED_ATTR_SIZE

Tids = Annotated[tuple[Pid, ...], Meta(min_length=1, max_length=MAX_THREADS)]
Limits = Annotated[tuple[tuple[U64, U64], ...], Meta(max_length=16)]  # RLIM_NLIMITS
LockFuture = Annotated[int, Meta(ge=0, le=7)]
Action = Annotated[bytes, Meta(min_length=32, max_length=32)]
_NO_STACK = struct.pack("<QiiQ", 0, 2, 0, 0)  # SS_DISABLE


class Scheduling(msgspec.Struct, frozen=True):
    """`struct sched_attr` (sched(7)) of one thread, and where it may run."""

    attributes: Annotated[bytes, Meta(min_length=48, max_length=SCHED_ATTR_SIZE)]
    affinity: Annotated[tuple[U31, ...], Meta(max_length=1 << 14)]


class ThreadState(msgspec.Struct):
    """One thread, stopped. Addresses are the process's own."""

    tid: Pid
    registers: Registers
    xstate: Annotated[bytes, Meta(min_length=576, max_length=1 << 16)]
    sigmask: U64
    comm: Annotated[str, Meta(max_length=16, pattern=r"\A[\x01-\xff]*\Z")]  # bytes as Latin 1
    scheduling: Scheduling
    pending: SigQueue = ()  # siginfo_t, oldest first
    altstack: Annotated[bytes, Meta(min_length=24, max_length=24)] = _NO_STACK  # stack_t
    robust_list: tuple[U64, U64] = (0, 0)  # head, length
    clear_child_tid: U64 = 0
    rseq: tuple[U64, U32, U32] = (0, 0, 0)  # address, size, signature
    timer_slack: U64 = 50_000
    pdeathsig: Annotated[int, Meta(ge=0, le=64)] = 0
    remaining_ns: U63 | None = None  # of an interrupted relative wait; None: not in one, or not known


class Credentials(msgspec.Struct, frozen=True):
    """What credentials(7) and capabilities(7) say of the process."""

    uids: tuple[U32, U32, U32, U32]  # real, effective, saved, file system
    gids: tuple[U32, U32, U32, U32]
    groups: Annotated[tuple[U32, ...], Meta(max_length=1 << 16)]  # NGROUPS_MAX
    inheritable: U64
    permitted: U64
    effective: U64
    bounding: U64
    ambient: U64
    securebits: U32
    no_new_privs: bool


class TimerState(msgspec.Struct, frozen=True):
    """One POSIX timer and how it stood when captured."""

    timer: PosixTimer
    setting: Itimer  # struct itimerspec: interval, remaining
    overrun: I32


class MemoryFields(msgspec.Struct):
    """`struct prctl_mm_map` without its pointers, in the kernel's order (PR_SET_MM_MAP, prctl(2))."""

    start_code: Address
    end_code: Address
    start_data: Address
    end_data: Address
    start_brk: Address
    brk: Address  # on the link it comes with `protocol.Complete`
    start_stack: Address
    arg_start: Address
    arg_end: Address
    env_start: Address
    env_end: Address


class ProcessState(msgspec.Struct):
    """Everything of the process that is not a thread, a page or a descriptor."""

    # the first one first; on the link the others follow (`protocol.Threads`)
    threads: Annotated[list[ThreadState], Meta(max_length=MAX_THREADS)]
    tids: Tids  # of all threads, the first one first, in the process's own numbers
    actions: Annotated[list[tuple[SignalNumber, Action]], Meta(max_length=64)]  # kernel sigaction
    pending: SigQueue
    itimers: tuple[Itimer, Itimer, Itimer]  # struct itimerval of REAL, VIRTUAL, PROF
    timers: Annotated[list[TimerState], Meta(max_length=1 << 16)]
    credentials: Credentials
    limits: Limits
    memory: MemoryFields
    auxv: Annotated[bytes, Meta(max_length=4096)]
    executable: Index  # into the migration's files
    cwd: PathText
    umask: Annotated[int, Meta(ge=0, le=0o777)]
    personality: U32
    oom_score_adj: Annotated[int, Meta(ge=-1000, le=1000)]
    dumpable: U31
    child_subreaper: U31
    thp_disable: U31
    captured_at: I63  # CLOCK_MONOTONIC of the source when timers were read, nanoseconds
    lock_future: LockFuture = 0  # flags of mlockall(2); on the link it comes with `protocol.Complete`
