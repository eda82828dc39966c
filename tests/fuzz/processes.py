"""Targets under the control of a program that is moved: its names, its memory, its files."""

from __future__ import annotations

import os
import struct
from random import Random

from fuzz.mutate import mutate_bytes
from fuzz.target import Target

from agent import scratch
from agent.kernel import elf, procfs

_SPLIT = b"\xff\xfe"  # between the parts of an input


def _parts(data: bytes, count: int) -> list[bytes]:
    parts = data.split(_SPLIT)
    return (parts + [b""] * count)[:count]


def _as_path(name: bytes) -> bytes:
    """As the kernel shows a path in maps (seq_path): no zero bytes, line feeds escaped."""
    return b"/" + name.replace(b"\0", b"").replace(b"\n", b"\\012")


def _as_comm(name: bytes) -> bytes:
    return name.partition(b"\0")[0][:15]


def _maps(data: bytes) -> bool:
    """Three mappings with any names: no line is lost, and none is added."""
    names = [_as_path(part) for part in _parts(data, 3)]
    maps = smaps = b""
    for number, name in enumerate(names):
        start = 0x10000 * (number + 1)
        head = b"%08x-%08x r-xp 00001000 08:01 4711                       %s\n" % (start, start + 4096, name)
        maps += head
        smaps += head + b"Size:                  4 kB\nTHPeligible:    0\nVmFlags: rd ex mr mw me \n"
    lines, with_flags = procfs.parse_maps(maps), procfs.parse_smaps(smaps)
    assert [line.start for line in lines] == [0x10000, 0x20000, 0x30000]
    assert [line.start for line in with_flags] == [0x10000, 0x20000, 0x30000]
    for line, name in zip(lines, names, strict=True):
        assert (line.end - line.start, line.protection, line.inode) == (4096, 5, 4711)
        assert os.fsencode(line.name) == name.replace(b"\\012", b"\n")
        procfs.printable(line.name).encode()
    return True


_STATUS = b"""Name:\t%s
Umask:\t0022
State:\tS (sleeping)
Pid:\t7
TracerPid:\t0
Uid:\t0\t0\t0\t0
Gid:\t0\t0\t0\t0
FDSize:\t64
Groups:\t0
NStgid:\t7
CapInh:\t0000000000000000
NoNewPrivs:\t0
Seccomp:\t0
Speculation_Store_Bypass:\tvulnerable
"""


def _names(data: bytes) -> bool:
    """What a program calls itself: in status it is escaped (proc_task_name), in stat it is as it is."""
    comm = _as_comm(data)
    escaped = comm.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    found = procfs.parse_status(_STATUS % escaped)
    assert (found["Uid"], found["TracerPid"], found["Groups"]) == ("0\t0\t0\t0", "0", "0")
    settings = procfs.parse_settings(_STATUS % escaped)
    assert not settings.seccomp and settings.credentials.startswith(b"\nUid:")
    stat = procfs.parse_stat(b"7 (%s) S 1 2 3 0 -1 " % comm + b" ".join(b"%d" % n for n in range(9, 53)))
    assert (stat.state, stat.ppid, stat.pgrp, stat.starttime) == ("S", 1, 2, 22)
    assert stat.comm == comm.decode("utf-8", "replace")
    return True


def _fdinfo(data: bytes) -> bool:
    """A dma-buf's name is the program's, line feeds and all."""
    text = b"pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t7\nsize:\t4096\nexp_name:\tsystem\nname:\t%s\n" % data
    found = procfs.parse_fdinfo(text)
    assert found[:3] == [("pos", "0"), ("flags", "02"), ("mnt_id", "15")]
    return True


def _label(data: bytes) -> bool:
    """What stands where our label, and our table of calls, would."""
    namespace = os.stat("/proc/self/ns/pid").st_ino
    owner = scratch.owner_of(data[:40])
    if owner is not None:
        assert 0 <= owner.pid < 1 << 64
        scratch.Owner(owner.pid, owner.born, namespace).alive()
    fd = scratch.userfaultfd_of(data[40:104])
    assert fd is None or isinstance(fd, int)
    return owner is not None


def _labels() -> list[bytes]:
    entry = struct.pack("<7Qq", 323, 1, 2, 3, 4, 5, 6, 7)
    return [struct.pack("<16sQQQ", b"migrate: scratch", 1, 2, 3) + entry, bytes(104)]


def _elf(data: bytes) -> bool:
    fd = os.memfd_create("elf")
    try:
        os.pwrite(fd, data, 0)
        found = elf.build_id(fd)
    finally:
        os.close(fd)
    assert len(found) <= 128
    return bool(found)


def _elves() -> list[bytes]:
    """The smallest file with a build id."""
    note = struct.pack("<III4s20s", 4, 20, 3, b"GNU\0", bytes(range(20)))
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head = struct.pack("<16sHHIQQQIHHHHHH", ident, 3, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return [head + segment + note]


def _mutate_names(data: bytes, random: Random) -> bytes:
    odd = (b"\n", b") R 1", b"\nVmFlags: io", b"\xc2\x85", b" (deleted)", b"\\012", b"\xff", b"\nlock:\t")
    at = random.randrange(len(data) + 1)
    return data[:at] + random.choice(odd) + data[at:] if random.random() < 0.5 else mutate_bytes(data, random)


TARGETS = (
    Target("maps", _maps, lambda: [b"usr/lib/x.so" + _SPLIT + b"a b (deleted)" + _SPLIT], _mutate_names),
    Target("task-names", _names, lambda: [b"redis-server", b"a) S ("], _mutate_names),
    Target("fdinfo", _fdinfo, lambda: [b"buffer"], _mutate_names),
    Target("scratch", _label, _labels, mutate_bytes),
    Target("elf", _elf, _elves, mutate_bytes),
)
