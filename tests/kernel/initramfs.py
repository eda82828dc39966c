"""The file system that a guest starts from: a newc archive.

Its format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parent
_HEADER: Final = "070701" + "{:08x}" * 13
_DEPENDS: Final = re.compile(rb"\0depends=([^\0]*)\0")
# for the file system, and what the kernel would load by itself if it could
_WANTED: Final = ("virtio_pci", "9pnet_virtio", "9p", "tcp_diag", "udp_diag", "unix_diag")


def _entry(number: int, name: str, mode: int, data: bytes) -> bytes:
    path = name.encode() + b"\0"
    header = _HEADER.format(number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0).encode() + path
    return header.ljust(-(-len(header) // 4) * 4, b"\0") + data.ljust(-(-len(data) // 4) * 4, b"\0")


def archive(files: Mapping[str, bytes], directories: tuple[str, ...] = ()) -> bytes:
    """An archive of executable `files` by name, and empty directories."""
    parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    entries = [(name, stat.S_IFDIR | 0o755, b"") for name in sorted({*parents, *directories})]
    entries += [(name, stat.S_IFREG | 0o755, data) for name, data in files.items()]
    packed = [_entry(number, *entry) for number, entry in enumerate(entries, 1)]
    return b"".join([*packed, _entry(0, "TRAILER!!!", 0, b"")])


def modules(directory: Path) -> list[Path]:
    """The kernel modules that a guest needs, each after those it depends on (as its own .modinfo says)."""
    found = {path.stem.replace("-", "_"): path for path in directory.rglob("*.ko")}

    def in_order(name: str) -> Iterator[Path]:
        match = _DEPENDS.search(found[name].read_bytes())
        for needed in match[1].decode().split(",") if match and match[1] else ():
            yield from in_order(needed.replace("-", "_"))
        yield found[name]

    return list(dict.fromkeys(path for name in _WANTED for path in in_order(name)))


def initramfs(kernel_modules: Path, busybox: Path, command: str) -> bytes:
    """Its init runs `command`, a shell script, in the guest."""
    files = {name: (HERE / name).read_bytes() for name in ("init", "start")}
    files |= {"busybox": busybox.read_bytes(), "command": command.encode()}
    for number, path in enumerate(modules(kernel_modules)):
        files[f"modules/{number:02}-{path.name}"] = path.read_bytes()
    return archive(files, ("dev", "host"))
