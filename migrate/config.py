"""A person's defaults: `~/.config/migrate/config.yaml`, read by the same rules as plans (docs/operations.md).

What the command line says is stronger; a plan says what is to be done, so it is stronger too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import click

from migrate.errors import ExitCode, Failure
from migrate.plan import kinds
from migrate.plan.parse import InvalidPlan, parse_section
from migrate.plan.schema import DEFAULTS, LIMITS, SSH, Key, Section
from migrate.plan.tree import MAX_BYTES

_SHARED: Final = ("ssh", "limits", "compression", "compression_level")
CONFIG: Final = Section(
    "",
    (
        *(key for key in DEFAULTS.keys if key.name in _SHARED),
        Key("log_format", kinds.choice("text", "json"), "What is said on standard error.", "text"),
    ),
)
# By parameters of the commands, where they are not called as the keys are.
_PARAMETERS: Final = {"config": "ssh_config"}


def path() -> Path:
    """Where it is looked for; it need not be there."""
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home, "migrate", "config.yaml")


def load() -> dict[str, Any]:
    """Defaults by the names of the commands' parameters; Failure names every line that is wrong."""
    file = path()
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failure("usage", f"{file}: {error.strerror}", "coordinator", ExitCode.USAGE) from error
    try:
        found = parse_section(data, CONFIG)
    except InvalidPlan as error:
        message = "\n".join(f"{file}:{problem}" for problem in error.problems)
        raise Failure("usage", message, "coordinator", ExitCode.USAGE) from error
    values = {**found, **found.pop(SSH.path, {}), **found.pop(LIMITS.path, {})}
    return {
        _PARAMETERS.get(name, name): value
        for name, value in values.items()
        if name not in (SSH.path, LIMITS.path)
    }


def apply(context: click.Context) -> None:
    """Make them the defaults of every command below `context`."""
    assert isinstance(context.command, click.Group)
    context.default_map = _for(context.command, load())


def _for(command: click.Command, values: dict[str, Any]) -> dict[str, Any]:
    if isinstance(command, click.Group):
        return {name: _for(each, values) for name, each in command.commands.items()}
    return values
