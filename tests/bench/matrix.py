"""What is measured: the cases of each benchmark, and which of them a quick run takes."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Final

from bench.results import Case, Workload

QUICK: Final = (
    "memory/64MiB/0",
    "memory/256MiB/50",
    "memory/1GiB/50",
    "threads/10",
    "threads/1000",
    "mappings/5000",
    "connections/100",
    "content/compressible",
    "links/1gbit",
)
SIZES: Final = {"64 MiB": 64, "256 MiB": 256, "1 GiB": 1024, "4 GiB": 4096}
FILLS: Final = {"incompressible": "random", "compressible": "text", "zero-rich": "sparse"}
AT_MOST: Final = {"1 GiB, 500": 3, "4 GiB, 50": 3, "4 GiB, 500": 2}
LINKS: Final = {"100mbit": "100 Mbit/s", "1gbit": "1 Gbit/s", None: "unlimited"}


def _memory() -> list[Case]:
    return [
        Case(
            benchmark="memory",
            name=f"memory/{size.replace(' ', '')}/{rate}",
            series=f"{rate} MB/s written",
            x=size,
            workload=Workload(megabytes=megabytes, rate=rate),
            at_most=AT_MOST.get(f"{size}, {rate}"),
        )
        for size, megabytes in SIZES.items()
        for rate in (0, 50, 500)
    ]


def _threads() -> list[Case]:
    return [
        Case(
            benchmark="threads",
            name=f"threads/{count}",
            series="16 MiB",
            x=str(count),
            workload=Workload(threads=count),
        )
        for count in (1, 10, 100, 1000)
    ]


def _mappings() -> list[Case]:
    return [
        Case(
            benchmark="mappings",
            name=f"mappings/{count}",
            series="64 MiB",
            x=str(count),
            workload=Workload(megabytes=64, mappings=count, rate=5),
        )
        for count in (50, 5000)
    ]


def _connections() -> list[Case]:
    return [
        Case(
            benchmark="connections",
            name=f"connections/{count}",
            series="16 MiB",
            x=str(count),
            workload=Workload(connections=count),
        )
        for count in (1, 100, 1000)
    ]


def _content() -> list[Case]:
    return [
        Case(
            benchmark="content",
            name=f"content/{name}",
            series="1 GiB, 5 MB/s written",
            x=name,
            workload=Workload(megabytes=1024, rate=5, fill=fill),
        )
        for name, fill in FILLS.items()
    ]


def _links() -> list[Case]:
    return [
        Case(
            benchmark="links",
            name=f"links/{bandwidth or 'unlimited'}",
            series="128 MiB, 2 MB/s written",
            x=name,
            workload=Workload(megabytes=128, rate=2),
            bandwidth=bandwidth,
        )
        for bandwidth, name in LINKS.items()
    ]


def _slowdown() -> list[Case]:
    return [
        Case(
            benchmark="slowdown",
            name="slowdown/computing",
            series="1 GiB, 50 MB/s written, one thread computing",
            x="computing",
            workload=Workload(megabytes=1024, rate=50, spin=True),
        )
    ]


def cases() -> list[Case]:
    """The whole matrix; cases on the same kind of link are neighbours."""
    return [*_memory(), *_threads(), *_mappings(), *_connections(), *_content(), *_slowdown(), *_links()]


def chosen(only: tuple[str, ...], quick: bool) -> list[Case]:
    """The cases that match one of `only` (names, patterns, or how a name begins); ValueError if none does."""
    found = [case for case in cases() if not quick or case.name in QUICK]
    if only:
        found = [case for case in cases() if any(_matches(case.name, pattern) for pattern in only)]
    if not found:
        raise ValueError(
            f"no case is called {', '.join(only)}; there are: {', '.join(case.name for case in cases())}"
        )
    return found


def _matches(name: str, pattern: str) -> bool:
    return fnmatch(name, pattern) or name == pattern or name.startswith(f"{pattern}/")
