"""Health gates: ask a URL until it answers 200, and say in plain words why it does not.

The objects that a role creates in an API go the same way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

from firstboot.protocol.errors import LocalError
from firstboot.protocol.plan import CreateObject, Probe
from firstboot.web import Answer, Unanswered, ask

TRY_SECONDS = 10.0  # from the connection to the answer's last byte
FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0  # seconds between tries, doubling
MAX_ANSWER = 1024 * 1024  # bytes of an answer that is looked through
MAX_BODY = 200  # characters of an error page, for the reason


class ProbeFailed(LocalError):
    """The gate did not open; the message is the last reason, `detail` whatever tells more."""

    detail = ""


def probe(step: Probe, root: Path, seconds: float = TRY_SECONDS) -> None:
    """Ask once; ProbeFailed unless the answer is 200 and holds what it must.

    `seconds` is the limit for all of it. The paths in `step` are under `root`.
    """
    answer = _asked(step, root, seconds, "GET")
    if answer.status != HTTPStatus.OK:
        raise _refusal(answer)
    if step.contains not in answer.body.decode(errors="replace"):
        raise ProbeFailed(step.lacks or f"its answer lacks {step.contains}")


def create(step: CreateObject, root: Path, content: bytes, seconds: float = TRY_SECONDS) -> None:
    """Have an API make the object, which is `content`; ProbeFailed unless it then has one.

    One of that name which is there already is left as it is (409, RFC 9110).
    """
    answer = _asked(step, root, seconds, "POST", content)
    if answer.status not in (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.CONFLICT):
        raise _refusal(answer)


def _refusal(answer: Answer) -> ProbeFailed:
    body = _printable(answer.body[: 4 * MAX_BODY].decode(errors="replace"))
    return ProbeFailed(f"HTTP {answer.status}: {body}" if body else f"HTTP {answer.status}")


def _asked(
    step: Probe | CreateObject,
    root: Path,
    seconds: float,
    method: str,
    content: bytes | None = None,
) -> Answer:
    def path(name: str) -> str:
        return str(root / name.lstrip("/")) if name else ""

    try:
        return ask(
            method,
            step.url,
            {"Content-Type": "application/json"} if content else {},
            content,
            seconds=seconds,
            most=MAX_ANSWER,
            authority=path(step.authority),
            certificate=path(step.certificate),
            key=path(step.key),
        )
    except Unanswered as error:
        raise ProbeFailed(str(error)) from None


def wait(
    step: Probe,
    root: Path,
    cancelled: threading.Event | None = None,
    tried: Callable[[str], None] | None = None,
) -> None:
    """Ask until the answer is 200; ProbeFailed with the last reason after `step.deadline` s.

    Blocks; setting `cancelled` ends it with ProbeFailed at the next pause. After each try in vain
    `tried` gets its reason; what it raises ends the waiting.
    """
    cancelled = cancelled or threading.Event()
    end, pause = time.monotonic() + step.deadline, FIRST_PAUSE
    while True:
        left = end - time.monotonic()
        try:
            return probe(step, root, min(TRY_SECONDS, max(left, 0.1)))
        except ProbeFailed as error:
            left = end - time.monotonic()
            if left <= 0:
                raise ProbeFailed(f"not healthy after {step.deadline:.0f} s: {error}") from None
            reason = str(error)
        if tried is not None:
            tried(reason)
        # The last pause ends at the deadline, so there is a try at that moment too.
        if cancelled.wait(min(pause, left)):
            raise ProbeFailed("waiting for it to be healthy was cancelled")
        pause = min(2 * pause, LAST_PAUSE)


def _printable(text: str) -> str:
    """One line without control characters: it goes to the status and the console."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(clean.split())[:MAX_BODY]
