"""Positive controls: rules that are known to split, in the same world as the core.

The same discovery, channels, disks and enrolment; only who becomes master, and when, is decided by
another rule. Each rule is told the same as the core and nothing else. A run splits if more than one
cluster is ever ACTIVE. DESIGN holds the rates of the simulation with which the core's rule was once
chosen; it was another program, so only their region and order can be the same:

- *random start delay* splits when two delays end before the first master is heard of. How often
  depends on the delays drawn, here 0 to 3 s, and on the time from being master to being heard as
  one, here an fsync or two and a few delays of 50 ms. With one link dead the news goes through the
  third host, so it takes a little longer, not 60 s: there that simulation had 39 %.
- *lowest id* and *majority of those seen* act 5 s after the last change of whom they see.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import ClusterConfig, Member, Value
from firstboot.protocol.situation import Start
from tests.sim.faults import Faults
from tests.sim.invariants import Witness
from tests.sim.machine import Disk
from tests.sim.world import World

RUNS = 200
APART = 60.0  # seconds until a network that was cut is whole again
MOVES = 30.0  # and when a partition moves
SETTLE = 5.0
LONGEST_DELAY = 3.0


class Tally(Witness):
    """A witness that writes down what does not hold, and lets the run go on."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config)
        self.broken: set[str] = set()

    def must(self, holds: bool, what: str, detail: str = "") -> None:
        self.checks[what] += 1
        if not holds:
            self.broken.add(what)


# ---------------------------------------------------------------- the rules


class Rule(Assembly):
    """Makes itself master of an ACTIVE cluster when its time has come, and asks nobody."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.acts_at = start.now + SETTLE
        self._company_seen = -1

    @property
    def deadline(self) -> float:
        waits = self.acts_at > self.now and self.decided is None and not self.failure
        return min(super().deadline, self.acts_at) if waits else super().deadline

    def chooses_itself(self) -> bool:
        """Whether this host would be master, as it sees things now."""
        return True

    def settle(self) -> None:
        """Wait anew whenever somebody comes or goes."""
        if self.company.version != self._company_seen:
            self._company_seen, self.acts_at = self.company.version, self.now + SETTLE

    def _decide(self) -> None:
        self.settle()
        if self.decided is not None or self.now < self.acts_at or not self.chooses_itself():
            return
        if self.stored.authority_epoch != 1:
            self._ask_authority(1)
            return
        me = Member(self.me.node_id, self.me.name, self.me.endpoint.host)
        fingerprint = self.stored.authority_fingerprint
        self._learn(Value(1, fingerprint, (me,), active=True, members=1))


class LowestId(Rule):
    """Who has the lowest id of those it sees is master, once nothing changed for 5 s."""

    def chooses_itself(self) -> bool:
        return self.company.before(self.standing) == 0


class RandomDelay(Rule):
    """Who has seen no master when its random delay ends is master."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.acts_at = start.now + LONGEST_DELAY * start.rng.random()

    def settle(self) -> None:
        pass


class MajorityOfSeen(LowestId):
    """The same as the lowest id, but among a majority at least: Akka's cluster bootstrap."""

    def chooses_itself(self) -> bool:
        return self.present_voters() >= self.config.majority and super().chooses_itself()


class VotesInMemory(Assembly):
    """The core, with all that it must not forget in memory only: `moving` takes it away."""


RULES: dict[str, tuple[type[Assembly], bool]] = {  # with `election: strict` or not
    "lowest id": (LowestId, False),
    "random delay": (RandomDelay, False),
    "majority of seen": (MajorityOfSeen, False),
    "votes in memory": (VotesInMemory, False),
    "firstboot": (Assembly, False),
    "firstboot strict": (Assembly, True),
}

# ---------------------------------------------------------------- the cases


def _apart(world: World, side: set[int]) -> set[tuple[int, int]]:
    every = range(len(world.hosts))
    return {(a, b) for a in every for b in every if (a in side) != (b in side)}


def _boot_all(world: World, skew: float) -> None:
    for host in world.hosts:
        world.at(world.rng.random() * skew, host.boot)


def benign(world: World) -> None:
    """Three hosts, booted within 10 s."""
    _boot_all(world, 10.0)


