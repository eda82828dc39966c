"""Numbers and layouts that the kernel fixes, against its headers: a probe in C tells what they say.

What the installed headers are too old to know is computed or listed here, and proven by use elsewhere.
"""

from __future__ import annotations

import ctypes
import importlib
import pkgutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import agent
from agent import shadow, tracee
from agent.kernel import capabilities, clone, memory, pagemap, ptrace, sched, userfaultfd
from agent.kernel.arch import x86_64 as arch
from agent.kernel.arch.x86_64 import Registers
from agent.resources import signals, timers, waits

Probe = Callable[[str, dict[str, str]], dict[str, int]]

# Constants with these beginnings are the kernel's, under the kernel's names.
PREFIXES = (
    *("PTRACE_", "PR_", "CLONE_NEW", "CLONE_VM", "CLONE_FS", "CLONE_FILES", "CLONE_SIGHAND", "CLONE_THREAD"),
    *(
        "CLONE_SYSVSEM",
        "CLONE_CHILD",
        "MS_",
        "MAP_",
        "MADV_",
        "UFFD_FEATURE",
        "UFFD_USER",
        "UFFDIO_",
        "PAGE_IS_",
        "PM_SCAN_",
        "TFD_",
        "SIGEV_",
    ),
    *("EPOLL_CTL", "NT_", "KCMP_", "CLOSE_RANGE_"),
)
# Younger than headers may be; each is used on the running kernel by another test.
YOUNG = {
    *("PAGE_IS_WPALLOWED", "PAGE_IS_WRITTEN", "PAGE_IS_FILE", "PAGE_IS_PRESENT", "PAGE_IS_SWAPPED"),
    *("PAGE_IS_PFNZERO", "PAGE_IS_HUGE", "PAGE_IS_SOFT_DIRTY", "PAGE_IS_GUARD"),
    *("PM_SCAN_WP_MATCHING", "PM_SCAN_CHECK_WPASYNC"),
    *(
        "UFFD_FEATURE_WP_UNPOPULATED",
        "UFFD_FEATURE_WP_ASYNC",
        "MADV_GUARD_INSTALL",
        "PR_TIMER_CREATE_RESTORE_IDS",
    ),
}
# These are no macros, so a header is not asked whether it has them.
ENUMS = ("KCMP_",)
HEADERS = """
#include <stdio.h>
#include <stddef.h>
#include <linux/types.h>
#include <linux/ptrace.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <linux/mount.h>
#include <linux/fs.h>
#include <linux/userfaultfd.h>
#include <linux/timerfd.h>
#include <linux/eventpoll.h>
#include <linux/elf.h>
#include <linux/kcmp.h>
#include <linux/close_range.h>
#include <linux/rseq.h>
#include <linux/uio.h>
#include <linux/wait.h>
#include <linux/capability.h>
#include <linux/fcntl.h>
#include <linux/time.h>
#include <linux/mman.h>
#include <asm/unistd_64.h>
#include <asm/signal.h>
#include <asm/siginfo.h>
#include <asm/sigcontext.h>
#include <asm/ucontext.h>
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """Values of C expressions, by name; those whose macro the headers do not have are left out."""
    where = tmp_path_factory.mktemp("abi")

    def ask(headers: str, expressions: dict[str, str]) -> dict[str, int]:
        lines = [
            f"#ifdef {e}\n{shown}\n#endif" if e.isidentifier() and not e.startswith(ENUMS) else shown
            for n, e in expressions.items()
            for shown in [f'printf("{n} %lld\\n", (long long)({e}));']
        ]
        source = "\n".join([headers, "int main(void) {", *lines, "return 0; }"])
        return run(where, source)

    return ask


def run(where: Path, source: str) -> dict[str, int]:
    (where / "probe.c").write_text(source)
    subprocess.run(["gcc", "-w", "-o", where / "probe", where / "probe.c"], check=True)
    shown = subprocess.run([where / "probe"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in shown.splitlines())}


def modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(agent.__path__, "agent."):
        yield importlib.import_module(info.name)


def constants(*prefixes: str) -> dict[str, int]:
    """All integers of the agent's modules whose names begin so; one name has one value everywhere."""
    found: dict[str, int] = {}
    for module in modules():
        for name, value in vars(module).items():
            bare = name.lstrip("_")
            if isinstance(value, int) and bare.startswith(prefixes):
                assert found.setdefault(bare, value) == value, f"{module.__name__}.{name}"
    return found


