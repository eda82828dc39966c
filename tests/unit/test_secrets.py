"""What a process has in memory is in nothing that is said about it: events, reports, records, logs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from unit.moving import Move, Moving, Program, running

from agent import finishing
from agent.api import MigrationRecord, MoveOptions, Outcome, Request
from agent.server import log
from agent.server.store import Store, new_id

SECRET = "correct-horse-battery-staple"
# In memory, in a register, on the stack, in a pipe, and in a file that has no name any more.
PROGRAM = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
int main(int count, char **arguments)
{
    static const char start[] = "correct-horse-", end[] = "battery-staple";
    char secret[64], *pages = mmap(0, 1 << 20, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int pipes[2], file = open(arguments[1], O_RDWR | O_CREAT, 0600);
    struct timespec time = {0, 3000000};
    strcpy(stpcpy(secret, start), end);
    for (int n = 0; n < 1 << 20; n += 32)
        strcpy(pages + n, secret);
    unlink(arguments[1]);
    write(file, secret, strlen(secret));
    pipe(pipes);
    write(pipes[1], secret, strlen(secret));
    dprintf(1, "%ld\nready\n", (long)pages);
    for (;;) {
        asm volatile("movups %0, %%xmm5" : : "m"(*secret) : "xmm5");
        nanosleep(&time, 0);
    }
}
"""


def shown(text: str) -> bool:
    """Also as hexadecimal, and in part."""
    forms = (SECRET[:12], SECRET[-12:], SECRET[8:20])
    return any(form in text or form.encode().hex() in text.lower() for form in forms)


def told(move: Move, directory: Path, capture: pytest.LogCaptureFixture) -> list[str]:
    """Everything that is said of a migration, in each form."""
    id = new_id()
    with capture.at_level(logging.DEBUG, logger="agent.server.log"):
        for event in move.events:
            log.write(id, event)
    logs = [form.format(line) for form in (log._Text(), log._Json()) for line in capture.records]
    lines = [msgspec.json.encode(event) for event in move.events]
    now = datetime.now(UTC)
    request = Request(operation="move", pid=1, destination="here")
    record = MigrationRecord(
        id=id, request=request, status="finished", state="", created=now, finished=now, report=move.report
    )
    Store(directory / "state" / "reports").save(record, lines)
    files = [path.read_text() for path in (directory / "state").rglob("*.json")]
    assert logs and lines and files
    return [*logs, *map(bytes.decode, lines), *files]


def drop_a_page(program: Program, patch: pytest.MonkeyPatch) -> None:
    """It is different there, and the report says where."""
    patch.setenv("MIGRATE_TEST_DROP_PAGE", hex(int(program.lines()[0]) + 4096))


def fail(program: Program, patch: pytest.MonkeyPatch) -> None:
    """In the middle of it all, with the state of the process at hand."""

    def failing(finish: finishing.Finish, *_: object) -> None:
        raise ValueError(f"{len(finish._leader.xstate)} bytes of registers")

    patch.setattr(finishing.Finish, "end", failing)


def nothing(program: Program, patch: pytest.MonkeyPatch) -> None:
    return


@pytest.mark.parametrize(
    ("mishap", "outcome"),
    [(nothing, Outcome.MIGRATED), (drop_a_page, Outcome.ROLLED_BACK), (fail, Outcome.ROLLED_BACK)],
)
def test_a_secret_is_in_nothing_that_is_said(
    mishap: Callable[[Program, pytest.MonkeyPatch], None],
    outcome: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with running(tmp_path, PROGRAM, str(tmp_path / "deleted")) as program:
        mishap(program, monkeypatch)
        move = Move(program, MoveOptions(verify=True, compression="none"))
        assert move.report is not None and move.report.outcome is outcome, move.report
        assert has(program.copies[-1] if outcome is Outcome.MIGRATED else program.pid, program)
    output, errors = capfd.readouterr()
    for text in (*told(move, tmp_path, caplog), output, errors):
        assert not shown(text), text


def has(pid: int, program: Moving) -> bool:
    """It is there to be found."""
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    try:
        return shown(os.pread(fd, 64, int(program.lines()[0])).decode("latin-1"))
    finally:
        os.close(fd)


@pytest.mark.parametrize("text", [SECRET, SECRET.encode().hex(), f"...{SECRET[5:25]}"])
def test_it_would_be_found(text: str) -> None:
    assert shown(text)
