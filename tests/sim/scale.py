"""How messages, bytes and CPU of one formation grow with the number of hosts: docs/scale.md.

``python -m tests.sim.scale --hosts 100 1000 10000`` runs the real core in the simulated world,
without faults, and measures what every host sent, received and spent in the core. With `seeds`
every host is told three addresses, as a list or DNS gives them; with `mdns` each hears of all
others, which is what multicast itself costs on one link and no protocol above it can change.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import USUAL, ClusterConfig, Stage, Topology
from tests.sim.faults import Faults
from tests.sim.machine import Host
from tests.sim.world import World

SEEDS = 3  # addresses that every host is told
HOUR = 3600.0
STEP = 0.05  # virtual seconds between two looks at whether all run


@dataclass
class Cost:
    """What one host sent and received, and seconds of CPU in the core."""

    sent: int = 0
    received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    found: int = 0  # addresses that discovery told
    cpu: float = 0.0
    peers: int = 0  # connections at the same time, at most


@dataclass
class Row:
    """One formation: virtual seconds until all run; the founding master; medians of the nodes."""

    hosts: int
    discovery: str
    seconds: float
    master: Cost
    hubs: Cost  # the busiest of the others
    node: Cost
    wall: float = field(default=0.0)


class Measured(Assembly):
    """The core; what it costs is counted from outside."""

    cost: Cost

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        """As the core does, with a stopwatch."""
        if isinstance(event, events.PeerFound):
            self.cost.found += 1
        began = time.thread_time()
        actions = super().receive(event, now)
        _ = self.deadline
        self.cost.cpu += time.thread_time() - began
        return actions


class Plain(World):
    """A world without faults that counts."""

    def __init__(self, hosts: int, discovery: str, topology: Topology) -> None:
        config = ClusterConfig("demo", hosts, grace=HOUR, agreed="x" * 64)
        super().__init__(hosts, hosts, config, Faults(until=0.0), Measured, topology=topology)
        self.discovery = discovery
        self.costs = [Cost() for _ in self.hosts]
        self._size: dict[int, tuple[messages.Message, int]] = {}

    def boot(self, host: Host) -> None:
        """Switch one on."""
        Measured.cost = self.costs[host.index]  # its first events come while it boots
        host.boot()

    def make_core(self, *arguments: object) -> Assembly:
        """The core under test, and where its costs go."""
        core = super().make_core(*arguments)  # type: ignore[arg-type]
        assert isinstance(core, Measured)
        core.cost = Measured.cost
        return core

    def fsync(self) -> float:
        """A quick disk: the master writes once for every host, and this is not about that."""
        return 0.001

    def announce(self, host: Host) -> None:
        """Discovery."""
        if self.discovery == "mdns":
            return super().announce(host)
        for seed in self.hosts[:SEEDS]:
            host.later(0.0, events.PeerFound(seed.endpoint, "static"))
        return None

    def send(self, source: Host, action: events.Send) -> None:
        """Count, then carry."""
        found = source.channels.get((action.node_id, action.channel))
        if found is not None:
            size = self._bytes(action.message)
            mine, theirs = self.costs[source.index], self.costs[found[1].index]
            mine.sent += 1
            mine.bytes_sent += size
            mine.peers = max(mine.peers, len(source.channels))
            theirs.received += 1
            theirs.bytes_received += size
        super().send(source, action)

    def _bytes(self, message: messages.Message) -> int:
        """Its size on the wire; a Hello goes to many and is encoded once."""
        known = self._size.get(id(message))
        if known is None or known[0] is not message:
            known = self._size[id(message)] = message, len(messages.encode(message))
            if len(self._size) > 10_000:
                self._size.clear()
        return known[1]


def formation(hosts: int, discovery: str, topology: Topology = USUAL) -> Row:
    """One formation of that many hosts, all switched on within a second."""
    began = time.monotonic()
    world = Plain(hosts, discovery, topology)
    for host in world.hosts:
        world.at(world.rng.random(), partial(world.boot, host))
    while not _formed(world):
        world.run(world.now + STEP)
        if world.now > HOUR:
            raise RuntimeError(
                f"{hosts} hosts do not form within an hour\n{world.picture()[:2000]}"
            )
    (founder,) = world.witness.active.values()
    world.witness.finish(world)
    master = world.by_id[founder].index
    others = sorted((c for i, c in enumerate(world.costs) if i != master), key=lambda c: c.received)
    return Row(
        hosts,
        discovery,
        round(world.now, 2),
        world.costs[master],
        others[-1],
        _median(others),
        round(time.monotonic() - began, 1),
    )


def _formed(world: World) -> bool:
    """All others are done; the founder runs, and stays for `grace` in case more hosts come."""
    left = [h.core for h in world.hosts if not h.gone]
    return len(left) <= 1 and all(c is not None and c.stage is Stage.RUNNING for c in left)


def _median(costs: Sequence[Cost]) -> Cost:
    plain = [asdict(c) for c in costs]
    return Cost(**{key: statistics.median(p[key] for p in plain) for key in plain[0]})


def table(rows: Sequence[Row]) -> str:
    """The figures in Markdown."""
    lines = [
        "| Hosts | Discovery | Virtual s | Host | Connections | Messages sent | received"
        " | KiB sent | received | ms of CPU in the core |",
        "|--:|:--|--:|:--|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        for name, cost in (("master", row.master), ("busiest other", row.hubs), ("node", row.node)):
            lines.append(
                f"| {row.hosts} | {row.discovery} | {row.seconds} | {name} | {cost.peers:.0f}"
                f" | {cost.sent:.0f} | {cost.received:.0f} | {cost.bytes_sent / 1024:.1f}"
                f" | {cost.bytes_received / 1024:.1f} | {cost.cpu * 1000:.1f} |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """The same as a picture: what a node and the master do, a host, over the number of hosts."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    rows = [row for row in rows if row.discovery == "seeds"]
    hosts = [row.hosts for row in rows]
    kinds = (
        ("messages sent", "sent", 1.0),
        ("KiB sent", "bytes_sent", 1 / 1024),
        ("ms of CPU in the core", "cpu", 1000.0),
    )
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (name, item, unit) in zip(axes, kinds, strict=True):
        master = [getattr(row.master, item) * unit / row.hosts for row in rows]
        node = [getattr(row.node, item) * unit for row in rows]
        axis.semilogx(hosts, node, "o-", label="a node (median)")
        axis.semilogx(hosts, master, "s--", label="the master, for each host")
        axis.set(xlabel="hosts", title=name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Run the sizes asked for; write a table and JSON."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim.scale", description=__doc__)
    parser.add_argument("--hosts", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--discovery", choices=("seeds", "mdns"), nargs="+", default=["seeds"])
    parser.add_argument("--report", type=Path, help="write PATH.json and PATH.md")
    parser.add_argument("--plot", type=Path, help="write a picture there; needs matplotlib")
    options = parser.parse_args()
    gc.disable()  # it would look through ten thousand hosts while one of them is measured
    rows = []
    for hosts in options.hosts:
        for discovery in options.discovery:
            rows.append(formation(hosts, discovery))
            print(f"{hosts} hosts, {discovery}: {rows[-1].wall} s", file=sys.stderr, flush=True)
    print(table(rows))
    if options.report is not None:
        options.report.with_suffix(".md").write_text(table(rows) + "\n")
        plain = [asdict(row) for row in rows]
        options.report.with_suffix(".json").write_text(json.dumps(plain, indent=1) + "\n")
    if options.plot is not None:
        plot(rows, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
