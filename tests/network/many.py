"""``python -m tests.network.many``: one formation of many real processes (``make chaos`` has few).

All hosts are switched on at once and share this machine's cores; what is told is when each phase
was over, and what it cost: CPU, bytes on the wire, messages, connections.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.machines.document import document
from tests.network.hosts import Host, Hosts
from tests.network.rig import Network, call
from tests.network.run import wait_until

PHASES = ("listening", "deciding", "certificates", "running")


@dataclass
class Figures:
    """Seconds from the first start; of each host its CPU seconds, bytes, messages, connections."""

    hosts: int
    cores: int
    load: float = 0.0  # average of the minute before (getloadavg(3)): what else the cores did
    at: dict[str, list[float]] = field(default_factory=dict)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    messages: list[int] = field(default_factory=list)
    connections: list[int] = field(default_factory=list)
    clusters: int = 0
    masters: int = 0

    def text(self) -> str:
        """The figures as a person reads them."""
        lines = [
            f"{self.hosts} hosts on {self.cores} cores: {self.clusters} cluster,"
            f" {self.masters} master; every process ended by itself",
            f"load of the machine in the minute before: {self.load:.1f}",
        ]
        for phase, moments in self.at.items():
            lines.append(_row(f"{phase}, s after the first start", moments, 2))
        last = max(self.at["listening"])
        lines += [
            f"from the last host's listening to all certificates"
            f" {max(self.at['certificates']) - last:.2f} s, to all running"
            f" {max(self.at['running']) - last:.2f} s",
            _row("CPU of a host, s", self.cpu, 2, total=True),
            _row("sent by a host, kB", [n / 1000 for n in self.sent], 0, total=True),
            _row("messages to a host", self.messages, 0, total=True),
            _row("connections of a host", self.connections, 0),
        ]
        return "\n".join(lines)


def _row(what: str, numbers: Sequence[float], digits: int, *, total: bool = False) -> str:
    least, half, most = min(numbers), sorted(numbers)[len(numbers) // 2], max(numbers)
    text = f"{what}: {least:.{digits}f} to {most:.{digits}f}, half below {half:.{digits}f}"
    return text + f", all together {sum(numbers):.{digits}f}" * total


def form(hosts: int, directory: Path, timeout: float) -> Figures:
    """One formation of that many; TimeoutError if not all run in that many seconds."""
    figures = Figures(hosts, os.cpu_count() or 1, os.getloadavg()[0])
    # They start one after the other: all are to be in it, and the master ends soon.
    text = document(hosts, payload="none", election="{strict: true, grace: 5s}")
    with _room_for_neighbours(hosts * hosts), Hosts(hosts, directory, text) as many:
        began = time.time()
        many.start()
        left = dict(enumerate(many.all))
        wait_until(_reaper(left, figures), timeout, f"{hosts} hosts run and end")
        figures.clusters, figures.masters = len(many.clusters()), many.masters()
        figures.sent = _sent(many.network)
        for host in many.all:
            _tell_history(host, figures)
        for phase in PHASES:
            # Whoever comes when all is decided never was in some of them.
            rows = (p for h in many.all for p in h.status["timeline"] if p["what"] == phase)
            figures.at[phase] = [round(float(row["at"]) - began, 3) for row in rows]
    return figures


@contextmanager
def _room_for_neighbours(number: int) -> Iterator[None]:
    """All namespaces share one ARP table, of 1024 neighbours by default (arp(7)): else most are
    lost."""
    limits = [Path(f"/proc/sys/net/ipv4/neigh/default/gc_thresh{n}") for n in (3, 2)]
    before = [path.read_text() for path in limits]
    try:
        for path, text in zip(limits, before, strict=True):
            path.write_text(str(max(2 * number, int(text))))
        yield
    finally:
        for path, text in zip(limits, before, strict=True):
            path.write_text(text)


def _reaper(left: dict[int, Host], figures: Figures) -> Callable[[], bool]:
    """Take each process's end, and what it cost, which subprocess would throw away."""

    def look() -> bool:
        for number, host in list(left.items()):
            process = host.process
            assert process is not None
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                assert process.returncode == 0, host.log[-2000:]
                figures.cpu.append(round(usage.ru_utime + usage.ru_stime, 3))
                del left[number]
        return not left

    return look


def _sent(network: Network) -> list[int]:
    """What came from each host into the switch, in bytes."""
    argv = ["ip", "-n", network.switch, "-s", "-j", "link", "show"]
    links = json.loads(call(argv, check=True).stdout)
    ports = [link for link in links if link["ifname"].startswith("port")]
    return [int(port["stats64"]["rx"]["bytes"]) for port in ports]


def _tell_history(host: Host, figures: Figures) -> None:
    path = host.root / "var/lib/firstboot/history.jsonl"
    events = [json.loads(line).get("event") for line in path.read_text().splitlines()]
    figures.messages.append(events.count("MessageReceived"))
    figures.connections.append(events.count("Connected"))


def main() -> int:
    """0 if all hosts became one cluster."""
    parser = argparse.ArgumentParser(prog="python -m tests.network.many", description=__doc__)
    parser.add_argument("--hosts", type=int, default=50)
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds")
    parser.add_argument("--report", type=Path, help="write the figures there, as .txt and .json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        figures = form(options.hosts, Path(directory), options.timeout)
    print(figures.text())
    if options.report is not None:
        options.report.with_suffix(".txt").write_text(figures.text() + "\n")
        options.report.with_suffix(".json").write_text(json.dumps(asdict(figures), indent=1) + "\n")
    return 0 if (figures.clusters, figures.masters) == (1, 1) else 1


if __name__ == "__main__":
    sys.exit(main())
