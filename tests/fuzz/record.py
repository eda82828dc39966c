"""`python -m fuzz.record DIRECTORY` (as root): what two engines say to each other in one migration.

Into `stream-VERSION.source` and `stream-VERSION.destination`, frame after frame as they were sent. Made once
for each version of the protocol, before the next one changes anything: decoders must go on to read them
(tests/unit/test_recorded.py), and fuzzing begins with them. Run it where names do not matter:

    unshare --uts --mount sh -c 'hostname alpha; mount -t tmpfs none /mnt; python -m fuzz.record DIRECTORY'
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from unit.children import ended, wait_for
from unit.moving import Destination
from unit.tapped import Tap

from agent import source
from agent.api import Event, Finished, MoveOptions, Outcome, Request, StateChanged
from agent.kernel import clone
from agent.protocol import VERSION

CLONE_NEWNET = 0x40000000
PROGRAM = Path("/mnt/example")

# One of most kinds of descriptors, a thread asleep, timers, a signal on its way, memory that comes and goes.
TEXT = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
static void on_signal(int number) { (void)number; }
static void *sleeper(void *unused)
{
    struct timespec hour = {3600, 0};
    while (1)
        nanosleep(&hour, 0);
    return unused;
}
int main(void)
{
    pthread_t thread;
    int ends[2], watch = epoll_create1(0), events = eventfd(7, EFD_NONBLOCK), timer;
    struct itimerspec soon = {{1, 0}, {1, 500}};
    struct itimerval later = {{0, 0}, {3600, 0}};
    struct epoll_event wanted = {EPOLLIN, {.u64 = 7}};
    struct sockaddr_in here = {AF_INET, htons(7000), {htonl(INADDR_LOOPBACK)}, {0}};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
    struct timespec pause = {0, 2000000};
    sigset_t blocked;
    timer_t posix;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR2);
    sigaddset(&blocked, SIGHUP);
    sigprocmask(SIG_BLOCK, &blocked, 0);
    signal(SIGUSR1, on_signal);
    raise(SIGHUP);
    pipe(ends);
    write(ends[1], "in the pipe", 11);
    timer = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(timer, 0, &soon, 0);
    signalfd(-1, &blocked, SFD_NONBLOCK);
    epoll_ctl(watch, EPOLL_CTL_ADD, events, &wanted);
    epoll_ctl(watch, EPOLL_CTL_ADD, ends[0], &wanted);
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    bind(listener, (struct sockaddr *)&here, sizeof here);
    listen(listener, 5);
    open("/mnt/example.c", O_RDONLY);
    dup(events);
    setitimer(ITIMER_REAL, &later, 0);
    timer_create(CLOCK_REALTIME, &event, &posix);
    timer_settime(posix, 0, &soon, 0);
    char *memory = mmap(0, 1 << 16, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(memory, 1, 1 << 16);
    pthread_create(&thread, 0, sleeper, 0);
    for (long round = 0;; round++) {
        char *page = memory + 8192 * (round % 8);
        memset(page, (int)round, 4096);
        madvise(page + 4096, 4096, MADV_DONTNEED);
        if (round % 3 == 0)
            memset(memory + 4096 * (round % 16), 7, 4096);
        if (round % 50 == 0)
            mprotect(mmap(0, 4096, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096, 1);
        nanosleep(&pause, 0);
    }
}
"""


def build() -> None:
    PROGRAM.with_suffix(".c").write_text(TEXT)
    options = ["-w", "-O1", "-static", "-pthread"]
    subprocess.run(["gcc", *options, "-o", str(PROGRAM), f"{PROGRAM}.c"], check=True)


def record() -> dict[str, bytearray]:
    """Both directions of a migration that went well."""
    program = subprocess.Popen(
        [PROGRAM], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        cwd="/", env={}, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(os.listdir(f"/proc/{program.pid}/task")) == 2, "the program's thread")
    destination = Destination(lambda: clone.unshare(CLONE_NEWNET))
    tap = Tap(destination.link)
    reports = []

    def on_event(event: Event) -> None:
        if isinstance(event, Finished):
            reports.append(event.report)
        elif isinstance(event, StateChanged) and event.state == "committing":
            os.kill(program.pid, signal.SIGUSR2)

    request = Request(operation="move", pid=program.pid, destination="beta", options=MoveOptions(verify=True))
    source.run(request, tap.near, on_event, lambda: False)
    destination.close()
    wait_for(lambda: ended(program.pid), "the original to end")
    report = reports[0]
    assert report.outcome is Outcome.MIGRATED, (report.error, report.blockers)
    assert report.destination.pid is not None
    os.kill(report.destination.pid, signal.SIGKILL)
    return tap.said


def main() -> None:
    directory = Path(sys.argv[1])
    build()
    for name, data in record().items():
        (directory / f"stream-{VERSION}.{name}").write_bytes(data)


if __name__ == "__main__":
    main()
