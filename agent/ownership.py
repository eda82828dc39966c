"""Whose a process is, as ptrace(2) asks it: what somebody who is not root may have moved."""

from __future__ import annotations

import os

from agent.kernel import procfs


def foreign(pid: int, uid: int) -> str:
    """Why process `pid` is not wholly the user's own; "" if it is. ProcessLookupError.

    Its own are those that the user could trace: all user ids theirs, no capabilities, and memory that the
    kernel lets its user read (PR_SET_DUMPABLE, prctl(2): not so for setuid programs and what keeps secrets).
    """
    status = procfs.status(pid)
    if {int(each) for each in status["Uid"].split()} != {uid}:
        return f"it does not run as user {uid} alone"
    if int(status["CapPrm"], 16):
        return "it has capabilities, which its user has not"
    try:
        readable_by = os.stat(f"/proc/{pid}/mem").st_uid  # root's if it is not dumpable (proc(5))
    except FileNotFoundError:
        raise ProcessLookupError(3, "no such process", str(pid)) from None
    return "" if readable_by == uid else "it is closed to its own user (not dumpable)"
