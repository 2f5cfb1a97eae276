"""`firstboot admit` and `join` as a person meets them, where no network is needed."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from firstboot import host, userdata
from firstboot.cli import main
from firstboot.pki import make_key, node_id
from firstboot.protocol.model import Member, Stored, Value

ROOT = Path(__file__).parents[1]
ONE_TIME = userdata.make_token(userdata.ONE_TIME)
DOCUMENT = f"cluster: demo\ntoken: {userdata.make_token()}\nexpect: 3\n"
OTHER = Member("b" * 32, "host-2", "10.0.0.2")


def configured(root: Path, text: str = DOCUMENT) -> Path:
    (root / "etc/firstboot").mkdir(parents=True)
    (root / "etc/firstboot/config.yaml").write_text(text)
    (root / "etc/firstboot/config.yaml").chmod(0o600)
    return root


def remember(root: Path, stored: Stored, *, complete: bool = True) -> str:
    """Give the host an identity and this state; its node id."""
    directory, key = host.StateDirectory(root), make_key()
    directory.begin(key, host.Machine())
    directory.save(stored)
    if complete:
        directory.finish()
    return node_id(key)


def member(founder: Member = OTHER) -> Stored:
    value = Value(1, "1" * 64, (founder,), active=True, members=3)
    return Stored(
        decided=value,
        activated=True,
        enrolled=Member("c" * 32, "host-3", "10.0.0.3"),
        enrolled_fingerprint=value.fingerprint,
        closed=True,
        finished=True,
    )


def own(root: Path, stored: Stored) -> None:
    """Make the host with that state the founding master."""
    directory = host.StateDirectory(root)
    key = directory.load_identity_key()
    assert key is not None
    me = Member(node_id(key), "host-1", "10.0.0.1")
    assert stored.decided is not None
    directory.save(replace(stored, decided=replace(stored.decided, masters=(me,))))


def run(*words: str | Path, said: str = "") -> tuple[int, str]:
    """The exit code and everything printed."""
    argv = [sys.executable, "-m", "firstboot", *map(str, words)]
    done = subprocess.run(argv, input=said, text=True, capture_output=True, cwd=ROOT, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


# ---------------------------------------------------------------- admit


@pytest.mark.parametrize(
    "options",
    [
        ("--hosts", "0"),
        ("--hosts", "many"),
        ("--hosts", "10001"),
        ("--hosts", "9" * 5000),
        ("--window", "1"),
        ("--window", "0s"),
        ("--window", "31d"),
        ("--window", "999999999d"),
        ("now",),
    ],
)
def test_wrong_options_are_64(options: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["admit", *options]) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_who_is_not_configured_or_in_no_cluster_admits_nobody(tmp_path: Path) -> None:
    code, said = run("admit", "--root", tmp_path)
    assert (code, said.count("\n")) == (78, 1)
    assert "not configured" in said
    configured(tmp_path)
    code, said = run("admit", "--root", tmp_path)
    assert (code, said.count("\n")) == (64, 1)
    assert "in no active cluster yet" in said
    assert not (tmp_path / "var/lib/firstboot").exists()  # looking makes nothing


def test_a_node_names_the_master(tmp_path: Path) -> None:
    remember(configured(tmp_path), member())
    code, said = run("admit", "--root", tmp_path)
    assert code == 64
    assert said == (
        "firstboot: only the master of cluster demo admits hosts; run this on host-2 at 10.0.0.2\n"
    )


@pytest.mark.parametrize(
    ("closed", "complete", "expected"),
    [
        (False, False, "admission is still open"),
        (True, False, "firstboot.service is still at work"),
        (True, True, "but the cluster knows its master at 10.0.0.1"),
    ],
)
def test_a_master_that_cannot_admit_says_why(
    tmp_path: Path, closed: bool, complete: bool, expected: str
) -> None:
    stored = replace(member(), closed=closed)
    remember(configured(tmp_path), stored, complete=complete)
    own(tmp_path, stored)
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    code, said = run("admit", "--root", tmp_path)
    assert code in (1, 64)
    assert said.count("\n") == 1
    assert expected in said
    assert "fb1j-" not in said
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} - {p.name for p in before} <= {
        "history.jsonl"
    }


# ---------------------------------------------------------------- join


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2",
        ONE_TIME[:-1],
        ONE_TIME.replace("fb1j", "fb1"),
        userdata.make_token(),
        f"{ONE_TIME} {ONE_TIME}",
        "fb1j-\x1b[2J",
        "x" * 100_000,
    ],
    ids=lambda _: "",  # tokens are random, and every process that runs tests must name them alike
)
def test_what_is_no_one_time_token_is_refused_and_not_shown(tmp_path: Path, text: str) -> None:
    configured(tmp_path)
    code, said = run("join", "--root", tmp_path, said=f"{text}\n")
    assert (code, said.count("\n")) == (64, 1)
    assert "firstboot admit" in said
    assert not text or text not in said
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["config.yaml"]


def test_it_is_kept_private_and_wins_over_the_documents(tmp_path: Path) -> None:
    configured(tmp_path)
    assert not userdata.find(tmp_path).late  # type: ignore[union-attr]
    for _ in range(2):  # again is no mistake
        code, said = run("join", "--root", tmp_path, said=f" {ONE_TIME} \n")
        assert code == 0
        assert ONE_TIME not in said
    kept = tmp_path / userdata.JOIN
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    document = userdata.find(tmp_path)
    assert document is not None
    assert document.token.reveal() == ONE_TIME
    assert document.late
    assert document.warnings == ()
    # What peers compare is still the document's.
    assert document.config.agreed == userdata.parse(DOCUMENT.encode(), "x").config.agreed


def test_a_file_that_wins_is_named_and_nothing_kept(tmp_path: Path) -> None:
    configured(tmp_path)
    other = tmp_path / "run/firstboot/config.d/50.yaml"
    other.parent.mkdir(parents=True)
    other.write_text(f"token: {userdata.make_token()}\n")
    code, said = run("join", "--root", tmp_path, said=ONE_TIME)
    assert (code, said.count("\n")) == (78, 1)
    assert "/run/firstboot/config.d/50.yaml" in said
    assert not (tmp_path / userdata.JOIN).exists()


def test_it_needs_the_clusters_document(tmp_path: Path) -> None:
    code, said = run("join", "--root", tmp_path, said=ONE_TIME)
    assert (code, said.count("\n")) == (78, 1)
    assert "not configured" in said


def test_a_member_needs_none(tmp_path: Path) -> None:
    remember(configured(tmp_path), member())
    code, said = run("join", "--root", tmp_path, said=ONE_TIME)
    assert (code, said) == (64, "firstboot: this host is in cluster demo already\n")


def test_a_terminal_is_asked_and_shows_nothing(tmp_path: Path) -> None:
    configured(tmp_path)
    ours, theirs = pty.openpty()
    argv = ["setsid", "--ctty", sys.executable, "-m", "firstboot", "join", "--root", str(tmp_path)]
    with subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT) as process:
        os.close(theirs)
        shown = b""
        while b"One-time token: " not in shown:
            shown += os.read(ours, 1000)
        os.write(ours, f"{ONE_TIME}\n".encode())
        try:
            while more := os.read(ours, 1000):
                shown += more
        except OSError:  # Linux: EIO when the other side is closed
            pass
    os.close(ours)
    assert process.returncode == 0
    assert ONE_TIME.encode() not in shown
    assert (tmp_path / userdata.JOIN).exists()
