"""As soon as the process lives, the agents have nothing of it open: what it closes is closed."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from unit.moving import running

from agent.destination import Incoming
from agent.kernel import clone
from agent.link import Link

CLONE_NEWNET = 0x40000000

# A thread waits for the end of a pipe, which the program closes once it is moved (in another pid namespace).
CLOSES = r"""
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
static int ends[2];
static void *reader(void *unused)
{
    char byte;
    (void)unused;
    dprintf(1, "read %zd\n", read(ends[0], &byte, 1));
    return 0;
}
int main(void)
{
    char before[64] = "", now[64];
    struct timespec time = {0, 1000000};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    pthread_t thread;
    bind(listener, (struct sockaddr *)&address, sizeof address);
    listen(listener, 5);
    pipe(ends);
    pthread_create(&thread, 0, reader, 0);
    readlink("/proc/self/ns/pid", before, sizeof before - 1);
    dprintf(1, "ready\n");
    do {
        nanosleep(&time, 0);
        now[readlink("/proc/self/ns/pid", now, sizeof now - 1)] = 0;
    } while (!__builtin_strcmp(before, now));
    close(ends[1]);
    pthread_join(thread, 0);
    for (;;)
        pause();
}
"""


def links(pid: int | str) -> set[str]:
    """What its descriptors are, where that can be told from all others of the host."""
    directory = f"/proc/{pid}/fd"
    found = {
        os.readlink(f"{directory}/{fd}")
        for fd in os.listdir(directory)
        if os.path.lexists(f"{directory}/{fd}")
    }
    return {link for link in found if link.startswith(("pipe:", "socket:"))}


def test_what_the_process_closes_is_closed_while_the_agents_still_live(tmp_path: Path) -> None:
    def look(incoming: Incoming) -> None:
        """In the destination, when the process lives and the source has not been told all yet."""
        assert incoming.shadow is not None
        try:
            assert incoming._entry is not None and incoming._entry.state == "live"
            theirs, ours = links(incoming.shadow.pid), links("self")
            assert any(link.startswith("socket:") for link in theirs)
            assert not theirs & ours, theirs & ours
            program.wait_for("read 0")  # the thread finds the end of its pipe
            said = "all is closed"
        except BaseException as error:
            said = repr(error)
        (tmp_path / "said").write_text(said)
        finish(incoming)

    def prepare() -> None:
        clone.unshare(CLONE_NEWNET)  # where the port is free
        setattr(Incoming, "_finish", look)  # noqa: B010

    finish = Incoming._finish
    with running(tmp_path, CLOSES) as program:
        program.move(prepare)
        assert (tmp_path / "said").read_text() == "all is closed"


@pytest.mark.parametrize("times", [1, 2])
def test_letting_go_twice_closes_nothing_of_others(times: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        incoming = Incoming(Link(ours))
        before = os.listdir("/proc/self/fd")
        incoming.context.sockets.append((os.dup(0), None))
        incoming.context.shared["pipe", 1] = os.pipe()
        incoming._fds[0] = os.dup(0)
        for _ in range(times):
            incoming._let_go()
            assert os.listdir("/proc/self/fd") == before
        incoming.close()
