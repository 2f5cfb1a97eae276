"""Where a start's time goes, phase by phase: ``python -m tests.bench.phases --hosts 3 --runs 5``.

Runs formations as the benchmark does, with a clock at each phase's end within every process, and
prints the medians over all hosts: processor time first, as three hosts share this machine.
"""

from __future__ import annotations

import sys
import time

# What ends each phase, and what the phase is called; the first mark that comes counts.
PHASES = {
    "python": "Python itself",
    "imports": "imports",
    "document": "the document: read, checked",
    "network": "identity and first state on disk; zeroconf imported meanwhile",
    "listening": "port open, bootstrap certificate, TLS contexts",
    "discovering": "mDNS open, first announcement",
    "deciding": "peers found, TLS with each, a quorum",
    "decided": "promises and votes, each on disk",
    "certificates": "request, signature, check, each on disk",
    "running": "ACTIVE on a quorum's disks, the role's files",
    "end": "last reports, closing",
}
_SAME = {"signing": "decided", "enrolling": "decided"}
_seen: list[tuple[str, float, float]] = []


def _mark(what: str) -> None:
    what = _SAME.get(what, what)
    if what in PHASES and what not in (seen for seen, _, _ in _seen):
        _seen.append((what, time.process_time(), time.monotonic()))


def inside() -> None:
    """Be ``firstboot run --root DIRECTORY``, with the clocks; writes DIRECTORY/phases.json."""
    _mark("python")
    from firstboot import cli
    from firstboot.late import late_patterns

    run = cli._run

    def timed(root: object) -> int:
        with late_patterns():
            from firstboot import publisher, service, userdata  # noqa: F401
        _mark("imports")
        find, mark = userdata.find, publisher.Publisher.mark

        def found(*given: object) -> object:
            document = find(*given)  # type: ignore[arg-type]
            _mark("document")
            return document

        def marked(self: publisher.Publisher, what: str, **more: object) -> None:
            mark(self, what, **more)
            _mark(what)

        userdata.find = found  # type: ignore[assignment]
        publisher.Publisher.mark = marked  # type: ignore[method-assign]
        code = run(root)  # type: ignore[arg-type]
        _mark("end")
        import json
        from pathlib import Path

        Path(sys.argv[-1], "phases.json").write_text(json.dumps(_seen))
        return code

    cli._run = timed
    cli.program()


def main() -> int:
    """Form, and print a row for each phase."""
    import argparse
    import json
    import shutil
    import statistics

    from tests.bench import systems
    from tests.bench.__main__ import settle
    from tests.network.hosts import PROJECT
    from tests.network.rig import Network

    parser = argparse.ArgumentParser(prog="python -m tests.bench.phases", description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--hosts", type=int, default=3)
    options = parser.parse_args()
    code = f"import gc, sys; gc.disable(); sys.path.insert(0, {str(PROJECT)!r})"
    systems.LAUNCHER = f"{code}; from tests.bench import phases; phases.inside()"
    took: dict[str, list[tuple[float, float]]] = {what: [] for what in PHASES}
    with Network(options.hosts) as network:
        settle(network)
        directory = network.owner.directory / "formation"
        for number in range(options.runs + 1):
            directory.mkdir()
            formation = systems.Firstboot().form(network, directory)
            for path in directory.glob("*/phases.json") if number else ():
                rows = json.loads(path.read_text())
                # Before the first mark there is no clock of ours: Python began at its CPU time 0.
                before = ("", 0.0, rows[0][2] - rows[0][1])
                for row in rows:
                    took[row[0]].append((row[1] - before[1], row[2] - before[2]))
                    before = row
            shutil.rmtree(directory)
    print("| Phase | CPU ms | wall ms |\n|:--|--:|--:|")
    for what, name in PHASES.items():
        if took[what]:
            cpu, wall = (1000 * statistics.median(x) for x in zip(*took[what], strict=True))
            print(f"| {name} | {cpu:.1f} | {wall:.1f} |")
    print(
        f"\nCPU of a host with its exit, last formation: {statistics.median(formation.cpu):.3f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
