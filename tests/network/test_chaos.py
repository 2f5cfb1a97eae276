"""The campaign in short: a few drawn runs with real processes, and that nothing of it stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.network.chaos.campaign import campaign
from tests.network.chaos.formation import Formation
from tests.network.chaos.plan import Fault, draw
from tests.network.chaos.verdict import judge
from tests.network.hosts import PROJECT
from tests.network.run import Run, wait_until

pytestmark = pytest.mark.network

SEEDS = (2, 4, 8, 15, 29, 46)


def test_formations_survive_what_befalls_them(tmp_path: Path) -> None:
    report = campaign(SEEDS, jobs=len(SEEDS), keep=tmp_path)
    assert not report.violations, report.text()
    assert report.runs == report.clean == len(SEEDS)
    assert report.faults.total() >= len(SEEDS)
    for invariant in ("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I11"):
        assert report.checks[invariant], invariant


# A product broken on purpose: what the campaign is for must show in it.
BROKEN = """
from firstboot.protocol import election, situation, voter
{patch}
from firstboot.cli import program
program()
"""
HASTY = """
def store(self, then=None, *, real=voter.Voter._store, **changes):
    real(self, None, **changes)
    if then is not None:
        then()
voter.Voter._store = store
"""
LONELY = """
election.quorum = lambda config, **_: 1
situation.Situation.in_grace = property(lambda self: False)
"""
ALONE = Fault(0.0, "partition", lasts=15.0, group=(1,))


@pytest.mark.parametrize(
    ("patch", "faults", "invariant"),
    [(HASTY, (), "I4"), (LONELY, (ALONE,), "I1")],
    ids=["replies before the disk", "a quorum of one"],
)
def test_a_broken_product_is_found(patch: str, faults: tuple[Fault, ...], invariant: str) -> None:
    plan = replace(draw(0), hosts=3, expect=3, masters=1, strict=False, grace=1.0, extra=0)
    plan = replace(plan, discovery="both", stranger=False, starts=(0.0,) * 3, faults=faults)
    with Run() as run:
        formation = Formation(plan, run, threading.Event())
        for host in formation.hosts:
            host.program = ("-c", BROKEN.format(patch=patch))
        formation.patience = 10.0
        found = judge(formation.carry_out()).findings
        assert any(line.startswith(f"{invariant}:") for line in found.wrong), found


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
