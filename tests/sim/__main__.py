"""``python -m tests.sim``: the campaign (``make sim SEEDS=N JOBS=2``), or one seed's events."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.sim import world
from tests.sim.campaign import Report, campaign, narrated
from tests.sim.minimise import minimised

MINIMISED = 3  # failing seeds that are


def main() -> int:
    """0 if no seed failed, 130 if it was interrupted; what was run by then is reported."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed: to go on, or share")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", type=Path, help="write the report there, as .txt and .json")
    parser.add_argument("--boundaries", type=int, default=3, help="formations crashed everywhere")
    parser.add_argument("--minimise", type=int, metavar="SEED", help="print its few needed faults")
    parser.add_argument("--into", type=Path, default=Path("build/sim"), help="for the histories")
    parser.add_argument("--narrate", type=int, metavar="SEED", help="print one seed's events")
    options = parser.parse_args()
    if options.narrate is not None:
        print("\n".join(narrated(options.narrate)))
        return 0
    if options.minimise is not None:
        print("\n".join(_minimised(options.minimise, options.into)))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tell = _Teller(options.seeds).tell
    report = campaign(options.first, options.seeds, options.jobs, tell, options.boundaries)
    print(report.text())
    if options.report is not None:
        report.write(options.report)
    for seed in sorted(report.bad)[:MINIMISED]:
        lines = _minimised(seed, options.into)
        print(f"\nseed {seed}, minimised; replay {options.into}/seed-{seed}/host-*.jsonl:")
        print("\n".join(lines[: lines.index("") if "" in lines else None]))
    if report.failed:
        return 1
    return 0 if report.seeds == options.seeds else 130


def _minimised(seed: int, into: Path) -> list[str]:
    """The compiled core has no diary: the sources from which it was made run the same events."""
    if Path(str(world.__file__)).suffix == ".py":
        return minimised(seed, into / f"seed-{seed}")
    argv = [sys.executable, "-m", "tests.sim", "--minimise", str(seed), "--into", str(into)]
    sources = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(argv, env=sources, capture_output=True, text=True)
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


class _Teller:
    """Progress on stderr: over and over on a terminal, now and then in a file."""

    def __init__(self, seeds: int) -> None:
        self.seeds, self.next = seeds, 0.0

    def tell(self, report: Report) -> None:
        """One line, perhaps."""
        terminal = sys.stderr.isatty()
        if report.elapsed < self.next and report.seeds < self.seeds:
            return
        self.next = report.elapsed + (0.5 if terminal else 60.0)
        left = (self.seeds - report.seeds) * report.elapsed / max(report.seeds, 1)
        bad = f" ({', '.join(map(str, report.bad[:3]))})" if report.bad else ""
        line = (
            f"{report.seeds}/{self.seeds} seeds, {report.failed} bad{bad},"
            f" {report.seeds / max(report.elapsed, 1e-3):.0f}/s, {left / 60:.0f} min left"
        )
        end = "\r" if terminal and report.seeds < self.seeds else "\n"
        print(f"{line:70}", end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
