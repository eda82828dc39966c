"""What must be true of a received message beyond what each of its fields may be (`agent.bounds`).

`check` is all that a message by itself can be asked, and is called where it is decoded (`agent.protocol`);
the rest compares it with what was received before. Nothing here is done for a frame of pages: its table is
checked by `transport.frames`, and against the layout by the destination.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from agent.kernel.arch.x86_64 import PAGE, TASK_SIZE
from agent.layout import Mapping
from agent.pageset import Range
from agent.resources import service_address, signals, tcp, waits
from transport.frames import ProtocolError

if TYPE_CHECKING:
    from agent import protocol
    from agent.descriptors import Descriptor
    from agent.shadow import Special
    from agent.state import ProcessState, ThreadState

PIECE: Final = 64 * PAGE  # of memory that one digest is of, at most
_ROOM: Final = 1 << 30  # bytes in one place that a layout must leave to us
_SPECIALS: Final = frozenset({"[vdso]", "[vvar]", "[vvar_vclock]"})
_UNLIMITED: Final = (1 << 64) - 1
_MAX_SECONDS: Final = 1 << 34  # of a timer: more than the kernel's 64 bits of nanoseconds (ktime_t)
_SECOND: Final = 1_000_000_000
_MAX_SAID: Final = 4 << 20  # characters


def check(message: msgspec.Struct) -> None:
    """ValueError if it cannot be meant."""
    wrong = _CHECKS.get(type(message).__struct_config__.tag)
    if wrong is not None:
        wrong(message)


def _offer(message: protocol.Offer) -> None:
    _unique(message.tids, "thread")
    if message.pid not in message.tids:
        raise ValueError(f"a process {message.pid} without its first thread")
    _unique((s.name for s in message.specials), "mapping")
    for special in message.specials:
        if special.name not in _SPECIALS:
            raise ValueError(f"a mapping {special.name!r} of the kernel's")
    _in_order([(s.start, s.end) for s in message.specials])
    _limits(message.limits)
    for listener in message.listeners:
        tcp.validate(listener)
    for connection in message.connections:
        tcp.validate(connection)
    for address in message.addresses:
        service_address.validate(address)


def _also(message: protocol.Also) -> None:
    for listener in message.listeners:
        tcp.validate(listener)


def _layout(layout: Sequence[Mapping]) -> None:
    """Some thousand of them may come in the pause."""
    position, room, bits = 0, 0, 0
    for mapping in layout:
        start, end, offset = mapping.start, mapping.end, mapping.offset
        if start < position or end <= start:
            raise ValueError(f"a mapping {start:#x}-{end:#x} out of order")
        if offset and mapping.file < 0:
            raise ValueError(f"a mapping {start:#x}-{end:#x} of no file, with an offset")
        room = max(room, start - position)
        bits |= start | end | offset
        position = end
    if bits % PAGE:
        raise ValueError("a mapping that does not begin or end with a page")
    if max(room, TASK_SIZE - position) < _ROOM:
        raise ValueError("a layout that leaves no room")


def _in_order(ranges: Iterable[Range]) -> None:
    position = 0
    for start, end in ranges:
        if start < position or end <= start or (start | end) % PAGE:
            raise ValueError(f"a range {start:#x}-{end:#x} out of order")
        position = end


def _rebuild(message: protocol.Rebuild) -> None:
    process = message.process
    _unique(process.tids, "thread")
    if len(process.threads) != 1 or process.threads[0].tid not in process.tids:
        raise ValueError("not the first thread, and it alone")
    _thread(process.threads[0])
    _queue(process.pending)
    _limits(process.limits)
    _unique((number for number, _ in process.actions), "action for signal")
    _timers(process)


def _timers(process: ProcessState) -> None:
    for itimer in process.itimers:
        _timer(itimer, 1_000_000)
    _unique((state.timer.id for state in process.timers), "timer")
    for state in process.timers:
        _timer(state.setting, _SECOND)


def _timer(setting: bytes, fractions: int) -> None:
    """`setting`: interval and value, each in seconds and fractions of one."""
    *pair, value_s, value_f = struct.unpack("<4q", setting)
    for seconds, fraction in (pair, (value_s, value_f)):
        if not 0 <= seconds < _MAX_SECONDS or not 0 <= fraction < fractions:
            raise ValueError(f"a timer of {seconds} s and {fraction}")


def _threads(message: protocol.Threads) -> None:
    _unique((thread.tid for thread in message.threads), "thread")
    for thread in message.threads:
        _thread(thread)


def _thread(thread: ThreadState) -> None:
    _queue(thread.pending)
    if thread.remaining_ns is not None and not waits.can_go_on(thread.registers):
        raise ValueError(f"thread {thread.tid} waits in call {thread.registers.orig_rax}")


def _queue(queue: Iterable[bytes]) -> None:
    for siginfo in queue:
        if not 1 <= signals.number_of(siginfo) <= 64:
            raise ValueError(f"a signal {signals.number_of(siginfo)}")


def _limits(limits: Iterable[tuple[int, int]]) -> None:
    for pair in limits:
        for limit in pair:
            if limit >> 63 and limit != _UNLIMITED:
                raise ValueError(f"a limit of {limit}")


def _verify(message: protocol.Verify) -> None:
    _in_order(message.present)
    for start, end, _ in message.pieces:
        if not 0 < end - start <= PIECE or (start | end) % PAGE:
            raise ValueError(f"a piece {start:#x}-{end:#x}")


def _late(message: protocol.Commit | protocol.Late) -> None:
    _queue(siginfo for _, siginfo in message.signals)


def _said(message: protocol.Answer | protocol.Ready | protocol.Live | protocol.Done) -> None:
    """It becomes part of a report, which is one line to others."""
    parts = [one for name in ("blockers", "notices", "phases") for one in getattr(message, name, ())]
    said = sum(len(word) for one in parts for word in msgspec.structs.astuple(one) if isinstance(word, str))
    if said > _MAX_SAID:
        raise ValueError(f"{said} characters for a report")


def _unique(found: Iterable[object], what: str) -> None:
    seen: set[object] = set()
    for one in found:
        if one in seen:
            raise ValueError(f"{what} {one} twice")
        seen.add(one)


_CHECKS: Final[dict[Any, Callable[[Any], None]]] = {
    "offer": _offer,
    "also": _also,
    "prepare": lambda message: _layout(message.layout),
    "layout": lambda message: _layout(message.mappings),
    "discard": lambda message: _in_order(message.ranges),
    "guards": lambda message: _in_order(message.ranges),
    "rebuild": _rebuild,
    "threads": _threads,
    "verify": _verify,
    "commit": _late,
    "late": _late,
    "answer": _said,
    "ready": _said,
    "live": _said,
    "done": _said,
}


# --- compared with what was received, or sent, before ---


def answer_fits(answer: protocol.Answer, offer: protocol.Offer) -> None:
    """ProtocolError if it asks for a file that was not offered: whatever it names would be read and sent."""
    offered = {file.path for file in (*offer.files, *offer.opened)} if offer.copy_files else set()
    for path in answer.missing:
        if path not in offered:
            raise ProtocolError(f"the destination asks for {path}, which was not offered")


def apart(layout: Sequence[Mapping], specials: Sequence[Special]) -> None:
    """ProtocolError if a mapping lies where the vDSO is to be."""
    for special in specials:
        for mapping in layout:
            if mapping.start < special.end and special.start < mapping.end:
                raise ProtocolError(f"a mapping {mapping.start:#x} over {special.name}")


def add_numbers(taken: set[int], descriptors: Sequence[Descriptor]) -> None:
    """Take the numbers of more descriptors; ProtocolError if one is taken already."""
    for descriptor in descriptors:
        for number, _ in descriptor.numbers:
            if number in taken:
                raise ProtocolError(f"descriptor {number} twice")
            taken.add(number)
