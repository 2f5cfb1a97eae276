"""A crash in every gap there is: before and behind each Persist and each Send of every host.

A formation on a kind network is run once to count its gaps, then once for each gap with a power
cut exactly there. The host comes back after a few seconds, or never: then the others form without
it, or, where the cluster was already ACTIVE and it was the master, say MASTER_LOST.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from firstboot.protocol import events, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import ClusterConfig
from tests.sim.faults import Faults
from tests.sim.machine import Host
from tests.sim.outcome import runs
from tests.sim.world import World, settle

HOSTS = 3


class Boundaries(World):
    """A kind world that counts its gaps, and cuts the power in one of them."""

    def __init__(
        self, seed: int, at: int = 0, *, back: bool = True, core: type[Assembly] = Assembly
    ) -> None:
        config = ClusterConfig("demo", HOSTS, grace=10.0, agreed="x")
        faults = Faults(until=0.0, skew=0.2, delay=0.005)
        super().__init__(seed, HOSTS, config, faults, core)
        self.passed, self.cut_at, self.back = 0, at, back
        self.victim: Host | None = None
        self.gap = ""

    def crash_now(self, host: Host, actions: list[events.Action], gap: int) -> bool:
        """In the chosen gap; those between other actions are no different from each other."""
        beside = actions[max(0, gap - 1) : gap + 1]
        if not any(isinstance(a, events.Persist | events.Send) for a in beside):
            return False
        self.passed += 1
        if self.passed != self.cut_at:
            return False
        names = [type(a).__name__ for a in actions]
        self.victim, self.gap = host, f"host {host.index}, gap {gap} of {names}"
        host.absent = not self.back
        return True

    def _all_others_run(self) -> bool:
        return all(runs(h) for h in self.hosts if h is not self.victim)

    def play(self) -> None:
        """Run it, and check what became of everybody; raises on a violation."""
        self.schedule()
        if self.back:
            settle(self)
            return
        self.run(self.bound, lambda: self.victim is not None and self._all_others_run())
        self.witness.finish(self)
        lost = [h for h in self.hosts if h is not self.victim and not runs(h)]
        silent = [h for h in lost if not self.witness.active or not _says_lost(h)]
        self.witness.must(not silent, "L1: stuck", f" without {self.gap}\n{self.picture()}")


def _says_lost(host: Host) -> bool:
    if host.core is None:
        return False
    told: list[dict[str, Any]] = status.describe(host.core, 1_800_000_000.0)["problems"]
    return any(p["code"] == "MASTER_LOST" for p in told)


def count(seed: int) -> int:
    """How many gaps a formation has when nothing happens in any."""
    world = Boundaries(seed)
    world.play()
    return world.passed


def crashed(
    seeds: Iterable[int], every: int = 1, core: type[Assembly] = Assembly
) -> Iterator[Boundaries]:
    """Each gap (or one of `every`) of each of these formations, crashed at; not yet played."""
    for seed in seeds:
        for at in range(1, count(seed) + 1, every):
            yield Boundaries(seed, at, core=core)
            yield Boundaries(seed, at, back=False, core=core)
