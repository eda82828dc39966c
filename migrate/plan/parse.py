"""A plan from its text, or all that is wrong with it at once, each with the place where it is written."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from typing import Any, Final, TypeVar

import msgspec

from agent.api import MoveOptions, SshOptions
from agent.hook_api import Select
from migrate.plan import tree
from migrate.plan.kinds import INVALID, Invalid, fail, is_empty, select_of, what
from migrate.plan.model import LOCAL, Move, Plan, Rule
from migrate.plan.schema import DEFAULTS, LIMITS, MOVE, PLAN, RULE, SELECT, SSH, Key, ListOf, Section
from migrate.plan.tree import Items, Mapping, Node, Place, Problem, Scalar, Unreadable, shown

MAX_PROBLEMS: Final = 100
_OPTIONS: Final = {"limits", "compression", "compression_level", "verify", "copy_files", "leave_stopped"}
_NAMES: Final = {
    "downtime_limit": "downtime_limit_ms",
    "freeze_timeout": "freeze_timeout_ms",
    "reconnect": "reconnect_ms",
    "address": "addresses",
}
T = TypeVar("T")


class InvalidPlan(Exception):
    """`problems`: everything that is wrong, in the order in which it is written."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: (p.place.line, p.place.column))[:MAX_PROBLEMS])
        super().__init__("\n".join(map(str, self.problems)))


class Read(msgspec.Struct, frozen=True):
    """A section that was read: the values that are right, and where each key and value is."""

    node: Node
    values: dict[str, Any]
    places: dict[str, Place]


def parse(data: bytes) -> Plan:
    """Read a YAML plan; InvalidPlan."""
    try:
        return _plan(tree.from_yaml(data))
    except Unreadable as error:
        raise InvalidPlan([error.problem]) from None


def parse_object(value: object) -> Plan:
    """Read the same from a decoded JSON object; InvalidPlan, with paths in the place of lines."""
    try:
        return _plan(tree.from_json(value))
    except Unreadable as error:
        raise InvalidPlan([error.problem]) from None


def parse_section(data: bytes, section: Section) -> dict[str, Any]:
    """Read a YAML document that is one section: its values by key, sections in it too; InvalidPlan."""
    reader = _Reader()
    try:
        read = reader.document(tree.from_yaml(data), section)
    except Unreadable as error:
        raise InvalidPlan([error.problem]) from None
    if reader.problems or read is None:
        raise InvalidPlan(reader.problems)
    return read.values


def _plan(root: Node) -> Plan:
    reader = _Reader()
    found = reader.plan(root)
    if reader.problems or found is None:
        raise InvalidPlan(reader.problems)
    return found


