"""Faults at exact points of the project's own processes, put in from outside (`sitecustomize.py`).

In the directory that MIGRATE_FAULTS names there are `rules.json`, what is to fail in this run, and `referee`,
the unix socket of who makes it fail. Without rules for this process nothing is touched. A rule:

    {"id": 3, "host": "alpha", "process": "agent.worker", "point": "after-send:Commit", "nth": 1,
     "since": null}

Points: `before-send:KIND`, `mid-send:KIND` (half of it has left), `after-send:KIND`, `after-receive:KIND` of
the messages of `agent.protocol`, KIND "Pages" for a frame of pages; `state:NAME`, before the source says that
it enters it; `before-step:STATE` and `after-step:STATE` of the journals of `agent.journal`, which are names
of files; `call:MODULE:NAME`, before that function is called. Where a process (a regular expression, for its
command line) gets to a rule's point for the nth time, counted from the point `since` on, it asks the
referee, and waits: for its end, or for the number of the error that the call shall fail with (0: none).
"""

from __future__ import annotations

import _socket
import contextlib
import functools
import importlib
import importlib.abc
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PAGES = "Pages"
_OURS = ("agent.", "transport.", "migrate.")  # not yet loaded; the standard library's may be


class Rule:
    def __init__(self, words: dict[str, Any]) -> None:
        self.id: int = words["id"]
        self.point: str = words["point"]
        self.left: int = words["nth"]
        self.since: str | None = words["since"]

    def reached(self, point: str) -> bool:
        """Whether this is the time; a rule fires once."""
        if self.since is not None:
            if point == self.since:
                self.since = None
            return False
        if point != self.point:
            return False
        self.left -= 1
        return self.left == 0


class Faults:
    """The rules of this process."""

    def __init__(self, directory: str, rules: list[Rule]) -> None:
        self._referee = os.path.join(directory, "referee")
        self.rules = rules
        self._asking = False

    def points(self) -> set[str]:
        return {point for rule in self.rules for point in (rule.point, rule.since) if point}

    def reach(self, point: str) -> None:
        """OSError if the referee says so."""
        if self._asking:
            return
        for rule in self.rules:
            if rule.reached(point):
                self._asking = True
                try:
                    number = self._ask(rule)
                finally:
                    self._asking = False
                if number:
                    raise OSError(number, os.strerror(number), f"injected at {point}")

    def _ask(self, rule: Rule) -> int:
        """By the socket type below `socket.socket`, whose methods may be the ones that fail."""
        asking = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        try:
            asking.connect(self._referee)
            asking.send(b"%d\n" % rule.id)
            answer = asking.recv(16)
            return int(answer) if answer else 0
        except OSError:  # there is no referee any more: the run is over
            return 0
        finally:
            asking.close()


# --- where the points are ---


