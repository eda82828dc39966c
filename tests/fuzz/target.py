"""What is fuzzed: a decoder, valid input for it, and how such input is changed."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import msgspec
from fuzz.mutate import Mutate

from transport import frames

# what decoding n bytes may allocate at its peak: `room` + FACTOR * n bytes, all of it told by tracemalloc
ROOM = 1 << 20
ROOM_FOR_PAGES = 5 * frames.MAX_PAGES  # a body, what it unpacks to, and the frame before it
FACTOR = 64


class Target(msgspec.Struct, frozen=True):
    """`run` lets through whatever the decoder raises that it must not, and asserts what must be true of what
    was understood; it says whether anything was."""

    name: str
    run: Callable[[bytes], bool]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate
    room: int = ROOM


def peak_of(target: Target, data: bytes) -> int:
    """Bytes that a run allocates at most at a time."""
    tracemalloc.start()
    try:
        target.run(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def allowed(target: Target, data: bytes) -> int:
    return target.room + FACTOR * len(data)
