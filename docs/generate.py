#!/usr/bin/env python3
"""Render docs/what-migrates.md, and the diagrams of states in docs/architecture.md, from the code that
decides it, so that the pages cannot lie.

    python docs/generate.py            write the pages
    python docs/generate.py --check    exit status 1 if one is not what would be written

The prose is docs/what-migrates.in.md; a line `{{name}}` in it is replaced by the table `name` of TABLES. Of
descriptors we ask agent.kinds, of mappings agent.resources.mappings, of a process agent.state. Every other
refusal is found where it is made: calls that build a Blocker, in the modules of SECTIONS.
"""

from __future__ import annotations

import ast
import functools
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgspec

from agent import inventory, kinds, states
from agent.api import Blocker
from agent.descriptors import OpenFile, SourceProcess
from agent.resources import char_device, mappings
from agent.resources.tcp import options
from agent.state import Credentials, ProcessState, ThreadState

DOCS: Final = Path(__file__).resolve().parent
AGENT: Final = DOCS.parent / "agent"
TEMPLATE: Final = DOCS / "what-migrates.in.md"
PAGE: Final = DOCS / "what-migrates.md"
ARCHITECTURE: Final = DOCS / "architecture.md"
NOTE: Final = (
    "<!-- Rendered by docs/generate.py from docs/what-migrates.in.md and the code. Do not edit. -->\n"
)

# modules that refuse, by section of the page
SECTIONS: Final = {
    "process": ("inventory.py", "source.py"),
    "memory": ("resources/mappings.py",),
    "files": (
        "descriptors.py",
        *(f"resources/{name}.py" for name in ("regular_file", "file_locks", "pipe", "epoll")),
        *(f"resources/{name}.py" for name in ("unix_socket", "memfd")),
    ),
    "tcp": ("resources/tcp/blockers.py",),
    "addresses": ("network.py", "resources/service_address.py"),
    "destination": ("destination.py", "suitability.py", "resources/files.py"),
}
# how a refusal is written down: the functions that build one, and what their arguments are
BUILDERS: Final = {
    "Blocker": ("kind", "what", "why", "hint"),
    "ApiBlocker": ("kind", "what", "why", "hint"),
    "_blocker": ("kind", "what", "why", "hint"),
    "_refusal": ("kind", "what", "why", "hint"),
    "add": ("kind", "why", "hint"),
}
# what is planned for kinds that are refused today
PLANNED: Final = {
    "trees of processes": ("child-processes", "zombie", "shared-memory", "memfd", "external-pipe", "pidfd"),
    "every kind of descriptor and lock": (
        *("unix-socket", "inotify", "file-lock", "signal-driven-io", "packet-pipe", "deleted-file"),
        *("epoll-stale-entry", "udp-socket"),
    ),
    "terminals carried over the link": ("terminal",),
    "sandboxes and namespaces": (
        *("seccomp", "chroot"),
        *(f"{name}-namespace" for name in (*inventory._NAMESPACES, "mnt")),
    ),
    "more kinds of memory": ("hugetlb", "sealed-mapping", "aio"),
    "another kernel's vDSO": ("vdso-differs",),
    "stopped processes": ("stopped",),
}
# what only the run can tell, in words
AT_RUN_TIME: Final = {
    "address-primary": "the host itself needs it: a route, or a whole network, goes with it",
    "file-owner": "its owner or mode there is another: its descriptor could give more than it did",
    "unix-socket": "it listens, is bound, or another process has it or its other end, and stays",
    "unix-message": "its next message carries descriptors (SCM_RIGHTS) or credentials, or is too long",
    "unix-service": "nothing is bound to that path there, or not everybody may send to it",
    "not-owned": "a user asked for it, and it is not wholly that user's",
    "file-differs": "its size, build id or content is another there, or it is no regular file that opens",
}
PLANS: Final = {kind: plan for plan, found in PLANNED.items() for kind in found}

