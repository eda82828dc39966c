"""Command line parameters: their types, and the options that several subcommands share."""

from __future__ import annotations

import functools
import ipaddress
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from agent.api import MoveOptions, SshOptions
from migrate import completion, units
from migrate.targets import Place, parse_place, parse_process
from transport.target import HostTarget, parse_host

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
DEFAULTS: Final = MoveOptions()


class Parsed(click.ParamType[Any]):
    """A parameter read by a function that raises ValueError with a message for a person."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value  # a default
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return completion.hosts(incomplete) if self.name in ("host", "process", "place") else []


class Common(msgspec.Struct, frozen=True, kw_only=True):
    """What every subcommand that reaches a host knows."""

    ssh: SshOptions
    log_file: Path | None
    verbose: int
    quiet: bool
    json: bool
    log_format: str = "text"
    typed: frozenset[str] = frozenset()  # fields of `ssh` that the command line itself says


def parse_address(text: str) -> str:
    """An IP address in its usual form, or "none"."""
    if text.lower() == "none":
        return "none"
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"{text!r} is not an IP address (or none)") from None


def _place(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> Place:
    try:
        return parse_place(words)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def required_id(place: Place) -> str:
    """The migration that was named; click.UsageError."""
    if place.id is None:
        raise click.UsageError("name the migration: `migrate status` lists them")
    return place.id


HOST: Final = Parsed("host", parse_host)
PROCESS: Final = Parsed("process", parse_process)
DURATION: Final = Parsed("duration", units.parse_duration)
PATIENCE: Final = Parsed("duration", units.parse_patience)
BANDWIDTH: Final = Parsed("rate", units.parse_bandwidth)
ADDRESS: Final = Parsed("address", parse_address)

place_argument = click.argument(
    "place", nargs=-1, type=Parsed("place", str), metavar="[[USER@]HOST[:PORT]] [ID]", callback=_place
)
process_argument = click.argument("process", type=PROCESS, metavar="[[USER@]SRC[:PORT]:]PID")
destination_argument = click.argument("destination", type=HOST, metavar="[USER@]DEST[:PORT]")

# Fields of SshOptions, and the parameters that they come from.
_SSH: Final = {"identity": "identity", "config": "ssh_config", "agent_command": "agent_command"}
_COMMON: Final = (
    click.option(
        "--identity", "-i", multiple=True, metavar="FILE", help="Private key for SSH connections from here."
    ),
    click.option(
        "--ssh-config",
        "-F",
        multiple=True,
        metavar="FILE",
        help="ssh_config to use instead of ~/.ssh/config.",
    ),
    click.option(
        "--agent-command",
        default=SshOptions().agent_command,
        show_default=True,
        metavar="COMMAND",
        help='What starts the agent on a host, as in "sudo migrate-agent".',
    ),
    click.option(
        "--log-file", type=click.Path(path_type=Path, dir_okay=False), help="Append every event to this file."
    ),
    click.option("--verbose", "-v", count=True, help="Show messages of the agents; twice: all of them."),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="What progress and messages on standard error look like; json: an event a line, with its time.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="No progress, only errors and the report."),
    click.option("--json", "json", is_flag=True, help="Print JSON instead of a table."),
)

_MOVE: Final = (
    click.option(
        "--downtime-limit",
        type=DURATION,
        default=DEFAULTS.downtime_limit_ms,
        show_default="50ms",
        help="How long the pause may be; rounds go on until it is expected to be shorter.",
    ),
    click.option(
        "--max-rounds",
        type=click.IntRange(min=1),
        default=DEFAULTS.max_rounds,
        show_default=True,
        help="Freeze after so many rounds at the latest.",
    ),
    click.option(
        "--freeze-timeout",
        type=DURATION,
        default=DEFAULTS.freeze_timeout_ms,
        show_default="2s",
        help="Roll back if the pause has lasted so long.",
    ),
    click.option(
        "--reconnect",
        type=PATIENCE,
        default=DEFAULTS.reconnect_ms,
        show_default="20s",
        help="Seek the destination so long if the link breaks before the pause; 0s: not at all.",
    ),
    click.option(
        "--bandwidth", type=BANDWIDTH, help="Limit for the link before the pause, as in 100mbit or 10MB."
    ),
    click.option(
        "--compression",
        type=click.Choice(["zstd", "none"]),
        default=DEFAULTS.compression,
        show_default=True,
        help="How memory is compressed on the link.",
    ),
    click.option(
        "--compression-level",
        type=click.IntRange(-50, 19),
        default=DEFAULTS.compression_level,
        show_default=True,
        help="Negative levels are faster, higher ones pack better.",
    ),
    click.option(
        "--address",
        "addresses",
        type=ADDRESS,
        multiple=True,
        help="Service address that moves along (repeatable, or none). Default: those its connections use.",
    ),
    click.option(
        "--verify", is_flag=True, help="Compare every page with the source's before the point of no return."
    ),
    click.option("--leave-stopped", is_flag=True, help="Leave the process stopped on the destination."),
    click.option(
        "--copy-files", is_flag=True, help="Copy executables and libraries that the destination lacks."
    ),
)


def _typed(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def common_options(function: Command) -> Command:
    """Adds the shared options; the function gets them as one `common: Common`."""

    @functools.wraps(function)
    def wrapped(**parameters: Any) -> Any:
        given: dict[str, Any] = {field: parameters.pop(name) for field, name in _SSH.items()}
        common = Common(
            ssh=SshOptions(**given),
            typed=frozenset(field for field, name in _SSH.items() if _typed(name)),
            **{name: parameters.pop(name) for name in ("log_file", "verbose", "quiet", "json", "log_format")},
        )
        return function(common=common, **parameters)

    return _apply(_COMMON, wrapped)


def move_options(function: Command) -> Command:
    """Adds the options of a move; `to_move_options` makes the struct of them."""
    return _apply(_MOVE, function)


def to_move_options(parameters: dict[str, Any]) -> MoveOptions:
    """The options given as a MoveOptions; click.UsageError if they contradict each other."""
    addresses = parameters["addresses"]
    if "none" in addresses and len(addresses) > 1:
        raise click.UsageError("--address none cannot be combined with other addresses")
    chosen = None if not addresses else () if "none" in addresses else tuple(dict.fromkeys(addresses))
    return MoveOptions(
        downtime_limit_ms=parameters["downtime_limit"],
        freeze_timeout_ms=parameters["freeze_timeout"],
        reconnect_ms=parameters["reconnect"],
        addresses=chosen,
        **{
            name: parameters[name]
            for name in (
                "max_rounds",
                "bandwidth",
                "compression",
                "compression_level",
                "verify",
                "leave_stopped",
                "copy_files",
            )
        },
    )


def _apply(options: tuple[Decorator, ...], function: Command) -> Command:
    for option in reversed(options):
        function = option(function)
    return function


def request_ssh(common: Common, source: HostTarget | None) -> SshOptions:
    """What the source agent uses to reach the destination.

    Key files and ssh_config named here are this host's; a source elsewhere uses its own.
    """
    if source is None:
        return common.ssh
    return SshOptions(agent_command=common.ssh.agent_command)
