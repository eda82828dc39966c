"""A document as a tree of nodes that know where they are written.

A plan may come from anywhere, so nothing of it is constructed and everything is bounded: the bytes, the
depth, and the nodes *after* aliases are followed, so that nine lines of aliases to aliases are refused and
not expanded (the "billion laughs").
"""

from __future__ import annotations

import re
from typing import Any, Final, Literal, TypeAlias

import msgspec
import yaml

from migrate.text import clean

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
MAX_NODES: Final = 20_000
MAX_SHOWN: Final = 40  # characters of somebody's text that a message repeats
_BREAK: Final = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # as PyYAML counts lines
_CORE: Final = "tag:yaml.org,2002:"
_KINDS: Final[dict[str, Kind]] = {
    f"{_CORE}int": "number",
    f"{_CORE}float": "number",
    f"{_CORE}bool": "truth",
    f"{_CORE}null": "nothing",
    **{_CORE + name: "text" for name in ("str", "timestamp", "merge", "value")},
}

Kind: TypeAlias = Literal["text", "number", "truth", "nothing"]


class Place(msgspec.Struct, frozen=True):
    """Where something is: `path` always, as in "moves[2].limits", line and column (from 1) if in a text."""

    path: str = ""
    line: int = 0
    column: int = 0

    def inside(self, step: str) -> str:
        """The path of what is called `step` here."""
        return (
            step if not self.path else f"{self.path}{step}" if step.startswith("[") else f"{self.path}.{step}"
        )


class Problem(msgspec.Struct, frozen=True):
    """One thing that is wrong, and where."""

    place: Place
    message: str

    def __str__(self) -> str:
        """`LINE:COLUMN: message`; without a text `PATH: message`."""
        if self.place.line:
            return f"{self.place.line}:{self.place.column}: {self.message}"
        return f"{self.place.path or 'plan'}: {self.message}"


class Scalar(msgspec.Struct, frozen=True):
    """`text` as it is written, without quotes; `kind` is what YAML takes it for."""

    place: Place
    text: str
    kind: Kind


class Items(msgspec.Struct, frozen=True):
    place: Place
    nodes: tuple[Node, ...]


class Mapping(msgspec.Struct, frozen=True):
    """Pairs in order; a key may be there twice."""

    place: Place
    entries: tuple[tuple[Scalar, Node], ...]


Node: TypeAlias = Scalar | Items | Mapping


class Unreadable(Exception):
    """There is no tree."""

    def __init__(self, message: str, place: Place) -> None:
        super().__init__(message)
        self.problem = Problem(place, message)


