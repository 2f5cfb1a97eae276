"""Many seeds, one report: how many runs, which faults, what was checked, what was found."""

from __future__ import annotations

import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field

from tests.sim.world import Faults, World, simulate

SIZES = (3, 3, 5, 2, 4, 1, 7)  # hosts of a run, by seed
CHUNK = 50


@dataclass
class Report:
    """What a campaign saw; `longest` is virtual seconds from the end of faults to all running."""

    seeds: int = 0
    events: int = 0
    checks: int = 0
    longest: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Join another part of the campaign."""
        self.seeds += other.seeds
        self.events += other.events
        self.checks += other.checks
        self.longest = max(self.longest, other.longest)
        self.faults += other.faults
        self.failures += other.failures

    def text(self) -> str:
        """The report as a person reads it."""
        faults = ", ".join(f"{kind} {n}" for kind, n in sorted(self.faults.items()))
        lines = [
            f"{self.seeds} formations, {self.events} events, {self.checks} invariant checks",
            f"faults injected: {faults or 'none'}",
            f"longest from the end of faults to all running: {self.longest:.1f} virtual s",
            f"violations and stuck runs: {len(self.failures)}",
        ]
        return "\n".join([*lines, *self.failures[:5]])

    def json(self) -> str:
        """The same for programs."""
        return json.dumps(vars(self), default=dict)


def world_of(seed: int) -> World:
    """The run of that seed: always the same."""
    return simulate(seed, hosts=SIZES[seed % len(SIZES)])


def run_seeds(seeds: Iterable[int]) -> Report:
    """Run these seeds in this process."""
    report = Report()
    for seed in seeds:
        report.seeds += 1
        try:
            world = world_of(seed)
        except AssertionError:
            report.failures.append(f"seed {seed}:\n{traceback.format_exc(limit=-2)}")
            continue
        report.events += world.events
        report.checks += world.witness.checks
        report.faults.update(world.counts)
        if world.ended:
            report.longest = max(report.longest, world.now - world.peaceful)
    return report


def campaign(first: int, count: int, jobs: int, tell: Callable[[Report], None]) -> Report:
    """Run `count` seeds in `jobs` processes; `tell` hears of the progress."""
    total = Report()
    chunks = [range(n, min(n + CHUNK, first + count)) for n in range(first, first + count, CHUNK)]
    for part in _in_processes(chunks, jobs):
        total.add(part)
        tell(total)
    return total


def _in_processes(chunks: list[range], jobs: int) -> Iterator[Report]:
    if jobs == 1:
        yield from map(run_seeds, chunks)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run_seeds, chunks)


def narrated(seed: int) -> Iterator[str]:
    """The event list of one seed, for a person to follow."""
    lines: list[str] = []
    try:
        world = World(seed, hosts=SIZES[seed % len(SIZES)])
        world.trace = lines.append
        world.schedule()
        world.run(world.bound, world.all_running)
        lines.append(world.picture())
    except AssertionError as error:
        lines.append(f"VIOLATION {error}")
    yield from lines


def stopwatch(report: Report, started: float) -> str:
    """Runs per second so far."""
    return f"{report.seeds / max(time.monotonic() - started, 1e-3):.0f}/s"


__all__ = ["Faults", "Report", "campaign", "narrated", "run_seeds", "stopwatch", "world_of"]