def test_syscall_numbers(probe: Probe) -> None:
    ours = constants("NR_")
    assert len(ours) > 60
    kernel = probe(HEADERS, {name: f"__{name.replace('NR_BRK', 'NR_brk')}" for name in ours})
    assert ours == kernel


def test_names_of_the_kernel(probe: Probe) -> None:
    ours = constants(*PREFIXES)
    assert len(ours) > 80
    kernel = probe(HEADERS, {name: name for name in ours})
    assert {n: v for n, v in ours.items() if n in kernel} == kernel
    assert ours.keys() - kernel.keys() <= YOUNG


def test_other_numbers(probe: Probe) -> None:
    kernel = probe(
        HEADERS,
        {
            "wall": "__WALL",
            "mremap": "MREMAP_MAYMOVE | MREMAP_FIXED",
            "iov": "UIO_MAXIOV",
            "capability": "_LINUX_CAPABILITY_VERSION_3",
            "cap_resource": "CAP_SYS_RESOURCE",
            "magic1": "FP_XSTATE_MAGIC1",
            "magic2": "FP_XSTATE_MAGIC2",
            "uc_flags": "UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS",
            "dupfd": "F_LINUX_SPECIFIC_BASE + 6",
            "onfault": "MLOCK_ONFAULT",
        },
    )
    assert kernel["wall"] == ptrace.WALL
    assert kernel["mremap"] == shadow.MREMAP_MAYMOVE_FIXED
    assert kernel["iov"] == memory.IOV_MAX
    assert kernel["capability"] == capabilities.VERSION_3
    assert kernel["cap_resource"] == 24  # identity.limit_notices
    assert (kernel["magic1"], kernel["magic2"]) == (arch._FP_XSTATE_MAGIC1, arch._FP_XSTATE_MAGIC2)
    assert (
        kernel["uc_flags"]
        == struct.unpack_from("<Q", arch.sigreturn_frame(0, Registers(), bytes(576), 0), 8)[0]
    )
    assert kernel["dupfd"] == 1030  # Shadow.place
    assert kernel["onfault"] == 1  # Shadow._advise


def test_ioctls(probe: Probe) -> None:
    """The struct pm_scan_arg of linux/fs.h (Linux 6.7) is twelve words; its ioctl is computed from that."""
    kernel = probe(
        HEADERS + "struct scan_arg { __u64 words[12]; };\n",
        {
            "scan": "_IOWR('f', 16, struct scan_arg)",
            "api": "(unsigned)UFFDIO_API",
            "register": "(unsigned)UFFDIO_REGISTER",
            "protect": "(unsigned)UFFDIO_WRITEPROTECT",
            "api_size": "sizeof(struct uffdio_api)",
            "register_size": "sizeof(struct uffdio_register)",
            "range_size": "sizeof(struct uffdio_range)",
            "protect_size": "sizeof(struct uffdio_writeprotect)",
            "register_mode": "offsetof(struct uffdio_register, mode)",
            "protect_mode": "offsetof(struct uffdio_writeprotect, mode)",
        },
    )
    assert kernel["scan"] % (1 << 32) == pagemap.PAGEMAP_SCAN
    assert ctypes.sizeof(pagemap.PmScanArg) == 96
    assert pagemap.PmScanArg.category_inverted.offset == 64
    assert pagemap.PmScanArg.return_mask.offset == 88
    ours = (userfaultfd.UFFDIO_API, userfaultfd.UFFDIO_REGISTER, userfaultfd.UFFDIO_WRITEPROTECT)
    assert (kernel["api"], kernel["register"], kernel["protect"]) == ours
    assert (kernel["api_size"], kernel["register_size"], kernel["range_size"]) == (24, 32, 16)
    assert kernel["protect_size"] == 24
    assert kernel["register_mode"] == kernel["protect_mode"] == 16


