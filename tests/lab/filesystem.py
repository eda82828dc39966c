"""A host's own view of the file system: what is its own is a tmpfs, everything else is the machine's.

The directory that the lab's hosts share is the machine's too, kept visible under the host's own /var/lib.

All of it is mounted in the host's mount namespace and goes with it.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from lab import kernel
from lab.keys import Keys
from lab.plan import HOST_DIRECTORY, LABS, Host, LabError, Plan, home

# The home directory's files that are the host's own, not the machine's.
_PERSONAL = {".ssh", ".profile", ".bashrc", ".bash_profile", ".bash_login", ".bash_history", ".bash_logout"}


def make(host: Host, plan: Plan, keys: Keys) -> None:
    """Build `host`'s file system in the current, new mount namespace."""
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    _kernel_filesystems()
    _own("/tmp", 0o1777, plan.visible)
    _own("/dev/shm", 0o1777, ())
    _own_with_directories("/run", plan.visible)
    _own_with_directories("/var/lib", plan.visible)
    _own_home(home())
    HOST_DIRECTORY.mkdir(mode=0o755)
    _own_configuration(host, plan)
    _ssh_files(host, plan, keys)


def _kernel_filesystems() -> None:
    safe = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", "/proc", "proc", safe)
    kernel.mount("sysfs", "/sys", "sysfs", safe)
    with contextlib.suppress(OSError):  # nothing needs it
        kernel.mount("cgroup2", "/sys/fs/cgroup", "cgroup2", safe)
    terminals = "newinstance,mode=0620,ptmxmode=0666,gid=5"
    kernel.mount("devpts", "/dev/pts", "devpts", kernel.MS_NOSUID | kernel.MS_NOEXEC, terminals)


def _tmpfs(target: str, mode: int) -> None:
    kernel.mount("tmpfs", target, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, f"mode={mode:o}")


def _bind(source: int | Path, target: Path) -> None:
    """Bind a path, or what an O_PATH descriptor holds, on the existing `target`."""
    origin = f"/proc/self/fd/{source}" if isinstance(source, int) else str(source)
    kernel.mount(origin, str(target), flags=kernel.MS_BIND | kernel.MS_REC)


def _own(target: str, mode: int, visible: Iterable[Path]) -> None:
    """Give the host its own `target`, empty but for what must stay visible."""
    top = Path(target).resolve()
    kept = {path: os.open(path, os.O_PATH) for path in visible if path.is_relative_to(top)}
    _tmpfs(str(top), mode)
    for path, fd in kept.items():
        if not path.exists():
            path.mkdir(parents=True)
            _bind(fd, path)
        os.close(fd)


def _own_with_directories(target: str, visible: Iterable[Path]) -> None:
    """The same, with the machine's directories in it, empty: as packages leave them where nothing ran yet."""
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(target)}
    _own(target, 0o755, visible)
    for name, status in found.items():
        path = Path(target, name)
        if stat.S_ISDIR(status.st_mode) and path != LABS and not path.exists():
            path.mkdir()
            os.chown(path, status.st_uid, status.st_gid)
            path.chmod(stat.S_IMODE(status.st_mode))


def _own_home(top: Path) -> None:
    """A home directory whose personal files are the host's own; its other entries are the machine's."""
    entries = {entry.name: os.open(entry, os.O_PATH | os.O_NOFOLLOW) for entry in os.scandir(top)}
    _tmpfs(str(top), 0o700)
    for name, fd in entries.items():
        if name not in _PERSONAL:
            _mirror(fd, top / name)
        os.close(fd)


def _mirror(fd: int, target: Path) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISLNK(mode):
        target.symlink_to(os.readlink("", dir_fd=fd))
        return
    if stat.S_ISDIR(mode):
        target.mkdir()
    else:
        target.touch()
    _bind(fd, target)


def _replace(path: str, content: str, mode: int = 0o644) -> None:
    """Give the host its own `path`. Raises LabError if the machine has no such file to put it on."""
    if not Path(path).exists():
        raise LabError(f"{path} is missing on this machine")
    own = HOST_DIRECTORY / Path(path).name
    _write(own, content, mode)
    _bind(own, Path(path).resolve())


def _write(path: Path, content: str, mode: int) -> None:
    path.write_text(content)
    path.chmod(mode)


def _own_configuration(host: Host, plan: Plan) -> None:
    names = "".join(f"{each.ipv4} {each.name}\n{each.ipv6} {each.name}\n" for each in plan.hosts)
    loopback = "127.0.0.1 localhost\n::1 localhost ip6-localhost\n"
    _replace("/etc/hosts", loopback + names)
    if Path("/etc/hostname").exists():
        _replace("/etc/hostname", f"{host.name}\n")
    _replace("/etc/shadow", _unlocked_root(Path("/etc/shadow").read_text()), 0o600)


def _unlocked_root(shadow: str) -> str:
    """No password for root, and no locked account: sshd lets no one into that, not even by key."""
    lines = [line.split(":") for line in shadow.splitlines()]
    return "".join(":".join([f[0], "*", *f[2:]] if f[0] == "root" else f) + "\n" for f in lines)


def _ssh_files(host: Host, plan: Plan, keys: Keys) -> None:
    own, user = keys.hosts[host.name], keys.users[host.name]
    _write(HOST_DIRECTORY / "ssh_host_ed25519_key", own.private, 0o600)
    _write(HOST_DIRECTORY / "ssh_host_ed25519_key.pub", own.public, 0o644)
    directory = home() / ".ssh"
    directory.mkdir(mode=0o700)
    _write(directory / "id_ed25519", user.private, 0o600)
    _write(directory / "id_ed25519.pub", user.public, 0o644)
    _write(directory / "known_hosts", keys.known_hosts(plan), 0o644)
    _write(directory / "authorized_keys", keys.authorized_keys(), 0o600)
