"""What a process is made of, read from outside, and every reason why it cannot be moved. Touches nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import stat as stat_module
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from agent import kinds
from agent.api import Blocker, Notice, ProcessInfo
from agent.descriptors import OpenFile, SourceProcess, open_files, path_blockers
from agent.kernel import procfs
from agent.kernel.arch import x86_64_features
from agent.kernel.memory import RemoteMemory
from agent.layout import Mapping
from agent.ownership import foreign
from agent.resources import mappings, pipe, regular_file, tcp, tcp_socket
from agent.resources.files import FileRef
from agent.resources.mappings import FileTable
from agent.shadow import Special

_NAMESPACES: Final = ("net", "ipc", "uts", "user", "cgroup")
_REAPER: Final = "/memfd:migrate-reaper (deleted)"


class Inventory(msgspec.Struct):
    """One process as found."""

    pid: int
    command: str
    memory_bytes: int
    tids: list[int]
    layout: list[Mapping]
    files: FileTable
    executable: int
    specials: list[Special]
    vdso_digest: bytes
    descriptors: list[OpenFile]
    cwd: str
    session_leader: bool
    blockers: list[Blocker]
    notices: list[Notice]

    @property
    def connections(self) -> int:
        return sum(1 for d in self.descriptors if tcp_socket.recognise(d))


def command(pid: int) -> str:
    text = procfs.command_line(pid).replace(b"\0", b" ").strip().decode("utf-8", "replace")
    return text or f"[{procfs.stat(pid).comm}]"


def memory_bytes(status: dict[str, str]) -> int:
    return 1024 * int(status.get("VmRSS", "0 kB").split()[0])


def own_numbers(pid: int, tids: Iterable[int]) -> dict[int, int]:
    """The numbers that a process's tasks have in their own pid namespace, by those that they have in ours."""
    if procfs.namespace(pid, "pid") == procfs.namespace(os.getpid(), "pid"):
        return {tid: tid for tid in tids}
    found: dict[int, int] = {}
    for tid in tids:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            found[tid] = int(procfs.status(pid, tid)["NSpid"].split()[-1])
    return found


def examine(process: SourceProcess) -> Inventory:
    """Everything about one process, and all its blockers at once. ProcessLookupError if there is none."""
    pid = process.pid
    status = procfs.status(pid)
    early = _kernel_thread(pid, status)
    if early:
        return _unmovable(pid, status, early)
    lines = procfs.smaps(pid)
    files = FileTable(pid)
    found = mappings.blockers(lines)
    layout = [] if found else mappings.layout(lines, files, {})
    specials = mappings.specials(lines)
    descriptors = open_files(process)
    process.holders.look()
    found += _process_blockers(pid, status)
    for descriptor in descriptors:
        found += kinds.blockers(descriptor, process)
    found += tcp.signed_blockers({d.inode: d.name for d in descriptors if tcp_socket.recognise(d)})
    executable = os.readlink(f"/proc/{pid}/exe")
    found += _executable_blockers(executable)
    stat = procfs.stat(pid)
    return Inventory(
        pid=pid,
        command=command(pid),
        memory_bytes=memory_bytes(status),
        tids=procfs.threads(pid),
        layout=layout,
        files=files,
        executable=-1 if found else files.number_of_path(executable, f"/proc/{pid}/exe"),
        specials=specials,
        vdso_digest=_vdso_digest(pid, specials),
        descriptors=descriptors,
        cwd=os.readlink(f"/proc/{pid}/cwd"),
        session_leader=stat.session == pid,
        blockers=found,
        notices=_notices(pid, stat),
    )


def _unmovable(pid: int, status: dict[str, str], found: list[Blocker]) -> Inventory:
    return Inventory(
        pid, command(pid), memory_bytes(status), procfs.threads(pid), [], FileTable(pid), -1, [], b"", [],
        "/", False, found, [],
    )  # fmt: skip


def _kernel_thread(pid: int, status: dict[str, str]) -> list[Blocker]:
    what = f"pid {pid}"
    if status.get("State", "").startswith("Z"):
        return [Blocker(kind="zombie", what=what, why="it has ended; only its parent has not noticed yet")]
    if "VmSize" not in status:
        return [Blocker(kind="kernel-thread", what=what, why="it is part of the kernel")]
    return []


def _blocker(kind: str, what: str, why: str, hint: str = "") -> Blocker:
    return Blocker(kind=kind, what=what, why=why, hint=hint)


def _process_blockers(pid: int, status: dict[str, str]) -> list[Blocker]:
    found: list[Blocker] = []
    what = f"pid {pid}"
    if status["TracerPid"] != "0":
        why = f"process {status['TracerPid']} is debugging it"
        found.append(_blocker("traced", what, why, "detach the debugger"))
    if status["State"][0] in "Tt":
        found.append(_blocker("stopped", what, "it is stopped", "continue it with SIGCONT"))
    if pid == os.getpid() or pid == 1:
        found.append(_blocker("self", what, "it is this agent or the host's init"))
    return [*found, *lasting_blockers(pid)]


