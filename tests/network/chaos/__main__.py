"""``python -m tests.network.chaos``: the campaign (``make chaos RUNS=20 JOBS=4``).

``--seed S --runs 1`` repeats one run's plan. A bad run's files are kept under ``build/chaos``.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from tests.network.chaos.campaign import campaign
from tests.network.chaos.plan import draw
from tests.network.chaos.report import Report


def main() -> int:
    """0 if no run was a bad one, 130 if it was interrupted."""
    parser = argparse.ArgumentParser(prog="python -m tests.network.chaos", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time; mostly they wait")
    parser.add_argument("--seed", type=int, default=0, help="of the first run")
    parser.add_argument("--report", type=Path, help="write the report there, as .txt and .json")
    parser.add_argument("--plan", action="store_true", help="only print what the runs would be")
    parser.add_argument("--keep", type=Path, default=Path("build/chaos"), metavar="DIRECTORY")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.runs)
    if options.plan:
        print("\n".join(str(draw(seed)) for seed in seeds))
        return 0
    began = time.monotonic()

    def tell(report: Report) -> None:
        bad, minutes = len(report.violations), (time.monotonic() - began) / 60
        line = f"{report.runs}/{options.runs} runs, {bad} bad, {minutes:.1f} min"
        print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)

    try:
        report = campaign(seeds, options.jobs, options.keep, tell)
    except KeyboardInterrupt:
        return 130
    minutes = (time.monotonic() - began) / 60
    how = (
        f"seeds {seeds.start} to {seeds.stop - 1}, {options.jobs} at a time on {os.cpu_count()}"
        f" cores: {minutes:.0f} minutes"
    )
    text = f"{how}\n{report.text()}"
    print(text)
    if options.report is not None:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.with_suffix(".txt").write_text(text + "\n")
        options.report.with_suffix(".json").write_text(report.json() + "\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
