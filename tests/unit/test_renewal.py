"""How an engine gets a new link from its front, or hears that there is none."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from agent.renewal import Asking, Giving
from transport.frames import LinkClosed


@pytest.fixture
def giving() -> Iterator[Giving]:
    ours = Giving()
    yield ours
    ours.close()


def never() -> bool:
    return False


def test_a_link_is_handed_over(giving: Giving) -> None:
    ours, theirs = socket.socketpair()
    giving.give(theirs)
    link = Asking(giving.theirs).next(never)
    assert link is not None
    with ours, link:
        ours.sendall(b"hello")
        assert link.recv(5) == b"hello"


def test_why_there_is_none(giving: Giving) -> None:
    giving.refuse("the host is gone")
    with pytest.raises(LinkClosed, match="the host is gone"):
        Asking(giving.theirs).next(never)


def test_a_link_that_cannot_be_handed_over_is_none(giving: Giving) -> None:
    """The engine must not wait for it for ever."""
    link = socket.socket()
    link.close()
    giving.give(link)
    with pytest.raises(LinkClosed):
        Asking(giving.theirs).next(never)


def test_somebody_gives_up_meanwhile(giving: Giving) -> None:
    assert Asking(giving.theirs).next(lambda: True) is None
