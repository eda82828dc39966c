"""All targets by name."""

from __future__ import annotations

from itertools import chain

from fuzz import journals, processes, resumption, streams, texts
from fuzz.target import Target

_MODULES = (streams, resumption, texts, journals, processes)
TARGETS: dict[str, Target] = {
    target.name: target for target in chain.from_iterable(each.TARGETS for each in _MODULES)
}
