"""Formations of the simulator as real hosts would record them: histories, actions, statuses."""

from __future__ import annotations

import random
from typing import Any

from firstboot.payloads.rows import NONE, OPTIONS
from firstboot.protocol import events, history, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import ClusterConfig, Issued, Self, Stage, Stored
from firstboot.protocol.situation import Start
from tests.sim.world import Faults, World

WALL = 1_800_000_000.0  # Unix time minus simulated time

Turn = tuple[float, events.Event, list[events.Action]]


class Recorded(Assembly):
    """The real core, with a diary: the lines `service` would write, and what really was done."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.lines: list[str] = []
        self.turns: list[Turn] = []
        self.statuses: list[dict[str, Any]] = []

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        now = round(now + 5e-7, 6)  # as precise as `service` measures, and never backwards
        actions = list(super().receive(event, now))
        self.lines.append(history.event_line(event, now))
        self.turns.append((now, event, actions))
        shown = status.describe(self, WALL)
        if not self.statuses or self.statuses[-1] != shown:
            self.statuses.append(shown)
        return actions


class RecordingWorld(World):
    """Keeps every core it made, in order; `runs` are those of one host."""

    def __init__(
        self,
        seed: int,
        hosts: int = 3,
        config: ClusterConfig | None = None,
        faults: Faults | None = None,
    ) -> None:
        super().__init__(seed, hosts, config, faults)
        formed = config or ClusterConfig("demo", hosts, grace=30.0, agreed="x")
        self.config = formed
        self.cores: list[tuple[history.Opening, Recorded]] = []

    def make_core(
        self, me: Self, stored: Stored, issued: list[Issued], config: ClusterConfig
    ) -> Assembly:
        seed, now = self.rng.getrandbits(48), round(self.now + 5e-7, 6)
        known = tuple(issued)
        opening = history.Opening(config, me, stored, known, seed, now, WALL)
        core = Recorded(
            Start(
                config=config,
                me=me,
                stored=stored,
                issued=known,
                payload=NONE,
                options=OPTIONS["none"],
                rng=random.Random(seed),
                now=now,
            )
        )
        self.cores.append((opening, core))
        return core

    def runs(self, index: int) -> list[tuple[history.Opening, Recorded]]:
        """The runs of that host, one for each time it was switched on."""
        at = self.hosts[index].endpoint
        return [(o, c) for o, c in self.cores if o.me.endpoint == at]

    def history_of(self, index: int) -> list[str]:
        """That host's history.jsonl, line by line."""
        lines: list[str] = []
        for opening, core in self.runs(index):
            lines += [history.opening_line(opening), *core.lines]
        return [f"{line}\n" for line in lines]


def formed(seed: int, hosts: int = 3, faults: Faults | None = None) -> RecordingWorld:
    """A formation from the first boot to all running; quiet unless `faults` says otherwise."""
    world = RecordingWorld(seed, hosts, faults=faults or Faults(until=0.0))
    world.schedule()

    def all_running() -> bool:
        return all(
            h.gone or (h.core is not None and h.core.stage is Stage.RUNNING) for h in world.hosts
        )

    ended = world.run(world.faults.until + 200.0, all_running)
    assert ended, world.picture()
    return world
