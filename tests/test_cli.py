"""The verbs as a person meets them: exit codes, what is printed where, and never a traceback."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from firstboot import host, userdata, words
from firstboot.cli import main
from firstboot.protocol.model import Stage
from tests.recording import formed

ROOT = Path(__file__).parents[1]
TOKEN = userdata.make_token()
DOCUMENT = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"
CONFIG = "etc/firstboot/config.yaml"
Firstboot = Callable[..., tuple[int, str, str]]


@pytest.fixture
def firstboot(capsys: pytest.CaptureFixture[str]) -> Firstboot:
    """Run it: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as ended:  # argparse's own way out, for --help
            assert isinstance(ended.code, int)
            code = ended.code
        shown = capsys.readouterr()
        assert "Traceback" not in shown.out + shown.err
        assert TOKEN not in shown.err
        return code, shown.out, shown.err

    return run


def one_line(error: str) -> str:
    """A person's mistake: one line that says who speaks."""
    assert error.startswith("firstboot: ") and error.endswith("\n"), error
    assert error.count("\n") == 1, error
    return error.removeprefix("firstboot: ").rstrip("\n")


def written(path: Path, text: str | bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return path


# ---------------------------------------------------------------- usage


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("nonsense",),
        ("--nonsense",),
        ("run", "now"),
        ("status", "--format", "xml"),
        ("status", "--format"),
        ("validate",),
        ("validate", "a", "b"),
        ("replay",),
        ("token", "--root", "/"),
        ("timeline", "-x"),
    ],
)
def test_wrong_usage_is_64_and_one_line(firstboot: Firstboot, arguments: tuple[str, ...]) -> None:
    code, out, error = firstboot(*arguments)
    assert (code, out) == (64, "")
    assert "--help" in one_line(error)


