"""The systemd unit: what it starts exists, and nothing in it takes from the agent what it needs."""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
from pathlib import Path

import click
import pytest
from unit.moving import Move, Moving

from agent import privileges
from agent.api import MoveOptions, Outcome
from agent.kernel import capabilities as kernel
from agent.kernel.errors import check, libc
from agent.main import main
from agent.privileges import SERVICE
from agent.server.places import RUNTIME_VARIABLE, Places, default

UNIT = Path(__file__).parents[2] / "configs" / "migrate-agent.service"
# systemd.exec(5): each of these implies a mount or UTS namespace, or takes memory that libffi needs.
FORBIDDEN = re.compile(
    r"Private|Protect|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|ExecPaths|NoExecPaths|"
    r"TemporaryFileSystem|Bind|Root|Mount|DynamicUser|RestrictNamespaces|"
    r"MemoryDeny|Extension|LogNamespace"
)
NUMBERS = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
AUDIT_ARCH_X86_64 = 0xC000003E
RET_ALLOW, RET_KILL_PROCESS = 0x7FFF0000, 0x80000000
PROGRAM = r"""
#include <stdio.h>
#include <time.h>
int main(void)
{
    struct timespec time = {0, 3000000};
    for (long round = 0;; round++) {
        dprintf(1, "round %ld\n", round);
        nanosleep(&time, 0);
    }
}
"""


def settings() -> list[tuple[str, str]]:
    lines = [line for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#")]
    return [(name, value) for name, _, value in (line.partition("=") for line in lines)]


def values(name: str) -> list[str]:
    return [value for key, value in settings() if key == name]


def test_it_starts_a_command_that_exists() -> None:
    (line,) = values("ExecStart")
    program, name, *options = shlex.split(line)
    assert Path(program).name == "migrate-agent"
    command = main.commands[name]
    with command.make_context(name, options) as context:
        assert isinstance(context, click.Context) and context.params["idle_exit"] is None


def test_it_owns_the_places_that_tools_look_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUNTIME_VARIABLE)
    places = default()
    found = Places(
        Path("/run", *values("RuntimeDirectory"), "agent.sock"), Path("/var/lib", *values("StateDirectory"))
    )
    assert found == places
    assert values("RuntimeDirectoryMode") == values("StateDirectoryMode") == ["0700"]


def test_nothing_in_it_hides_the_host_from_it() -> None:
    assert not [name for name, _ in settings() if FORBIDDEN.match(name)]


def capabilities() -> list[str]:
    return " ".join(values("CapabilityBoundingSet")).split()


def test_capabilities_are_those_of_the_service_and_of_what_it_starts() -> None:
    """And what it takes to open the socket to a group, and to give all others up."""
    wanted = {f"CAP_{name}" for name in (*SERVICE.own, *SERVICE.starts, "CHOWN", "SETPCAP")}
    found = capabilities()
    assert len(set(found)) == len(found) and set(found) == wanted


def test_families_are_those_that_are_used() -> None:
    root = UNIT.parents[1]
    sources = [p.read_text() for name in ("agent", "transport") for p in (root / name).rglob("*.py")]
    used = {family for text in sources for family in re.findall(r"\bAF_[A-Z0-9]+\b", text)}
    (allowed,) = values("RestrictAddressFamilies")
    assert set(allowed.split()) == used - {"AF_UNSPEC"}


def denied() -> set[int]:
    """The system calls that the unit forbids, by number."""
    (line,) = values("SystemCallFilter")
    assert line.startswith("~")
    listing = subprocess.run(
        ["systemd-analyze", "syscall-filter", *line[1:].split()], capture_output=True, text=True, check=True
    )
    names = set(re.findall(r"^ +([a-z0-9_]+)$", listing.stdout, re.M))
    numbers = dict(re.findall(r"#define __NR_(\w+)\s+(\d+)", NUMBERS.read_text()))
    return {int(numbers[name]) for name in names if name in numbers}


def under_the_unit() -> None:
    """Become what the unit makes of it: seccomp(2), no_new_privs, the bounding set."""
    program = [(0x20, 0, 0, 0)]  # BPF_LD_W_ABS: the number
    for number in sorted(denied()):
        program += [(0x15, 0, 1, number), (0x06, 0, 0, RET_KILL_PROCESS)]
    program.append((0x06, 0, 0, RET_ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in program))
    keep = kernel.numbers(name.removeprefix("CAP_") for name in capabilities())
    kernel.drop_bounding(keep)
    have = kernel.get().permitted & keep
    kernel.put(kernel.Sets(have, have, 0))
    check(libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    wanted = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code))
    check(libc.prctl(22, 2, ctypes.create_string_buffer(wanted), 0, 0), "PR_SET_SECCOMP")


@pytest.mark.skipif(os.geteuid() != 0, reason="the unit is root's")
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="it knows the groups of system calls")
def test_an_engine_under_its_filter_moves_a_process(tmp_path: Path) -> None:
    program = Moving(tmp_path, PROGRAM)
    program.progress()
    child = os.fork()
    if child == 0:
        code = 1
        try:

            def begin(move: Move, state: str) -> None:
                if state == "examining":
                    under_the_unit()
                    privileges.enter(privileges.ENGINE)

            move = Move(program.pid, MoveOptions(verify=True), on_state=begin)
            report = move.report
            assert report is not None and report.outcome is Outcome.MIGRATED, report
            os.kill(report.destination.pid or 0, signal.SIGKILL)
            code = 0
        finally:
            os._exit(code)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        program.close()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="it knows the groups of system calls")
def test_what_is_forbidden_ends_it() -> None:
    child = os.fork()
    if child == 0:
        under_the_unit()
        libc.unshare(0)
        os.write(2, b"")
        libc.swapoff(b"/nowhere")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSYS
