"""Everything that is true of x86-64 only: registers, syscall numbers, machine code, signal frames.

Another architecture is another file with the same names. Sources: ptrace.h, sigcontext.h, ucontext.h
in arch/x86/include/uapi/asm and arch/x86/entry/syscalls/syscall_64.tbl; the machine code is listed
instruction by instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Annotated, Final, NamedTuple

import msgspec

from agent.bounds import U64

PAGE: Final = 4096
TASK_SIZE: Final = 0x7FFF_FFFF_F000
MMAP_MIN: Final = 0x1_0000
Address = Annotated[int, msgspec.Meta(ge=0, le=TASK_SIZE)]  # of a program's own, and the end of one

# syscall numbers
NR_mmap: Final = 9
NR_mprotect: Final = 10
NR_munmap: Final = 11
NR_rt_sigaction: Final = 13
NR_mremap: Final = 25
NR_mincore: Final = 27
NR_madvise: Final = 28
NR_waitid: Final = 247
NR_dup3: Final = 292
NR_getitimer: Final = 36
NR_setitimer: Final = 38
NR_close: Final = 3
NR_recvmsg: Final = 47
NR_exit: Final = 60
NR_fcntl: Final = 72
NR_umask: Final = 95
NR_setgroups: Final = 116
NR_setresuid: Final = 117
NR_setresgid: Final = 119
NR_setfsuid: Final = 122
NR_setfsgid: Final = 123
NR_capset: Final = 126
NR_rt_sigqueueinfo: Final = 129
NR_sigaltstack: Final = 131
NR_personality: Final = 135
NR_mlock2: Final = 325
NR_munlock: Final = 150
NR_mlockall: Final = 151
NR_prctl: Final = 157
NR_futex: Final = 202
NR_set_tid_address: Final = 218
NR_restart_syscall: Final = 219
NR_timer_create: Final = 222
NR_tgkill: Final = 234
NR_timer_settime: Final = 223
NR_timer_gettime: Final = 224
NR_timer_getoverrun: Final = 225
NR_timer_delete: Final = 226
NR_clock_gettime: Final = 228
NR_clock_nanosleep: Final = 230
NR_epoll_wait: Final = 232
NR_epoll_ctl: Final = 233
NR_ppoll: Final = 271
NR_set_robust_list: Final = 273
NR_epoll_pwait: Final = 281
NR_rt_tgsigqueueinfo: Final = 297
NR_userfaultfd: Final = 323
NR_rseq: Final = 334
NR_clone3: Final = 435
NR_epoll_pwait2: Final = 441
NR_poll: Final = 7
NR_nanosleep: Final = 35
NR_rt_sigtimedwait: Final = 128
NR_semtimedop: Final = 220
NR_semop: Final = 65
NR_io_getevents: Final = 208
NR_recvfrom: Final = 45
NR_read: Final = 0
NR_write: Final = 1
NR_readv: Final = 19
NR_writev: Final = 20
NR_preadv2: Final = 327
NR_pwritev2: Final = 328
NR_recvmmsg: Final = 299
NR_sendto: Final = 44
NR_sendmsg: Final = 46
NR_sendmmsg: Final = 307
NR_connect: Final = 42
NR_splice: Final = 275
NR_sendfile: Final = 40
NR_accept: Final = 43
NR_accept4: Final = 288

# kernel-internal results that a tracer sees in rax (include/linux/errno.h)
EINTR: Final = 4
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516

# Syscalls that answer a mere stop with EINTR (signal(7), "Interruption of system calls ... by stop signals"):
# nothing was consumed, so running them again is what the program would have seen without it. The first ones
# always do, the others on sockets with a time limit (SO_RCVTIMEO, SO_SNDTIMEO; sock_intr_errno) and special
# descriptors.
EINTR_ON_STOP: Final = frozenset(
    {
        *(NR_epoll_wait, NR_epoll_pwait, NR_epoll_pwait2, NR_rt_sigtimedwait),
        *(NR_semop, NR_semtimedop, NR_io_getevents),
        *(NR_read, NR_readv, NR_preadv2, NR_recvfrom, NR_recvmsg, NR_recvmmsg, NR_accept, NR_accept4),
        *(NR_write, NR_writev, NR_pwritev2, NR_sendto, NR_sendmsg, NR_sendmmsg, NR_connect),
        *(NR_splice, NR_sendfile),
    }
)

RED_ZONE: Final = 128  # bytes below the stack pointer that are in use (System V ABI, 3.2.2)
_REGISTERS: Final = struct.Struct("<27Q")
_SYSCALL: Final = b"\x0f\x05"
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Registers(msgspec.Struct, array_like=True):
    """`struct user_regs_struct` (asm/user_64.h), 27 words, in the kernel's order."""

    r15: U64 = 0
    r14: U64 = 0
    r13: U64 = 0
    r12: U64 = 0
    rbp: U64 = 0
    rbx: U64 = 0
    r11: U64 = 0
    r10: U64 = 0
    r9: U64 = 0
    r8: U64 = 0
    rax: U64 = 0
    rcx: U64 = 0
    rdx: U64 = 0
    rsi: U64 = 0
    rdi: U64 = 0
    orig_rax: U64 = 0
    rip: U64 = 0
    cs: U64 = 0
    eflags: U64 = 0
    rsp: U64 = 0
    ss: U64 = 0
    fs_base: U64 = 0
    gs_base: U64 = 0
    ds: U64 = 0
    es: U64 = 0
    fs: U64 = 0
    gs: U64 = 0

    def pack(self) -> bytes:
        return _REGISTERS.pack(*msgspec.structs.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Registers:
        return cls(*_REGISTERS.unpack(data))

    @property
    def syscall(self) -> int | None:
        """The syscall that the task was in when it stopped; None outside one."""
        return None if self.orig_rax >> 63 else self.orig_rax

    @property
    def result(self) -> int:
        return self.rax - (1 << 64) if self.rax >> 63 else self.rax


REGISTERS_SIZE: Final = _REGISTERS.size


def outside_syscall(registers: Registers) -> Registers:
    """The same registers with "not in a syscall": resuming does not restart anything."""
    return msgspec.structs.replace(registers, orig_rax=_U64)


def hide_stop(registers: Registers, signal_pending: bool) -> Registers:
    """Turn an EINTR that only our stop caused into running the syscall again.

    With a signal about to be delivered the EINTR belongs to the program and stays.
    """
    interrupted = registers.syscall in EINTR_ON_STOP and registers.result == -EINTR
    if not interrupted or signal_pending:
        return registers
    return rerun(registers)


def rerun(registers: Registers) -> Registers:
    """Registers that execute the interrupted syscall again from its beginning, its arguments as they were."""
    return msgspec.structs.replace(registers, rax=registers.orig_rax, rip=registers.rip - 2, orig_rax=_U64)


def as_restarted(registers: Registers) -> Registers:
    """What the kernel would do on resume, by hand: for a context that goes through rt_sigreturn instead."""
    if registers.syscall is None:
        return registers
    result = -registers.result
    # rt_sigreturn forgets the restart block (restore_sigcontext): such a call starts over with its full time
    if result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        return rerun(registers)
    return outside_syscall(registers)


# --- machine code ---

# rbx: table of 64-byte entries (nr, six arguments, result); r12: how many of them
_LOOP: Final = bytes.fromhex(
    "4d85e4"  # loop: test r12, r12
    "742a"  #        je done
    "488b03"  #       mov rax, [rbx]
    "488b7b08"  #     mov rdi, [rbx+8]
    "488b7310"  #     mov rsi, [rbx+16]
    "488b5318"  #     mov rdx, [rbx+24]
    "4c8b5320"  #     mov r10, [rbx+32]
    "4c8b4328"  #     mov r8, [rbx+40]
    "4c8b4b30"  #     mov r9, [rbx+48]
    "0f05"  #         syscall
    "48894338"  #     mov [rbx+56], rax
    "4883c340"  #     add rbx, 64
    "49ffcc"  #       dec r12
    "ebd1"  #         jmp loop
)  # done:

# for a shadow, whose tracer's death is its own: stop with SIGTRAP
BATCH_TRAP: Final = _LOOP + bytes.fromhex(
    "cc"  # done: int3
    "ebfd"  #     jmp done
)

# for a process that must outlive its tracer: raise the flag at r13, wait for the tracer in ppoll (timeout at
# r14), and if nobody comes return through the signal frame at r15 to where the process was
BATCH_PARK: Final = _LOOP + bytes.fromhex(
    "49c7450001000000"  # mov qword [r13], 1
    "31ff"  #             xor edi, edi
    "31f6"  #             xor esi, esi
    "4c89f2"  #           mov rdx, r14
    "4531d2"  #           xor r10d, r10d
    "b80f010000"  #       mov eax, ppoll
    "0f05"  #             syscall
    "4c89fc"  #           mov rsp, r15
    "b80f000000"  #       mov eax, rt_sigreturn
    "0f05"  #             syscall
)

# pid 1 of a pid namespace made for one tree: reap until nobody is left
_REAPER: Final = bytes.fromhex(
    "bfffffffff"  # reap: mov edi, -1
    "31f6"  #       xor esi, esi
    "ba00000040"  # mov edx, __WALL
    "4531d2"  #     xor r10d, r10d
    "b83d000000"  # mov eax, wait4
    "0f05"  #       syscall
    "4883f8f6"  #   cmp rax, -ECHILD
    "75e4"  #       jne reap
    "31ff"  #       xor edi, edi
    "b8e7000000"  # mov eax, exit_group
    "0f05"  #       syscall
)

_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")


def _elf(code: bytes, address: int, data_size: int) -> bytes:
    """A static ELF executable: a read-execute page, `code`, at `address`, then `data_size` writable zeros."""
    count = 2 if data_size else 1
    offset = _EHDR.size + _PHDR.size * count
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    entry = address + offset
    header = _EHDR.pack(ident, 2, 62, 1, entry, _EHDR.size, 0, 0, _EHDR.size, _PHDR.size, count, 64, 0, 0)
    text = _PHDR.pack(1, 5, 0, address, address, offset + len(code), offset + len(code), PAGE)
    data = _PHDR.pack(1, 6, 0, address + PAGE, address + PAGE, 0, data_size, PAGE) if data_size else b""
    return header + text + data + code


def seed_elf(address: int, data_size: int) -> tuple[bytes, int]:
    """The shadow's first program and the address of its batch runner; a tracer stops it before it runs."""
    return _elf(BATCH_TRAP, address, data_size), address + _EHDR.size + 2 * _PHDR.size


def reaper_elf() -> bytes:
    return _elf(_REAPER, 0x400000, 0)


def batch_registers(base: Registers, code: int, table: int, count: int) -> Registers:
    """Registers that start a batch: everything a syscall may clobber is the caller's to save."""
    return msgspec.structs.replace(
        base, rip=code, rbx=table, r12=count, orig_rax=_U64, rax=0, eflags=0x202, rsp=table
    )


def syscall_registers(base: Registers, at: int, number: int, arguments: tuple[int, ...]) -> Registers:
    """Registers that execute one syscall instruction at `at`."""
    a = (*arguments, 0, 0, 0, 0, 0, 0)
    return msgspec.structs.replace(
        base, rip=at, rax=number, orig_rax=_U64, rdi=a[0], rsi=a[1], rdx=a[2], r10=a[3], r8=a[4], r9=a[5]
    )


def find_syscall_offset(code: bytes) -> int:
    """Offset of the syscall instruction in our own runner."""
    return code.index(_SYSCALL)


def find_syscall(code: bytes) -> int | None:
    """Offset of a syscall instruction in a piece of text; None if there is none."""
    offset = code.find(_SYSCALL)
    return None if offset < 0 else offset


# --- calls that return by themselves ---

_CALL_AND_RETURN: Final = b"\x0f\x05\xc3"  # syscall; ret
# what every libc (and Go) has as the return address of its signal handlers: mov eax, rt_sigreturn; syscall
_RESTORERS: Final = (b"\x48\xc7\xc0\x0f\0\0\0\x0f\x05", b"\xb8\x0f\0\0\0\x0f\x05")


class ReturnPath(NamedTuple):
    """Instructions of a program by which a syscall returns through a signal frame, whoever is alive by then.

    `call`: "syscall; ret"; `restorer`: what makes the syscall rt_sigreturn. Addresses.
    """

    call: int
    restorer: int


def find_return(texts: Iterable[tuple[int, bytes]]) -> ReturnPath | None:
    """Look for a return path in pieces of executable text, (address, content); None if part is missing."""
    call = restorer = 0
    for address, text in texts:
        found = [at for at in (text.find(code) for code in _RESTORERS) if at >= 0]
        restorer = restorer or (address + found[0] if found else 0)
        at = text.find(_CALL_AND_RETURN)
        call = call or (address + at if at >= 0 else 0)
        if call and restorer:
            return ReturnPath(call, restorer)
    return None


def is_return_path(path: ReturnPath, at_call: bytes, at_restorer: bytes) -> bool:
    """Whether these bytes, read at the two addresses, still are one."""
    return at_call.startswith(_CALL_AND_RETURN) and at_restorer.startswith(_RESTORERS)


RETURN_PATH_BYTES: Final = max(map(len, (_CALL_AND_RETURN, *_RESTORERS)))


def returning_frame(
    path: ReturnPath, end: int, back: Registers, xstate: bytes, sigmask: int
) -> tuple[int, bytes]:
    """A signal frame that ends before `end` and leads to `back`: (its address, its content).

    Its return address is the restorer: a `ret` with the stack pointer at it goes back, as after a handler.
    """
    address = (end - frame_size(xstate)) // 64 * 64
    frame = sigreturn_frame(address, back, xstate, sigmask)
    return address, struct.pack("<Q", path.restorer) + frame[8:]


def returning_registers(
    base: Registers, path: ReturnPath, frame: int, number: int, arguments: tuple[int, ...]
) -> Registers:
    """Registers that make one syscall and then return through `frame`."""
    return msgspec.structs.replace(syscall_registers(base, path.call, number, arguments), rsp=frame)


# --- rt_sigframe ---

_FP_XSTATE_MAGIC1: Final = 0x46505853
_FP_XSTATE_MAGIC2: Final = 0x46505845
_UC_FP_XSTATE: Final = 1
# flags, link; uc_stack; registers; fpstate and reserved words; sigmask
_UCONTEXT: Final = struct.Struct("<QQ" + "QiiQ" + "23Q" + "9Q" + "Q")


_FP_OFFSET: Final = -(-(8 + _UCONTEXT.size + 128) // 64) * 64


def frame_size(xstate: bytes) -> int:
    """Bytes of a `sigreturn_frame`."""
    return _FP_OFFSET + len(xstate) + 4


def sigreturn_frame(address: int, registers: Registers, xstate: bytes, sigmask: int) -> bytes:
    """A `struct rt_sigframe` for `address` that returns to `registers`; the caller sets rsp to address + 8.

    The layout is asm/sigframe.h: return address, ucontext, then (64-byte aligned) the xsave area with its
    magic words. Padding is ours. `address` must be 64-byte aligned.
    """
    r = registers
    segments = (r.cs & 0xFFFF) | ((r.ss & 0xFFFF) << 48)
    gregs = (
        *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax),
        *(r.rcx, r.rsp, r.rip, r.eflags, segments, 0, 0, 0, 0),
    )
    flags = _UC_FP_XSTATE | 2 | 4  # UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    # ss_flags 3 is no valid mode: the kernel then leaves the alternate stack as it is (restore_altstack)
    context = _UCONTEXT.pack(flags, 0, 0, 3, 0, 0, *gregs, address + _FP_OFFSET, *(0,) * 8, sigmask)
    return (bytes(8) + context).ljust(_FP_OFFSET, b"\0") + _signal_xstate(xstate)


def _signal_xstate(xstate: bytes) -> bytes:
    """The ptrace form of the xsave area as a signal frame wants it (asm/sigcontext.h `_fpx_sw_bytes`)."""
    size, features = len(xstate), struct.unpack_from("<Q", xstate, 464)[0]
    software = struct.pack("<IIQI", _FP_XSTATE_MAGIC1, size + 4, features, size).ljust(48, b"\0")
    return xstate[:464] + software + xstate[512:] + struct.pack("<I", _FP_XSTATE_MAGIC2)
