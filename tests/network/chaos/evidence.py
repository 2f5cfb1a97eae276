"""What a run leaves behind, as one trail: every durable state and deed of every host, in time.

Histories hold what happened to a host; the real core, run again over them, tells what it did
about it (`firstboot.replay` does the same for a person). All processes of a run read one
monotonic clock, so moments of different hosts can be compared.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import events, history
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.election import Round
from firstboot.protocol.messages import Granted, from_plain
from firstboot.protocol.model import ClusterConfig, Stored, Value
from firstboot.protocol.situation import Start


@dataclass(frozen=True)
class Life:
    """What one host's disk held at the end, or when it was wiped."""

    name: str
    lines: tuple[str, ...]
    state: Stored | None = None
    granted: Granted | None = None
    laid: dict[str, bytes] = field(default_factory=dict)  # /etc/firstboot/pki, by file name


@dataclass(frozen=True)
class Moment:
    """One event of one run of one host, what it did about it, and what its disk held after it."""

    at: float
    life: str
    node_id: str
    event: events.Event
    actions: tuple[events.Action, ...]
    durable: Stored
    decided: Value | None
    chosen: tuple[int, Value] | None = None  # the quorum and value of a round that ended here


@dataclass(frozen=True)
class Waking:
    """A start of the process: what it found, and what it might have found."""

    at: float
    life: str
    node_id: str
    voter: bool
    config: ClusterConfig
    found: Stored
    possible: tuple[Stored, ...]  # the last state known to be durable, and all asked for since


@dataclass
class Trail:
    """Everything that is known of one run, in the order of time."""

    wakings: list[Waking] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    ends: dict[str, tuple[Stored, ...]] = field(default_factory=dict)  # as Waking.possible

    @property
    def config(self) -> ClusterConfig:
        """What all hosts agreed on."""
        return self.wakings[0].config

    @property
    def voters(self) -> set[str]:
        """Every identity that ever could vote."""
        return {w.node_id for w in self.wakings if w.voter}


def trail(lives: Iterable[Life]) -> Trail:
    """The trail of these hosts; UserError if a history cannot be read."""
    found = Trail()
    for life in lives:
        _follow(life, found)
    found.wakings.sort(key=lambda w: w.at)
    found.moments.sort(key=lambda m: m.at)  # stable: one host's stay in their order
    return found


def _follow(life: Life, into: Trail) -> None:
    core: Assembly | None = None
    asked: dict[int, Stored] = {}
    durable = Stored()
    pending: list[Stored] = []
    for item in history.read(life.lines):
        if isinstance(item, history.Opening):
            possible = (durable, *pending) if core is not None else (item.stored,)
            into.wakings.append(
                Waking(
                    item.now,
                    life.name,
                    item.me.node_id,
                    item.me.voter,
                    item.config,
                    item.stored,
                    possible,
                )
            )
            core, asked, pending, durable = _core(item), {}, [], item.stored
            continue
        assert core is not None, "a history begins with a run"
        now, event = item
        before = core.round
        actions = tuple(core.receive(event, now))
        if isinstance(event, events.PersistDone) and event.sequence in asked:
            durable = asked[event.sequence]
            pending = [s for number, s in asked.items() if number > event.sequence]
        for action in actions:
            if isinstance(action, events.Persist):
                asked[action.sequence] = action.state
                pending.append(action.state)
        into.moments.append(
            Moment(
                now,
                life.name,
                core.me.node_id,
                event,
                actions,
                durable,
                core.decided,
                _chosen(core, before),
            )
        )
    if core is not None:
        into.ends[life.name] = (durable, *pending)


def _chosen(core: Assembly, before: Round | None) -> tuple[int, Value] | None:
    """The quorum a round got by with, if it has just ended well."""
    over = before is not None and before is not core.round and before.accepted
    if not over or before is None or before.value is None or core.decided != before.value:
        return None
    return min(len(before.accepted), len(before.promises)), before.value


def _core(opening: history.Opening) -> Assembly:
    name = opening.config.payload
    rng = random.Random(opening.seed)
    return Assembly(
        Start(
            config=opening.config,
            me=opening.me,
            stored=opening.stored,
            issued=opening.issued,
            payload=PAYLOADS[name],
            options=OPTIONS[name],
            rng=rng,
            now=opening.now,
        )
    )


# ---------------------------------------------------------------- from the disk


def lives(directory: Path) -> Iterator[Life]:
    """Every disk of a run's directory, those of wiped hosts as well; not the stranger's."""
    for root in sorted(directory.glob("h*")):
        life = read_life(root)
        if life is not None:
            yield life


def read_life(root: Path) -> Life | None:
    """What lies below a host's root; None if it never started."""
    kept = root / "var/lib/firstboot"
    path = kept / "history.jsonl"
    if not path.exists() or not path.stat().st_size:
        return None
    with path.open() as file:
        lines = tuple(file)
    laid = root / "etc/firstboot/pki"
    return Life(
        root.name,
        lines,
        _state(kept / "state.json"),
        _granted(kept / "secrets/certificates.json"),
        {p.name: p.read_bytes() for p in laid.iterdir()} if laid.is_dir() else {},
    )


def _state(path: Path) -> Stored | None:
    if not path.exists():
        return None
    state: Stored = from_plain(Stored, json.loads(path.read_text())["state"])
    return state


def _granted(path: Path) -> Granted | None:
    if not path.exists():
        return None
    granted: Granted = from_plain(Granted, json.loads(path.read_text()))
    return granted