class _Reader:
    """Goes through a tree once; what is wrong is collected."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def report(self, problem: Problem) -> None:
        self.problems.append(problem)

    def document(self, root: Node, section: Section) -> Read | None:
        return self._section(root, section)

    def plan(self, root: Node) -> Plan | None:
        top = self._section(root, PLAN)
        if top is None:
            return None
        if not {"moves", "drain"} & top.places.keys():
            self.report(
                Problem(root.place, "the keys 'moves' and 'drain' are both missing: there is nothing to do")
            )
        defaults: dict[str, Any] = top.values.get("defaults", {})
        moves = [self._move(read, defaults) for read in top.values.get("moves", ())]
        rules = [self._rule(read, defaults) for read in top.values.get("drain", ())]
        self._check_names([*top.values.get("moves", ()), *top.values.get("drain", ())])
        self._check_selectors(top.values.get("moves", ()), "source")
        self._check_selectors(top.values.get("drain", ()))
        if self.problems:
            return None
        carried_out = {name: defaults[name] for name in ("on_failure", "parallel") if name in defaults}
        ssh = SshOptions(**defaults.get("ssh", {}))
        return Plan(
            moves=tuple(filter(None, moves)), drain=tuple(filter(None, rules)), ssh=ssh, **carried_out
        )

    def _move(self, read: Read, defaults: dict[str, Any]) -> Move | None:
        values = read.values
        if {"select", "source", "destination"} - values.keys():
            return None
        if values["source"] == values["destination"] != LOCAL:
            message = f"{shown(values['destination'])} is the source already"
            self.report(Problem(read.places["destination"], message))
        return Move(
            name=values.get("name"),
            select=values["select"],
            source=values["source"],
            destination=values["destination"],
            options=_options(values, defaults),
        )

    def _rule(self, read: Read, defaults: dict[str, Any]) -> Rule | None:
        values = read.values
        if {"select", "destinations"} - values.keys():
            return None
        return Rule(
            name=values.get("name"),
            select=values["select"],
            destinations=values["destinations"],
            options=_options(values, defaults),
        )

    def _check_names(self, reads: Sequence[Read]) -> None:
        found = [(r.values["name"], r.places["name"]) for r in reads if "name" in r.values]
        self._unique(found, "this name is taken already")

    def _check_selectors(self, reads: Sequence[Read], *more: str) -> None:
        whole = [r for r in reads if {"select", *more} <= r.values.keys()]
        found = [((r.values["select"], *(r.values[m] for m in more)), r.places["select"]) for r in whole]
        self._unique(found, "the same is selected already")

    def _unique(self, found: Sequence[tuple[Hashable, Place]], message: str) -> None:
        first: dict[Hashable, Place] = {}
        for value, place in found:
            if value in first:
                where = first[value]
                words = f"line {where.line}" if where.line else where.path
                self.report(Problem(place, f"{message}: {words}"))
            first.setdefault(value, place)

    def _section(self, node: Node, section: Section) -> Read | None:
        """None if it is no mapping at all."""
        if not isinstance(node, Mapping):
            keys = ", ".join(key.name for key in section.keys)
            fail(node, self.report, f"here must be keys ({keys}) and their values, not {what(node)}")
            return None
        read = Read(node, {}, {})
        for name, value in node.entries:
            self._entry(read, section, name, value)
        for key in section.keys:
            if key.required and key.name not in read.places:
                self.report(Problem(node.place, f"the key {key.name!r} is missing"))
        return read

    def _entry(self, read: Read, section: Section, name: Scalar, value: Node) -> None:
        key = section.find(name.text)
        if key is None:
            self.report(Problem(name.place, _unknown(name.text, section)))
        elif key.name in read.places:
            self.report(Problem(name.place, f"the key {key.name!r} is there twice"))
        else:
            read.places[key.name] = value.place
            found = self._value(key, value)
            if found is not INVALID:
                read.values[key.name] = found

    def _value(self, key: Key, node: Node) -> Any:
        if isinstance(key.kind, Section):
            return self._nested(key.kind, node)
        if isinstance(key.kind, ListOf):
            return self._list(key.kind.section, node)
        return key.kind.read(node, self.report)

    def _nested(self, section: Section, node: Node) -> Any:
        if is_empty(node) and section is not SELECT:
            return {}
        before = len(self.problems)
        read = self._section(node, section)
        if read is None:
            return INVALID
        if section is not SELECT:
            return read.values
        if not read.places and len(self.problems) == before:
            return fail(node, self.report, "one of pid, pidfile and name is missing")
        found: Select | Invalid = select_of(read.values, node.place, self.report)
        return found if len(self.problems) == before else INVALID

    def _list(self, section: Section, node: Node) -> list[Read] | Invalid:
        if is_empty(node):
            return []
        if not isinstance(node, Items):
            return fail(node, self.report, f"here must be a list ('- …' on each line), not {what(node)}")
        return [read for item in node.nodes if (read := self._section(item, section)) is not None]


def _unknown(name: str, section: Section) -> str:
    """What to do about a key that is not known here."""
    known = [key.name for key in section.keys]
    message = f"there is no key {shown(name)} here"
    if close := difflib.get_close_matches(name[:100].lower(), known, 1):
        return f"{message}; is {close[0]!r} meant?"
    if name == "<<":
        return f"{message}; write what moves have in common under 'defaults'"
    if elsewhere := [other.path or "the top" for other in _PLACES if other.find(name) is not None]:
        return f"{message}; it belongs under {elsewhere[0]!r}"
    return f"{message}; known are {', '.join(known)}"


_PLACES: Final = (LIMITS, DEFAULTS, MOVE, RULE, SSH, SELECT, PLAN)


def _options(values: dict[str, Any], defaults: dict[str, Any]) -> MoveOptions:
    """What a move or a rule says, and where it says nothing, the defaults."""
    chosen = {name: defaults[name] for name in _OPTIONS if name in defaults}
    chosen |= {name: values[name] for name in (*_OPTIONS, "address") if name in values}
    limits = {**defaults.get("limits", {}), **values.get("limits", {})}
    chosen.pop("limits", None)
    return MoveOptions(**{_NAMES.get(name, name): value for name, value in {**chosen, **limits}.items()})
