"""The destination's half of `--verify`: is the shadow what the source says it is?"""

from __future__ import annotations

from typing import Final

from agent import protocol
from agent.kernel import procfs, ptrace
from agent.kernel.arch.x86_64 import PAGE
from agent.layout import Mapping, merge
from agent.pageset import PageSet
from agent.shadow import Shadow
from agent.soft_dirty import SoftDirty
from agent.verify import Masks, digest

_ZERO: Final = bytes(PAGE)
_SPECIAL: Final = ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")


def check_verify(shadow: Shadow, message: protocol.Verify) -> list[tuple[int, int]]:
    """The pieces whose digest differs."""
    masks = Masks(message.masked)
    return [
        (start, end)
        for start, end, expected in message.pieces
        if digest(shadow.memory, start, end, masks) != expected
    ]


def check_rest(shadow: Shadow, message: protocol.Verify, rebuild: protocol.Rebuild) -> list[str]:
    return [*_surplus(shadow, message), *_mappings(shadow), *_registers(shadow, rebuild)]


def _surplus(shadow: Shadow, message: protocol.Verify) -> list[str]:
    """Pages that the shadow has and the source has not must be zero."""
    specials = [(m.start, m.end) for m in procfs.maps(shadow.pid) if m.name in _SPECIAL]
    pages = SoftDirty(shadow.pid, None)
    try:
        own = pages.scan([], specials, protect=False).present
    finally:
        pages.close()
    found = []
    for start, end in PageSet(own).without(PageSet(message.present)).ranges():
        for page in range(start, end, PAGE):
            if shadow.memory.read(page, PAGE) != _ZERO:
                found.append(f"page {page:#x} that the original does not have")
    return found


def _mappings(shadow: Shadow) -> list[str]:
    actual = [
        Mapping(m.start, m.end, m.protection) for m in procfs.maps(shadow.pid) if m.name not in _SPECIAL
    ]
    expected = [Mapping(m.start, m.end, m.protection) for m in shadow.layout]
    if merge(actual) == merge(expected):
        return []
    odd = set(merge(actual)) ^ set(merge(expected))
    return [f"mapping {m.start:#x}-{m.end:#x}" for m in sorted(odd, key=lambda m: m.start)]


def _registers(shadow: Shadow, rebuild: protocol.Rebuild) -> list[str]:
    found = []
    for thread in rebuild.process.threads:
        tid = shadow.threads[thread.tid]
        if ptrace.get_registers(tid) != thread.registers:
            found.append(f"registers of task {thread.tid}")
        if ptrace.get_xstate(tid) != thread.xstate:
            found.append(f"vector registers of task {thread.tid}")
        if ptrace.get_sigmask(tid) != thread.sigmask:
            found.append(f"signal mask of task {thread.tid}")
    return found