# the order of sigreturn_frame's registers, and where each is in struct sigcontext
GREGS = [
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rdi",
    "rsi",
    "rbp",
    "rbx",
    "rdx",
    "rax",
    "rcx",
    "rsp",
    "rip",
    "eflags",
    "cs",
    "ss",
]


def test_signal_frame(probe: Probe) -> None:
    """struct rt_sigframe: a return address, then struct ucontext."""
    names = {r: f"8 + offsetof(struct ucontext, uc_mcontext.{r})" for r in GREGS}
    extra = {
        "fpstate": "8 + offsetof(struct ucontext, uc_mcontext.fpstate)",
        "sigmask": "8 + offsetof(struct ucontext, uc_sigmask)",
        "stack": "8 + offsetof(struct ucontext, uc_stack)",
        "ss_flags": "8 + offsetof(struct ucontext, uc_stack.ss_flags)",
        "size": "sizeof(struct ucontext)",
        "software": "offsetof(struct _fpstate_64, sw_reserved)",
        "software_size": "sizeof(struct _fpx_sw_bytes)",
        "siginfo": "sizeof(siginfo_t)",
    }
    kernel = probe(HEADERS, {**names, **extra})
    registers = Registers(**{name: 0x1000 + n for n, name in enumerate(GREGS)})
    xstate = bytes(464) + bytes(48) + struct.pack("<Q", 7) + bytes(56) + bytes(256)
    frame = arch.sigreturn_frame(0x40000, registers, xstate, 0xABCD)
    for name in GREGS:
        size = "<H" if name in ("cs", "ss") else "<Q"
        assert struct.unpack_from(size, frame, kernel[name])[0] == getattr(registers, name), name
    (pointer,) = struct.unpack_from("<Q", frame, kernel["fpstate"])
    assert pointer % 64 == 0
    assert pointer - 0x40000 >= 8 + kernel["size"] + kernel["siginfo"]
    assert struct.unpack_from("<Q", frame, kernel["sigmask"])[0] == 0xABCD
    assert struct.unpack_from("<i", frame, kernel["ss_flags"])[0] == 3
    assert (kernel["software"], kernel["software_size"]) == (464, 48)
    assert arch._UCONTEXT.size == kernel["size"] == 304
    assert kernel["siginfo"] == ptrace.SIGINFO_SIZE == 128


def test_registers(probe: Probe) -> None:
    headers = "#include <stdio.h>\n#include <stddef.h>\n#include <sys/user.h>\n"
    fields = Registers.__struct_fields__
    kernel = probe(headers, {f: f"offsetof(struct user_regs_struct, {f})" for f in fields})
    assert kernel == {field: 8 * n for n, field in enumerate(fields)}


def offsets(structure: str, *fields: str) -> dict[str, str]:
    return {"size": f"sizeof({structure})", **{f: f"offsetof({structure}, {f})" for f in fields}}


