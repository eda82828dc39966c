"""The system calls a lab needs that Python 3.11 does not offer: namespaces, mounts, prctl. No policy."""

from __future__ import annotations

import ctypes
import fcntl
import os

from agent.kernel.errors import check, libc

# linux/sched.h
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# A host's namespaces: those a process enters itself, and those that its children will be in.
OWN = CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWCGROUP
CHILDREN = CLONE_NEWPID | CLONE_NEWTIME

# linux/mount.h
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18

# linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

# asm/unistd_64.h
NR_rt_sigaction = 13

# linux/nsfs.h
NS_GET_PARENT = 0xB702


def unshare(flags: int) -> None:
    """Leave namespaces for new ones; NEWPID and NEWTIME count for children only (unshare(2))."""
    check(libc.unshare(ctypes.c_int(flags)), f"unshare {flags:#x}")


def setns(fd: int, flags: int) -> None:
    """Enter the namespace behind `fd`, or those `flags` names of the process behind a pidfd (setns(2))."""
    check(libc.setns(ctypes.c_int(fd), ctypes.c_int(flags)), f"setns fd {fd} {flags:#x}")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = [os.fsencode(each) or None for each in (source, target, kind)]
    result = libc.mount(*arguments, ctypes.c_ulong(flags), os.fsencode(data) or None)
    check(result, f"mount {kind or 'bind'} {source} on {target}")


def default_action(number: int) -> None:
    """SIG_DFL for signal `number`, past glibc, which refuses to touch its own (rt_sigaction(2))."""
    action = ctypes.create_string_buffer(32)  # struct kernel_sigaction: SIG_DFL, no flags, an empty mask
    check(libc.syscall(NR_rt_sigaction, number, action, None, 8), f"rt_sigaction {number}")


def set_death_signal(number: int) -> None:
    """Get signal `number` when the parent ends; 0: none (PR_SET_PDEATHSIG(2const))."""
    check(libc.prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0), "prctl PDEATHSIG")


def set_name(name: str) -> None:
    """Set what ps(1) shows as this process's name, 15 bytes at most."""
    check(libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0), "prctl NAME")


def parent_namespace(fd: int) -> int:
    """A descriptor of the parent of pid namespace `fd` (NS_GET_PARENT(2const)); EPERM past our own."""
    return fcntl.ioctl(fd, NS_GET_PARENT)
