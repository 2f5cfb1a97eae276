"""What is told where people log in, and the journal's catalog."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from firstboot.greeting import MAX_LINE, greet, greeting
from firstboot.host import logins
from firstboot.journal import MESSAGE_IDS, Journal
from firstboot.publisher import Publisher

CATALOG = Path(__file__).parents[2] / "ostree-overlay/20units/usr/lib/systemd/catalog"
WAITING: dict[str, Any] = {
    "state": "waiting",
    "sentence": "1 of 3 hosts are present; waiting for 2 more.",
    "hint": "Boot the missing hosts with this same document.",
    "problems": [],
}


def status(**changes: Any) -> dict[str, Any]:
    return {**WAITING, **changes}


def problem(text: str, hint: str = "Repair it.", *, blocking: bool = True) -> dict[str, Any]:
    return {"code": "X", "text": text, "hint": hint, "blocking": blocking}


def shown(root: Path) -> tuple[str, str]:
    return (root / logins.ISSUE).read_text(), (root / logins.MOTD).read_text()


def test_sentence_and_remedy_are_shown_in_both_places(tmp_path: Path) -> None:
    greet(tmp_path, WAITING)
    text = (
        "firstboot: 1 of 3 hosts are present; waiting for 2 more.\n"
        "  Boot the missing hosts with this same document.\n"
    )
    assert shown(tmp_path) == (text, text)
    for name in (logins.ISSUE, logins.MOTD):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
        assert (tmp_path / name).parent.stat().st_mode & 0o777 == 0o755


def test_the_gravest_problem_is_shown_once() -> None:
    more = [problem("All is lost."), problem("And this.")]
    assert greeting(status(state="degraded", problems=more)).endswith(
        "  All is lost.\n  Repair it.\n"
    )
    same = status(state="failed", hint="", problems=[problem(WAITING["sentence"], "")])
    assert greeting(same) == f"firstboot: {WAITING['sentence']}\n"
    minor = [problem("Nothing grave.", blocking=False)]
    assert "grave" not in greeting(status(problems=minor))


def test_a_host_that_runs_says_nothing(tmp_path: Path) -> None:
    greet(tmp_path, WAITING)
    greet(tmp_path, status(state="running"))
    greet(tmp_path, status(state="running"))
    assert not (tmp_path / logins.ISSUE).exists()
    assert not (tmp_path / logins.MOTD).exists()


def test_nothing_in_a_sentence_drives_a_terminal(tmp_path: Path) -> None:
    bad = "\x1b[2J\\4 \N{RIGHT-TO-LEFT OVERRIDE}" + "x" * 1000
    greet(tmp_path, status(sentence=bad))
    issue, motd = shown(tmp_path)
    assert motd.splitlines()[0].startswith("firstboot: ?[2J\\4 ?xxx")
    assert issue.splitlines()[0].startswith("firstboot: ?[2J\\\\4 ?xxx")  # agetty shows one
    assert len(motd.splitlines()[0]) <= MAX_LINE + len("firstboot: …")


def test_a_prompt_that_waits_is_drawn_anew(tmp_path: Path) -> None:
    reload = tmp_path / logins.RELOAD
    reload.parent.mkdir()
    greet(tmp_path, WAITING)
    assert not reload.exists()  # nobody waits, and nothing is made for them
    reload.touch()
    before = reload.stat().st_mtime_ns
    greet(tmp_path, status(sentence="2 of 3."))
    assert reload.stat().st_mtime_ns > before


def test_a_full_run_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("no directory")
    greet(tmp_path, WAITING)


def test_it_is_written_only_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    publisher = Publisher(tmp_path, Journal(under_systemd=False, stream=sys.stderr))
    publisher.end_early("failed", "No such thing.", code="FAILED")
    publisher.end_early("failed", "No such thing.", code="FAILED")
    before = (tmp_path / logins.ISSUE).stat().st_ino
    publisher.end_early("failed", "No such thing.", code="FAILED")
    assert (tmp_path / logins.ISSUE).stat().st_ino == before
    publisher.end_early("failed", "Another thing.", code="FAILED")
    assert "Another" in (tmp_path / logins.MOTD).read_text()
    capsys.readouterr()


# ---------------------------------------------------------------- catalog


def test_the_catalog_has_an_entry_for_each_kind_of_message(tmp_path: Path) -> None:
    text = (CATALOG / "firstboot.catalog").read_text()
    assert sorted(re.findall(r"(?m)^-- ([0-9a-f]{32})$", text)) == sorted(MESSAGE_IDS.values())
    known = {"CLUSTER", "STAGE", "ROLE", "CLUSTER_ID", "CODE"}
    assert set(re.findall(r"@FIRSTBOOT_([A-Z_]+)@", text)) <= known
    # systemd itself reads it.
    there = tmp_path / "usr/lib/systemd/catalog"
    there.mkdir(parents=True)
    (there / "firstboot.catalog").write_text(text)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    (tmp_path / "etc").mkdir()
    command = ["journalctl", f"--root={tmp_path}", "--update-catalog"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    command = ["journalctl", f"--root={tmp_path}", "--list-catalog"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    assert all(ident in listed for ident in MESSAGE_IDS.values()), listed
