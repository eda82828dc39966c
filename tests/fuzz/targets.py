"""All targets by name."""

from __future__ import annotations

from fuzz import processes, streams, texts
from fuzz.target import Target

TARGETS: dict[str, Target] = {
    target.name: target for target in (*streams.TARGETS, *texts.TARGETS, *processes.TARGETS)
}
