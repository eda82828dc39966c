"""Durations, sizes and rates, read and written."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import units


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [("50ms", 50.0), ("0.2s", 200.0), ("2 s", 2000.0), ("1min", 60_000.0), ("500us", 0.5), (" 5MS ", 5.0)],
)
def test_durations(text: str, milliseconds: float) -> None:
    assert units.parse_duration(text) == pytest.approx(milliseconds)


@pytest.mark.parametrize(
    "text", ["", "50", "ms", "-5ms", "5 m", "0ms", "1e3ms", "5ms/s", "nan s", "٥ms", "1,5s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("100mbit", 12_500_000),
        ("1gbit", 125_000_000),
        ("1gbit/s", 125_000_000),
        ("10MB", 10_000_000),
        ("10MiB/s", 10 << 20),
        ("1.5kib", 1536),
    ],
)
def test_bandwidths(text: str, rate: int) -> None:
    assert units.parse_bandwidth(text) == rate


@pytest.mark.parametrize("text", ["", "100", "10 apples", "-1MB", "0MB", "1kbit", "10MB/min", "10mbps"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        units.parse_bandwidth(text)


@given(st.text(max_size=12))
def test_any_text_is_a_number_or_refused(text: str) -> None:
    for parse in (units.parse_duration, units.parse_bandwidth):
        try:
            assert parse(text) > 0
        except ValueError as error:
            assert repr(text) in str(error)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.98 KiB"),
        (1 << 20, "1.00 MiB"),
        (1_073_741_824, "1.00 GiB"),
        (218_234_880, "208 MiB"),
        (10_240, "10.0 KiB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert units.size(count) == text


@given(st.integers(0, 1 << 60))
def test_a_size_is_right_to_a_percent_and_short(count: int) -> None:
    number, unit = units.size(count).split()
    factor = 1024 ** ("B", "KiB", "MiB", "GiB", "TiB", "PiB").index(unit)
    assert float(number) * factor == pytest.approx(count, rel=0.01)
    assert len(number) <= 4


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.041, "0.04 ms"),
        (14.84, "14.8 ms"),
        (560.0, "560 ms"),
        (999.7, "1.00 s"),
        (12_340.0, "12.3 s"),
        (150_000.0, "2 min 30 s"),
    ],
)
def test_times(milliseconds: float, text: str) -> None:
    assert units.milliseconds(milliseconds) == text
    assert units.seconds(milliseconds / 1000) == text


def test_a_minute_never_has_sixty_seconds() -> None:
    assert units.seconds(119.6) == "2 min 0 s"
    assert units.seconds(179.7) == "3 min 0 s"
