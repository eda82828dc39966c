"""Mappings: from /proc/PID/maps and smaps to a `Layout`, with what cannot be moved refused by name.

The VmFlags of smaps (proc(5)) need a page table walk, so the freeze reads the cheap maps only and takes flags
from the last reading: a mapping whose extent did not change since keeps the flags it had then.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import msgspec

from agent.api import Blocker
from agent.descriptors import path_blockers
from agent.kernel import procfs
from agent.kernel.procfs import MapsLine
from agent.layout import Flag, Mapping
from agent.resources.files import FileRef, build_id, describe
from agent.shadow import Special
from agent.unmovable import Unmovable

_VMFLAGS: Final = {
    "gd": Flag.GROWSDOWN,
    "nr": Flag.NORESERVE,
    "lo": Flag.LOCKED,
    "lf": Flag.LOCKONFAULT,
    "hg": Flag.HUGEPAGE,
    "nh": Flag.NOHUGEPAGE,
    "dc": Flag.DONTFORK,
    "dd": Flag.DONTDUMP,
    "wf": Flag.WIPEONFORK,
    "mg": Flag.MERGEABLE,
    "sr": Flag.SEQUENTIAL,
    "rr": Flag.RANDOM,
}
# VmFlags that need nothing: rights, kinds of bookkeeping, our own userfaultfd, "may" bits, and that there may
# be guard regions ("gu", seen on 6.18): which there are, the scans tell
_HARMLESS: Final = frozenset(
    ["rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "ac", "uw", "um", "ui", "sd", "mt", "de", "gu"]
)
_REFUSED: Final = {
    "ht": ("hugetlb", "hugetlbfs pages"),
    "io": ("device-memory", "memory-mapped device registers"),
    "pf": ("device-memory", "pages of a device"),
    "mm": ("device-memory", "a mix of pages and device frames"),
    "sl": ("sealed-mapping", "sealed by mseal(2)"),
    "ss": ("shadow-stack", "a shadow stack"),
    "dp": ("droppable-memory", "MAP_DROPPABLE memory"),
}
_SPECIALS: Final = ("[vvar]", "[vvar_vclock]", "[vdso]")
_DELETED: Final = " (deleted)"


class FileTable:
    """The files a migration refers to by number. A path is described (hashed) once."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.refs: list[FileRef] = []
        self._numbers: dict[tuple[str, tuple[int, int], int], int] = {}
        self.hurried = False  # in the pause

    def number(self, line: MapsLine) -> int:
        key = (line.name, line.device, line.inode)
        if key not in self._numbers:
            self._append(key, self._describe(line))
        return self._numbers[key]

    def _describe(self, line: MapsLine) -> FileRef:
        # it was mapped since they were looked at
        for blocker in path_blockers(line.name, procfs.printable(line.name)):
            raise Unmovable(blocker.kind, f"{blocker.what}: {blocker.why}")
        mapped = f"/proc/{self._pid}/map_files/{line.start:x}-{line.end:x}"
        try:
            return describe(line.name, mapped, self.hurried)
        except FileNotFoundError:  # the running process has unmapped or cut it since: then by its name
            path = f"/proc/{self._pid}/root{line.name}"
            if os.stat(path).st_ino != line.inode:
                raise
            return describe(line.name, path, self.hurried)

    def number_of_path(self, path: str, through: str) -> int:
        info = os.stat(through)
        key = (path, (os.major(info.st_dev), os.minor(info.st_dev)), info.st_ino)
        if key not in self._numbers:
            self._append(key, describe(path, through))
        return self._numbers[key]

    def _append(self, key: tuple[str, tuple[int, int], int], ref: FileRef) -> None:
        self._numbers[key] = len(self.refs)
        self.refs.append(ref)

    def with_build_ids(self) -> list[FileRef]:
        """For better messages at the other end."""
        return [msgspec.structs.replace(r, build_id=r.build_id or build_id(r.path)) for r in self.refs]


