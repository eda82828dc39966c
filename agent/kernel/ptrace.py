"""ptrace(2): stop a task, look at it, make it go on. Thin wrappers, all for the tracer's one thread.

The raw call comes from python-ptrace; what it has no name for goes through the same call. A task that is gone
is ProcessLookupError (ESRCH).
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from ptrace import PtraceError
from ptrace.binding.func import ptrace as _raw

from agent.kernel import procfs
from agent.kernel.arch.x86_64 import REGISTERS_SIZE, Registers

PTRACE_CONT: Final = 7
PTRACE_GETREGS: Final = 12
PTRACE_SETREGS: Final = 13
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_SETOPTIONS: Final = 0x4200
PTRACE_GETEVENTMSG: Final = 0x4201
PTRACE_GETSIGINFO: Final = 0x4202
PTRACE_GETREGSET: Final = 0x4204
PTRACE_SETREGSET: Final = 0x4205
PTRACE_SEIZE: Final = 0x4206
PTRACE_INTERRUPT: Final = 0x4207
PTRACE_PEEKSIGINFO: Final = 0x4209
PTRACE_GETSIGMASK: Final = 0x420A
PTRACE_SETSIGMASK: Final = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION: Final = 0x420F

PTRACE_PEEKSIGINFO_SHARED: Final = 1

PTRACE_O_TRACESYSGOOD: Final = 1
PTRACE_O_TRACECLONE: Final = 1 << 3
PTRACE_O_TRACEEXEC: Final = 1 << 4
PTRACE_O_TRACEEXIT: Final = 1 << 6
PTRACE_O_EXITKILL: Final = 1 << 20
PTRACE_O_SUSPEND_SECCOMP: Final = 1 << 21

PTRACE_EVENT_CLONE: Final = 3
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_EXIT: Final = 6
PTRACE_EVENT_STOP: Final = 128
SYSCALL_STOP: Final = 5 | 0x80  # the "signal" of a syscall's stop with PTRACE_O_TRACESYSGOOD

NT_X86_XSTATE: Final = 0x202
WALL: Final = 0x4000_0000  # wait(2) __WALL: threads too
SIGINFO_SIZE: Final = 128
SIGSET_SIZE: Final = 8


class RseqConfiguration(ctypes.Structure):
    """`struct ptrace_rseq_configuration` (linux/ptrace.h)."""

    _fields_ = (
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


# the largest area there may be; no thread but the tracer asks
_xstate_buffer = ctypes.create_string_buffer(32768)
_xstate: Final = memoryview(_xstate_buffer).cast("B")
_XSTATE_VECTOR: Final = struct.pack("<QQ", ctypes.addressof(_xstate_buffer), len(_xstate_buffer))


def _call(request: int, tid: int, addr: int = 0, data: int = 0) -> int:
    try:
        return int(_raw(request, tid, addr, data))
    except PtraceError as error:
        raise OSError(
            error.errno, os.strerror(error.errno), f"task {tid}, ptrace request {request:#x}"
        ) from None


def seize(tid: int, options: int = 0) -> None:
    """Become the tracer without stopping the task; with no EXITKILL it runs on if we die."""
    try:
        _call(PTRACE_SEIZE, tid, 0, options)
    except PermissionError:
        if procfs.stat(tid).state in "ZX":  # ended, and its parent has not noticed yet
            raise ProcessLookupError(3, os.strerror(3), f"task {tid}") from None
        raise


def interrupt(tid: int) -> None:
    _call(PTRACE_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    _call(PTRACE_CONT, tid, 0, signal)


def to_syscall(tid: int, signal: int = 0) -> None:
    """Go on, with a signal, to the next entry to, or exit from, a syscall."""
    _call(PTRACE_SYSCALL, tid, 0, signal)


def detach(tid: int, signal: int = 0) -> None:
    _call(PTRACE_DETACH, tid, 0, signal)


def set_options(tid: int, options: int) -> None:
    _call(PTRACE_SETOPTIONS, tid, 0, options)


def get_event_message(tid: int) -> int:
    value = ctypes.c_ulong()
    _call(PTRACE_GETEVENTMSG, tid, 0, ctypes.addressof(value))
    return value.value


def get_registers(tid: int) -> Registers:
    buffer = ctypes.create_string_buffer(REGISTERS_SIZE)
    _call(PTRACE_GETREGS, tid, 0, ctypes.addressof(buffer))
    return Registers.unpack(buffer.raw)


def set_registers(tid: int, registers: Registers) -> None:
    buffer = ctypes.create_string_buffer(registers.pack(), REGISTERS_SIZE)
    _call(PTRACE_SETREGS, tid, 0, ctypes.addressof(buffer))


def get_xstate(tid: int) -> bytes:
    """The whole xsave area in its standard (not compacted) form, as long as enabled features make it."""
    vector = ctypes.create_string_buffer(_XSTATE_VECTOR, 16)
    _call(PTRACE_GETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(vector))
    return bytes(_xstate[: struct.unpack("<QQ", vector.raw)[1]])


def set_xstate(tid: int, xstate: bytes) -> None:
    buffer = ctypes.create_string_buffer(xstate, len(xstate))
    vector = ctypes.create_string_buffer(struct.pack("<QQ", ctypes.addressof(buffer), len(xstate)), 16)
    _call(PTRACE_SETREGSET, tid, NT_X86_XSTATE, ctypes.addressof(vector))


def get_sigmask(tid: int) -> int:
    value = ctypes.c_uint64()
    _call(PTRACE_GETSIGMASK, tid, SIGSET_SIZE, ctypes.addressof(value))
    return value.value


def set_sigmask(tid: int, mask: int) -> None:
    value = ctypes.c_uint64(mask)
    _call(PTRACE_SETSIGMASK, tid, SIGSET_SIZE, ctypes.addressof(value))


def get_siginfo(tid: int) -> bytes:
    """`siginfo_t` of the current stop, 128 bytes."""
    buffer = ctypes.create_string_buffer(SIGINFO_SIZE)
    _call(PTRACE_GETSIGINFO, tid, 0, ctypes.addressof(buffer))
    return buffer.raw


def pending_signals(tid: int, shared: bool) -> list[bytes]:
    """The thread's or the process's queue of pending signals, oldest first, each a 128-byte `siginfo_t`."""
    found: list[bytes] = []
    room = 1  # most queues are empty
    while True:
        buffer = ctypes.create_string_buffer(SIGINFO_SIZE * room)
        arguments = ctypes.create_string_buffer(
            struct.pack("<QIi", len(found), PTRACE_PEEKSIGINFO_SHARED if shared else 0, room), 16
        )
        count = _call(PTRACE_PEEKSIGINFO, tid, ctypes.addressof(arguments), ctypes.addressof(buffer))
        found += (buffer.raw[n * SIGINFO_SIZE : (n + 1) * SIGINFO_SIZE] for n in range(count))
        if count < room:
            return found
        room = 64


def get_rseq(tid: int) -> tuple[int, int, int]:
    """(address, size, signature) of the registered rseq area; address 0 if there is none."""
    configuration = RseqConfiguration()
    _call(PTRACE_GET_RSEQ_CONFIGURATION, tid, ctypes.sizeof(configuration), ctypes.addressof(configuration))
    return configuration.rseq_abi_pointer, configuration.rseq_abi_size, configuration.signature


class TaskEnded(ProcessLookupError):
    """The task exited or was killed while we waited for it; `status` is wait(2)'s."""

    def __init__(self, tid: int, status: int) -> None:
        super().__init__(3, "the task ended", f"task {tid}")
        self.tid = tid
        self.status = status


def wait(tid: int) -> int:
    """Wait for the next stop of a tracee and return the status; TaskEnded if it will never stop again."""
    _, status = os.waitpid(tid, WALL)
    if not os.WIFSTOPPED(status):
        raise TaskEnded(tid, status)
    return status


def event(status: int) -> int:
    """The PTRACE_EVENT_* of a stop's status; 0 for a plain signal-delivery-stop."""
    return status >> 16
