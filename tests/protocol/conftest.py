"""The core is pure: whatever opens a socket or starts a program in here fails its test."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")


class Guard:
    """Audit hooks (PEP 578) see every way to the outside, and can never be taken out again."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []

    def __call__(self, event: str, _arguments: tuple[object, ...]) -> None:
        if self.on and event.startswith(FORBIDDEN):
            self.seen.append(event)
            raise AssertionError(f"{event} in a test of the core")


_GUARD = Guard()
sys.addaudithook(_GUARD)


@pytest.fixture(autouse=True)
def outside() -> Iterator[list[str]]:
    """What a test tried to do outside of this process; none may stay in the list."""
    _GUARD.seen.clear()
    _GUARD.on = True
    yield _GUARD.seen
    _GUARD.on = False
    assert not _GUARD.seen