THREAD: Final = {
    "tid": "its number, as the process sees it",
    "registers": "general registers, segment bases (TLS), and where it is in a system call",
    "xstate": "the whole xsave area: x87, SSE, AVX, AVX-512, PKRU, whatever the CPU has switched on",
    "sigmask": "blocked signals",
    "comm": "name",
    "scheduling": "policy, priority, nice value, deadline parameters (`sched_attr`), CPU affinity",
    "pending": "signals queued for this thread, in order, each with its `siginfo`",
    "altstack": "alternate signal stack",
    "robust_list": "list of robust mutexes",
    "clear_child_tid": "the word that is cleared and woken at its end (`pthread_join`)",
    "rseq": "restartable sequences; a thread inside one goes on at its abort handler",
    "timer_slack": "timer slack",
    "pdeathsig": "parent-death signal",
    "remaining_ns": "what is left of an interrupted sleep, `poll` or futex wait",
}
PROCESS: Final = {
    "threads": "all threads, under their numbers (a new pid namespace where one of them is taken)",
    "tids": "their numbers",
    "actions": "signal handlers and ignored signals, with their flags and masks",
    "pending": "signals queued for the process, in order, each with its `siginfo`",
    "itimers": "`setitimer` timers; time goes on during the pause",
    "timers": "POSIX timers under their numbers; the overrun count of a queued expiry is not kept",
    "credentials": "see below",
    "limits": "all resource limits, soft and hard (a hard limit that may not be raised is said)",
    "memory": "where text, data, heap, stack, arguments and environment are (`brk` to the byte)",
    "auxv": "auxiliary vector",
    "executable": "`/proc/PID/exe`",
    "cwd": "working directory, by path",
    "umask": "file mode mask",
    "personality": "personality",
    "oom_score_adj": "OOM score adjustment (one that may not be lowered is said)",
    "dumpable": "dumpable flag",
    "child_subreaper": "child subreaper flag",
    "thp_disable": "transparent huge pages switched off",
    "lock_future": "whether memory that it maps later is locked (`mlockall(MCL_FUTURE)`)",
    "captured_at": "its monotonic clock, which goes on by the time that really passed",
}
CREDENTIALS: Final = {
    "uids": "real, effective, saved and file system user",
    "gids": "real, effective, saved and file system group",
    "groups": "supplementary groups",
    "inheritable": "inheritable capabilities",
    "permitted": "permitted capabilities",
    "effective": "effective capabilities",
    "bounding": "capability bounding set",
    "ambient": "ambient capabilities",
    "securebits": "securebits",
    "no_new_privs": "no_new_privs",
}


class Refusal(NamedTuple):
    """One reason as the source says it; what is only known at run time is "…"."""

    kind: str
    why: str
    hint: str


# --- refusals, read from the source -------------------------------------------------------------------------


class Scope:
    """What the names in one function, and in its module, may stand for."""

    def __init__(self, module: ast.Module, function: ast.AST) -> None:
        self._values: dict[str, list[tuple[int, ast.expr]]] = {}
        for node in (*module.body, *ast.walk(function)):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._values.setdefault(target.id, []).append((value.lineno, value))
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one, its in zip(target.elts, value.elts, strict=True):
                self._assign(one, its)

    def texts(self, node: ast.expr | None) -> list[str]:
        """The texts that an expression may have; none if it is not known here."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts)]
            case ast.IfExp(body=first, orelse=second):
                return [*self.texts(first), *self.texts(second)]
            case ast.Name(id=name):
                earlier = [(line, value) for line, value in self._values.get(name, []) if line <= node.lineno]
                return self.texts(max(earlier, key=lambda found: found[0])[1]) if earlier else []
        return []


def _arguments(node: ast.AST) -> dict[str, ast.expr] | None:
    """What a node that may refuse something says: a call of a builder, or a yielded (kind, why, hint)."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILDERS:
        positional = dict(zip(BUILDERS[node.func.id], node.args, strict=False))
        return positional | {k.arg: k.value for k in node.keywords if k.arg}
    if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 3:
        return dict(zip(("kind", "why", "hint"), node.value.elts, strict=True))
    return None