def specials(lines: Sequence[MapsLine]) -> list[Special]:
    return [Special(m.name, m.start, m.end) for m in lines if m.name in _SPECIALS]


def ordinary(lines: Sequence[MapsLine], ours: tuple[int, int]) -> list[MapsLine]:
    """Without vDSO, vsyscall and our own scratch, which the kernel may have merged with a neighbour."""
    found: list[MapsLine] = []
    for line in lines:
        if line.name in (*_SPECIALS, "[vsyscall]"):
            continue
        if line.end <= ours[0] or line.start >= ours[1]:
            found.append(line)
            continue
        if line.start < ours[0]:
            found.append(msgspec.structs.replace(line, end=ours[0]))
        if line.end > ours[1]:
            found.append(msgspec.structs.replace(line, start=ours[1]))
    return found


def layout(
    lines: Sequence[MapsLine], files: FileTable, known: dict[int, MapsLine], scratch: tuple[int, int] = (0, 0)
) -> list[Mapping]:
    """The layout of the lines; flags from the line itself, else from `known` (by start address)."""
    return [_mapping(line, files, _flags(line, known)) for line in ordinary(lines, scratch)]


def _flags(line: MapsLine, known: dict[int, MapsLine]) -> frozenset[str]:
    if line.vmflags:
        return line.vmflags
    before = known.get(line.start) or next((k for k in known.values() if k.start <= line.start < k.end), None)
    return before.vmflags if before is not None else frozenset()


def _mapping(line: MapsLine, files: FileTable, vmflags: frozenset[str]) -> Mapping:
    flags = Flag.SHARED if line.shared else Flag(0)
    for name in vmflags & _VMFLAGS.keys():
        flags |= _VMFLAGS[name]
    if line.name == "[stack]":
        flags |= Flag.GROWSDOWN
    number = files.number(line) if line.inode else -1
    return Mapping(
        line.start, line.end, line.protection, int(flags), number, line.offset if line.inode else 0
    )


def blockers(lines: Sequence[MapsLine], scratch: tuple[int, int] = (0, 0)) -> list[Blocker]:
    """Why mappings cannot be moved; the lines are smaps'."""
    return [b for line in ordinary(lines, scratch) for b in _line_blockers(line)]


def _line_blockers(line: MapsLine) -> list[Blocker]:
    what = f"mapping {line.start:#x}-{line.end:#x} {procfs.printable(line.name)}".rstrip()
    found = path_blockers(line.name, what) if line.inode else []
    found += [
        Blocker(kind=kind, what=what, why=f"it is {text}", hint="")
        for flag, (kind, text) in _REFUSED.items()
        if flag in line.vmflags
    ]
    if unknown := line.vmflags - _HARMLESS - _VMFLAGS.keys() - _REFUSED.keys():
        why = f"it has flags that are not known here: {' '.join(sorted(unknown))}"
        found.append(Blocker(kind="unknown-mapping", what=what, why=why, hint=""))
    if line.shared and (not line.inode or "mw" in line.vmflags):
        why = "shared memory: other processes may see it"
        found.append(Blocker(kind="shared-memory", what=what, why=why, hint="use private memory"))
    elif line.name.startswith("/memfd:") or line.name.startswith("/SYSV"):
        found.append(Blocker(kind="shared-memory", what=what, why="a memory file", hint="use private memory"))
    elif line.inode and line.name.endswith(_DELETED):
        why = "the file it maps was deleted or replaced, so the destination cannot have it"
        hint = "restart the program after an upgrade of its files"
        found.append(Blocker(kind="deleted-mapping", what=what, why=why, hint=hint))
    elif line.name.startswith("anon_inode:") or line.name.startswith("/dev/") or line.name == "/[aio]":
        kind = "aio" if "aio" in line.name else "device-memory"
        found.append(Blocker(kind=kind, what=what, why="memory that belongs to a kernel object", hint=""))
    return found
