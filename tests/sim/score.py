"""How many mutants the campaign kills, and at which seed; then how often known bad rules split."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from firstboot.protocol.assembly import Assembly
from tests.sim.campaign import new_world, version
from tests.sim.controls import RUNS, Rates, rates
from tests.sim.mutants import MUTANTS
from tests.sim.world import play

SEEDS = 2000


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant; `seed` is None if it survived all that were tried."""

    mutant: str
    breaks: str
    killed_by: str
    seed: int | None
    tried: int


def objection(seed: int, core: type[Assembly] = Assembly) -> str:
    """What the campaign has against the run of that seed; empty if nothing."""
    try:
        play(new_world(seed, core))
    except AssertionError as error:
        return re.sub(r" after \d+ s: .*", "", str(error).partition("\n")[0]) or "an assertion"
    return ""


def hunt(job: tuple[int, range]) -> Verdict:
    """Try those seeds on the mutant of that number, in order, until one kills it."""
    index, seeds = job
    mutant = MUTANTS[index]
    with mutant.applied() as core:
        for tried, seed in enumerate(seeds, start=1):
            found = objection(seed, core)
            if found:
                return Verdict(mutant.name, mutant.breaks, found, seed, tried)
    return Verdict(mutant.name, mutant.breaks, "", None, len(seeds))


def spared(seeds: Iterable[int]) -> list[str]:
    """The control: what the campaign has against the core itself."""
    return [f"seed {seed}: {found}" for seed in seeds if (found := objection(seed))]


@dataclass(frozen=True)
class Score:
    """All verdicts, and the control: the core itself over every seed that a mutant was tried on."""

    verdicts: list[Verdict]
    control_seeds: int
    control: list[str]

    @property
    def perfect(self) -> bool:
        """Whether every mutant died and the core did not."""
        return not self.control and all(v.seed is not None for v in self.verdicts)

    def text(self) -> str:
        """The table, for a person."""
        dead, every = sum(v.seed is not None for v in self.verdicts), len(self.verdicts)
        head = ("mutant", "what it breaks", "killed by", "at seed", "tried")
        rows = [
            (
                v.mutant,
                v.breaks,
                v.killed_by or "SURVIVED",
                "-" if v.seed is None else str(v.seed),
                str(v.tried),
            )
            for v in self.verdicts
        ]
        lines = [
            f"mutants killed: {dead} of {every}, {100 * dead // every} %",
            f"control: the core itself on all {self.control_seeds} seeds that were tried:"
            f" {len(self.control)} violations",
            *self.control[:5],
            "",
            *table([head, *rows]),
        ]
        return "\n".join(lines)


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Columns as wide as they must be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def score(
    seeds: list[range],
    pool: Executor,
    jobs: int,
    tell: Callable[[Verdict], object] = lambda _: None,
) -> Score:
    """Hunt every mutant on its seeds; then the core on all that were tried, in parts for `jobs`."""
    verdicts: list[Verdict] = []
    tried: set[int] = set()
    for verdict, mine in zip(pool.map(hunt, enumerate(seeds)), seeds, strict=True):
        tell(verdict)
        verdicts.append(verdict)
        tried.update(mine[: verdict.tried])
    control = sorted(tried)
    parts = pool.map(spared, (control[n :: 4 * jobs] for n in range(4 * jobs)))
    return Score(verdicts, len(tried), [line for part in parts for line in part])


def report(done: Score, split: Rates) -> str:
    """Both tables."""
    head = f"firstboot {version()}, Python {platform.python_version()}"
    title = (
        f"Splits of bad rules and of the core in the same world, {split.runs} runs a case; in"
        " brackets what the simulation of the design had"
    )
    return "\n".join([head, "", done.text(), "", title, "", *table(split.rows())])


def main() -> int:
    """0 if the score is 100 %, the control clean, and only bad rules split."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="per mutant, at most")
    parser.add_argument("--runs", type=int, default=RUNS, help="per case and rule")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--report", type=Path, help="write the report there, as .txt and .json")
    options = parser.parse_args()
    started = time.monotonic()

    def tell(verdict: Verdict) -> None:
        fate = "SURVIVED" if verdict.seed is None else f"seed {verdict.seed}: {verdict.killed_by}"
        print(f"{time.monotonic() - started:5.0f} s  {verdict.mutant}: {fate}", file=sys.stderr)

    with ProcessPoolExecutor(options.jobs) as pool:
        done = score([range(options.seeds)] * len(MUTANTS), pool, options.jobs, tell)
        split = rates(options.runs, pool)
    text = report(done, split)
    print(text)
    if options.report is not None:
        both = {"version": version(), "mutants": asdict(done), "rates": asdict(split)}
        options.report.with_suffix(".txt").write_text(text + "\n")
        options.report.with_suffix(".json").write_text(json.dumps(both, indent=1) + "\n")
    return 0 if done.perfect and split.as_expected else 1