def lasting_blockers(pid: int, tids: list[int] | None = None, has_children: bool = True) -> list[Blocker]:
    """What the process may become at any time, so it is asked again; some microseconds for each thread.

    `tids`: only of those (default: all) the settings may differ. `has_children`: whether to look for them.
    """
    found: list[Blocker] = []
    what = f"pid {pid}"
    if has_children and (children := procfs.children(pid)):
        who = ", ".join(f"{c} ({procfs.stat(c).comm})" for c in children[:5] if os.path.exists(f"/proc/{c}"))
        why = f"it has child processes: {who}"
        found.append(_blocker("child-processes", what, why, "move a program of one process"))
    settings = set(procfs.each_thread(pid, lambda tid: procfs.settings(pid, tid), tids))
    if any(s.seccomp for s in settings):
        found.append(
            _blocker("seccomp", what, "it runs under a seccomp filter", "start it without the sandbox")
        )
    if len({s.credentials for s in settings}) > 1:
        found.append(_blocker("credentials", what, "its threads have different credentials"))
    cwd = os.readlink(f"/proc/{pid}/cwd")
    found += path_blockers(cwd, f"working directory {procfs.printable(cwd)}")
    return [*found, *_namespace_blockers(pid)]


def _namespace_blockers(pid: int) -> list[Blocker]:
    found = [
        Blocker(
            kind=f"{kind}-namespace",
            what=f"pid {pid}",
            why=f"it lives in another {kind} namespace than this agent (a container?)",
            hint="run the agent inside the container",
        )
        for kind in _NAMESPACES
        if procfs.namespace(pid, kind) != procfs.namespace(os.getpid(), kind)
    ]
    if procfs.namespace(pid, "mnt") != procfs.namespace(os.getpid(), "mnt") and not _under_our_reaper(pid):
        why = "it lives in another mount namespace than this agent (a container?)"
        found.append(
            Blocker(kind="mnt-namespace", what=f"pid {pid}", why=why, hint="run the agent inside it")
        )
    if os.readlink(f"/proc/{pid}/root") != "/":
        found.append(Blocker(kind="chroot", what=f"pid {pid}", why="its root directory is not /"))
    return found


def _under_our_reaper(pid: int) -> bool:
    """Whether it is in a pid namespace that an earlier migration made because its number was taken."""
    parent = procfs.stat(pid).ppid
    try:
        return parent > 0 and os.readlink(f"/proc/{parent}/exe") == _REAPER
    except OSError:
        return False


def _executable_blockers(executable: str) -> list[Blocker]:
    what = procfs.printable(executable)
    if executable.endswith(" (deleted)"):
        why = "its executable was deleted or replaced"
        return [Blocker(kind="deleted-executable", what=what, why=why, hint="restart the program")]
    return path_blockers(executable, what)


def _notices(pid: int, stat: procfs.Stat) -> list[Notice]:
    found: list[Notice] = []
    if stat.session != pid:
        message = f"its session {stat.session} stays; on the destination it has the agent's session"
        found.append(Notice(kind="session", message=message))
    if any(t.clock not in (0, 1, 2, 3, 7, 8, 9, 11) for t in procfs.timers(pid)):
        found.append(Notice(kind="cpu-timer", message="a timer on another task's CPU clock starts anew"))
    return found


def _vdso_digest(pid: int, specials: list[Special]) -> bytes:
    vdso = next((s for s in specials if s.name == "[vdso]"), None)
    if vdso is None:
        return b""
    memory = RemoteMemory(pid)
    try:
        return hashlib.sha256(memory.read(vdso.start, vdso.end - vdso.start)).digest()
    finally:
        memory.close()


def own_vdso_digest() -> bytes:
    return _vdso_digest(os.getpid(), mappings.specials(procfs.maps(os.getpid())))


def cpu_flags() -> tuple[str, ...]:
    """What programs may depend on here, each in a word: instructions, and the places of extended state."""
    words = x86_64_features.program_words(procfs.read("/proc/cpuinfo").decode())
    return tuple(sorted(words | x86_64_features.xstate_words()))


def opened_files(inventory: Inventory, process: SourceProcess) -> list[FileRef]:
    """Those that can be told: a path that is no text is a blocker of its own."""
    files = (d for d in inventory.descriptors if regular_file.recognise(d) and procfs.is_text(d.link))
    refs = (regular_file.reference(d, process) for d in files)
    return [r for r in refs if r is not None]


def fifos(inventory: Inventory) -> tuple[pipe.Fifo, ...]:
    found = (pipe.fifo(d) for d in inventory.descriptors if procfs.is_text(d.link))
    return tuple(one for one in found if one is not None)


def directories(inventory: Inventory) -> tuple[str, ...]:
    opened = (d.link for d in inventory.descriptors if stat_module.S_ISDIR(d.mode))
    return tuple(path for path in (inventory.cwd, *opened) if procfs.is_text(path))


def processes(measure: bool, owner: int | None = None) -> Iterator[ProcessInfo]:
    """The user processes of this host; with `measure`, each one's dirty rate where it can be watched.

    With `owner` only those that are wholly that user's; no other is touched.
    """
    from agent.dirty_rate import dirty_rate

    for pid in sorted(procfs.processes()):
        try:
            if owner is not None and foreign(pid, owner):
                continue
            info = _process_info(pid)
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
        if info is None:
            continue
        if measure and not info.blockers:
            info = msgspec.structs.replace(info, dirty_rate=dirty_rate(pid))
        yield info


def _process_info(pid: int) -> ProcessInfo | None:
    status = procfs.status(pid)
    if "VmSize" not in status or pid == os.getpid():
        return None
    process = SourceProcess(pid)
    try:
        inventory = examine(process)
    finally:
        process.close()
    sockets = sum(1 for d in inventory.descriptors if d.socket is not None)
    return ProcessInfo(
        pid=pid,
        command=inventory.command,
        user=_user(int(status["Uid"].split()[0])),
        memory_bytes=inventory.memory_bytes,
        threads=len(inventory.tids),
        sockets=sockets,
        dirty_rate=None,
        blockers=tuple(inventory.blockers),
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
