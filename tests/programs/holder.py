#!/usr/bin/env python3
"""Hold things that a migration cannot carry, and go on living: `holder.py KIND[,KIND…] STATUS`.

Meanwhile it takes a heartbeat by CLOCK_REALTIME and writes to STATUS, as one line of JSON: pid, kind, beats,
longest_gap_ms. That shows whether the process was disturbed while its migration was refused. Kinds: HOLDERS.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import json
import mmap
import os
import pty
import select
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ALLOW, BPF_RET_K = 0x7FFF0000, 0x06
SYS_IO_SETUP, SYS_IO_URING_SETUP, SYS_PIDFD_OPEN, SYS_USERFAULTFD = 206, 425, 434, 323
SYS_PERF_EVENT_OPEN = 298
CLONE_NEWUTS = 0x04000000
IPC_CREAT, IPC_RMID = 0o1000, 0
PTRACE_SEIZE = 0x4206
PORT, PRIVATE = 7321, Path("/tmp/holder-private")


def check(result: int) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def hold_unix_socket() -> object:
    """A client of a stream service, which stays."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0holder-service-{os.getpid()}")
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect(listener.getsockname())
    return listener, client


def hold_unix_listener() -> object:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"\0holder-{os.getpid()}")
    listener.listen()
    return listener


def hold_udp() -> object:
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.bind(("0.0.0.0", 0))
    return sender


def hold_netlink() -> object:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)


def hold_packet() -> object:
    return socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)


def hold_child() -> object:
    child = os.fork()
    if child == 0:
        signal.pause()
    return child


def hold_shared_anonymous() -> object:
    memory = mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED)
    memory[:5] = b"alive"
    return memory


def hold_sysv_memory() -> object:
    """Marked for removal at once: it lives as long as it is attached."""
    segment = check(libc.shmget(0, 65536, IPC_CREAT | 0o600))
    libc.shmat.restype = ctypes.c_void_p
    attached = libc.shmat(segment, None, 0)
    check(libc.shmctl(segment, IPC_RMID, None))
    return attached


def hold_tty() -> object:
    """The other end of a terminal of its own making."""
    main, side = pty.openpty()
    termios.tcgetattr(side)
    return main, side


def hold_inotify() -> object:
    watcher = check(libc.inotify_init1(0))
    check(libc.inotify_add_watch(watcher, b"/", 0x100))
    return watcher


def hold_fanotify() -> object:
    return check(libc.fanotify_init(0, os.O_RDONLY))


def hold_seccomp() -> object:
    """A filter that permits everything is one nevertheless."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", BPF_RET_K, 0, 0, SECCOMP_RET_ALLOW))
    header = struct.pack("HxxxxxxP", 1, ctypes.addressof(program))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header))
    return program


def hold_io_uring() -> object:
    return check(libc.syscall(SYS_IO_URING_SETUP, 8, ctypes.create_string_buffer(120)))


def hold_aio() -> object:
    context = ctypes.c_ulong(0)
    check(libc.syscall(SYS_IO_SETUP, 16, ctypes.byref(context)))
    return context


def hold_pidfd() -> object:
    return check(libc.syscall(SYS_PIDFD_OPEN, os.getpid(), 0))


def hold_userfaultfd() -> object:
    return check(libc.syscall(SYS_USERFAULTFD, 0))


def hold_perf_event() -> object:
    """PERF_TYPE_SOFTWARE, PERF_COUNT_SW_TASK_CLOCK, of this process."""
    attributes = struct.pack("IIQ", 1, 112, 1).ljust(112, b"\0")
    return check(libc.syscall(SYS_PERF_EVENT_OPEN, attributes, 0, -1, -1, 0))


def hold_proc_file() -> object:
    return open("/proc/self/maps")


def hold_directory_gone() -> object:
    """The working directory is one that has been removed."""
    path = Path(f"holder-{os.getpid()}")
    path.mkdir()
    os.chdir(path)
    (Path("..") / path).rmdir()
    return path


def hold_lock() -> object:
    """A lease: whoever opens the file would break it."""
    Path(f"leased-{os.getpid()}").touch()
    leased = open(f"leased-{os.getpid()}")
    fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    return leased


def hold_namespace() -> object:
    return check(libc.unshare(CLONE_NEWUTS))


def hold_passed_descriptor() -> object:
    """A descriptor in flight, in the queue of a socket."""
    left, right = socket.socketpair()
    left.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [2]))])
    return left, right


def hold_listener() -> object:
    """Moves, but not to a host where somebody else listens there."""
    return socket.create_server(("", PORT))


def hold_private_directory() -> object:
    """Moves, but not to a host that has no such directory."""
    PRIVATE.mkdir(exist_ok=True)
    return os.open(PRIVATE, os.O_RDONLY | os.O_DIRECTORY)


def hold_tracer() -> object:
    """Being traced, by a child; it can be only one."""
    child = os.fork()
    if child == 0:
        check(libc.ptrace(PTRACE_SEIZE, os.getppid(), None, None))
        signal.pause()
    return child


HOLDERS: dict[str, Callable[[], object]] = {
    name.removeprefix("hold_").replace("_", "-"): function
    for name, function in list(globals().items())
    if name.startswith("hold_")
}


def live(kind: str, status: Path) -> None:
    """Until SIGTERM, which is left to its default."""
    beats, longest, last = 0, 0.0, time.time()
    with status.open("w") as file:
        while True:
            select.select([], [], [], 0.002)
            now = time.time()
            beats, longest, last = beats + 1, max(longest, (now - last) * 1e3), now
            told = {"pid": os.getpid(), "kind": kind, "beats": beats, "longest_gap_ms": round(longest, 3)}
            os.pwrite(file.fileno(), json.dumps(told).ljust(199).encode() + b"\n", 0)


def main() -> int:
    kind, status = sys.argv[1], Path(sys.argv[2]).resolve()
    os.chdir(status.parent)
    held = [HOLDERS[each]() for each in kind.split(",")]
    live(kind, status)
    del held
    return 0


if __name__ == "__main__":
    sys.exit(main())
