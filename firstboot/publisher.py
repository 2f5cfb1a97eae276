"""What one run tells: its status for everybody, its history for replay, and when what began."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from firstboot import greeting, host
from firstboot.discovery.interface import ProviderReport, opening
from firstboot.journal import Journal
from firstboot.protocol import status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.errors import FirstbootError
from firstboot.protocol.model import Stage

HISTORY = "history.jsonl"
MAX_HISTORY = 8 * 1024 * 1024  # bytes; a run that waits for days stops recording, not forming


class Recorder:
    """The history file. Whatever happens to it must not stop the formation."""

    def __init__(self, directory: Path) -> None:
        self._file: IO[str] | None = None
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            self._file = os.fdopen(os.open(directory / HISTORY, flags, 0o600), "a")

    def line(self, text: str) -> None:
        """Add a line; it reaches the file at the next `flush`."""
        size: list[int] = []
        self._do(lambda file: file.write(f"{text}\n"))
        self._do(lambda file: size.append(file.tell()))  # this flushes: a full disk shows here
        if size and size[0] > MAX_HISTORY:
            self.close()

    def flush(self) -> None:
        """Hand what was added to the kernel."""
        self._do(lambda file: file.flush())

    def close(self) -> None:
        """Stop recording."""
        self._do(lambda file: file.close())
        self._file = None

    def _do(self, deed: Any) -> None:
        if self._file is None:
            return
        try:
            deed(self._file)
        except OSError:
            broken, self._file = self._file, None
            with suppress(OSError):
                broken.close()


class Publisher:
    """Writes the status when it changes, and has the journal say what is new in it."""

    def __init__(self, root: Path, journal: Journal) -> None:
        self._root, self._journal = root, journal
        self.platform = ""  # the cloud this host is on, for remedies
        self.shown: dict[str, Any] = {}
        self._greeted: str | None = None
        self._timeline: list[dict[str, Any]] = []
        self._seen: set[str] = set()
        self._since = time.time()

    def mark(self, what: str, **more: object) -> None:
        """Note that this began just now; only the first time counts."""
        if what not in self._seen:
            self._seen.add(what)
            self._timeline.append({"what": what, "at": round(time.time(), 6), **more})

    def note(self, core: Assembly) -> bool:
        """Note what has begun; whether the stage is another than the one that was told last."""
        if core.enrolled:
            self.mark("certificates")
        self.mark(core.stage.value)
        if what := status.milestone(core):
            self.mark(what, part_of=core.stage.value)
        return core.stage.value != self.shown.get("stage")

    def publish(
        self, core: Assembly, reports: Iterable[ProviderReport], gate: str = "", **more: object
    ) -> dict[str, Any]:
        """Tell where the core stands; `gate` as in `describe`, `more` further items."""
        offset = time.time() - time.monotonic()
        now = status.describe(core, offset, gate)
        next_try = status.looks_again(core, offset)
        if now["sentence"] != self.shown.get("sentence"):
            self._since = time.time()
        self.note(core)
        now |= {
            "since": self._since,
            "timeline": self._timeline,
            "providers": [self._fares(core, report, next_try) for report in reports],
            **more,
        }
        before, self.shown = self.shown, now
        if _steady(now) != _steady(before):
            self._tell(now, before)
        return now

    def _fares(
        self, core: Assembly, report: ProviderReport, next_try: float | None
    ) -> dict[str, Any]:
        """A provider's report as plain data, with how dialling goes at the addresses it found.

        `next_try` is when the core asks all providers again, Unix time, None if it does not.
        """
        error, remedy = report.error, report.remedy
        failures = status.unreached(core, report.name) if report.found else {}
        if failures:
            told = ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items()))
            unmet = f"nobody of ours answers there ({told})"
            error = f"{error}; {unmet}" if error else unmet
            remedy = remedy or opening(self.platform, f"TCP {core.me.endpoint.port}")
        texts = {"error": error, "detail": report.detail, "remedy": remedy}
        waits = report.next_try < 0 or next_try is None
        at = None if waits else round(max(report.next_try, next_try or 0.0), 1)
        return {"name": report.name, "found": report.found, **texts, "next_try": at}

    def waiting_for_address(self, cluster: str, sentence: str, hint: str) -> None:
        """This host has no address yet, so there is no core to describe."""
        self._brief(Stage.DISCOVERING.value, "waiting", sentence, hint=hint, cluster=cluster)

    def waiting_for_document(self, source: str, reason: str) -> None:
        """The document that the kernel's command line names cannot be had yet."""
        sentence = f"Waiting for the document at {source}: {reason}."
        hint = "firstboot.config on the kernel's command line names it; it is tried again."
        self._brief(Stage.DISCOVERING.value, "waiting", sentence, hint=hint)

    def end_early(self, state: str, sentence: str, code: str = "") -> None:
        """Nothing is started, and this is why."""
        problem = {"code": code, "text": sentence, "hint": "", "blocking": True}
        self._brief(state, state, sentence, problems=[problem] if code else [])

    def _brief(self, stage: str, state: str, sentence: str, **more: Any) -> None:
        now = {
            "schema": status.SCHEMA,
            "cluster": "",
            "stage": stage,
            "state": state,
            "sentence": sentence,
            "hint": "",
            "since": time.time(),
            "problems": [],
            **more,
        }
        self._tell(now, {"problems": now["problems"]})  # the sentence says it already

    def _tell(self, now: dict[str, Any], before: dict[str, Any]) -> None:
        with suppress(FirstbootError):  # a full /run must stop neither host nor journal
            host.write_status(self._root, now)
        told = greeting.greeting(now)
        if told != self._greeted:
            self._greeted = told
            greeting.greet(self._root, now)
        self._journal.report(now, before)


def _steady(shown: dict[str, Any]) -> dict[str, Any]:
    """A status without what changes by itself."""
    return {key: item for key, item in shown.items() if key not in ("since", "grace_ends")}
