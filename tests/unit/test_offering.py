"""What a program opens while its pages are copied: agreed to between two rounds, or one clear error.

The destination has a network of its own, and a file system of its own at one place.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from unit.children import wait_for
from unit.moving import Move, Moving
from unit.test_exhaustion import assert_untouched, mounted

from agent import protocol
from agent.api import MoveOptions
from agent.destination import Incoming
from agent.kernel import clone, procfs
from agent.link import Link

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a destination its own files")

CLONE_NEWNET = 0x40000000
# Does what the file "command" says: opens a file, binds a socket to a port and perhaps listens, closes the
# last that it opened. Says each round what it reads there.
OPENER = r"""
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
static int last = -1;
static void bind_to(int port)
{
    struct sockaddr_in address = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
    last = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(last, (void *)&address, sizeof address))
        dprintf(1, "wrong bind\n");
}
static void obey(char *word, char *argument)
{
    if (!strcmp(word, "open"))
        last = open(argument, O_RDWR);
    else if (!strcmp(word, "bind"))
        bind_to(atoi(argument));
    else if (!strcmp(word, "listen")) {
        bind_to(atoi(argument));
        listen(last, 5);
    } else if (!strcmp(word, "close"))
        close(last);
    dprintf(1, "did %s %d\n", word, last);
}
int main(int count, char **arguments)
{
    struct timespec time = {0, 3000000};
    char text[256], word[256], argument[256];
    memset(mmap(0, 4 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 'm', 4 << 20);
    for (long round = 0;; round++) {
        int command = open(arguments[1], O_RDONLY);
        if (command >= 0) {
            long size = read(command, text, sizeof text - 1);
            close(command);
            unlink(arguments[1]);
            text[size] = 0;
            sscanf(text, "%s %s", word, argument);
            obey(word, argument);
        }
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


class Opener(Moving):
    def __init__(self, directory: Path) -> None:
        self._command = directory / "command"
        super().__init__(directory, OPENER, self._command)
        self.progress()

    def obey(self, word: str, argument: object = "-") -> int:
        """The descriptor that it is about."""
        done = len(self._done(word))
        new = self._command.with_name("new")
        new.write_text(f"{word} {argument}")
        new.rename(self._command)
        wait_for(lambda: len(self._done(word)) > done, f"the program to {word}")
        return int(self._done(word)[-1].split()[2])

    def _done(self, word: str) -> list[str]:
        return [line for line in self.lines() if line.startswith(f"did {word} ")]


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[Opener]:
    found = Opener(tmp_path)
    yield found
    found.close()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory that the destination has for itself."""
    place = tmp_path / "own"
    place.mkdir()
    return place


def elsewhere(own: Path, *steps: Callable[[], object]) -> Callable[[], None]:
    """The destination: with other files at that place, and a network where all ports are free."""

    kept: list[object] = []

    def prepare() -> None:
        copies = {file.name: file.read_bytes() for file in own.iterdir()}
        clone.unshare(CLONE_NEWNET)
        mounted(own, 1 << 20)
        for name, content in copies.items():
            (own / name).write_bytes(content)
            shutil.chown(own / name, 0, 0)
        kept.extend(step() for step in steps)

    return prepare


def before(kind: type[protocol.Message], action: Callable[[], object]) -> None:
    """For the destination: done once, when such a message is there."""
    receive, made = Link.receive, list[object]()

    def receiving(link: Link) -> protocol.Message | protocol.Pages:
        message = receive(link)
        if isinstance(message, kind) and not made:
            made.append(action())
        return message

    setattr(Link, "receive", receiving)  # noqa: B010


def moved(opener: Opener, prepare: Callable[[], None], **steps: Callable[[], object]) -> Move:
    """With something done in `precopy`, before its first round, and before the `freeze`."""

    def on_state(_: Move, state: str) -> None:
        steps.get({"pre-copy": "precopy", "freezing": "freeze"}.get(state, ""), lambda: None)()

    return Move(opener, MoveOptions(), on_state, prepare=prepare)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def take(port: int) -> Callable[[], socket.socket]:
    """For the destination: somebody listens there."""
    return lambda: socket.create_server(("127.0.0.1", port))


# --- agreed to, and moved ---


def test_a_file_of_the_destinations_own(opener: Opener, own: Path) -> None:
    file = own / "file"
    file.write_bytes(b"the same")
    fds: list[int] = []
    move = moved(opener, elsewhere(own), precopy=lambda: fds.append(opener.obey("open", file)))
    there = Path(f"/proc/{move.migrated.destination.pid}/fd/{fds[0]}")
    assert there.stat().st_dev != file.stat().st_dev
    assert there.read_bytes() == b"the same"
    opener.progress()


@pytest.mark.parametrize("word", ["bind", "listen"])
def test_a_port(opener: Opener, own: Path, word: str) -> None:
    port, fds = free_port(), list[int]()
    move = moved(opener, elsewhere(own), precopy=lambda: fds.append(opener.obey(word, port)))
    report = move.migrated
    listening = Path(f"/proc/{report.destination.pid}/net/tcp").read_text()
    assert (f"0100007F:{port:04X} 00000000:0000 0A" in listening) == (word == "listen")
    assert procfs.fds(report.destination.pid or 0)[fds[0]].startswith("socket:")
    opener.progress()


def test_what_is_closed_again_need_not_be_there(opener: Opener, own: Path) -> None:
    port = free_port()
    move = moved(
        opener,
        elsewhere(own, take(port)),
        precopy=lambda: opener.obey("listen", port),
        freeze=lambda: opener.obey("close"),
    )
    assert move.migrated
    opener.progress()


# --- not to be had ---


def test_a_file_that_the_destination_does_not_have(opener: Opener, own: Path) -> None:
    file = own / "file"
    file.write_bytes(b"only here")
    move = moved(opener, elsewhere(own, file.unlink), precopy=lambda: opener.obey("open", file))
    message = move.rolled_back("file-missing", "destination")
    assert message.startswith(f"{file}: the process uses it and the destination does not have it")
    assert_untouched(opener)


def test_a_file_that_is_another_one_there(opener: Opener, own: Path) -> None:
    file = own / "file"
    file.write_bytes(b"this")
    prepare = elsewhere(own, lambda: file.write_bytes(b"that"))
    move = moved(opener, prepare, precopy=lambda: opener.obey("open", file))
    assert "same size, other content" in move.rolled_back("file-differs", "destination")
    assert_untouched(opener)


def test_a_file_that_the_destination_loses_after_it_has_agreed(opener: Opener, own: Path) -> None:
    file = own / "file"
    file.write_bytes(b"the same")

    prepare = elsewhere(own, lambda: before(protocol.Rebuild, file.unlink))
    move = moved(opener, prepare, precopy=lambda: opener.obey("open", file))
    assert str(file) in move.rolled_back("file-changed", "destination")
    assert_untouched(opener)


def test_a_port_that_is_taken(opener: Opener, own: Path) -> None:
    port = free_port()
    move = moved(opener, elsewhere(own, take(port)), precopy=lambda: opener.obey("listen", port))
    message = move.rolled_back("tcp-port-taken", "destination")
    assert f"127.0.0.1:{port}: another socket of the destination has this port" in message
    assert_untouched(opener)


@pytest.mark.parametrize("when", ["before the move", "in pre-copy"])
def test_a_port_that_is_taken_after_it_was_agreed_to(opener: Opener, own: Path, when: str) -> None:
    port = free_port()
    steps: dict[str, Callable[[], object]] = {"precopy": lambda: opener.obey("listen", port)}
    if when == "before the move":
        steps.pop("precopy")()
    prepare = elsewhere(own, lambda: before(protocol.Rebuild, take(port)))
    message = moved(opener, prepare, **steps).rolled_back("tcp-port-taken", "destination")
    assert f"127.0.0.1:{port}: another socket" in message and "free it" in message
    assert_untouched(opener)


def test_what_does_not_come_with_an_agent_that_knows_no_more(opener: Opener, own: Path) -> None:
    """One of the version before: it is not asked, and decides in the freeze."""
    file = own / "file"
    file.write_bytes(b"the same")

    def older() -> None:
        send = Link.send

        def plain(link: Link, message: protocol.Message) -> None:
            if isinstance(message, protocol.Answer):
                message = protocol.Answer(
                    host=message.host,
                    blockers=message.blockers,
                    notices=message.notices,
                    missing=message.missing,
                    unshared=message.unshared,
                )
            send(link, message)

        setattr(Link, "send", plain)  # noqa: B010
        setattr(Incoming, "_also", None)  # noqa: B010

    move = moved(opener, elsewhere(own, older), precopy=lambda: opener.obey("open", file))
    assert "was opened during the migration" in move.rolled_back("file-differs", "destination")
    assert_untouched(opener)