class _Half:
    """In the place of a link's socket: lets half of the first frame out, then reaches the point."""

    def __init__(self, sock: Any, reached: Callable[[], None]) -> None:
        self._socket = sock
        self._reached: Callable[[], None] | None = reached

    def sendmsg(self, parts: Sequence[bytes | memoryview]) -> int:
        if self._reached is None:
            return int(self._socket.sendmsg(parts))
        whole = b"".join(parts)
        sent = int(self._socket.sendmsg([memoryview(whole)[: len(whole) // 2]]))
        reached, self._reached = self._reached, None
        reached()
        return sent

    def __getattr__(self, name: str) -> Any:
        return getattr(self._socket, name)


def _watch_link(module: ModuleType, faults: Faults) -> None:
    link = module.Link
    send, send_pages, introduce, take = link.send, link.send_pages, link._introduce, link._take
    halves = {point for point in faults.points() if point.startswith("mid-send:")}

    @contextlib.contextmanager
    def around(self: Any, kind: str) -> Iterator[None]:
        faults.reach(f"before-send:{kind}")
        point, whole = f"mid-send:{kind}", self._socket
        if point in halves:
            self._socket = half = _Half(whole, lambda: faults.reach(point))
        try:
            yield
        finally:
            if point in halves and self._socket is half:  # and not that of a new connection
                self._socket = whole
        faults.reach(f"after-send:{kind}")

    def watched_send(self: Any, message: Any) -> None:
        with around(self, type(message).__name__):
            send(self, message)

    def watched_pages(self: Any, *arguments: Any, **options: Any) -> None:
        with around(self, PAGES):
            send_pages(self, *arguments, **options)

    def watched_introduce(self: Any) -> None:
        with around(self, "Resumed"):
            introduce(self)

    def watched_take(self: Any) -> Any:
        message = take(self)
        faults.reach(f"after-receive:{type(message).__name__}")
        return message

    link.send, link.send_pages = watched_send, watched_pages
    link._introduce, link._take = watched_introduce, watched_take


def _watch_states(source: ModuleType, faults: Faults) -> None:
    run = source.run
    signature = inspect.signature(run)

    def watched(*arguments: Any, **options: Any) -> Any:
        bound = signature.bind(*arguments, **options)
        emit = bound.arguments["emit"]

        def tell(event: Any) -> None:
            if type(event).__name__ == "StateChanged":
                faults.reach(f"state:{event.state}")
            emit(event)

        bound.arguments["emit"] = tell
        return run(*bound.args, **bound.kwargs)

    source.run = watched  # type: ignore[attr-defined]


def _watch_steps(module: ModuleType, faults: Faults) -> None:
    """Of `os`: a step of a journal is a file's new name, or its first."""
    for name in ("rename", "link"):
        setattr(module, name, _watch_naming(getattr(module, name), faults))


def _watch_naming(original: Callable[..., None], faults: Faults) -> Callable[..., None]:
    @functools.wraps(original)
    def watched(source: Any, target: Any, **options: Any) -> None:
        state = os.path.splitext(os.fspath(target))[1][1:]
        faults.reach(f"before-step:{state}")
        original(source, target, **options)
        faults.reach(f"after-step:{state}")

    return watched


def _watch_call(module: ModuleType, name: str, faults: Faults) -> None:
    """`name` may be that of a class's method, with a dot."""
    holder: Any = module
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original = getattr(holder, last)
    point = f"call:{module.__name__}:{name}"

    @functools.wraps(original)
    def watched(*arguments: Any, **options: Any) -> Any:
        faults.reach(point)
        return original(*arguments, **options)

    setattr(holder, last, watched)


Watch = Callable[[ModuleType, Faults], None]


def _watches(faults: Faults) -> dict[str, list[Watch]]:
    """What is to be done to which module once it is there."""
    found: dict[str, list[Watch]] = {}
    for point in sorted(faults.points()):
        kind, _, rest = point.partition(":")
        if kind == "call":
            module, _, name = rest.partition(":")
            found.setdefault(module, []).append(functools.partial(_watch_named, name))
        elif kind == "state":
            found["agent.source"] = [_watch_states]
        elif kind.endswith("-step"):
            found.setdefault("os", [])
            if _watch_steps not in found["os"]:
                found["os"].append(_watch_steps)
        else:
            found["agent.link"] = [_watch_link]
    return found


def _watch_named(name: str, module: ModuleType, faults: Faults) -> None:
    _watch_call(module, name, faults)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules as the other finders do, and changes them right after they were executed."""

    def __init__(self, watches: dict[str, list[Watch]], faults: Faults) -> None:
        self._watches = watches
        self._faults = faults

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._watches:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._change(spec.loader, self._watches.pop(name))
                return spec
        return None

    def _change(self, loader: Any, watches: list[Watch]) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for watch in watches:
                watch(module, self._faults)

        loader.exec_module = exec_module


def _applies(words: dict[str, Any]) -> bool:
    command = " ".join(sys.orig_argv)
    return os.uname().nodename == words["host"] and re.search(words["process"], command) is not None


def _rules(directory: str) -> list[Rule]:
    try:
        with open(os.path.join(directory, "rules.json"), "rb") as file:
            return [Rule(words) for words in json.load(file) if _applies(words)]
    except FileNotFoundError:
        return []


def start(directory: str) -> None:
    """Put in what `directory` has for this process."""
    rules = _rules(directory)
    if not rules:
        return
    faults = Faults(directory, rules)
    watches = _watches(faults)
    for name in [name for name in watches if not name.startswith(_OURS)]:
        for watch in watches.pop(name):
            watch(importlib.import_module(name), faults)
    if watches:
        sys.meta_path.insert(0, Finder(watches, faults))
