"""What the service says: lines without systemd; entries, STATUS= and the console under it."""

from __future__ import annotations

import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from firstboot import journal
from firstboot.journal import MESSAGE_IDS, NOTICE, WARNING, Journal


class Systemd:
    """Stands in for systemd-python: remembers what it was given."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, Any]]] = []
        self.notified: list[str] = []

    def send(self, text: str, **fields: Any) -> None:
        text.encode()  # the real one raises as well
        assert all(isinstance(v, str | int) for v in fields.values())
        assert all(key.isupper() or key.replace("_", "").isupper() for key in fields)
        self.entries.append((text, fields))

    def notify(self, text: str) -> bool:
        assert "\n" not in text, "each line would be an assignment of its own: sd_notify(3)"
        self.notified.append(text)
        return True


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Systemd:
    fake = Systemd()
    package = types.ModuleType("systemd")
    package.journal = types.SimpleNamespace(send=fake.send)  # type: ignore[attr-defined]
    package.daemon = types.SimpleNamespace(notify=fake.notify)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "systemd", package)
    return fake


@pytest.fixture(autouse=True)
def on_console(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have gone to this machine's own console."""
    lines: list[str] = []
    monkeypatch.setattr(journal, "console", lines.append)
    return lines


def shown(sentence: str = "One.", stage: str = "deciding", **changes: Any) -> dict[str, Any]:
    return {
        "cluster": "demo",
        "stage": stage,
        "role": None,
        "cluster_id": None,
        "sentence": sentence,
        "problems": [],
        **changes,
    }


def problem(code: str, text: str, hint: str = "") -> dict[str, Any]:
    return {"code": code, "text": text, "hint": hint, "blocking": True}


# ---------------------------------------------------------------- without systemd


