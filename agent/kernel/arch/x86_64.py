"""Everything that is true of x86-64 only: registers, syscall numbers, machine code, signal frames.

Another architecture is another file with the same names. Sources: arch/x86/include/uapi/asm/{ptrace,sigcontext,
ucontext}.h, arch/x86/entry/syscalls/syscall_64.tbl; the machine code is listed instruction by instruction.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

PAGE: Final = 4096
TASK_SIZE: Final = 0x7FFF_FFFF_F000
MMAP_MIN: Final = 0x1_0000

# syscall numbers
NR_mmap: Final = 9
NR_mprotect: Final = 10
NR_munmap: Final = 11
NR_rt_sigaction: Final = 13
NR_rt_sigprocmask: Final = 14
NR_rt_sigreturn: Final = 15
NR_ioctl: Final = 16
NR_mremap: Final = 25
NR_madvise: Final = 28
NR_dup3: Final = 292
NR_getitimer: Final = 36
NR_setitimer: Final = 38
NR_close: Final = 3
NR_recvmsg: Final = 47
NR_exit: Final = 60
NR_fcntl: Final = 72
NR_fchdir: Final = 81
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
NR_setpriority: Final = 141
NR_mlock2: Final = 325
NR_munlock: Final = 150
NR_prctl: Final = 157
NR_futex: Final = 202
NR_set_tid_address: Final = 218
NR_restart_syscall: Final = 219
NR_timer_create: Final = 222
NR_timer_settime: Final = 223
NR_timer_gettime: Final = 224
NR_timer_getoverrun: Final = 225
NR_timer_delete: Final = 226
NR_clock_nanosleep: Final = 230
NR_epoll_wait: Final = 232
NR_epoll_ctl: Final = 233
NR_ppoll: Final = 271
NR_set_robust_list: Final = 273
NR_epoll_pwait: Final = 281
NR_rt_tgsigqueueinfo: Final = 297
NR_prlimit64: Final = 302
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
NR_accept: Final = 43
NR_accept4: Final = 288

# kernel-internal results that a tracer sees in rax (include/linux/errno.h)
EINTR: Final = 4
ERESTARTSYS: Final = 512
ERESTARTNOINTR: Final = 513
ERESTARTNOHAND: Final = 514
ERESTART_RESTARTBLOCK: Final = 516

# syscalls that answer a mere stop with EINTR (signal(7), "Interruption of system calls ... by stop signals"):
# nothing was consumed, so running them again is what the program would have seen without the stop
EINTR_ON_STOP: Final = frozenset(
    {
        NR_epoll_wait,
        NR_epoll_pwait,
        NR_epoll_pwait2,
        NR_rt_sigtimedwait,
        NR_semop,
        NR_semtimedop,
        NR_io_getevents,
        NR_recvfrom,
        NR_recvmsg,
        NR_accept,
        NR_accept4,
        0,  # read (inotify, timed receive)
        1,  # write (timed send)
    }
)

_REGISTERS: Final = struct.Struct("<27Q")
_SYSCALL: Final = b"\x0f\x05"
_U64: Final = 0xFFFF_FFFF_FFFF_FFFF


class Registers(msgspec.Struct, array_like=True):
    """`struct user_regs_struct` (asm/user_64.h), 27 words, in the kernel's order."""

    r15: int = 0
    r14: int = 0
    r13: int = 0
    r12: int = 0
    rbp: int = 0
    rbx: int = 0
    r11: int = 0
    r10: int = 0
    r9: int = 0
    r8: int = 0
    rax: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    orig_rax: int = 0
    rip: int = 0
    cs: int = 0
    eflags: int = 0
    rsp: int = 0
    ss: int = 0
    fs_base: int = 0
    gs_base: int = 0
    ds: int = 0
    es: int = 0
    fs: int = 0
    gs: int = 0

    def pack(self) -> bytes:
        return _REGISTERS.pack(*(getattr(self, name) for name in self.__struct_fields__))

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


def is_compat(registers: Registers) -> bool:
    """Whether the task runs 32-bit code (__USER32_CS)."""
    return registers.cs == 0x23


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
    """Registers that execute the interrupted syscall again from its beginning, with its original arguments."""
    return msgspec.structs.replace(registers, rax=registers.orig_rax, rip=registers.rip - 2, orig_rax=_U64)


def as_restarted(registers: Registers) -> Registers:
    """What the kernel would do on resume, done by hand: for a context that goes through rt_sigreturn instead."""
    if registers.syscall is None:
        return registers
    result = -registers.result
    # rt_sigreturn forgets the restart block (restore_sigcontext), so such a call starts over with its full time
    if result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
        return rerun(registers)
    return outside_syscall(registers)


# --- machine code -----------------------------------------------------------------------------------------------

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

# for a process that must outlive its tracer: raise the flag at r13, wait for the tracer in ppoll (timeout at r14),
# and if nobody comes return through the signal frame at r15 to where the process was
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
    """A static ELF executable: a read-execute page with `code` at `address`, then `data_size` zero bytes, writable."""
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


# --- rt_sigframe -------------------------------------------------------------------------------------------------

_FP_XSTATE_MAGIC1: Final = 0x46505853
_FP_XSTATE_MAGIC2: Final = 0x46505845
_UC_FP_XSTATE: Final = 1
# flags, link; uc_stack; registers; fpstate and reserved words; sigmask
_UCONTEXT: Final = struct.Struct("<QQ" + "QiiQ" + "23Q" + "9Q" + "Q")


def sigreturn_frame(address: int, registers: Registers, xstate: bytes, sigmask: int) -> bytes:
    """A `struct rt_sigframe` for `address` that returns to `registers`; the caller sets rsp to address + 8.

    The layout is asm/sigframe.h: return address, ucontext, then (64-byte aligned) the xsave area with its magic words.
    Padding is ours. `address` must be 64-byte aligned.
    """
    r = registers
    fp_offset = -(-(8 + _UCONTEXT.size + 128) // 64) * 64
    segments = (r.cs & 0xFFFF) | ((r.ss & 0xFFFF) << 48)
    gregs = (
        *(r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx, r.rdx, r.rax),
        *(r.rcx, r.rsp, r.rip, r.eflags, segments, 0, 0, 0, 0),
    )
    flags = _UC_FP_XSTATE | 2 | 4  # UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS
    # ss_flags 3 is no valid mode: the kernel then leaves the alternate stack as it is (restore_altstack)
    context = _UCONTEXT.pack(flags, 0, 0, 3, 0, 0, *gregs, address + fp_offset, *(0,) * 8, sigmask)
    return (bytes(8) + context).ljust(fp_offset, b"\0") + _signal_xstate(xstate)


def _signal_xstate(xstate: bytes) -> bytes:
    """The ptrace form of the xsave area in the form that a signal frame wants (asm/sigcontext.h `_fpx_sw_bytes`)."""
    features = struct.unpack_from("<Q", xstate, 464)[0]
    software = struct.pack("<IIQI", _FP_XSTATE_MAGIC1, len(xstate) + 4, features, len(xstate)).ljust(48, b"\0")
    return xstate[:464] + software + xstate[512:] + struct.pack("<I", _FP_XSTATE_MAGIC2)
