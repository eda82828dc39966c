"""What a guest is made of: Debian's kernel and busybox, unpacked below the build directory, not installed."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CACHE: Final = Path(__file__).resolve().parents[2] / "build" / "kernel"
_KERNEL: Final = re.compile(r"linux-image-6\.1\.0-\d+-amd64")
_MODULES: Final = (
    *("fs/9p", "fs/fscache", "fs/netfs", "net/9p", "drivers/virtio"),
    *("net/ipv4/*_diag.ko", "net/unix/*_diag.ko"),
)
# of the packages, the files that a guest is made of
_PARTS: Final = {
    "linux-image": ("boot/vmlinuz-*", *(f"lib/modules/*/kernel/{directory}" for directory in _MODULES)),
    "busybox-static": ("bin/busybox",),
}


@dataclass(frozen=True)
class Kernel:
    """Debian 12's kernel, and a program that is many."""

    image: Path
    modules: Path
    busybox: Path


def fetch() -> Kernel:
    """Download and unpack it, if that was not done yet."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tree = CACHE / hashlib.sha256(repr(_PARTS).encode()).hexdigest()[:8]
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            _make(tree)
    return Kernel(next(tree.glob("boot/vmlinuz-*")), next(tree.glob("lib/modules/*")), tree / "bin/busybox")


def _make(tree: Path) -> None:
    """All or nothing: what was half done is done again the next time."""
    with tempfile.TemporaryDirectory(dir=CACHE) as directory:
        os.chmod(directory, 0o755)  # apt's own user looks at it
        unpacked = Path(directory) / "unpacked"
        unpacked.mkdir()
        _run("apt-get", "download", "-q", _kernel_package(), "busybox-static", cwd=directory)
        for package in Path(directory).glob("*.deb"):
            parts = next(parts for name, parts in _PARTS.items() if package.name.startswith(name))
            _unpack(package, unpacked, parts)
        unpacked.rename(tree)


def _unpack(package: Path, into: Path, parts: tuple[str, ...]) -> None:
    tar = package.with_suffix(".tar")
    with tar.open("wb") as file:
        subprocess.run(["dpkg-deb", "--fsys-tarfile", package], stdout=file, check=True)
    patterns = [f"./{part}" for part in parts]
    _run("tar", "-xf", str(tar), "-C", str(into), "--no-same-owner", "--wildcards", *patterns, cwd="/")


def _kernel_package() -> str:
    """What linux-image-amd64 stands for in Debian 12; a host that never fetched package lists does it now."""
    for refresh in (False, True):
        if refresh:
            _run("apt-get", "update", "-q", cwd="/")
        text = _run("apt-cache", "depends", "linux-image-amd64", cwd="/", may_fail=not refresh)
        found = _KERNEL.search(text)
        if found is not None:
            return found[0]
    raise RuntimeError(f"linux-image-amd64 is no 6.1 kernel here:\n{text}")


def _run(*command: str, cwd: str, may_fail: bool = False) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode and not may_fail:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
