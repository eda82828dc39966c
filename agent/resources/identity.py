"""Who a process is to the kernel: credentials(7), capabilities(7), prctl(2), limits, umask, personality."""

from __future__ import annotations

import os
import resource
import struct
from typing import Final

from agent.api import Notice
from agent.kernel import capabilities, procfs
from agent.kernel.arch import x86_64 as arch
from agent.kernel.capabilities import Sets
from agent.state import Credentials
from agent.tracee import Batch

PR_SET_PDEATHSIG: Final = 1
PR_GET_PDEATHSIG: Final = 2
PR_GET_DUMPABLE: Final = 3
PR_SET_DUMPABLE: Final = 4
PR_SET_KEEPCAPS: Final = 8
PR_SET_NAME: Final = 15
PR_GET_NAME: Final = 16
PR_CAPBSET_DROP: Final = 24
PR_GET_SECUREBITS: Final = 27
PR_SET_SECUREBITS: Final = 28
PR_SET_TIMERSLACK: Final = 29
PR_GET_TIMERSLACK: Final = 30
PR_SET_MM: Final = 35
PR_SET_MM_MAP: Final = 14
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37
PR_SET_NO_NEW_PRIVS: Final = 38
PR_GET_TID_ADDRESS: Final = 40
PR_SET_THP_DISABLE: Final = 41
PR_GET_THP_DISABLE: Final = 42
PR_CAP_AMBIENT: Final = 47
PR_CAP_AMBIENT_RAISE: Final = 2


def credentials(pid: int, tid: int | None = None, securebits: int = 0) -> Credentials:
    """From /proc/PID/status; securebits are only known to the task itself."""
    status = procfs.status(pid, tid)

    def four(name: str) -> tuple[int, int, int, int]:
        a, b, c, d = (int(x) for x in status[name].split())
        return a, b, c, d

    return Credentials(
        uids=four("Uid"),
        gids=four("Gid"),
        groups=tuple(int(x) for x in status["Groups"].split()),
        inheritable=int(status["CapInh"], 16),
        permitted=int(status["CapPrm"], 16),
        effective=int(status["CapEff"], 16),
        bounding=int(status["CapBnd"], 16),
        ambient=int(status["CapAmb"], 16),
        securebits=securebits,
        no_new_privs=status.get("NoNewPrivs", "0") == "1",
    )


def restore_credentials(batch: Batch, wanted: Credentials, now: Credentials) -> None:
    """Turn a task with credentials `now` (all of root's) into one with `wanted`; nothing where equal."""
    if wanted == now:
        return
    prctl = arch.NR_prctl
    for capability in range(64):
        if now.bounding >> capability & 1 and not wanted.bounding >> capability & 1:
            batch.call(f"drop capability {capability}", prctl, PR_CAPBSET_DROP, capability)
    batch.call("keep capabilities", prctl, PR_SET_KEEPCAPS, 1)
    groups = batch.put(struct.pack(f"<{len(wanted.groups)}I", *wanted.groups))
    batch.call("setgroups", arch.NR_setgroups, len(wanted.groups), groups)
    batch.call("setresgid", arch.NR_setresgid, *wanted.gids[:3])
    batch.call("setfsgid", arch.NR_setfsgid, wanted.gids[3])
    batch.call("setresuid", arch.NR_setresuid, *wanted.uids[:3])
    batch.call("setfsuid", arch.NR_setfsuid, wanted.uids[3])
    _restore_capabilities(batch, wanted)
    batch.call("keep capabilities", prctl, PR_SET_KEEPCAPS, wanted.securebits >> 4 & 1, optional=True)
    if wanted.no_new_privs:
        batch.call("no_new_privs", prctl, PR_SET_NO_NEW_PRIVS, 1)


def _restore_capabilities(batch: Batch, wanted: Credentials) -> None:
    header = batch.put(struct.pack("<II", capabilities.VERSION_3, 0))
    if wanted.securebits:
        # with CAP_SETPCAP still effective: it may be among those that go
        full = wanted.permitted | wanted.bounding
        everything = batch.put(capabilities.packed(Sets(full, full, wanted.inheritable)))
        batch.call("capset", arch.NR_capset, header, everything, optional=True)
        batch.call("securebits", arch.NR_prctl, PR_SET_SECUREBITS, wanted.securebits)
    data = capabilities.packed(Sets(wanted.effective, wanted.permitted, wanted.inheritable))
    batch.call("capset", arch.NR_capset, header, batch.put(data))
    for capability in range(64):
        if wanted.ambient >> capability & 1:
            batch.call("ambient", arch.NR_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability)


def restore_limits(pid: int, limits: tuple[tuple[int, int], ...]) -> None:
    """While the shadow still has our uid. A hard limit that may not be raised ends at the highest allowed."""
    for number, (soft, hard) in enumerate(limits):
        wanted = (_rlim(soft), _rlim(hard))
        current = resource.prlimit(pid, number)
        if current == wanted:
            continue
        try:
            resource.prlimit(pid, number, wanted)
        except PermissionError:
            resource.prlimit(pid, number, (_lower(wanted[0], current[1]), current[1]))


def limit_notices(limits: tuple[tuple[int, int], ...]) -> list[Notice]:
    """What restore_limits could not keep here."""
    status = procfs.status(os.getpid())
    if int(status["CapEff"], 16) >> 24 & 1:  # CAP_SYS_RESOURCE
        return []
    return [
        Notice(
            kind="limit-lowered",
            message=f"limit {number}: {_say(hard)} cannot be raised above {_say(ours)} there",
        )
        for number, (_, hard) in enumerate(limits)
        if hard > (ours := resource.getrlimit(number)[1] % (1 << 64))
    ]


def _say(limit: int) -> str:
    return "unlimited" if limit == (1 << 64) - 1 else str(limit)


def _rlim(value: int) -> int:
    return resource.RLIM_INFINITY if value == (1 << 64) - 1 else value


def _lower(first: int, second: int) -> int:
    infinite = resource.RLIM_INFINITY
    if infinite in (first, second):
        return second if first == infinite else first
    return min(first, second)
