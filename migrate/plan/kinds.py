"""The kinds of values in a plan: what is written for each, and how it is read.

A reader returns the value, or reports what is wrong and returns INVALID: the rest of the plan is read all the
same, so that a person sees all that is wrong at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from agent.hook_api import Select
from migrate import units
from migrate.options import parse_address
from migrate.plan.model import LOCAL
from migrate.plan.tree import Items, Mapping, Node, Place, Problem, Scalar, shown
from migrate.targets import PID_MAX
from transport.target import parse_host

MAX_DURATION: Final = 24 * 3600 * 1000.0  # milliseconds
MAX_BANDWIDTH: Final = 1 << 50  # bytes per second
MAX_TEXT: Final = 4096
NAME_LENGTH: Final = 100
_NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,9})")
_TRUTH: Final = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}


class Invalid:
    """The type of INVALID, which stands for a value whose problem has been reported."""


INVALID: Final = Invalid()
Report = Callable[[Problem], None]


class Kind(msgspec.Struct, frozen=True):
    """`about`: how it is written, for the reference."""

    about: str
    read: Callable[[Node, Report], Any]


def fail(node: Node, report: Report, message: str) -> Invalid:
    report(Problem(node.place, message))
    return INVALID


def is_empty(node: Node) -> bool:
    return isinstance(node, Scalar) and node.kind == "nothing"


def what(node: Node) -> str:
    """What somebody wrote instead, in a message."""
    if isinstance(node, Mapping):
        return "keys and values"
    if isinstance(node, Items):
        return "a list"
    return "nothing" if node.kind == "nothing" else shown(node.text)


def text(parse: Callable[[str], Any], about: str, example: str) -> Kind:
    """A word that `parse` understands; its ValueError says what is wrong."""

    def read(node: Node, report: Report) -> Any:
        if not isinstance(node, Scalar) or node.kind == "nothing":
            return fail(node, report, f"here must be {about}, as in {example}, not {what(node)}")
        if len(node.text) > MAX_TEXT:
            return fail(node, report, f"too long: {len(node.text):,} characters")
        try:
            node.text.encode()  # "\\ud800" can be written in YAML, and be sent nowhere
        except UnicodeEncodeError:
            return fail(node, report, f"{shown(node.text)} has half a character in it")
        try:
            return parse(node.text)
        except ValueError as error:
            return fail(node, report, str(error))

    return Kind(f"{about}, as in `{example}`", read)


def number(low: int, high: int) -> Kind:
    range_ = f"a whole number from {low} to {high}" if low < high else str(low)

    def read(node: Node, report: Report) -> int | Invalid:
        if not isinstance(node, Scalar) or node.kind != "number" or not _NUMBER.fullmatch(node.text):
            return fail(node, report, f"here must be {range_}, not {what(node)}")
        value = int(node.text)
        return (
            value if low <= value <= high else fail(node, report, f"here must be {range_}, not {node.text}")
        )

    return Kind(range_, read)


def _read_truth(node: Node, report: Report) -> bool | Invalid:
    if isinstance(node, Scalar) and node.kind == "truth" and node.text.lower() in _TRUTH:
        return _TRUTH[node.text.lower()]
    return fail(node, report, f"here must be true or false, not {what(node)}")


def choice(*values: str) -> Kind:
    def read(node: Node, report: Report) -> str | Invalid:
        if isinstance(node, Scalar) and node.text in values:
            return node.text
        return fail(node, report, f"here must be {' or '.join(values)}, not {what(node)}")

    return Kind(" or ".join(f"`{v}`" for v in values), read)


def several(kind: Kind, about: str) -> Kind:
    """One, or a list of them without repetitions, as a tuple."""

    def read(node: Node, report: Report) -> tuple[Any, ...] | Invalid:
        nodes: Sequence[Node] = node.nodes if isinstance(node, Items) else (node,)
        if not nodes:
            return fail(node, report, "the list is empty")
        values = [kind.read(each, report) for each in nodes]
        if INVALID in values:
            return INVALID
        seen = set()
        for place, value in zip(nodes, values, strict=True):
            if value in seen:
                return fail(place, report, f"{shown(str(value))} is there twice")
            seen.add(value)
        return tuple(values)

    return Kind(about, read)


def _duration(words: str) -> float:
    return _bounded(units.parse_duration(words), words)


def _patience(words: str) -> float:
    return _bounded(units.parse_patience(words), words)


def _bounded(milliseconds: float, words: str) -> float:
    if milliseconds > MAX_DURATION:
        raise ValueError(f"{shown(words)} is too long to be meant: at most a day")
    return milliseconds


def _bandwidth(words: str) -> int:
    try:
        rate = units.parse_bandwidth(words)
    except OverflowError:
        rate = MAX_BANDWIDTH + 1
    if rate > MAX_BANDWIDTH:
        raise ValueError(f"{shown(words)} is too much to be meant")
    return rate


def _host(words: str) -> str:
    return str(parse_host(words))


def _source(words: str) -> str:
    return words if words == LOCAL else _host(words)


def _printable(words: str) -> str:
    if not words.strip() or not words.isprintable():
        raise ValueError(f"{shown(words)}: write at least one letter, and none that cannot be printed")
    return words


def _name(words: str) -> str:
    if len(words) > NAME_LENGTH:
        raise ValueError(f"too long for a name: {len(words)} characters, at most {NAME_LENGTH}")
    return _printable(words)


def _process_name(words: str) -> str:
    if "/" in words or "\0" in words or not words or len(words) > 255:
        raise ValueError(
            f"{shown(words)} is no name of a process: as `ps -o comm` shows it, without directories"
        )
    return words


def _absolute(words: str) -> str:
    if not words.startswith("/") or "\0" in words:
        raise ValueError(f"{shown(words)} is not an absolute path")
    return words


def _path(words: str) -> str:
    if not words or "\0" in words:
        raise ValueError(f"{shown(words)} is not a path")
    return words


TRUTH: Final = Kind("`true` or `false`", _read_truth)
DURATION: Final = text(_duration, "a duration with us, ms, s or min", "50ms")
PATIENCE: Final = text(_patience, "a duration, or `0s`", "20s")
BANDWIDTH: Final = text(_bandwidth, "a rate with a unit of bits or bytes", "100mbit")
HOST: Final = text(_host, "a host, `[user@]host[:port]`", "root@beta")
SOURCE: Final = text(_source, f"a host, `[user@]host[:port]`, or `{LOCAL}`", "alpha")
NAME: Final = text(_name, "a name", "the-cache")
TEXT: Final = text(_printable, "a text", "sudo migrate-agent")
PROCESS_NAME: Final = text(_process_name, "the name of a process", "redis-server")
ABSOLUTE: Final = text(_absolute, "an absolute path", "/run/redis.pid")
PATHS: Final = several(text(_path, "a path", "/root/.ssh/id_ed25519"), "a path, or a list of paths")
HOSTS: Final = several(HOST, "a host, or a list of hosts, the best first")
PID: Final = number(1, PID_MAX)
_ADDRESS: Final = text(parse_address, "an IP address", "192.0.2.10")


def _read_addresses(node: Node, report: Report) -> tuple[str, ...] | Invalid:
    found: tuple[str, ...] | Invalid = several(_ADDRESS, "").read(node, report)
    if isinstance(found, Invalid) or "none" not in found:
        return found
    return () if len(found) == 1 else fail(node, report, "none cannot be combined with other addresses")


ADDRESSES: Final = Kind("an IP address, a list of them, or `none`", _read_addresses)


def select_of(values: dict[str, Any], place: Place, report: Report) -> Select | Invalid:
    """A selector made of its keys: exactly one."""
    if len(values) == 1:
        return Select(**values)
    if values:
        report(Problem(place, f"one of pid, pidfile and name is enough; here are {' and '.join(values)}"))
    return INVALID
