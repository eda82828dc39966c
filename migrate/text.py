"""Text from elsewhere (names of programs, messages of other hosts) made fit for a terminal."""

from __future__ import annotations


def clean(text: str) -> str:
    """`text` on one line, without anything a terminal would obey: control characters become escapes."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text
    )