def shown(text: str) -> str:
    """Somebody's text in a message: quoted, cut, on one line."""
    return repr(text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…")


def from_yaml(data: bytes) -> Node:
    """Read one YAML document; Unreadable."""
    if len(data) > MAX_BYTES:
        raise Unreadable(f"it has {len(data):,} bytes; a plan has {MAX_BYTES:,} at most", Place("", 1, 1))
    loader = _loader(_decoded(data))
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        raise _of_yaml(error, loader) from None
    except (ValueError, OverflowError):  # of chr(), for an escape that is no character
        raise Unreadable("an escape that is no character", _place(loader.get_mark())) from None
    if root is None:
        raise Unreadable("it is empty", Place("", 1, 1))
    return _Builder().build(root, "", 0)


def from_json(value: object) -> Node:
    """The same of what a JSON decoder made; Unreadable."""
    return _Builder().build_plain(value, "", 0)


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8-sig", "replace")
        raise Unreadable("it is not UTF-8", _at(before, len(before))) from None


def _at(text: str, index: int) -> Place:
    lines = _BREAK.split(text[:index])
    return Place("", len(lines), len(lines[-1]) + 1)


def _joined(text: str) -> str:
    """JSON writes characters beyond 16 bits as two halves, which PyYAML leaves apart."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


def _place(mark: Any, path: str = "") -> Place:
    return Place(path, mark.line + 1, mark.column + 1)


def _loader(text: str) -> _Loader:
    try:
        return _Loader(text)
    except yaml.reader.ReaderError as error:
        message = f"the character {error.character!r} is not allowed in YAML"
        raise Unreadable(message, _at(text, error.position)) from None


def _of_yaml(error: yaml.MarkedYAMLError, loader: _Loader) -> Unreadable:
    mark = error.problem_mark or error.context_mark or loader.get_mark()
    words = [error.problem or "it cannot be read"]
    if error.context and error.context_mark:
        words.append(f"{error.context} of line {error.context_mark.line + 1}")
    elif error.context:
        words.append(error.context)
    return Unreadable(f"not YAML: {', '.join(words)}", _place(mark))


class _TooMuch(yaml.MarkedYAMLError):
    """Noticed on the way, before the parser's own recursion, or anybody's patience, has its end."""


class _Loader(yaml.SafeLoader):
    """Makes nodes, nothing else, and not too many."""

    _depth = 0
    _count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._count += 1
        if self._depth > MAX_DEPTH or self._count > MAX_NODES:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            words = (
                f"nested deeper than {MAX_DEPTH}"
                if self._depth > MAX_DEPTH
                else f"more than {MAX_NODES:,} values"
            )
            raise _TooMuch(problem=words, problem_mark=mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


class _Builder:
    """Copies a tree, counting: what is reached twice counts twice."""

    def __init__(self) -> None:
        self._count = 0

    def build(self, node: yaml.Node, path: str, depth: int) -> Node:
        place = _place(node.start_mark, path)
        self._reckon(place, depth)
        if isinstance(node, yaml.ScalarNode):
            return Scalar(place, _joined(node.value), self._kind(node, place))
        if isinstance(node, yaml.SequenceNode):
            self._must_be(node, "seq", place)
            steps = (self.build(n, place.inside(f"[{i}]"), depth + 1) for i, n in enumerate(node.value))
            return Items(place, tuple(steps))
        self._must_be(node, "map", place)
        return Mapping(place, tuple(self._pair(key, value, place, depth) for key, value in node.value))

    def _pair(self, key: yaml.Node, value: yaml.Node, place: Place, depth: int) -> tuple[Scalar, Node]:
        if not isinstance(key, yaml.ScalarNode):
            raise Unreadable("a key must be a word", _place(key.start_mark, place.path))
        self._reckon(place, depth)
        inside = place.inside(clean(key.value[:MAX_SHOWN]))
        return Scalar(_place(key.start_mark, inside), key.value, "text"), self.build(value, inside, depth + 1)

    def build_plain(self, value: object, path: str, depth: int) -> Node:
        """Of dicts, lists and what is in them."""
        place = Place(path)
        self._reckon(place, depth)
        if isinstance(value, dict):
            return Mapping(place, tuple(self._plain_pair(str(k), v, place, depth) for k, v in value.items()))
        if isinstance(value, list | tuple):
            steps = (self.build_plain(v, place.inside(f"[{i}]"), depth + 1) for i, v in enumerate(value))
            return Items(place, tuple(steps))
        if isinstance(value, bool):
            return Scalar(place, str(value).lower(), "truth")
        if value is None:
            return Scalar(place, "", "nothing")
        return Scalar(place, str(value), "number" if isinstance(value, int | float) else "text")

    def _plain_pair(self, key: str, value: object, place: Place, depth: int) -> tuple[Scalar, Node]:
        inside = place.inside(clean(key[:MAX_SHOWN]))
        return Scalar(Place(inside), key, "text"), self.build_plain(value, inside, depth + 1)

    def _reckon(self, place: Place, depth: int) -> None:
        self._count += 1
        if self._count > MAX_NODES:
            raise Unreadable(f"more than {MAX_NODES:,} values, with what aliases (*) repeat", place)
        if depth > MAX_DEPTH:  # by an alias to what it is part of, or in JSON
            raise Unreadable(f"nested deeper than {MAX_DEPTH}", place)

    def _kind(self, node: yaml.ScalarNode, place: Place) -> Kind:
        kind = _KINDS.get(node.tag)
        if kind is None:
            raise Unreadable(f"tags such as {shown(node.tag)} have no meaning in a plan", place)
        return kind

    def _must_be(self, node: yaml.Node, name: str, place: Place) -> None:
        if node.tag != _CORE + name:
            raise Unreadable(f"tags such as {shown(node.tag)} have no meaning in a plan", place)
