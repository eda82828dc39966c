"""Which version of the project this is."""

from __future__ import annotations

from importlib import metadata


def installed() -> str:
    """The version as it was installed; a word in brackets for sources that were not."""
    try:
        return metadata.version("migrate")
    except metadata.PackageNotFoundError:
        return "(not installed)"