def test_clone_args(probe: Probe) -> None:
    kernel = probe(
        HEADERS, offsets("struct clone_args", "flags", "exit_signal", "set_tid", "set_tid_size")
    )
    packed = clone.clone_args(1, 2, exit_signal=4)
    assert len(packed) == clone.CLONE_ARGS_SIZE == kernel["size"]
    values = {"flags": 1, "set_tid": 2, "exit_signal": 4, "set_tid_size": 1}
    words = [0] * 11
    for name, value in values.items():
        words[kernel[name] // 8] = value
    assert packed == struct.pack("<11Q", *words)


MM_MAP = (
    *("start_code", "end_code", "start_data", "end_data", "start_brk", "brk", "start_stack"),
    *("arg_start", "arg_end", "env_start", "env_end", "auxv", "auxv_size", "exe_fd"),
)


def test_prctl_mm_map(probe: Probe) -> None:
    from agent.state import MemoryFields

    kernel = probe(HEADERS, offsets("struct prctl_mm_map", *MM_MAP))
    assert MemoryFields.__struct_fields__ == MM_MAP[:11]
    assert kernel["size"] == struct.calcsize("<11QQII")  # finishing._memory_map
    assert [kernel[name] for name in MM_MAP] == [*range(0, 97, 8), 100]


def test_sizes_and_offsets(probe: Probe) -> None:
    kernel = probe(
        HEADERS,
        {
            "sched_attr": "sizeof(struct sched_attr)",
            "nice": "offsetof(struct sched_attr, sched_nice)",
            "sigaction": "sizeof(struct sigaction)",
            "stack_t": "sizeof(stack_t)",
            "stack_size": "offsetof(stack_t, ss_size)",
            "timespec": "sizeof(struct __kernel_timespec)",
            "itimerspec": "sizeof(struct __kernel_itimerspec)",
            "itimer_value": "offsetof(struct __kernel_itimerspec, it_value)",
            "itimerval": "sizeof(struct itimerval)",
            "sigevent": "sizeof(struct sigevent)",
            "signo": "offsetof(struct sigevent, sigev_signo)",
            "notify": "offsetof(struct sigevent, sigev_notify)",
            "event_tid": "offsetof(struct sigevent, _sigev_un._tid)",
            "epoll_event": "sizeof(struct epoll_event)",
            "epoll_data": "offsetof(struct epoll_event, data)",
            "rseq_configuration": "sizeof(struct ptrace_rseq_configuration)",
            "peek": "sizeof(struct ptrace_peeksiginfo_args)",
            "peek_flags": "offsetof(struct ptrace_peeksiginfo_args, flags)",
            "rseq_cs": "sizeof(struct rseq_cs)",
            "rseq_pointer": "offsetof(struct rseq, rseq_cs)",
            "rseq_start": "offsetof(struct rseq_cs, start_ip)",
            "rseq_abort": "offsetof(struct rseq_cs, abort_ip)",
        },
    )
    assert (kernel["sched_attr"], kernel["nice"]) == (sched.SCHED_ATTR_SIZE, 16)
    assert kernel["sigaction"] == signals.ACTION_SIZE
    assert (kernel["stack_t"], kernel["stack_size"]) == (signals.STACK_T.size, 16)
    assert kernel["timespec"] == waits._TIMESPEC.size
    assert kernel["itimerspec"] == kernel["itimerval"] == timers.ITIMER_SIZE
    assert kernel["itimer_value"] == 16
    assert (kernel["sigevent"], kernel["signo"], kernel["notify"], kernel["event_tid"]) == (64, 8, 12, 16)
    assert (kernel["epoll_event"], kernel["epoll_data"]) == (struct.calcsize("<IQ"), 4)
    assert kernel["rseq_configuration"] == ctypes.sizeof(ptrace.RseqConfiguration)
    assert (kernel["peek"], kernel["peek_flags"]) == (struct.calcsize("<QIi"), 8)
    assert (kernel["rseq_cs"], kernel["rseq_pointer"]) == (32, 8)
    assert (kernel["rseq_start"], kernel["rseq_abort"]) == (8, 24)


def test_message_header(probe: Probe) -> None:
    """Shadow._receive_some's struct msghdr."""
    headers = "#define _GNU_SOURCE\n#include <stdio.h>\n#include <stddef.h>\n#include <sys/socket.h>\n"
    fields = ("msg_iov", "msg_iovlen", "msg_control", "msg_controllen", "msg_flags")
    kernel = probe(headers, {**offsets("struct msghdr", *fields), "cloexec": "MSG_CMSG_CLOEXEC + 0"})
    packed = struct.pack("<QIxxxxQQQQi", 0, 0, 1, 2, 3, 4, 5)
    for value, name in enumerate(fields, 1):
        size = "<i" if name == "msg_flags" else "<Q"
        assert struct.unpack_from(size, packed, kernel[name])[0] == value
    assert kernel["size"] - len(packed) == 4  # padding, which the kernel reads and does not use
    assert kernel["cloexec"] == 0x40000000


def test_the_parts_of_the_scratch_do_not_overlap() -> None:
    largest_xstate = 11_008  # with AMX tiles
    frame = arch.sigreturn_frame(0, Registers(), bytes(largest_xstate), 0)
    assert tracee.CONTROL + 32 <= tracee.FRAME and tracee.FRAME % 64 == 0
    assert tracee.FRAME + len(frame) < tracee.STACK_TOP - 4096
    assert tracee.DATA + tracee.DATA_SIZE == tracee.SCRATCH_SIZE
