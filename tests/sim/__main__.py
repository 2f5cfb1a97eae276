"""``python -m tests.sim``: the campaign (``make sim SEEDS=N JOBS=2``), or one seed's events."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from tests.sim.campaign import Report, campaign, narrated, stopwatch


def main() -> int:
    """0 if no seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", type=Path, help="write the report there, as .txt and .json")
    parser.add_argument("--narrate", type=int, metavar="SEED", help="print one seed's events")
    options = parser.parse_args()
    if options.narrate is not None:
        print("\n".join(narrated(options.narrate)))
        return 0
    started = time.monotonic()

    def tell(report: Report) -> None:
        bad = len(report.failures)
        end = "\r" if sys.stderr.isatty() else "\n"
        if end == "\r" or report.seeds % 1000 == 0:
            line = f"{report.seeds}/{options.seeds} seeds, {bad} bad, {stopwatch(report, started)}"
            print(line, end=end, file=sys.stderr, flush=True)

    report = campaign(options.first, options.seeds, options.jobs, tell)
    print(report.text())
    if options.report is not None:
        options.report.with_suffix(".txt").write_text(report.text() + "\n")
        options.report.with_suffix(".json").write_text(report.json() + "\n")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
