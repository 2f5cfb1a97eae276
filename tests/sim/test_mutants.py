"""The campaign kills every mutant within the seeds it is given, and bad rules split."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest

from firstboot.protocol.assembly import Assembly
from tests.sim import score as score_of
from tests.sim.controls import CASES, RULES, Rates, rates
from tests.sim.mutants import MUTANTS, Mutant
from tests.sim.score import Score, Verdict, hunt, score

JOBS = os.cpu_count() or 1
RECORD = Path(__file__).parents[2] / "docs/proof/mutants.json"
BEYOND = 1000  # seeds, should the faults of a seed have changed since


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with ProcessPoolExecutor(JOBS) as executor:
        yield executor


def test_every_mutant_dies_and_the_core_does_not(pool: Executor) -> None:
    """Each begins at the seed that the recorded report has for it, and may need some more."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["mutants"]["verdicts"]
    known = {verdict["mutant"]: verdict["seed"] for verdict in recorded}
    seeds = [range(known[m.name], known[m.name] + BEYOND) for m in MUTANTS]
    done = score(seeds, pool, JOBS)
    print(done.text())
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) == len(done.verdicts)
    assert [v.mutant for v in done.verdicts if v.seed is None] == []
    assert done.control == []
    assert done.perfect


def test_a_change_that_breaks_nothing_survives(monkeypatch: pytest.MonkeyPatch) -> None:
    class Harmless(Assembly):
        pass

    monkeypatch.setattr(score_of, "MUTANTS", [Mutant("harmless", "nothing", Harmless)])
    assert hunt((0, range(10))) == Verdict("harmless", "nothing", "", None, 10)


def test_a_survivor_or_a_fault_of_the_core_spoils_the_score() -> None:
    dead = Verdict("a", "b", "I1", 3, 4)
    assert Score([dead], 4, []).perfect
    assert not Score([dead, Verdict("c", "d", "", None, 4)], 4, []).perfect
    assert not Score([dead], 4, ["seed 0: I1"]).perfect


def test_bad_rules_split_and_the_core_does_not(pool: Executor) -> None:
    found = rates(10, pool)
    split = {rule: {c: row[rule] for c, row in found.split.items()} for rule in RULES}
    every = dict.fromkeys(found.split, 0)
    surplus, recreated = CASES[3].name, CASES[4].name
    assert split["firstboot strict"] == every
    assert split["firstboot"] == every | {surplus: 10, recreated: 10}  # 2q <= V
    for rule in ("lowest id", "random delay"):
        assert split[rule][CASES[1].name] == 10
    assert split["majority of seen"][surplus] == 10
    assert split["votes in memory"][CASES[5].name] > split["firstboot"][CASES[5].name]
    assert found.as_expected


@pytest.mark.parametrize("rule", RULES)
def test_a_core_that_splits_or_a_control_that_does_not_is_not_as_expected(rule: str) -> None:
    row = {r: int(not r.startswith("firstboot")) for r in RULES}
    assert Rates(10, {case.name: row for case in CASES}).as_expected
    spoiled = row | {rule: 1 - row[rule]}
    assert not Rates(10, {case.name: spoiled for case in CASES}).as_expected
