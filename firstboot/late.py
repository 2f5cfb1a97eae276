"""Regular expressions of other people's modules, compiled when first used rather than on import.

Two modules that every start loads compile expressions which no start uses; that is 9 ms of
processor time, a twentieth of all it takes to form.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# What they compile they use by its methods only: that is all a late pattern has.
MODULES = frozenset({"cryptography.x509.name", "yaml.constructor", "yaml.reader", "yaml.resolver"})
_compile = re.compile


class Late:
    """A pattern that is compiled when one of its attributes is first asked for."""

    def __init__(self, pattern: Any, flags: Any) -> None:
        self._given = pattern, flags

    def __getattr__(self, name: str) -> Any:
        pattern, flags = self._given
        found = getattr(_compile(pattern, flags), name)
        setattr(self, name, found)
        return found


@contextmanager
def late_patterns() -> Iterator[None]:
    """While these modules are imported, what they compile is compiled late."""

    def compile_or_not(pattern: Any, flags: Any = 0) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__")
        return Late(pattern, flags) if caller in MODULES else _compile(pattern, flags)

    before, re.compile = re.compile, compile_or_not
    try:
        yield
    finally:
        re.compile = before
