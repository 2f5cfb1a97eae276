"""From a failing seed to the few faults that make it fail, as a story and as histories.

A run's faults are recorded as they happen: the occurrences, and of each chance which tries came
true. They are taken away, in halves and then one by one (delta debugging; Zeller and Hildebrandt,
"Simplifying and Isolating Failure-Inducing Input", 2002), hosts are taken away and moments drawn
together, as long as the same rule is broken.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from firstboot.payloads.rows import NONE
from firstboot.protocol import events, history
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import USUAL, ClusterConfig, Issued, Self, Stored, Topology
from firstboot.protocol.situation import Start
from tests.sim.campaign import new_world, size_of
from tests.sim.faults import Faults, Occurrence
from tests.sim.world import World, play

RUNS = 600  # at most, for one seed
WALL = 1_800_000_000.0  # Unix time minus simulated time
Hit = tuple[str, int]  # a chance, and the number of the try that came true


# ---------------------------------------------------------------- worlds that a history can hold


class Whole(World):
    """Its cores live by whole microseconds and run the payload that replay knows."""

    def make_core(
        self, me: Self, stored: Stored, issued: list[Issued], config: ClusterConfig
    ) -> Assembly:
        """The core under test, to be replayed exactly."""
        seed, now = self.rng.getrandbits(48), _micro(self.now)
        known = tuple(issued)
        opening = history.Opening(config, me, stored, known, seed, now, WALL, b"", self.topology)
        core = self.whole(opening)
        rng = random.Random(seed)
        return core(Start(config, me, stored, known, NONE, {}, rng, now, self.topology))

    def whole(self, opening: history.Opening) -> type[Assembly]:
        """The class of a core whose clock is as coarse as a history."""
        return _rounded(self.core, None)


class Recording(Whole):
    """Writes every host's history as `service` does, for ``firstboot replay``."""

    def whole(self, opening: history.Opening) -> type[Assembly]:
        """The same with a diary."""
        lines = self.histories.setdefault(opening.me.boot.partition("-")[0], [])
        lines.append(history.opening_line(opening))
        return _rounded(self.core, lines)

    @property
    def histories(self) -> dict[str, list[str]]:
        """Each host's lines, by its index."""
        kept: dict[str, list[str]] = self.__dict__.setdefault("_histories", {})
        return kept


def _micro(now: float) -> float:
    return round(now + 5e-7, 6)  # as precise as `service` measures, and never backwards


def _rounded(core: type[Assembly], lines: list[str] | None) -> type[Assembly]:
    class Rounded(core):  # type: ignore[valid-type,misc]
        def receive(self, event: events.Event, now: float) -> list[events.Action]:
            if lines is not None:
                lines.append(history.event_line(event, _micro(now)))
            done: list[events.Action] = super().receive(event, _micro(now))
            return done

    return Rounded


@dataclass(frozen=True)
class Case:
    """One run, with every fault chosen."""

    seed: int
    config: ClusterConfig
    hosts: int
    faults: Faults
    occurrences: tuple[Occurrence, ...]
    hits: tuple[Hit, ...]
    core: type[Assembly] = Assembly
    topology: Topology = USUAL

    def world(self, kind: type[World] = World) -> World:
        """The world of that run, before anything happens."""
        faults = replace(self.faults)
        world = kind(self.seed, self.hosts, self.config, faults, self.core, self.topology)
        last = len(world.hosts)
        world.occurrences = [o for o in self.occurrences if max(o.host, o.other, 0) < last]
        world.occurrences = [
            replace(o, links=frozenset(x for x in o.links if max(x) < last))
            for o in world.occurrences
        ]
        world.only = {}
        for chance, number in self.hits:
            world.only.setdefault(chance, set()).add(number)
        return world

    def told(self) -> list[str]:
        """The faults that are left, one a line."""
        plain = Faults()
        lines = [f"seed {self.seed}, {self.hosts} hosts, {self.config}"]
        for item in fields(Faults):
            value = getattr(self.faults, item.name)
            if value != getattr(plain, item.name):
                lines.append(f"{item.name}: {value}")
        for o in self.occurrences:
            where = f"links {sorted(o.links)}" if o.links else f"host {o.host}"
            lines.append(f"{o.at:10.4f} {o.kind}, {where}, {o.length:.3f}")
        return [*lines, *(f"{chance}: try {number}" for chance, number in self.hits)]


def broken(world: World) -> str:
    """The rule that this run breaks, as ``I4``; empty if none."""
    try:
        play(world)
    except AssertionError as error:
        return str(error).partition(":")[0][:60] or "?"
    return ""


