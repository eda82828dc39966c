"""Changed copies of valid input: one that knows its form gets further into a decoder than bytes at random.

Everything here is a function of its `Random`, so that a seed repeats what it did.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any, Final

import msgspec

from transport import frames
from transport.frames import Kind, LinkClosed, ProtocolError

Mutate = Callable[[bytes, Random], bytes]

_EDGES: Final = [
    *(0, 1, 2, 7, 14, 16, 64, 65, 127, 128, 4095, 4096, 0o4000, 65535, 65536, 1 << 20),
    *((1 << bits) + step for bits in (22, 30, 31, 32, 47, 48, 62, 63) for step in (-1, 0, 1)),
    *(0x7FFF_FFFF_F000, (1 << 64) - 1, -1, -2, -4096, -(1 << 31), -(1 << 62), -(1 << 63)),
]
_TEXTS: Final = [
    *("", "\0", "/", "/etc/passwd", "/dev/zero", "../..", "a\0b", "\n", "\x1b[2J", "\u2028", "\U0001f600"),
    *("%s%n", "::1", "fe80::1%lo", "127.0.0.1", "0.0.0.0", "localhost", "example.org", "x" * 5000, "-1"),
]
_FLOATS: Final = [0.0, -1.0, 1e308, -1e308, float("inf"), float("nan"), 5e-324]


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """A few edits anywhere."""
    result = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(result) + 1)
        size = random.choice((1, 1, 2, 4, 8, 16))
        match random.randrange(5):
            case 0:
                del result[at : at + size]
            case 1:
                result[at:at] = random.randbytes(size)
            case 2 if at < len(result):
                result[at] ^= 1 << random.randrange(8)
            case 3:
                whole = struct.pack("<Q", random.choice(_EDGES) % (1 << 64))[: min(size, 8)]
                result[at : at + len(whole)] = whole if random.random() < 0.5 else whole[::-1]
            case _:
                other = random.randrange(len(result) + 1)
                result[at:at] = result[other : other + 8 * size]
    return bytes(result)


# --- trees: what msgpack and JSON have in common ---


def mutate_tree(tree: Any, random: Random) -> Any:
    """One to three nodes of it are another, are gone, or are there more often."""
    box = [copy.deepcopy(tree)]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_places(box))
        holder, key = random.choice(places)
        _change(holder, key, places, random)
        if not box:
            box.append(None)
    return box[0]


def _places(holder: Any) -> Any:
    """(holder, key) of every node below."""
    keys = list(holder) if isinstance(holder, dict) else range(len(holder))
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _places(holder[key])


def _change(holder: Any, key: Any, places: list[tuple[Any, Any]], random: Random) -> None:
    value = holder[key]
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, place = random.choice(places)
            holder[key] = copy.deepcopy(other[place]) if _has(other, place) else None
        case 2 if isinstance(holder, list):
            at = random.randrange(len(holder) + 1)
            holder[at:at] = [copy.deepcopy(value)] * random.choice((1, 1, 2, 20, 300))
        case 3 if isinstance(holder, list) and len(holder) > 1:
            random.shuffle(holder)
        case 4 if isinstance(holder, dict):
            holder[random.choice(_TEXTS)] = value
        case 5:
            holder[key] = random.choice((None, True, [], {}, [[]], "", 0))
        case _:
            holder[key] = _another(value, random)


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _another(value: Any, random: Random) -> Any:
    """A value of the same type, mostly."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        near = value + random.choice((-4096, -1, 1, 4096)) if random.random() < 0.3 else random.choice(_EDGES)
        return min(max(near, -(1 << 63)), (1 << 64) - 1)
    if isinstance(value, float):
        return random.choice(_FLOATS)
    if isinstance(value, str):
        return random.choice(_TEXTS)
    if isinstance(value, bytes):
        return mutate_bytes(value, random) if random.random() < 0.7 else random.randbytes(40)
    return random.choice((value, None, 0, "", b"", random.choice(_EDGES)))


def mutate_msgpack(data: bytes, random: Random) -> bytes:
    try:
        tree = msgspec.msgpack.decode(data)
        return msgspec.msgpack.encode(mutate_tree(tree, random))
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, TypeError):
        return mutate_bytes(data, random)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Of JSON, a document a line."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    try:
        tree = mutate_tree(msgspec.json.decode(lines[at]), random)
        if random.random() < 0.1:
            tree = mutate_tree(tree, random) if random.random() < 0.5 else 10 ** random.choice((19, 30, 400))
        text = json.dumps(tree, ensure_ascii=random.random() < 0.5, default=str)
        lines[at] = text.encode("utf-8", "replace")
    except (msgspec.MsgspecError, ValueError, RecursionError):
        lines[at] = mutate_bytes(lines[at], random)
    return b"\n".join(lines)


# --- streams of frames ---


def frames_of(data: bytes) -> list[tuple[Kind, bytes, int]]:
    """Kind, body and raw size of each whole frame."""
    position, found = 0, []

    def read(size: int) -> bytes:
        nonlocal position
        if position + size > len(data):
            raise LinkClosed("end")
        position += size
        return data[position - size : position]

    try:
        while True:
            header, body = frames.read_frame(read)
            found.append((header.kind, bytes(body), header.raw_size))
    except (LinkClosed, ProtocolError):
        return found


def mutate_stream(data: bytes, random: Random) -> bytes:
    """Frames come in another order, or are other frames; their checksums are right, mostly."""
    whole = frames_of(data)
    if not whole or random.random() < 0.1:
        return mutate_bytes(data, random)
    at = random.randrange(len(whole))
    match random.randrange(6):
        case 0:
            del whole[at]
        case 1:
            whole.insert(random.randrange(len(whole) + 1), whole[at])
        case _:
            whole[at] = _other_frame(*whole[at], random)
    return b"".join(frames.encode(kind, body, raw) for kind, body, raw in whole)


def _other_frame(kind: Kind, body: bytes, raw: int, random: Random) -> tuple[Kind, bytes, int]:
    if kind is Kind.MESSAGE:
        return kind, mutate_msgpack(body, random), 0
    if random.random() < 0.3:
        return kind, body, random.choice((0, 4096, raw + 4096, frames.MAX_PAGES))
    head = 4 + 16 * min(4, len(body) // 16)
    return kind, mutate_bytes(body[:head], random) + body[head:], raw