@functools.cache
def _called() -> set[str]:
    """The names of all functions and methods that the agent calls somewhere."""
    nodes = (node for path in AGENT.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    names = {what.id for what in called if isinstance(what, ast.Name)}
    return names | {what.attr for what in called if isinstance(what, ast.Attribute)}


def _in_module(path: Path, called: set[str]) -> Iterator[Refusal]:
    module = ast.parse(path.read_text())
    for function in module.body:
        if isinstance(function, ast.FunctionDef) and function.name not in called:
            continue  # nobody asks it, so nobody is refused by it
        scopes = function.body if isinstance(function, ast.ClassDef) else [function]
        for one in scopes:
            scope = Scope(module, one)
            for said in _said(one):
                for kind in scope.texts(said.get("kind")):
                    whys, hints = scope.texts(said.get("why")), scope.texts(said.get("hint"))
                    yield from (Refusal(kind, why, (hints or [""])[0]) for why in whys or [""])


def _said(function: ast.AST) -> list[dict[str, ast.expr]]:
    """What a function says in refusing, from its beginning to its end."""
    nodes = sorted((n for n in ast.walk(function) if isinstance(n, ast.expr)), key=lambda node: node.lineno)
    return [said for node in nodes if (said := _arguments(node)) is not None]


def refusals(section: str) -> list[Refusal]:
    """All refusals of a section, each once."""
    called = _called()
    found = [r for name in SECTIONS[section] for r in _in_module(AGENT / name, called)]
    if section == "memory":
        found += [Refusal(kind, text, "") for kind, text in mappings._REFUSED.values()]
    return list(dict.fromkeys(e for r in found for e in _expanded(r)))


def _expanded(refusal: Refusal) -> Iterable[Refusal]:
    if not refusal.why:
        return [refusal._replace(why=AT_RUN_TIME[refusal.kind])]
    if refusal.kind != "…-namespace":
        return [refusal]
    return [
        Refusal(f"{name}-namespace", refusal.why.replace("…", name, 1), refusal.hint)
        for name in inventory._NAMESPACES
    ]


# --- descriptors, asked of the registry ---------------------------------------------------------------------


def _file(**said: Any) -> OpenFile:
    plain: dict[str, Any] = {"numbers": ((3, False),), "link": "", "flags": 0, "position": 0, "mode": 0}
    plain |= {"device": 0, "inode": 0, "size": 0, "links": 1, "owner": (0, 0), "info": []}
    return OpenFile(**plain | said)


def _samples() -> Iterator[tuple[str, OpenFile]]:
    """(how a person calls it, a description of that kind) of what no module of agent.resources recognises."""
    for prefix in kinds.REFUSED:
        yield f"`{prefix}…`" if prefix[-1] in "[:" else f"`{prefix}`", _file(link=prefix)
    yield "a terminal", _file(mode=stat.S_IFCHR, device=os.makedev(136, 0))
    yield "any other device", _file(mode=stat.S_IFCHR, device=os.makedev(10, 200))
    for family, kind, protocol in (
        (socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_UDP),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        (socket.AF_NETLINK, socket.SOCK_RAW, 0),
        (socket.AF_PACKET, socket.SOCK_DGRAM, 0),
    ):
        name = f"{family.name} {kind.name}"
        yield f"a socket, `{name}`", _file(mode=stat.S_IFSOCK, socket=(family, kind, protocol))
    yield "anything else", _file(link="anon_inode:[unheard-of]")


def unmovable_descriptors() -> list[tuple[str, Blocker]]:
    """What agent.kinds answers for each; ValueError if it would move one of them."""
    nobody = cast(SourceProcess, None)  # not asked: no kind recognises these
    found = []
    for name, file in _samples():
        if (kind := kinds.kind_of(file)) is not None:
            raise ValueError(f"{name} is movable now, as {kind.NAME}")
        found.append((name, kinds.blockers(file, nobody)[0]))
    return found


def all_kinds() -> set[str]:
    """Every kind of blocker that can be reported."""
    said = {r.kind for section in SECTIONS for r in refusals(section)}
    return said | {blocker.kind for _, blocker in unmovable_descriptors()}


# --- tables -------------------------------------------------------------------------------------------------


def table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _sentence(text: str | None) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def moving_descriptors() -> str:
    rows = ((f"`{kind.NAME}`", _sentence(kind.__doc__), f"`{_path(kind)}`") for kind in kinds.KINDS)
    return table(("kind", "what moves", "where"), rows)


def _path(module: Any) -> str:
    return str(module.__name__).replace(".", "/") + ".py"


def refused_descriptors() -> str:
    found = unmovable_descriptors()
    rows = ((name, f"`{b.kind}`", b.why, b.hint, PLANS.get(b.kind, "")) for name, b in found)
    return table(("descriptor", "kind", "why", "what to do", "planned"), rows)


def refused(section: str) -> Callable[[], str]:
    def render() -> str:
        rows = ((f"`{r.kind}`", r.why, r.hint, PLANS.get(r.kind, "")) for r in refusals(section))
        return table(("kind", "why", "what to do", "planned"), rows)

    return render


def fields(struct: type[msgspec.Struct], meaning: dict[str, str]) -> Callable[[], str]:
    """One row a field; KeyError for a field that nobody has described, ValueError for one that is gone."""

    def render() -> str:
        names = [field.name for field in msgspec.structs.fields(struct)]
        if gone := meaning.keys() - set(names):
            raise ValueError(f"{struct.__name__} has no field {sorted(gone)}")
        return table(("state", "meaning"), ((f"`{name}`", meaning[name]) for name in names))

    return render


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


TABLES: Final[dict[str, Callable[[], str]]] = {
    "thread": fields(ThreadState, THREAD),
    "process": fields(ProcessState, PROCESS),
    "credentials": fields(Credentials, CREDENTIALS),
    "descriptors": moving_descriptors,
    "devices": lambda: _listed(char_device.DEVICES.values()),
    "mapping flags": lambda: _listed(f.name.lower() for f in mappings._VMFLAGS.values() if f.name),
    "tcp options": lambda: _listed(options.OPTIONS),
    "refused tcp options": lambda: _listed((*options.NOT_MOVED, *options.NOT_MOVED_BYTES)),
    "refused descriptors": refused_descriptors,
    **{f"refused {section}": refused(section) for section in SECTIONS},
}


def render() -> str:
    """The page. KeyError for a table that is asked for and not there; ValueError for one not asked for."""
    lines, used = [], set()
    for line in TEMPLATE.read_text().splitlines():
        if line.startswith("{{") and line.endswith("}}"):
            used.add(line[2:-2])
            lines.append(TABLES[line[2:-2]]())
        else:
            lines.append(line)
    if left := TABLES.keys() - used:
        raise ValueError(f"nobody asks for {sorted(left)}")
    return NOTE + "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    pages = {PAGE: render(), ARCHITECTURE: with_diagrams(ARCHITECTURE.read_text())}
    wrong = [page for page, text in pages.items() if not page.exists() or page.read_text() != text]
    if arguments == ["--check"]:
        for page in wrong:
            print(f"{page} is not what the code says: run {sys.argv[0]}", file=sys.stderr)
        return 1 if wrong else 0
    for page in wrong:
        page.write_text(pages[page])
    return 0


def with_diagrams(page: str) -> str:
    """With the tables of agent.states between their markers."""
    for role, table in (("source", states.SOURCE), ("destination", states.DESTINATION)):
        begin, end = f"<!-- begin: states of the {role} -->\n", f"<!-- end: states of the {role} -->\n"
        before, rest = page.split(begin)
        drawn = f"```mermaid\n{states.diagram(table)}\n```\n"
        page = before + begin + drawn + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