VERBS = ["", "run", "status", "admit", "join", "validate", "token", "timeline", "replay"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_0_and_hides_what_is_for_tests_only(firstboot: Firstboot, verb: str) -> None:
    code, out, error = firstboot(*filter(None, (verb, "--help")))
    assert (code, error) == (0, "")
    assert "--root" not in out and out.startswith("usage: firstboot")
    if not verb:
        assert all(f"  {number}" in out for number in (0, 1, 2, 64, 78))


# ---------------------------------------------------------------- token and validate


def test_a_token_is_new_every_time_and_makes_a_valid_document(
    firstboot: Firstboot, tmp_path: Path
) -> None:
    tokens = set()
    for _ in range(3):
        code, out, error = firstboot("token")
        assert (code, error, out.count("\n")) == (0, "", 1)
        tokens.add(out.strip())
        path = written(tmp_path / "x.yaml", f"cluster: demo\ntoken: {out.strip()}\nexpect: 1\n")
        assert firstboot("validate", path)[0] == 0
    assert len(tokens) == 3


def test_a_good_document_is_told_in_one_line_without_its_token(
    firstboot: Firstboot, tmp_path: Path
) -> None:
    path = written(tmp_path / "x.yaml", DOCUMENT)
    code, out, error = firstboot("validate", path)
    assert (code, error) == (0, "")
    assert out == f"{path}: valid: cluster demo, expect 3, masters 1, payload etcd\n"


BAD: dict[str, str | bytes] = {
    "empty": "",
    "no yaml": "a: [",
    "a list": "- 1\n",
    "binary": b"\x7fELF\0\1\2" + bytes(range(256)),
    "not utf-8": b"cluster: d\xe9mo\n",
    "huge": b"# " + b"x" * (2 * 1024 * 1024),
    "deep": "a: " + "[" * 5000,
    "no token": "cluster: demo\nexpect: 3\n",
    "placeholder": "cluster: demo\ntoken: fb1-REPLACE-ME\nexpect: 3\n",
    "weak token": "cluster: demo\ntoken: secret\nexpect: 3\n",
    "misspelt token": DOCUMENT.replace(TOKEN, TOKEN[:-1]),
    "unknown key": f"{DOCUMENT}nonsense: 1\n",
    "expect in words": DOCUMENT.replace("expect: 3", "expect: three"),
    "expect none": DOCUMENT.replace("expect: 3", "expect: 0"),
    "two masters": f"{DOCUMENT}masters: 2\n",
    "too many masters": f"{DOCUMENT}masters: 5\n",
    "cluster no label": DOCUMENT.replace("demo", "De mo"),
    "payload unknown": f"{DOCUMENT}payload: kubernetes\n",
    "key twice": f"{DOCUMENT}expect: 4\n",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_78_and_one_line(firstboot: Firstboot, tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "x.yaml", BAD[name])
    code, out, error = firstboot("validate", path)
    assert (code, out) == (78, "")
    assert one_line(error).startswith(str(path))
    assert TOKEN[4:-1] not in error


def test_a_file_that_is_not_there_is_64(firstboot: Firstboot, tmp_path: Path) -> None:
    for verb in ("validate", "replay"):
        for path in (tmp_path / "no", written(tmp_path / "file", "") / "below", Path("a" * 300)):
            code, out, error = firstboot(verb, path)
            assert (out, str(path) in one_line(error)) == ("", True)
            assert code == 64 or (code == 1 and path.name == "a" * 300)


def test_a_directory_or_a_pipe_is_refused_at_once(firstboot: Firstboot, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        code, out, error = firstboot("validate", path)
        assert (code, out) in ((78, ""), (1, ""))
        one_line(error)
    code, out, error = firstboot("replay", tmp_path)
    assert (code, out) == (64, "")
    one_line(error)


@pytest.mark.parametrize("name", ["two\nlines", "\x1b[31mred", "b\udce9d"])
def test_odd_file_names_keep_an_error_in_one_line(
    firstboot: Firstboot, tmp_path: Path, name: str
) -> None:
    for verb in ("validate", "replay"):
        code, _, error = firstboot(verb, tmp_path / name)
        assert code == 64
        assert one_line(error).isprintable()


# ---------------------------------------------------------------- status


def status_of(root: Path, shown: dict[str, Any]) -> None:
    host.write_status(root, shown)


def shown_at(stage: str, **changes: Any) -> dict[str, Any]:
    """A status as a host in a formation wrote it, with what `service` adds."""
    found = recorded()[stage]
    began = time.time() - 60
    marks = [{"what": what, "at": began + n} for n, what in enumerate(("network", stage))]
    extra = {
        "since": began,
        "timeline": marks,
        "providers": [{"name": "mdns", "found": 2, "error": ""}],
        "certificates": [{"profile": "client", "not_after": began + 5 * 365 * 86400}],
        "warnings": [],
    }
    return {**found, **extra, **changes}


@cache
def recorded() -> dict[str, dict[str, Any]]:
    """One status for each stage of a quiet formation, the one with the most peers."""
    best: dict[str, dict[str, Any]] = {}
    for _, core in formed(0).cores:
        for shown in core.statuses:
            if len(shown["peers"]) >= len(best.get(shown["stage"], {"peers": ""})["peers"]):
                best[shown["stage"]] = shown
    failed = {**best["discovering"], "stage": "failed", "state": "failed", "sentence": "It failed."}
    return {**best, "failed": failed}


CODES = {"running": 0, "failed": 1}


@pytest.mark.parametrize("stage", [str(s) for s in Stage])
def test_status_at_every_stage(firstboot: Firstboot, tmp_path: Path, stage: str) -> None:
    shown = shown_at(stage)
    status_of(tmp_path, shown)
    code, out, error = firstboot("status", "--root", tmp_path)
    assert (code, error) == (CODES.get(stage, 2), "")
    lines = out.splitlines()
    assert lines[0].startswith(shown["sentence"])
    assert any(line.split()[:2] == ["cluster", "demo"] for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
    for peer in shown["peers"]:
        assert any("peer" in line and peer["address"] in line for line in lines)


@pytest.mark.parametrize("stage", [str(s) for s in Stage])
def test_status_for_programs_is_the_file_itself(
    firstboot: Firstboot, tmp_path: Path, stage: str
) -> None:
    shown = shown_at(stage)
    status_of(tmp_path, shown)
    code, out, error = firstboot("status", "--format", "json", "--root", tmp_path)
    assert (code, error) == (CODES.get(stage, 2), "")
    assert json.loads(out) == shown


@pytest.mark.parametrize("stage", [str(s) for s in Stage])
def test_timeline_at_every_stage(firstboot: Firstboot, tmp_path: Path, stage: str) -> None:
    status_of(tmp_path, shown_at(stage))
    code, out, error = firstboot("timeline", "--root", tmp_path)
    assert (code, error) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows == [
        ["at", "(s)", "took", "(s)", "phase"],
        ["0.000", "1.000", "network"],
        ["1.000", stage],
    ]


@pytest.mark.parametrize("stage", ["running", "failed"])
def test_waiting_ends_where_there_is_nothing_to_wait_for(
    firstboot: Firstboot, tmp_path: Path, stage: str
) -> None:
    status_of(tmp_path, shown_at(stage))
    assert firstboot("status", "--wait", "--root", tmp_path)[0] == CODES[stage]
    status_of(tmp_path, shown_at("running", state="degraded"))
    assert firstboot("status", "--wait", "--root", tmp_path)[0] == 2


def test_waiting_goes_on_until_it_runs(
    firstboot: Firstboot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = iter(("deciding", "enrolling", "starting", "running"))
    naps = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        status_of(tmp_path, shown_at(next(stages)))

    monkeypatch.setattr(time, "sleep", nap)
    status_of(tmp_path, shown_at("discovering"))
    code, out, _ = firstboot("status", "--wait", "--root", tmp_path)
    assert (code, len(naps)) == (0, 4)
    assert out.startswith("Running as ")


def test_problems_are_shown_with_every_line_of_their_hint(
    firstboot: Firstboot, tmp_path: Path
) -> None:
    problem = {"code": "STEP_FAILED", "text": "It did not.", "hint": "a\nb", "blocking": True}
    status_of(tmp_path, shown_at("starting", state="degraded", problems=[problem]))
    code, out, _ = firstboot("status", "--root", tmp_path)
    assert code == 2
    assert "  problem    STEP_FAILED: It did not.\n             a\n             b\n" in out


def test_each_provider_has_a_line_and_one_with_the_remedy(
    firstboot: Firstboot, tmp_path: Path
) -> None:
    soon, now = time.time() + 30, time.time()
    telling = {"error": "no host listens", "detail": "9 tried", "remedy": "Open TCP 7443."}
    providers = [
        {"name": "mdns", "found": 2, "error": "", "detail": "asked", "next_try": now},
        {"name": "sweep", "found": 0, "next_try": soon, **telling},
        {"name": "ec2", "found": 0, "error": "off", "detail": "", "remedy": "", "next_try": None},
    ]
    status_of(tmp_path, shown_at("discovering", providers=providers))
    _, out, _ = firstboot("status", "--root", tmp_path)
    assert "  discovery  mdns: 2 found; tries now\n" in out
    for left in (30, 29, 28, 27):
        out = out.replace(f"next try in {left} s", "next try soon")
    line = "  discovery  sweep: 0 found; 9 tried; no host listens; next try soon\n"
    assert line + "             Open TCP 7443.\n" in out
    assert "  discovery  ec2: 0 found; off\n" in out
    # Who runs needs none of that: only those that found somebody are told.
    status_of(tmp_path, shown_at("running", providers=providers))
    _, out, _ = firstboot("status", "--root", tmp_path)
    assert "  discovery  mdns: 2 found\n" in out
    assert "sweep" not in out
    assert "ec2" not in out


def test_a_host_without_a_document_is_no_failure(firstboot: Firstboot, tmp_path: Path) -> None:
    for verb in ("status", "timeline"):
        code, out, error = firstboot(verb, "--root", tmp_path)
        assert (code, error) == (0, "")
        assert out.startswith("This host is not configured: ")
    assert firstboot("status", "--wait", "--root", tmp_path)[0] == 0


def test_a_document_before_the_first_run_is_waiting(firstboot: Firstboot, tmp_path: Path) -> None:
    written(tmp_path / CONFIG, DOCUMENT)
    code, out, _ = firstboot("status", "--root", tmp_path)
    assert code == 2
    assert out.startswith("firstboot has not run on this host yet.")
    written(tmp_path / CONFIG, "expect: three\n")
    code, out, _ = firstboot("status", "--root", tmp_path)
    assert code == 2 and CONFIG in out


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"{}", b'{"stage": "running"}', b"\xff\xfe"]
)
def test_a_status_that_cannot_be_read_is_as_good_as_none(
    firstboot: Firstboot, tmp_path: Path, damage: bytes
) -> None:
    written(tmp_path / host.status.STATUS, damage, 0o644)
    for verb in ("status", "timeline"):
        code, out, error = firstboot(verb, "--root", tmp_path)
        assert (code, error) == (0, "")
        assert out.startswith("This host is not configured: ")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert words._duration(seconds) == text


# ---------------------------------------------------------------- run


def test_run_without_a_document_ends_well(firstboot: Firstboot, tmp_path: Path) -> None:
    code, out, error = firstboot("run", "--root", tmp_path)
    assert (code, out) == (0, "")
    assert "This host is not configured: " in one_line(error)
    assert firstboot("status", "--root", tmp_path)[:1] == (0,)


def test_the_garbage_collector_rests_only_during_a_start(
    firstboot: Firstboot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def find(_root: Path) -> None:
        seen.append(gc.isenabled())

    monkeypatch.setattr(userdata, "find", find)
    assert firstboot("run", "--root", tmp_path)[0] == 0
    assert seen == [False] and gc.isenabled()


def test_run_with_a_bad_document_is_78_and_says_so_ever_after(
    firstboot: Firstboot, tmp_path: Path
) -> None:
    written(tmp_path / CONFIG, f"{DOCUMENT}nonsense: 1\n")
    code, out, error = firstboot("run", "--root", tmp_path)
    assert (code, out) == (78, "")
    assert "nonsense" in one_line(error)
    assert not (tmp_path / "var/lib/firstboot").exists()  # nothing was begun
    code, out, _ = firstboot("status", "--root", tmp_path)
    assert code == 1 and "nonsense" in out
    code, out, _ = firstboot("status", "--format", "json", "--root", tmp_path)
    assert [p["code"] for p in json.loads(out)["problems"]] == ["CONFIGURATION"]


# ---------------------------------------------------------------- replay


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    world = formed(1)
    return written(tmp_path / "history.jsonl", "".join(world.history_of(0)))


def test_a_history_is_told_event_by_event(firstboot: Firstboot, recording: Path) -> None:
    code, out, error = firstboot("replay", recording)
    assert (code, error) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("run of host (") and lines[-1].startswith("Running as ")
    assert len(lines) == len(recording.read_text().splitlines()) + 1


def test_a_history_cut_short_anywhere_is_told_up_to_there(
    firstboot: Firstboot, recording: Path
) -> None:
    data = recording.read_bytes()
    first = data.index(b"\n") + 1
    for length in range(first, len(data), len(data) // 20):
        recording.write_bytes(data[:length])
        code, out, error = firstboot("replay", recording)
        assert (code, error) == (0, "")
        assert data[:length].count(b"\n") <= len(out.splitlines()) - 1


def test_a_history_over_a_power_cut_is_told_whole(firstboot: Firstboot, recording: Path) -> None:
    data = recording.read_bytes()
    recording.write_bytes(data[: len(data) * 2 // 3] + data)
    code, out, error = firstboot("replay", recording)
    assert (code, error) == (0, "")
    assert out.count("run of host (") == 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"Nov 22 12:00:00 host systemd[1]: Started.\n" * 2,
        b"one line without an end",
        bytes(range(256)) * 8,
        b"\xff\xfe{\n}\n",
        DOCUMENT.encode(),
        b'{"schema": 1, "state": {}}\n',
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_a_foreign_file_is_the_persons_mistake(
    firstboot: Firstboot, tmp_path: Path, data: bytes
) -> None:
    code, out, error = firstboot("replay", written(tmp_path / "x", data))
    assert (code, out) == (78, "")
    one_line(error)


def test_a_damaged_line_is_named(firstboot: Firstboot, recording: Path) -> None:
    lines = recording.read_bytes().splitlines(keepends=True)
    recording.write_bytes(b"".join([*lines[:5], b"\xff\0damage\n", *lines[5:]]))
    code, _, error = firstboot("replay", recording)
    assert code == 78
    assert one_line(error).startswith("line 6: ")


# ---------------------------------------------------------------- as a process


def test_a_reader_that_leaves_early_ends_it_quietly(recording: Path) -> None:
    recording.write_bytes(recording.read_bytes() * 40)  # more than a pipe holds
    program = [sys.executable, "-m", "firstboot", "replay", str(recording)]
    with subprocess.Popen(
        program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert error == b""
    assert process.returncode == 1


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
def test_no_locale_breaks_a_status(tmp_path: Path, locale: str) -> None:
    problem = {"code": "TOKEN_MISMATCH", "text": "Of a, b, c, ….", "hint": "", "blocking": True}
    status_of(tmp_path, shown_at("discovering", problems=[problem]))
    environment = {"PATH": os.environ["PATH"], "LC_ALL": locale, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "firstboot", "status", "--root", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, b"")
    assert b"TOKEN_MISMATCH: Of a, b, c, " in done.stdout


def test_what_was_said_before_a_mistake_is_not_lost(recording: Path) -> None:
    recording.write_bytes(b"".join([*recording.read_bytes().splitlines(True)[:5], b"damage\n{}\n"]))
    program = [sys.executable, "-m", "firstboot", "replay", str(recording)]
    environment = {"PATH": os.environ["PATH"]}  # an unbuffered Python would hide the mistake
    done = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 78 and b"line 6" in done.stderr
    assert len(done.stdout.splitlines()) == 5
