"""Paths that are not UTF-8: any bytes to the kernel, and refused by name, in words that can be said."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from unit.children import compiled, forked
from unit.moving import try_to_move

from agent import inventory
from agent.api import Blocker, Outcome
from agent.descriptors import SourceProcess
from agent.kernel import procfs
from agent.resources.mappings import FileTable
from agent.unmovable import Unmovable

ODD = b"\xff\xfe"
SHOWN = "\\xff\\xfe"


@pytest.fixture
def odd(tmp_path: Path) -> bytes:
    """A directory with such a name."""
    path = os.fsencode(tmp_path) + b"/" + ODD
    os.mkdir(path)
    with open(path + b"/file", "wb") as file:
        file.write(bytes(4096))
    return path


def of(pid: int) -> list[Blocker]:
    process = SourceProcess(pid)
    try:
        found = inventory.examine(process)
        assert all(msgspec.json.encode(r) for r in inventory.opened_files(found, process))
        assert msgspec.json.encode(inventory.directories(found))
    finally:
        process.close()
    assert msgspec.json.encode(found.blockers)
    return [b for b in found.blockers if b.kind == "path-name"]


def opened(odd: bytes) -> object:
    return os.open(odd + b"/file", os.O_RDONLY)


def opened_directory(odd: bytes) -> object:
    return os.open(odd, os.O_RDONLY)


def mapped(odd: bytes) -> object:
    with open(odd + b"/file", "rb") as file:
        return mmap.mmap(file.fileno(), 4096, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE)


def a_pipe(odd: bytes) -> object:
    os.mkfifo(odd + b"/fifo")
    return os.open(odd + b"/fifo", os.O_RDWR)


SETUPS: dict[str, Callable[[bytes], object]] = {
    "working directory": os.chdir,
    "fd": opened,
    "fd ": opened_directory,
    "fd  ": a_pipe,
    "mapping": mapped,
}


@pytest.mark.parametrize("what", SETUPS)
def test_it_is_refused_by_name(odd: bytes, what: str) -> None:
    with forked(lambda: SETUPS[what](odd)) as pid:
        found = [b.what for b in of(pid)]
        assert any(text.startswith(what.strip()) for text in found) and all(SHOWN in text for text in found)


def test_a_program_with_such_a_name(odd: bytes) -> None:
    path = odd + b"/program"
    with open(path, "wb") as file:
        file.write(compiled("#include <unistd.h>\nint main(void) { for (;;) pause(); }").read_bytes())
    os.chmod(path, 0o755)
    pid = os.posix_spawn(path, [path], {})
    try:
        assert any(b.what.endswith(f"{SHOWN}/program") for b in of(pid))
        assert SHOWN not in inventory.command(pid) and inventory.command(pid).isprintable()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def test_a_move_of_it_is_refused(odd: bytes) -> None:
    """All the way: nothing of it breaks what the agents say to each other."""

    def setup() -> object:
        os.chdir(odd)
        return opened(odd), mapped(odd)

    with forked(setup) as pid:
        report = try_to_move(pid)
        assert report.outcome is Outcome.REFUSED
        assert len({b.what for b in report.blockers if b.kind == "path-name"}) >= 3
        assert SHOWN in msgspec.json.encode(report).decode().replace("\\\\", "\\")


def test_what_is_mapped_later_ends_the_migration_by_name(odd: bytes) -> None:
    with forked(lambda: mapped(odd)) as pid:
        line = next(m for m in procfs.maps(pid) if m.name.endswith("/file"))
        with pytest.raises(Unmovable, match="is not UTF-8") as refused:
            FileTable(pid).number(line)
        assert refused.value.kind == "path-name"


def test_a_working_directory_is_looked_at_again_in_the_freeze(odd: bytes) -> None:
    with forked(lambda: None) as pid:
        assert not [b for b in inventory.lasting_blockers(pid) if b.kind == "path-name"]
    with forked(lambda: os.chdir(odd)) as pid:
        assert [b for b in inventory.lasting_blockers(pid) if b.kind == "path-name"]


@pytest.mark.parametrize(
    ("path", "text"), [(b"/a b\xc3\xa4", True), (b"/\xe4", False), (b"/\xed\xa0\x80", False), (b"", True)]
)
def test_what_is_text(path: bytes, text: bool) -> None:
    found = os.fsdecode(path)
    assert procfs.is_text(found) is text
    assert msgspec.json.encode(procfs.printable(found))
    assert text == (procfs.printable(found) == found)


def test_a_name_with_line_ends_adds_no_lines_to_a_status() -> None:
    def rename() -> None:
        Path("/proc/self/comm").write_bytes(b"x\x1cUmaskX: 7")

    with forked(rename) as pid:
        assert "UmaskX" not in procfs.status(pid)


def test_children_without_lists_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel without CONFIG_PROC_CHILDREN."""
    with forked(lambda: None) as first, forked(lambda: None) as second:
        with_lists = set(procfs.children(os.getpid()))
        assert {first, second} <= with_lists
        monkeypatch.setattr(procfs, "_lists_children", lambda: False)
        assert set(procfs.children(os.getpid())) == with_lists
        assert procfs.children(first) == []
    assert not {first, second} & set(procfs.children(os.getpid()))