class Minimiser:
    """Takes away what it can; `runs` counts what that cost."""

    def __init__(self, case: Case, rule: str) -> None:
        self.case, self.rule, self.runs = case, rule, 0
        # What a history can hold, unless the failure hangs on less than a microsecond.
        self.kind = Whole if broken(case.world(Whole)) == rule else World

    def attempt(self, case: Case) -> bool:
        """Keep this smaller case if it still breaks the rule."""
        if case == self.case or self.runs >= RUNS:
            return False
        self.runs += 1
        try:
            found = broken(case.world(self.kind))
        except Exception:  # noqa: BLE001  a combination that makes no world
            return False
        if found == self.rule:
            self.case = case
        return found == self.rule

    def minimise(self) -> Case:
        """The smallest that was found."""
        before = None
        while before != self.case and self.runs < RUNS:
            before = self.case
            self._strengths()
            self._kinds()
            self._single()
            self._hosts()
            self._moments()
        return self.case

    def _strengths(self) -> None:
        plain = Faults()
        for item in fields(Faults):
            if item.name not in ("until", "delay"):
                changed = replace(self.case.faults, **{item.name: getattr(plain, item.name)})
                self.attempt(replace(self.case, faults=changed))

    def _kinds(self) -> None:
        for kind in sorted({o.kind for o in self.case.occurrences}):
            rest = tuple(o for o in self.case.occurrences if o.kind != kind)
            self.attempt(replace(self.case, occurrences=rest))
        for chance in sorted({c for c, _ in self.case.hits}):
            rest_hits = tuple(h for h in self.case.hits if h[0] != chance)
            self.attempt(replace(self.case, hits=rest_hits))

    def _single(self) -> None:
        """Ever smaller parts, of both sorts of fault at once."""
        items: list[Occurrence | Hit] = [*self.case.occurrences, *self.case.hits]
        size = max(1, len(items) // 2)
        while items and self.runs < RUNS:
            at, shrunk = 0, False
            while at < len(items):
                rest = items[:at] + items[at + size :]
                if self.attempt(self._of(rest)):
                    items, shrunk = rest, True
                else:
                    at += size
            if size == 1 and not shrunk:
                return
            size = max(1, size // 2)

    def _of(self, items: Iterable[Occurrence | Hit]) -> Case:
        kept = list(items)
        return replace(
            self.case,
            occurrences=tuple(o for o in kept if isinstance(o, Occurrence)),
            hits=tuple(h for h in kept if isinstance(h, tuple)),
        )

    def _hosts(self) -> None:
        while self.case.hosts > 2:
            hosts, config = self.case.hosts - 1, self.case.config
            masters = config.masters if config.masters <= hosts else 1
            smaller = replace(config, expect=hosts, masters=masters)
            if not self.attempt(replace(self.case, hosts=hosts, config=smaller)):
                return

    def _moments(self) -> None:
        def halved(o: Occurrence) -> Occurrence:
            return replace(o, at=round(o.at / 2, 3), length=round(o.length / 2, 3))

        def each(shorter: Callable[[Occurrence], Occurrence]) -> None:
            for index, o in enumerate(self.case.occurrences):
                changed = list(self.case.occurrences)
                changed[index] = shorter(o)
                self.attempt(replace(self.case, occurrences=tuple(changed)))

        each(halved)
        skewed = replace(self.case.faults, skew=round(self.case.faults.skew / 2, 3))
        self.attempt(replace(self.case, faults=skewed))


def failing(seed: int, core: type[Assembly] = Assembly) -> tuple[Case, str] | None:
    """The run of that seed as a case, and the rule it breaks; None if it breaks none."""
    world = new_world(seed, core)
    rule = broken(world)
    if not rule:
        return None
    hits = tuple((chance, n) for chance, tries in world.hits.items() for n in tries)
    drawn = new_world(seed, core)  # as it was before its faults ended
    hosts = size_of(seed)
    planned = tuple(world.occurrences or ())
    case = Case(seed, drawn.config, hosts, drawn.faults, planned, hits, drawn.core, drawn.topology)
    return case, rule


# ---------------------------------------------------------------- what is shown of it


def explain(case: Case, rule: str, directory: Path) -> list[str]:
    """Write `case` down: its faults, its events, and one history a host; the lines as well."""
    world = case.world(Recording)
    assert isinstance(world, Recording)
    story: list[str] = []
    world.trace = story.append
    found = broken(world)
    if found != rule:
        story.append(f"recorded with whole microseconds this run breaks {found or 'no rule'}")
    lines = [f"breaks {rule}", *case.told(), "", *story]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "events.txt").write_text("\n".join(lines) + "\n")
    for index, written in world.histories.items():
        (directory / f"host-{index}.jsonl").write_text("\n".join(written) + "\n")
    return lines


def minimised(seed: int, directory: Path, core: type[Assembly] = Assembly) -> list[str]:
    """All of it for one seed; empty if it does not fail."""
    found = failing(seed, core)
    if found is None:
        return []
    case, rule = found
    search = Minimiser(case, rule)
    if broken(case.world()) != rule:
        return [f"seed {seed} breaks {rule}, but not with its faults chosen instead of drawn"]
    return explain(search.minimise(), rule, directory)
