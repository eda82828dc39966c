"""Durations, sizes and rates: as people write them, and as they like to read them."""

from __future__ import annotations

import re
from typing import Final

_NOTHING: Final = re.compile(r"0(us|ms|s|min)")
_NUMBER: Final = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)(/s)?")
_MILLISECONDS: Final = {"us": 0.001, "ms": 1.0, "s": 1000.0, "min": 60_000.0}
_BYTES: Final = {
    "bit": 0.125,
    "kbit": 125.0,
    "mbit": 125e3,
    "gbit": 125e6,
    "b": 1.0,
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "kib": 1024.0,
    "mib": 1024.0**2,
    "gib": 1024.0**3,
}
_PREFIXES: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def parse_duration(text: str) -> float:
    """`50ms`, `0.2s`, `1min` as milliseconds; ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[3] or match[2].lower() not in _MILLISECONDS:
        raise ValueError(f"{text!r} is not a duration: write a number and us, ms, s or min, as in 50ms")
    milliseconds = float(match[1]) * _MILLISECONDS[match[2].lower()]
    if not milliseconds:
        raise ValueError(f"{text!r}: a duration must be longer than nothing")
    return milliseconds


def parse_patience(text: str) -> float:
    """A duration, or `0s` for not waiting at all, as milliseconds; ValueError."""
    return 0.0 if _NOTHING.fullmatch(text.strip()) else parse_duration(text)


def parse_bandwidth(text: str) -> int:
    """`100mbit`, `10MB`, `12.5MiB/s` as bytes per second.

    ValueError. Bits only as "bit", so "Mb" are bytes too.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in _BYTES:
        raise ValueError(f"{text!r} is not a rate: write a number and a unit, as in 100mbit, 10MB or 10MiB")
    rate = round(float(match[1]) * _BYTES[match[2].lower()])
    if rate < 1024:
        raise ValueError(f"{text!r} is too little to be meant: at least 1KiB a second")
    return rate


def size(count: float) -> str:
    """Bytes with a binary prefix and three significant digits: "1.04 GiB"."""
    step = 0
    while count >= 999.5 and step < len(_PREFIXES) - 1:
        count /= 1024
        step += 1
    return f"{count:.0f} B" if step == 0 else f"{_three_digits(count)} {_PREFIXES[step]}B"


def rate(bytes_per_second: float) -> str:
    return f"{size(bytes_per_second)}/s"


def milliseconds(value: float) -> str:
    """A duration with three significant digits: "0.93 ms", "14.8 ms", "2.31 s"."""
    if value >= 999.5:
        return seconds(value / 1000)
    return f"{value:.2f} ms" if value < 10 else f"{_three_digits(value)} ms"


def seconds(value: float) -> str:
    if value < 0.9995:
        return milliseconds(value * 1000)
    if value < 119.5:
        return f"{_three_digits(value)} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s"


def count(number: int) -> str:
    """A number with its thousands set apart."""
    return f"{number:,}"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
