"""The campaign in short: a few drawn runs with real processes, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.network.chaos.campaign import campaign
from tests.network.hosts import PROJECT
from tests.network.run import wait_until

pytestmark = pytest.mark.network

SEEDS = (2, 4, 8, 15, 29, 46)


def test_formations_survive_what_befalls_them(tmp_path: Path) -> None:
    report = campaign(SEEDS, jobs=len(SEEDS), keep=tmp_path)
    assert not report.violations, report.text()
    assert report.runs == report.clean == len(SEEDS)
    assert report.faults.total() >= len(SEEDS)
    for invariant in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I11"):
        assert report.checks[invariant], invariant


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"]
)
def test_an_interrupted_campaign_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    argv = [sys.executable, "-m", "tests.network.chaos", "--runs", "9", "--jobs", "3"]
    environment = {**os.environ, "FIRSTBOOT_RUNS": str(tmp_path)}
    going = subprocess.Popen(argv, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True)

    def begun() -> list[Path]:
        return list(tmp_path.glob("fb*/h1/var/lib/firstboot/history.jsonl"))

    try:
        wait_until(lambda: len(begun()) == 3, 60, "three formations are under way")
        prefixes = {path.relative_to(tmp_path).parts[0] for path in begun()}
        going.send_signal(number)
        _, said = going.communicate(timeout=30)
    finally:
        going.kill()
    assert going.returncode == code, said
    assert list(tmp_path.glob("fb*")) == []
    names = {path.name.partition("-")[0] for path in Path("/run/netns").iterdir()}
    assert not names & prefixes