def said(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    Journal(under_systemd=False, stream=stream).report(now, before)
    return stream.getvalue().splitlines()


def test_without_systemd_everything_is_a_line_on_the_stream(on_console: list[str]) -> None:
    stream = io.StringIO()
    journal = Journal(under_systemd=False, stream=stream)
    journal.ready()
    journal.say("Hello.")
    journal.say("Beware.", kind="problem", priority=WARNING, code="X")
    assert stream.getvalue() == "firstboot: Hello.\nfirstboot: Beware.\n"
    assert on_console == []


def test_what_is_new_is_said_and_nothing_else() -> None:
    assert said(shown("One."), {}) == ["firstboot: One."]
    assert said(shown("One."), shown("One.")) == []
    assert said(shown("Two."), shown("One.")) == ["firstboot: Two."]
    assert said(shown("One.", "signing"), shown("One.")) == ["firstboot: One."]


def test_a_problem_is_said_once_with_its_remedy_and_again_if_it_says_more() -> None:
    first = shown(problems=[problem("DISK", "It is full.", "Free some.")])
    assert said(first, shown()) == ["firstboot: It is full. Free some."]
    assert said(first, first) == []
    second = shown(problems=[problem("DISK", "It is full.", "x"), problem("DENIED", "No.")])
    assert said(second, first) == ["firstboot: No."]
    third = shown(problems=[problem("DISK", "It reports an error.")])
    assert said(third, first) == ["firstboot: It reports an error."]
    assert said(shown(), third) == []


def test_every_line_of_a_remedy_says_who_speaks() -> None:
    """A failed step's hint is the last lines of its log."""
    failed = shown(problems=[problem("STEP_FAILED", "It failed.", "one\ntwo\n\nthree\n")])
    assert said(failed, shown()) == [
        "firstboot: It failed. one",
        "firstboot: two",
        "firstboot: three",
    ]


# ---------------------------------------------------------------- under systemd


def test_ready_is_told_at_once(systemd: Systemd) -> None:
    stream = io.StringIO()
    Journal(under_systemd=True, stream=stream).ready()
    assert systemd.notified == ["READY=1"] and not systemd.entries
    assert stream.getvalue() == ""


def test_an_entry_has_its_fields_and_goes_to_the_console_too(
    systemd: Systemd, on_console: list[str]
) -> None:
    stream = io.StringIO()
    Journal(under_systemd=True, stream=stream).say("Hello.", cluster="demo", number=5)
    fields = {
        "MESSAGE_ID": MESSAGE_IDS["note"],
        "PRIORITY": NOTICE,
        "SYSLOG_IDENTIFIER": "firstboot",
        "FIRSTBOOT_CLUSTER": "demo",
        "FIRSTBOOT_NUMBER": "5",
    }
    assert systemd.entries == [("Hello.", fields)]
    assert on_console == ["Hello."]
    assert stream.getvalue() == ""


def test_a_report_is_entries_of_their_kinds_and_a_status(systemd: Systemd) -> None:
    journal = Journal(under_systemd=True, stream=io.StringIO())
    now = shown(role="master", cluster_id="1" * 32, problems=[problem("DISK", "Full.", "Free.")])
    journal.report(now, {})
    journal.report({**now, "sentence": "Two."}, now)
    kinds = {number: kind for kind, number in MESSAGE_IDS.items()}
    told = [(text, kinds[f["MESSAGE_ID"]], f["PRIORITY"]) for text, f in systemd.entries]
    assert told == [
        ("One.", "stage", NOTICE),
        ("Full. Free.", "problem", WARNING),
        ("Two.", "progress", NOTICE),
    ]
    assert systemd.entries[1][1]["FIRSTBOOT_CODE"] == "DISK"
    for _, fields in systemd.entries:
        assert fields["FIRSTBOOT_STAGE"] == "deciding" and fields["FIRSTBOOT_ROLE"] == "master"
        assert fields["FIRSTBOOT_CLUSTER"] == "demo"
        assert fields["FIRSTBOOT_CLUSTER_ID"] == "1" * 32
    assert systemd.notified == ["STATUS=One.", "STATUS=Two."]


def test_a_text_that_is_no_unicode_is_entered_all_the_same(systemd: Systemd) -> None:
    Journal(under_systemd=True, stream=io.StringIO()).say("of \udce9")
    assert systemd.entries[0][0] == "of \\udce9"


def test_what_is_not_known_yet_is_an_empty_field(systemd: Systemd) -> None:
    Journal(under_systemd=True, stream=io.StringIO()).report(shown(), {})
    assert systemd.entries[0][1]["FIRSTBOOT_ROLE"] == ""


def test_a_status_that_did_not_change_is_not_told_again(systemd: Systemd) -> None:
    journal = Journal(under_systemd=True, stream=io.StringIO())
    journal.report(shown(problems=[problem("DISK", "Full.")]), shown())
    assert systemd.notified == []
    assert [text for text, _ in systemd.entries] == ["Full."]


# ---------------------------------------------------------------- the console

CONSOLE = journal.console  # before the fixture above replaces it


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A pipe for a console: (where it is read, its flags when opened)."""
    read, write = os.pipe2(os.O_NONBLOCK)
    real = os.open

    def opened(path: str, flags: int, mode: int = 0o777) -> int:
        if path != "/dev/console":
            return real(path, flags, mode)
        assert flags & os.O_NONBLOCK and flags & os.O_NOCTTY and flags & os.O_CLOEXEC
        return os.dup(write)

    monkeypatch.setattr(os, "open", opened)
    yield read, write
    os.close(read)
    os.close(write)


def test_the_console_gets_whole_lines(device: tuple[int, int]) -> None:
    CONSOLE("Hällo.")
    assert os.read(device[0], 100) == "firstboot: Hällo.\r\n".encode()


def test_a_console_that_nobody_reads_holds_up_nothing(device: tuple[int, int]) -> None:
    for _ in range(20):
        CONSOLE("x" * 8000)  # more than a pipe holds: the rest is lost


def test_no_console_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    CONSOLE("Hello.")


def test_the_console_shows_every_line_from_the_left(device: tuple[int, int]) -> None:
    """A terminal in raw mode needs a carriage return before each line feed."""
    CONSOLE("one\ntwo")
    data = os.read(device[0], 100)
    assert data.count(b"\n") == data.count(b"\r\n")


def test_a_text_that_is_no_unicode_does_not_stop_anything(device: tuple[int, int]) -> None:
    CONSOLE("from a file name: \udce9")
    assert os.read(device[0], 100).startswith(b"firstboot: from a file name: ")
