"""How one of our own modules is started as another process of the same installation, and what it needs."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def module(name: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that run module `name` with this interpreter and these sources.

    `-P` keeps the current directory out of the module path: an agent runs as root wherever it was started.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return [sys.executable, "-P", "-m", name], {**os.environ, "PYTHONPATH": path}


def raise_descriptor_limit() -> None:
    """As many descriptors as we may have: the freeze needs one for each socket and thread that is moved.

    What a session of sshd starts with is often 1,024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def allow_descriptors(count: int) -> int:
    """Raise the limit to so many if it is lower and may be raised; what it is then."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return count
    if hard < count:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))
            return count
    return hard
