"""The systemd unit: what it starts exists, and nothing in it takes from the agent what it needs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click

from agent.main import main
from agent.server.places import Places, default

UNIT = Path(__file__).parents[2] / "configs" / "migrate-agent.service"
# systemd.exec(5): each of these implies a mount namespace, or a seccomp filter which a tracer must not have.
FORBIDDEN = re.compile(
    r"Private|Protect|ReadOnlyPaths|ReadWritePaths|InaccessiblePaths|ExecPaths|NoExecPaths|"
    r"TemporaryFileSystem|Bind|Root|Mount|DynamicUser|SystemCall|Restrict(?!art)|LockPersonality|"
    r"MemoryDeny|Extension|LogNamespace"
)


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


def test_it_owns_the_places_that_tools_look_in() -> None:
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


def test_capabilities_are_named_once() -> None:
    found = capabilities()
    assert len(set(found)) == len(found) and all(re.fullmatch(r"CAP_[A-Z_]+", each) for each in found)
