"""Many seeds, one report: how many runs, which faults, what was checked, what was found."""

from __future__ import annotations

import gc
import itertools
import json
import platform
import signal
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import USUAL, Topology
from tests.sim.boundaries import crashed
from tests.sim.world import Faults, World, play

SIZES = (3, 3, 5, 2, 4, 1, 7)  # hosts of a run, by seed
HUB_SIZES = (4, 5, 4, 7)  # the same of those that keep to hubs
CHUNK = 50
KEPT = 50  # failures of which a report holds the text
_SUMS = ("seeds", "busy", "events", "stuck", "splits", "told", "outside", "boundaries", "failed")
FEW_HUBS = Topology(mesh=3, hubs=2)
TICK = 0.1  # seconds; how finely times are counted


@dataclass
class Report:
    """What a campaign saw. Times are virtual; `formed` and `healed` count TICKs.

    `formed` is from the first moment to all running, `healed` from the end of the faults for
    those that had not formed before.
    """

    first: int = 0
    seeds: int = 0
    events: int = 0
    elapsed: float = 0.0  # real seconds
    busy: float = 0.0  # processor seconds of the seeds' runs
    jobs: int = 1
    stuck: int = 0  # L1
    splits: int = 0  # I1 and I2, inside the promise
    told: int = 0  # splits outside of it, each of them told by the masters
    outside: int = 0  # runs that left the promise: 2q <= V, or one identity twice
    boundaries: int = 0  # crashed at, one run each
    failed: int = 0
    version: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    formed: Counter[int] = field(default_factory=Counter)
    healed: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)  # seeds, of the first KEPT failures

    def add(self, other: Report) -> None:
        """Join another part of the campaign."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("faults", "checks", "formed", "healed"):
            getattr(self, name).update(getattr(other, name))
        self.failures += other.failures[: max(0, KEPT - len(self.failures))]
        self.bad += other.bad[: max(0, KEPT - len(self.bad))]

    def saw(self, world: World) -> None:
        """Count a run that violated nothing."""
        self.events += world.events
        self.told += world.witness.split_told
        self.outside += not world.witness.safe
        if world.ended and world.formed is not None:
            self.formed[round(world.formed / TICK)] += 1
            after = world.formed - world.peaceful
            if after > 0:
                self.healed[round(after / TICK)] += 1

    def checked(self, world: World) -> None:
        """Count what was injected and checked."""
        for what, times in world.witness.checks.items():
            self.checks[what.partition(":")[0]] += times
        self.faults.update(world.counts)

    def failure(self, run: str, error: AssertionError) -> None:
        """Count and keep a run that did."""
        self.failed += 1
        self.stuck += str(error).startswith("L1")
        self.splits += str(error).startswith(("I1", "I2"))
        if len(self.failures) < KEPT:
            self.failures.append(f"{run}:\n{traceback.format_exc(limit=-2)}")

    @property
    def rate(self) -> float:
        """Runs a second of one processor's time."""
        return self.seeds / max(self.busy, 1e-3)

    def summary(self) -> dict[str, Any]:
        """All of it in plain types."""
        return {
            "version": self.version,
            "python": platform.python_version(),
            "first": self.first,
            "seeds": self.seeds,
            "events": self.events,
            "seconds": round(self.elapsed, 1),
            "jobs": self.jobs,
            "runs_per_processor_second": round(self.rate, 1),
            "checks": dict(sorted(self.checks.items())),
            "faults": dict(sorted(self.faults.items())),
            "splits_inside_the_promise": self.splits,
            "splits_outside_all_told": self.told,
            "runs_outside_the_promise": self.outside,
            "stuck": self.stuck,
            "boundaries_enumerated": self.boundaries,
            "formed": _times(self.formed),
            "formed_after_the_faults": _times(self.healed),
            "failed": self.failed,
            "failures": self.failures,
        }

    def text(self) -> str:
        """The report as a person reads it."""
        told = self.summary()
        last, checks = self.first + self.seeds - 1, sum(self.checks.values())
        formed, healed = told["formed"], told["formed_after_the_faults"]
        lines = [
            f"firstboot {self.version}, Python {told['python']}, seeds {self.first} to {last}",
            f"{self.seeds} formations, {self.events} events, {checks} invariant checks in"
            f" {self.elapsed:.0f} s on {self.jobs} processes: {self.rate:.0f} runs a second of"
            " processor time",
            "checks: " + ", ".join(f"{rule} {n}" for rule, n in told["checks"].items()),
            "faults: " + (", ".join(f"{k} {n}" for k, n in told["faults"].items()) or "none"),
            f"time to form, virtual: median {formed['median']} s, longest {formed['longest']} s"
            f" ({formed['runs']} runs)",
            f"after the end of the faults: median {healed['median']} s, longest"
            f" {healed['longest']} s ({healed['runs']} runs that had not formed before)",
            f"splits inside the promise (2q > V): {self.splits}",
            f"splits outside of it: {self.told}, all told by the masters that met"
            f" ({self.outside} runs left the promise)",
            f"stuck: {self.stuck}",
        ]
        if self.boundaries:
            lines.append(f"boundaries enumerated: {self.boundaries}")
        lines.append(f"violations and stuck runs: {self.failed}")
        return "\n".join([*lines, *self.failures[:5]])

    def write(self, path: Path) -> None:
        """As text and as JSON, beside each other."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text(self.text() + "\n")
        path.with_suffix(".json").write_text(json.dumps(self.summary(), indent=1) + "\n")


def _times(counted: Counter[int]) -> dict[str, Any]:
    """Runs, and of their times median and longest in seconds."""
    runs, ahead = sum(counted.values()), 0
    median = 0
    for tick in sorted(counted):
        median, ahead = tick, ahead + counted[tick]
        if 2 * ahead >= runs:
            break
    longest = max(counted, default=0)
    return {"runs": runs, "median": round(median * TICK, 1), "longest": round(longest * TICK, 1)}


def version() -> str:
    """What git calls this tree."""
    git = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "not in git"


# ---------------------------------------------------------------- runs


def size_of(seed: int) -> int:
    """How many hosts the run of that seed is of; every fourth is of many that keep to few hubs."""
    return HUB_SIZES[seed // 4 % len(HUB_SIZES)] if seed % 4 == 3 else SIZES[seed % len(SIZES)]


def new_world(seed: int, core: type[Assembly] = Assembly) -> World:
    """The world of that seed, before anything happens: always the same."""
    topology = FEW_HUBS if seed % 4 == 3 else USUAL
    return World(seed, hosts=size_of(seed), core=core, topology=topology)


def world_of(seed: int) -> World:
    """The run of that seed."""
    world = new_world(seed)
    play(world)
    return world


def run_seeds(seeds: Iterable[int]) -> Report:
    """Run these seeds in this process."""
    report, started = Report(), time.process_time()
    for seed in seeds:
        report.seeds += 1
        world = new_world(seed)
        try:
            play(world)
        except AssertionError as error:
            report.bad.append(seed)
            report.failure(f"seed {seed}", error)
        else:
            report.saw(world)
        report.checked(world)
    gc.collect()
    report.busy = time.process_time() - started
    return report


def run_boundaries(seed: int, every: int = 1) -> Report:
    """Crash at every boundary of one kind formation, or at one of `every`."""
    report = Report()
    for world in crashed([seed], every):
        report.boundaries += 1
        try:
            world.play()
        except AssertionError as error:
            report.failure(f"kind seed {seed}, crash {world.cut_at} {world.gap}", error)
        report.checked(world)
    return report


def campaign(
    first: int, count: int, jobs: int, tell: Callable[[Report], None], kind: int = 0
) -> Report:
    """Run `count` seeds in `jobs` processes; `tell` hears of the progress.

    Before, every boundary of `kind` formations is crashed at. On an interrupt it ends early, with
    a report of what was run.
    """
    total, started = Report(first=first, jobs=jobs, version=version()), time.monotonic()
    end = first + count
    ranges = (range(n, min(n + CHUNK, end)) for n in range(first, end, CHUNK))
    tasks = itertools.chain(
        (partial(run_boundaries, seed) for seed in range(kind)),
        (partial(run_seeds, seeds) for seeds in ranges),
    )
    parts = (task() for task in tasks) if jobs == 1 else _in_processes(tasks, jobs)
    try:
        for part in parts:
            total.add(part)
            total.elapsed = time.monotonic() - started
            tell(total)
    except KeyboardInterrupt:
        total.elapsed = time.monotonic() - started
    return total


def _in_processes(tasks: Iterator[Callable[[], Report]], jobs: int) -> Iterator[Report]:
    """A few tasks ahead of the processes, so that memory stays the same however many there are."""
    with ProcessPoolExecutor(jobs, initializer=_begin_process) as pool:
        waiting = {pool.submit(task) for task in itertools.islice(tasks, 2 * jobs)}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(task) for task in itertools.islice(tasks, len(done))}
                for future in done:
                    yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # a chunk's garbage is small, and collected at its end


def narrated(seed: int) -> Iterator[str]:
    """The event list of one seed, for a person to follow."""
    lines: list[str] = []
    world = new_world(seed)
    world.trace = lines.append
    try:
        play(world)
        lines.append(world.picture())
    except AssertionError as error:
        lines.append(f"VIOLATION {error}")
    yield from lines


__all__ = ["Faults", "Report", "campaign", "narrated", "run_seeds", "world_of"]
