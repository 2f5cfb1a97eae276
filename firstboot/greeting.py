"""What a person who logs in is told of this host: one sentence and the remedy, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from firstboot import host
from firstboot.protocol.errors import FirstbootError

MAX_LINE = 400  # characters; a person reads this before doing something else
FIRST, NEXT = "firstboot: ", "  "


def greet(root: Path, shown: dict[str, Any]) -> None:
    """Show this status where people log in. A host that runs its role says nothing there."""
    with suppress(FirstbootError):  # a full /run must stop neither host nor journal
        host.tell_logins(root, greeting(shown))


def greeting(shown: dict[str, Any]) -> str:
    """Sentence, hint, and the gravest problem with its remedy; empty once all is well."""
    if shown["state"] == "running":
        return ""
    lines = [_line(text) for text in _texts(shown) if text]
    return "".join(f"{NEXT if i else FIRST}{line}\n" for i, line in enumerate(lines))


def _texts(shown: dict[str, Any]) -> Iterator[str]:
    yield shown["sentence"]
    yield shown.get("hint", "")
    problems = [p for p in shown["problems"] if p.get("blocking")]
    for problem in problems[:1]:
        if problem["text"] != shown["sentence"]:
            yield problem["text"]
        yield from problem["hint"].splitlines()[:2]


def _line(text: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text[:MAX_LINE])
    return clean if len(text) <= MAX_LINE else f"{clean}…"
