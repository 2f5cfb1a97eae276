"""The benchmark works: it forms, reads the marks, and says so when nothing forms. No timing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import report, systems
from tests.bench.__main__ import main
from tests.bench.report import Series
from tests.bench.systems import EtcdLog, Formation, SerfLog

HOSTS = 2


@pytest.mark.network
def test_two_formations_have_their_marks_and_costs(tmp_path: Path) -> None:
    where = tmp_path / "figures"
    given = ["--runs", "2", "--hosts", str(HOSTS), "--systems", "firstboot"]
    assert main([*given, "--report", str(where)]) == 0
    written = json.loads(where.with_suffix(".json").read_text())
    [series] = written["series"]
    assert len(series["formations"]) == 2 and series["failed"] == []
    for formation in series["formations"]:
        marks = formation["marks"]
        assert 0 < marks["listening"] < marks["decided"] <= marks["certificates"]
        assert len(formation["cpu"]) == len(formation["peak"]) == HOSTS
        assert min(*formation["cpu"], *formation["peak"], formation["sent"]) > 0
    assert "certificates on every host" in where.with_suffix(".txt").read_text()


@pytest.mark.network
def test_what_does_not_form_is_no_figure_and_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(systems, "LAUNCHER", "print('broken here'); raise SystemExit(3)")
    assert main(["--runs", "1", "--hosts", str(HOSTS), "--systems", "firstboot"]) == 1
    assert "broken here" in capsys.readouterr().err


def test_a_failed_formation_counts_as_long_as_the_limit() -> None:
    made = [Formation({"certificates": 1.0 + i}, [1.0], [1], 1024) for i in range(2)]
    series = Series("firstboot", 3, made, ["not formed"])
    assert sorted(series.seconds("", "certificates")) == [1.0, 2.0, systems.LIMIT]
    assert report.p99(list(range(100))) == 98 and report.p99([2.0, 1.0]) == 2.0


def test_ratios_are_of_the_same_number_of_hosts() -> None:
    rows = [
        {"hosts": hosts, "name": name, "median": median}
        for hosts, name, median in (
            (3, report.ROWS[1][0], 0.2),
            (3, report.ROWS[4][0], 0.5),
            (5, report.ROWS[1][0], 0.3),
        )
    ]
    assert [(r["hosts"], r["ratio"]) for r in report.ratios(rows)] == [(3, 0.4)]


def test_the_logs_of_the_others_are_read_to_the_last_member() -> None:
    serf, joined = SerfLog(2), "2026 [INFO] serf: EventMemberJoin: {} 10.0.0.1"
    assert not serf.take(0, "[INFO] agent: Serf agent starting", 0.1)
    told = [serf.take(h, joined.format(n), 0.2) for h in (0, 1) for n in ("h1", "h1", "h2")]
    assert told == [False] * 5 + [True] and serf.marks == {"listening": 0.1, "members": 0.2}
    etcd, published = EtcdLog(2), '"msg":"published local member to cluster through raft"'
    assert [etcd.take(h, published, 0.3) for h in (0, 0, 1)] == [False, False, True]
