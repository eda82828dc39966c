"""Shell completion: commands, options and their values by click, names of hosts from ssh's own files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

SHELLS: Final = ("bash", "zsh", "fish")
_FILES: Final = ("~/.ssh/config", "~/.ssh/known_hosts", "/etc/hosts")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def script(command: click.Command, shell: str, program: str) -> str:
    """What a shell reads to complete `program`."""
    found = get_completion_class(shell)
    assert found is not None  # click has all of SHELLS
    return found(command, {}, program, f"_{program.upper().replace('-', '_')}_COMPLETE").source()


def hosts(incomplete: str) -> list[CompletionItem]:
    """Known hosts that begin as what was typed, behind its `user@`."""
    user, at, begun = incomplete.rpartition("@")
    return [CompletionItem(f"{user}{at}{name}") for name in sorted(set(_known())) if name.startswith(begun)]


def _known() -> Iterator[str]:
    for file in _FILES:
        try:
            lines = Path(file).expanduser().read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            yield from filter(_NAME.fullmatch, _named(Path(file).name, line.split()))


def _named(file: str, words: list[str]) -> list[str]:
    """The hosts that a line names; addresses, patterns and hashed names are no use to a person."""
    if len(words) < 2 or words[0].startswith("#"):
        return []
    if file == "config":
        return words[1:] if words[0].lower() == "host" else []
    names = words[0].split(",") if file == "known_hosts" else words[1:]
    return [name for name in names if not name[0].isdigit()]
