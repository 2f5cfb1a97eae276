"""Many runs, some at a time, each in a network of its own; nothing of them is left behind."""

from __future__ import annotations

import json
import shutil
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.network.chaos.formation import Formation, Stopped
from tests.network.chaos.plan import draw
from tests.network.chaos.report import Report
from tests.network.chaos.verdict import judge
from tests.network.run import Run


def campaign(
    seeds: Iterable[int],
    jobs: int,
    keep: Path,
    tell: Callable[[Report], None] = lambda _report: None,
) -> Report:
    """Run these seeds, `jobs` at a time; `tell` hears of the progress.

    A bad run's files are kept in ``keep/SEED``. On KeyboardInterrupt, or SIGTERM, every run is
    undone before it is raised again.
    """
    report, stop, adding = Report(), threading.Event(), threading.Lock()

    def one(seed: int) -> None:
        if not stop.is_set():
            with Run() as run:
                _one(seed, run, stop, keep, report, adding)

    with Run(), ThreadPoolExecutor(jobs) as pool:  # this Run makes SIGTERM unwind all of it
        running = [pool.submit(one, seed) for seed in seeds]
        try:
            for done in as_completed(running):
                done.result()
                tell(report)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return report


def _one(
    seed: int, run: Run, stop: threading.Event, keep: Path, report: Report, adding: threading.Lock
) -> None:
    plan, kept = draw(seed), keep / str(seed)
    try:
        outcome = Formation(plan, run, stop).carry_out()
        verdict = judge(outcome)
    except Stopped:
        return
    except Exception:  # noqa: BLE001  a run that breaks the campaign is a finding, not its end
        reason = traceback.format_exc()
        _keep(run.directory, kept, {"plan": str(plan), "wrong": reason})
        with adding:
            report.broken(plan, reason, str(kept))
        return
    if verdict.wrong:
        said = {"plan": str(plan), "wrong": verdict.wrong, "statuses": outcome.statuses}
        _keep(run.directory, kept, said)
    with adding:
        report.add(plan, outcome, verdict, str(kept))


def _keep(directory: Path, kept: Path, said: Mapping[str, object]) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(directory, kept, ignore=shutil.ignore_patterns("*.key"))
    (kept / "verdict.json").write_text(json.dumps(said, indent=1))
