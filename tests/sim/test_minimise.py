"""A failing seed becomes a few faults, a story, and histories that `firstboot replay` reads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import Register
from firstboot.protocol.situation import Start
from tests.sim.minimise import Minimiser, broken, failing, minimised
from tests.sim.test_sim import RepliesBeforeDisk

ROOT = Path(__file__).parents[2]


def test_a_failing_seed_is_minimised_and_its_histories_replayed(tmp_path: Path) -> None:
    lines = minimised(1, tmp_path, RepliesBeforeDisk)
    faults, story = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert faults[0] == "breaks I4"
    # This core needs no fault at all to fail, and no third host.
    assert " 2 hosts, " in faults[1]
    assert not [line for line in faults[2:] if line.partition(":")[0] not in ("delay", "until")]
    assert (tmp_path / "events.txt").read_text().splitlines() == lines
    for index in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "firstboot", "replay", tmp_path / f"host-{index}.jsonl"],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        timed = [line for line in story if line[:10].strip()]
        happened = [line for line in timed if line[11:].startswith(f"{index} ")]
        assert len(done.stdout.splitlines()) == len(happened) + 2  # the run, the last sentence


class Forgetful(Assembly):
    """Has forgotten what it promised when it is started again: without a crash it is correct."""

    def __init__(self, start: Start) -> None:
        forgot = replace(start.stored, register=Register())
        super().__init__(
            replace(start, stored=forgot if start.stored.decided is None else start.stored)
        )


def test_only_the_fault_that_is_needed_is_left() -> None:
    case, rule = next(filter(None, (failing(seed, Forgetful) for seed in range(60))))
    assert rule == "I4"
    assert broken(case.world()) == rule  # the same run with its faults chosen
    small = Minimiser(case, rule).minimise()
    assert broken(small.world()) == rule
    left = [o.kind for o in small.occurrences] + [chance for chance, _ in small.hits]
    assert len(left) <= 2 < len(case.occurrences) + len(case.hits), left
    assert any("crash" in what or "loop" in what for what in left)


def test_a_seed_that_holds_has_nothing_to_explain(tmp_path: Path) -> None:
    assert minimised(0, tmp_path / "none") == []
    assert not (tmp_path / "none").exists()