def halves(world: World) -> None:
    """Three hosts, two of which do not see the third for a minute; or of five, three."""
    _boot_all(world, 2.0)
    links = _apart(world, set(range(len(world.hosts) // 2 + 1)))
    world.partition(links)
    world.at(APART, world.heal, links)


def dead_link(world: World) -> None:
    """Three hosts, two of which do not see each other for a minute."""
    _boot_all(world, 2.0)
    a, b = world.rng.sample(range(3), 2)
    world.partition({(a, b), (b, a)})
    world.at(APART, world.heal, {(a, b), (b, a)})


def moving(world: World, wipes: bool) -> None:
    """Host 1 is with host 0, goes down, and comes back with host 2: with its disk, or a new one."""
    _boot_all(world, 2.0)
    first, second = _apart(world, {0, 1}), _apart(world, {0})
    world.partition(first)

    def move() -> None:
        host = world.hosts[1]
        if wipes:
            host.wipe()
        else:
            host.crash()
            host.gone = False  # if it had left, firstboot runs once more
            if world.core is VotesInMemory:
                host.disk = Disk()
        world.heal(first)
        world.partition(second)
        world.at(world.now + 1.0, host.boot)

    world.at(MOVES, move)
    world.at(MOVES + APART, world.heal, second)


@dataclass(frozen=True)
class Case:
    """A situation, and the percentages of the design's own simulation by RULES, if it had any."""

    name: str
    hosts: int
    lay_out: Callable[[World], None]
    design: tuple[float | None, ...]


CASES = (
    Case("3 hosts, skew 0-10 s", 3, benign, (0, 11.5, 0, None, 0, 0)),
    Case("3 hosts, 2|1 apart 60 s", 3, halves, (100, 100, 0, None, 0, 0)),
    Case("3 hosts, one link dead 60 s", 3, dead_link, (3.5, 39, 14.5, None, 0, 0)),
    Case("5 launched, expect 3, 3|2 apart 60 s", 5, halves, (100, 100, 100, None, 100, 0)),
    Case(
        "a voter re-created, partition moves",
        3,
        partial(moving, wipes=True),
        (100, 100, 100, None, 100, 0),
    ),
    Case("a voter restarted, partition moves", 3, partial(moving, wipes=False), (None,) * 6),
)


def run(case: Case, rule: str, seed: int) -> World:
    """One run of a case under a rule: until long after the network is whole."""
    core, strict = RULES[rule]
    config = ClusterConfig("demo", 3, strict=strict, grace=10.0, agreed="x")
    world = World(seed, case.hosts, config, Faults(until=0.0, delay=0.05), core)
    world.witness = Tally(config)
    world.rng = random.Random(f"{case.name} {seed}")
    case.lay_out(world)
    world.run(MOVES + APART + 30.0)
    return world


def splits(where: tuple[int, str], runs: int) -> int:
    """In how many runs more than one cluster became ACTIVE."""
    case = CASES[where[0]]
    return sum(len(run(case, where[1], seed).witness.active) > 1 for seed in range(runs))


@dataclass(frozen=True)
class Rates:
    """The number of runs that split, by case and rule."""

    runs: int
    split: dict[str, dict[str, int]]

    @property
    def as_expected(self) -> bool:
        """Whether the core splits only where 2q <= V, and every bad rule somewhere."""
        core = [rule for rule, (kind, _) in RULES.items() if kind is Assembly]
        bad = [rule for rule in RULES if rule not in core]
        outside = {c.name: c.hosts > 3 or "re-created" in c.name for c in CASES}
        kept = not any(self.split[c]["firstboot"] for c, weak in outside.items() if not weak)
        kept = kept and not any(row["firstboot strict"] for row in self.split.values())
        return kept and all(any(row[rule] for row in self.split.values()) for rule in bad)

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells: percent here, and in brackets what the design page has."""
        rows = [("case", *RULES)]
        for case in CASES:
            cells = []
            for rule, design in zip(RULES, case.design, strict=True):
                told = "" if design is None else f" ({design:g})"
                cells.append(f"{100 * self.split[case.name][rule] / self.runs:.1f} %{told}")
            rows.append((case.name, *cells))
        return rows


def rates(runs: int, pool: Executor) -> Rates:
    """Run every case under every rule."""
    jobs = [(number, rule) for number in range(len(CASES)) for rule in RULES]
    found = dict(zip(jobs, pool.map(partial(splits, runs=runs), jobs), strict=True))
    split = {c.name: {r: found[n, r] for r in RULES} for n, c in enumerate(CASES)}
    return Rates(runs, split)
