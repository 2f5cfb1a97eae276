"""Figures of many formations: as a table, as Markdown and as JSON."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.systems import LIMIT, Formation, program
from tests.network.hosts import PROJECT

# What a row is called, whose figure it is, and from which mark to which it counts.
ROWS = (
    ("firstboot: master decided on every host", "firstboot", "", "decided"),
    ("firstboot: certificates on every host", "firstboot", "", "certificates"),
    (
        "firstboot: certificates, since the last host listens",
        "firstboot",
        "listening",
        "certificates",
    ),
    ("serf: membership on every host", "serf", "", "members"),
    ("etcd: every member healthy", "etcd", "", "healthy"),
    ("etcd: healthy, since the last log file is made", "etcd", "log made", "healthy"),
)
# Figures to divide: of firstboot, and of the other system. Both are rows' names.
RATIOS = (
    ("certificates on every host : etcd healthy", ROWS[1][0], ROWS[4][0]),
    ("certificates since the last host listens : serf membership", ROWS[2][0], ROWS[3][0]),
)


@dataclass
class Series:
    """All formations of one system with one number of hosts; `failed` has the reasons."""

    system: str
    hosts: int
    formations: list[Formation] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def seconds(self, begin: str, end: str) -> list[float]:
        """How long from one mark ("": the start) to another; a failed formation counts `LIMIT`."""
        took = [f.marks[end] - (f.marks[begin] if begin else 0.0) for f in self.formations]
        return took + [LIMIT] * len(self.failed)

    @property
    def cpu(self) -> float:
        """Median seconds of CPU a host."""
        return statistics.median(x for f in self.formations for x in f.cpu)

    @property
    def peak(self) -> float:
        """Median peak memory of a host in MiB."""
        return statistics.median(x for f in self.formations for x in f.peak) / 2**20

    @property
    def sent(self) -> float:
        """Median KiB a host puts on the wire."""
        return statistics.median(f.sent for f in self.formations) / self.hosts / 1024


def p99(values: Sequence[float]) -> float:
    """The nearest-rank 99th percentile: with fewer than 100 values the largest."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def figures(series: Sequence[Series]) -> list[dict[str, Any]]:
    """A row for each figure and number of hosts, as plain data."""
    rows = []
    for hosts in sorted({s.hosts for s in series}):
        for name, system, begin, end in ROWS:
            for one in series:
                if (one.system, one.hosts) == (system, hosts) and one.formations:
                    took = one.seconds(begin, end)
                    rows.append(
                        {
                            "hosts": hosts,
                            "name": name,
                            "runs": len(took),
                            "failed": len(one.failed),
                            "median": statistics.median(took),
                            "p99": p99(took),
                            "fastest": min(took),
                            "cpu": one.cpu,
                            "peak": one.peak,
                            "sent": one.sent,
                        }
                    )
    return rows


def ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """firstboot's median divided by another's; etcd has as many members as it was measured with."""
    found = []
    for name, ours, theirs in RATIOS:
        others = {row["hosts"]: row["median"] for row in rows if row["name"] == theirs}
        for row in rows:
            other = others.get(row["hosts"])
            if row["name"] == ours and other:
                ratio = row["median"] / other
                found.append({"hosts": row["hosts"], "name": name, "ratio": ratio})
    return found


def machine() -> dict[str, str]:
    """What the figures depend on."""
    packages = ("cryptography", "zeroconf", "PyYAML", "fastjsonschema")
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": _processor(),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
        "serf": _version("serf", "version"),
        "etcd": _version("etcd", "--version"),
        "firstboot": _said("git", "-C", str(PROJECT), "describe", "--always", "--dirty"),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(name: str, option: str) -> str:
    path = program(name)
    return _said(path, option).splitlines()[0].removeprefix("etcd Version: ") if path else "none"


def _said(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def table(series: Sequence[Series]) -> str:
    """The figures and ratios for a terminal, and in Markdown: it is both."""
    head = "| Hosts | From start to … | median s | p99 s | CPU s/host | peak MiB | sent KiB/host |"
    lines = [head, "|--:|:--|--:|--:|--:|--:|--:|"]
    rows = figures(series)
    for r in rows:
        failed = f" ({r['failed']} of {r['runs']} not formed)" if r["failed"] else ""
        lines.append(
            f"| {r['hosts']} | {r['name']}{failed} | {r['median']:.3f} | {r['p99']:.3f}"
            f" | {r['cpu']:.3f} | {r['peak']:.1f} | {r['sent']:.1f} |"
        )
    lines += ["", "| Hosts | Ratio of medians | |", "|--:|:--|--:|"]
    lines += [f"| {r['hosts']} | {r['name']} | {r['ratio']:.2f} |" for r in ratios(rows)]
    return "\n".join(lines)


def as_json(series: Sequence[Series]) -> dict[str, Any]:
    """Everything, every formation included."""
    rows = figures(series)
    return {
        "machine": machine(),
        "figures": rows,
        "ratios": ratios(rows),
        "series": [asdict(s) for s in series],
    }
