"""Why a process that could be moved when checked cannot be moved now: raised in pre-copy and freeze."""

from __future__ import annotations


class Unmovable(Exception):
    """The process became something that cannot be moved. `kind` as of a blocker."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class NotStill(Unmovable):
    """Most of these end by themselves in a moment: worth another try."""
