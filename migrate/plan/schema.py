"""Every key of a plan, in one table: parse.py reads by it, and docs/plans.md is made of it."""

from __future__ import annotations

from typing import Final

import msgspec

from agent.api import MoveOptions, SshOptions
from migrate.plan import kinds
from migrate.plan.kinds import Kind
from migrate.plan.model import MAX_PARALLEL, VERSION

_MOVE: Final = MoveOptions()


class Key(msgspec.Struct, frozen=True):
    """`kind`: how a value is read, or the section that is nested here, or that each item of a list is."""

    name: str
    kind: Kind | Section | ListOf
    about: str
    default: str = ""
    required: bool = False


class Section(msgspec.Struct, frozen=True):
    """Keys that belong together. `path` names it in the reference."""

    path: str
    keys: tuple[Key, ...]

    def find(self, name: str) -> Key | None:
        return next((key for key in self.keys if key.name == name), None)


class ListOf(msgspec.Struct, frozen=True):
    section: Section


SELECT: Final = Section(
    "select",
    (
        Key("pid", kinds.PID, "The process with this number, as its host counts."),
        Key("pidfile", kinds.ABSOLUTE, "The process whose number is in this file of its host."),
        Key(
            "name",
            kinds.PROCESS_NAME,
            "The process of this name: as `ps -o comm` shows it, or the file name of its executable. "
            "For a move it must be the only one on its host; a drain rule takes them all.",
        ),
    ),
)
LIMITS: Final = Section(
    "limits",
    (
        Key("downtime_limit", kinds.DURATION, "How long the pause may be.", "50ms"),
        Key(
            "max_rounds",
            kinds.number(1, 1_000_000),
            "Freeze after so many rounds at the latest.",
            str(_MOVE.max_rounds),
        ),
        Key("freeze_timeout", kinds.DURATION, "Roll back if the pause has lasted so long.", "2s"),
        Key(
            "reconnect",
            kinds.PATIENCE,
            "Seek the destination so long if the link breaks before the pause; 0s: not at all.",
            "20s",
        ),
        Key("bandwidth", kinds.BANDWIDTH, "Limit of the link before the pause, per second.", "no limit"),
    ),
)
_TRANSFER: Final = (
    Key("limits", LIMITS, "Limits of a move."),
    Key(
        "compression",
        kinds.choice("zstd", "none"),
        "How memory is compressed on the link.",
        _MOVE.compression,
    ),
    Key(
        "compression_level",
        kinds.number(-50, 19),
        "Negative levels are faster, higher ones pack better.",
        str(_MOVE.compression_level),
    ),
    Key(
        "verify", kinds.TRUTH, "Compare every page with the source's before the point of no return.", "false"
    ),
    Key("copy_files", kinds.TRUTH, "Copy executables and libraries that the destination lacks.", "false"),
    Key("leave_stopped", kinds.TRUTH, "Leave the process stopped on the destination.", "false"),
)
_ADDRESS: Final = Key(
    "address",
    kinds.ADDRESSES,
    "Service addresses that move along.",
    "those that the process's connections use",
)
MOVE: Final = Section(
    "moves",
    (
        Key("name", kinds.NAME, "What it is called in messages.", "the selector and the source"),
        Key("select", SELECT, "The process: exactly one of its keys.", required=True),
        Key(
            "source",
            kinds.SOURCE,
            "Where the process runs; `local` is where the plan is applied.",
            required=True,
        ),
        Key("destination", kinds.HOST, "Where it is to run, as seen from the source.", required=True),
        _ADDRESS,
        *_TRANSFER,
    ),
)
RULE: Final = Section(
    "drain",
    (
        Key("name", kinds.NAME, "What it is called in messages.", "the selector"),
        Key("select", SELECT, "The processes that may leave: exactly one of its keys.", required=True),
        Key(
            "destinations",
            kinds.HOSTS,
            "Where to, as seen from the host that is emptied; "
            "the first is taken whose check finds nothing in the way.",
            required=True,
        ),
        _ADDRESS,
        *_TRANSFER,
    ),
)
SSH: Final = Section(
    "ssh",
    (
        Key("identity", kinds.PATHS, "Private keys, of the host where the plan is applied.", "ssh_config's"),
        Key(
            "config",
            kinds.PATHS,
            "ssh_config files, of that host too.",
            "`~/.ssh/config`, `/etc/ssh/ssh_config`",
        ),
        Key(
            "agent_command", kinds.TEXT, "What starts the agent on a host.", f"`{SshOptions().agent_command}`"
        ),
    ),
)
DEFAULTS: Final = Section(
    "defaults",
    (
        Key(
            "ssh",
            SSH,
            "How hosts are reached. What the command line says is stronger, `config.yaml` is weaker.",
        ),
        *_TRANSFER,
        Key(
            "on_failure",
            kinds.choice("stop", "continue"),
            "`stop`: nothing is touched unless all moves can be made, "
            "and after one that fails no other is started. `continue`: the others are made.",
            "stop",
        ),
        Key("parallel", kinds.number(1, MAX_PARALLEL), "How many moves at a time.", "1"),
    ),
)
PLAN: Final = Section(
    "",
    (
        Key("version", kinds.number(VERSION, VERSION), "Of this format.", required=True),
        Key(
            "defaults",
            DEFAULTS,
            "What is meant where a move or a rule says nothing, and how the plan is carried out.",
        ),
        Key("moves", ListOf(MOVE), "What `migrate plan apply` does, in order."),
        Key("drain", ListOf(RULE), "What may leave a host that is emptied (`migrate hook drain`)."),
    ),
)
SECTIONS: Final = (PLAN, DEFAULTS, SSH, MOVE, RULE, SELECT, LIMITS)
