"""Files that both hosts must have: what is the same, what is not and how that is said, what is copied."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import given
from hypothesis import strategies as st
from unit.children import compiled, forked

from agent.kernel import elf, procfs
from agent.kernel.errors import libc
from agent.resources import files
from agent.resources.files import FileRef, IncomingFile
from agent.resources.mappings import FileTable
from agent.unmovable import Unmovable


@pytest.fixture
def file(tmp_path: Path) -> FileRef:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    path.chmod(0o751)
    return files.describe(str(path), str(path))


def why(file: FileRef, copy_files: bool = False) -> tuple[str, str]:
    blocker = files.compare(file, copy_files)
    assert blocker is not None and blocker.what == file.path and blocker.hint
    return blocker.kind, blocker.why


def test_describe(file: FileRef) -> None:
    assert (file.size, file.mode) == (7, 0o751)
    assert file.digest.hex() == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert file.identity[1] == os.stat(file.path).st_ino


def test_a_link_is_followed_to_the_very_inode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with path.open("rb") as opened:
        path.unlink()
        path.write_bytes(b"new!")
        assert files.describe(str(path), f"/proc/self/fd/{opened.fileno()}").size == 3


def test_the_same(file: FileRef) -> None:
    assert files.compare(file, False) is None
    Path(file.path).touch()
    assert files.compare(file, False) is None


def test_missing(file: FileRef) -> None:
    Path(file.path).unlink()
    kind, reason = why(file)
    assert kind == "file-missing" and "does not have it" in reason
    assert files.compare(file, copy_files=True) is None
    assert files.missing([file]) == [file.path]


@pytest.mark.parametrize("copy_files", [False, True])
def test_what_differs_is_never_overwritten(file: FileRef, copy_files: bool) -> None:
    path = Path(file.path)
    path.write_bytes(b"longer content")
    assert why(file, copy_files) == ("file-differs", "7 bytes here, 14 there")
    path.write_bytes(b"CONTENT")
    assert why(file, copy_files) == ("file-differs", "same size, other content")
    path.unlink()
    path.mkdir()
    assert why(file, copy_files) == ("file-differs", "it is no regular file there")
    path.rmdir()
    os.mkfifo(path)
    assert why(file, copy_files) == ("file-differs", "it is no regular file there")
    path.unlink()
    path.symlink_to(path)
    assert why(file, copy_files)[1].startswith("it cannot be opened there: Too many levels")
    assert files.missing([file]) == []


def test_without_a_digest_nothing_is_the_same(file: FileRef) -> None:
    Path(file.path).write_bytes(b"CONTENT")
    assert why(msgspec.structs.replace(file, digest=b"")) == ("file-differs", "same size, other content")


def test_what_is_no_regular_file_is_not_opened(file: FileRef) -> None:
    """Opening a device may do something."""
    path = Path(file.path)
    path.unlink()
    os.mkfifo(path)
    with watching(path) as opened:
        for look in (files.compare, files.compare_opened):
            found = look(msgspec.structs.replace(file, identity=(1, 2)), False)
            assert found is not None and found.why == "it is no regular file there"
        assert not opened()
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        assert opened()


@contextlib.contextmanager
def watching(path: Path) -> Iterator[Callable[[], bool]]:
    """Whether it has been opened since (inotify(7))."""
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert libc.inotify_add_watch(fd, os.fsencode(path), 0x20) >= 0  # IN_OPEN

    def opened() -> bool:
        return bool(select.select([fd], [], [], 0)[0])

    try:
        yield opened
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away, and opens them all")
def test_an_open_file_must_be_the_same_user_s(file: FileRef) -> None:
    assert files.compare_opened(file, False) is None
    os.chown(file.path, 64001, 64002)
    blocker = files.compare_opened(file, False)
    assert blocker is not None and blocker.kind == "file-owner"
    assert blocker.why == "owner 0:0 on the source, 64001:64002 on the destination"
    assert files.compare(file, False) is None, "mapped, it is only read"
    os.chown(file.path, 0, 0)
    os.chmod(file.path, 0o711)
    blocker = files.compare_opened(file, False)
    assert blocker is not None and blocker.why == "mode 0751 on the source, 0711 on the destination"
    os.chmod(file.path, 0o777)
    assert files.compare_opened(file, False) is None


def test_a_file_that_was_replaced_is_not_sent(file: FileRef, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"content")
    Path(file.path).unlink()
    Path(file.path).symlink_to(tmp_path / "secret")
    with pytest.raises(Unmovable, match="was replaced"):
        list(files.read_chunks(file))


def test_programs_are_told_apart_by_their_build_ids(tmp_path: Path) -> None:
    source = "int main(void) { return %d; }"
    one, other = (compiled(source % n, "-Wl,--build-id") for n in (1, 2))
    path = tmp_path / "program"
    path.write_bytes(one.read_bytes())
    described = files.describe(str(path), str(path))
    ids = [files.build_id(str(p)) for p in (one, other)]
    assert ids[0] != ids[1] and all(len(i) == 40 for i in ids)
    described = msgspec.structs.replace(described, build_id=ids[0])
    path.write_bytes(other.read_bytes().ljust(described.size, b"\0")[: described.size])
    assert why(described) == ("file-differs", f"build id {ids[0]} here, {ids[1]} there")
    assert files.build_id("/proc/self/status") == "" == files.build_id("/does/not/exist")


def test_build_ids_are_what_pyelftools_says(tmp_path: Path) -> None:
    def by_pyelftools(path: str) -> str:
        with open(path, "rb") as file:
            section = ELFFile(file).get_section_by_name(".note.gnu.build-id")
            return next((str(n["n_desc"]) for n in section.iter_notes()), "") if section else ""

    found = {
        m.name for m in procfs.maps(os.getpid()) if m.name.startswith("/") and m.protection & procfs.PROT_EXEC
    }
    assert len(found) > 5 and any(files.build_id(path) for path in found)
    for path in found:
        assert files.build_id(path) == by_pyelftools(path), path


@pytest.mark.parametrize("place", [32, 64 + 8])
def test_offsets_beyond_everything(place: int, tmp_path: Path) -> None:
    """e_phoff; p_offset of the first segment, made one of notes."""
    content = bytearray(Path(compiled("int main(void) { return 3; }", "-Wl,--build-id")).read_bytes())
    content[64:68] = struct.pack("<I", elf.PT_NOTE)
    content[place : place + 8] = struct.pack("<Q", 1 << 63)
    path = tmp_path / "damaged"
    path.write_bytes(content)
    with path.open("rb") as file:
        assert isinstance(elf.build_id(file.fileno()), str)


@given(st.data())
def test_any_garbage_has_no_build_id_or_some(data: st.DataObject) -> None:
    """A damaged program: nothing but an answer."""
    content = bytearray(Path(compiled("int main(void) { return 3; }", "-Wl,--build-id")).read_bytes()[:4096])
    for _ in range(data.draw(st.integers(1, 20))):
        content[data.draw(st.integers(0, 1000))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryFile() as file:
        file.write(content[: data.draw(st.integers(0, len(content)))])
        file.flush()
        assert isinstance(elf.build_id(file.fileno()), str)


def test_in_a_hurry_the_build_id_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "int main(void) { return %d; }"
    one, other = (compiled(source % n, "-Wl,--build-id") for n in (1, 2))
    path = tmp_path / "program"
    path.write_bytes(one.read_bytes())
    described = files.describe(str(path), str(path), hurried=True)
    assert (described.digest, described.build_id) == (b"", files.build_id(str(one)))
    assert files.compare(described, False) is None
    path.write_bytes(other.read_bytes().ljust(described.size, b"\0")[: described.size])
    assert "build id" in why(described)[1]
    data = tmp_path / "data"
    data.write_bytes(b"small")
    assert len(files.describe(str(data), str(data), hurried=True).digest) == 32
    monkeypatch.setattr(files, "HURRIED_SIZE", 4)
    with pytest.raises(Unmovable, match=f"{data} \\(5 bytes\\) was mapped too late") as refused:
        files.describe(str(data), str(data), hurried=True)
    assert refused.value.kind == "file-new"


def test_a_file_is_described_in_a_hurry_in_the_pause() -> None:
    with forked(lambda: None) as pid:
        line = next(m for m in procfs.maps(pid) if files.build_id(m.name))
        table = FileTable(pid)
        assert table.refs[table.number(line)].digest
        table = FileTable(pid)
        table.hurried = True
        found = table.refs[table.number(line)]
        assert (found.digest, found.build_id) == (b"", files.build_id(line.name))


def test_the_very_same_file_is_not_read_again(file: FileRef, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "digest", lambda _: b"another")
    assert files.compare(file, False) is None
    for changed in (
        msgspec.structs.replace(file, stamp=(7, 1, 1)),
        msgspec.structs.replace(file, identity=(1, 1)),
    ):
        assert why(changed) == ("file-differs", "same size, other content")


def test_an_open_file_of_a_shared_file_system_may_differ_by_now(file: FileRef) -> None:
    Path(file.path).write_bytes(b"written to since")
    assert files.compare_opened(file, False) is None
    blocker = files.compare_opened(msgspec.structs.replace(file, identity=(1, 2)), False)
    assert blocker is not None and blocker.kind == "file-differs"
    Path(file.path).unlink()
    blocker = files.compare_opened(file, False)
    assert blocker is not None and blocker.kind == "file-missing"


def test_copying(file: FileRef, tmp_path: Path) -> None:
    there = msgspec.structs.replace(file, path=str(tmp_path / "some" / "where" / "copy"))
    incoming = IncomingFile(there)
    for part in files.read_chunks(file):
        incoming.write(part)
    assert not Path(there.path).exists(), "it has its name when it is whole"
    incoming.finish()
    assert Path(there.path).read_bytes() == b"content"
    assert os.stat(there.path).st_mode & 0o7777 == 0o751
    assert files.compare(there, False) is None


def test_a_damaged_copy_gets_no_name(file: FileRef, tmp_path: Path) -> None:
    there = msgspec.structs.replace(file, path=str(tmp_path / "copy"))
    incoming = IncomingFile(there)
    incoming.write(b"c0ntent")
    with pytest.raises(OSError, match="does not match"):
        incoming.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_copy_does_not_replace_what_appeared_meanwhile(file: FileRef, tmp_path: Path) -> None:
    there = msgspec.structs.replace(file, path=str(tmp_path / "copy"))
    incoming = IncomingFile(there)
    incoming.write(b"content")
    Path(there.path).write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        incoming.finish()
    assert Path(there.path).read_bytes() == b"mine"
