"""A plan as an object that reads as the same plan: what is sent to an agent that empties its host."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import msgspec

from agent.api import MoveOptions, SshOptions
from agent.hook_api import Select
from migrate.plan.model import VERSION, Move, Plan, Rule


def _duration(milliseconds: float) -> str:
    return f"{Decimal(repr(milliseconds)):f}ms"  # the shortest that reads as the same, without an exponent


_LIMITS: Final[dict[str, tuple[str, Callable[[Any], object]]]] = {
    "downtime_limit": ("downtime_limit_ms", _duration),
    "max_rounds": ("max_rounds", int),
    "freeze_timeout": ("freeze_timeout_ms", _duration),
    "reconnect": ("reconnect_ms", _duration),
    "bandwidth": ("bandwidth", "{}B".format),
}
_PLAIN: Final = ("compression", "compression_level", "verify", "copy_files", "leave_stopped")
_UNSAID: Final = MoveOptions()


def to_object(plan: Plan) -> dict[str, Any]:
    """What JSON and YAML can carry; defaults are left out."""
    written: dict[str, Any] = {"version": VERSION}
    defaults: dict[str, Any] = {"on_failure": plan.on_failure, "parallel": plan.parallel}
    if plan.ssh != SshOptions():
        defaults["ssh"] = _ssh(plan.ssh)
    written["defaults"] = defaults
    written["moves"] = [_move(move) for move in plan.moves]
    written["drain"] = [_rule(rule) for rule in plan.drain]
    return written


def _move(move: Move) -> dict[str, Any]:
    where = {"source": move.source, "destination": move.destination}
    return {**_named(move.name), "select": _select(move.select), **where, **_options(move.options)}


def _rule(rule: Rule) -> dict[str, Any]:
    where = {"destinations": list(rule.destinations)}
    return {**_named(rule.name), "select": _select(rule.select), **where, **_options(rule.options)}


def _named(name: str | None) -> dict[str, Any]:
    return {} if name is None else {"name": name}


def _select(select: Select) -> dict[str, Any]:
    return {name: value for name, value in msgspec.structs.asdict(select).items() if value is not None}


def _options(options: MoveOptions) -> dict[str, Any]:
    said = {name for name in options.__struct_fields__ if getattr(options, name) != getattr(_UNSAID, name)}
    written: dict[str, Any] = {name: getattr(options, name) for name in _PLAIN if name in said}
    if options.addresses is not None:
        written["address"] = list(options.addresses) or "none"
    limits = {key: form(getattr(options, name)) for key, (name, form) in _LIMITS.items() if name in said}
    return {**written, **({"limits": limits} if limits else {})}


def _ssh(ssh: SshOptions) -> dict[str, Any]:
    paths = {"identity": list(ssh.identity), "config": list(ssh.config)}
    return {**{name: value for name, value in paths.items() if value}, "agent_command": ssh.agent_command}
