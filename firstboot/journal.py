"""What the service says: to the journal with fields, to the console, and to systemd."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import IO, Any

PREFIX = "firstboot: "
IDENTIFIER = "firstboot"
WARNING, NOTICE = 4, 5  # syslog(3)
# Fixed ids, so that other programs can find these entries (journalctl MESSAGE_ID=...), and
# `journalctl -x` explains them: firstboot.catalog has them too.
MESSAGE_IDS = {
    "stage": "6f1d2a0c51f74b4db9a3b1c1d57a0e11",
    "progress": "6f1d2a0c51f74b4db9a3b1c1d57a0e12",
    "problem": "6f1d2a0c51f74b4db9a3b1c1d57a0e13",
    "note": "6f1d2a0c51f74b4db9a3b1c1d57a0e14",
    "exposed": "6f1d2a0c51f74b4db9a3b1c1d57a0e15",
}


class Journal:
    """Under systemd: journal entries, STATUS= and the console. Otherwise: lines on `stream`."""

    def __init__(self, *, under_systemd: bool, stream: IO[str]) -> None:
        self._systemd, self._stream = under_systemd, stream

    def ready(self) -> None:
        """READY=1: the configuration is understood; nothing that boots waits for the cluster."""
        if self._systemd:
            from systemd import daemon

            daemon.notify("READY=1")

    def say(
        self, text: str, *, kind: str = "note", priority: int = NOTICE, **fields: object
    ) -> None:
        """One entry, mostly of one line; `fields` become FIRSTBOOT_* fields of the journal's."""
        if not self._systemd:
            print("\n".join(_lines(text)), file=self._stream, flush=True)
            return
        from systemd import journal

        named = {f"FIRSTBOOT_{key.upper()}": str(item) for key, item in fields.items()}
        journal.send(
            text.encode(errors="backslashreplace").decode(),
            MESSAGE_ID=MESSAGE_IDS[kind],
            PRIORITY=priority,
            SYSLOG_IDENTIFIER=IDENTIFIER,
            **named,
        )
        console(text)

    def report(self, now: dict[str, Any], before: dict[str, Any]) -> None:
        """Say what is new in a status: another stage or sentence, another problem."""
        fields: dict[str, Any] = {
            k: now.get(k) or "" for k in ("cluster", "stage", "role", "cluster_id")
        }
        if now["stage"] != before.get("stage"):
            self.say(now["sentence"], kind="stage", **fields)
        elif now["sentence"] != before.get("sentence"):
            self.say(now["sentence"], kind="progress", **fields)
        for place in now.get("exposed", ()):
            if place not in before.get("exposed", ()):
                text = f"The token is still in {place['where']}. {place['remedy']}"
                self.say(text, kind="exposed", **fields)
        known = {(p["code"], p["text"]) for p in before.get("problems", ())}
        for problem in now["problems"]:
            if (problem["code"], problem["text"]) not in known:
                text = " ".join(t for t in (problem["text"], problem["hint"]) if t)
                self.say(text, kind="problem", priority=WARNING, code=problem["code"], **fields)
        if self._systemd and now["sentence"] != before.get("sentence"):
            from systemd import daemon

            daemon.notify(f"STATUS={now['sentence']}")


def console(text: str) -> None:
    """The machine's console, should it have one: where people look when nothing else answers."""
    with suppress(OSError):
        # Never waits: a console that nobody reads must not hold up the formation.
        flags = os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
        number = os.open("/dev/console", flags)
        try:
            os.write(number, "".join(f"{line}\r\n" for line in _lines(text)).encode())
        finally:
            os.close(number)


def _lines(text: str) -> list[str]:
    """Each line with the speaker's name before it; what is no Unicode is shown escaped."""
    sound = text.encode(errors="backslashreplace").decode()
    return [f"{PREFIX}{line}" for line in sound.splitlines() if line]
