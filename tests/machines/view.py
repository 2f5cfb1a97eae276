"""What the demo shows and judges, from the statuses of machines; nothing here touches one."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

TARGET = "firstboot.target"
NOTHING_SAID = "Switched on; firstboot has said nothing yet."
# Marks of the status's timeline, in order; where a node enrols, a master signs.
PHASES = ("network", "discovering", "deciding", "enrolling", "certificates", "starting", "running")
COLOURS = {"running": "green", "degraded": "yellow", "failed": "red", "unconfigured": "red"}


@dataclass(frozen=True, slots=True)
class Look:
    """One look at one host, `after` seconds since power-on; `shown` is firstboot's status."""

    host: str
    address: str
    on: bool
    after: float
    shown: Mapping[str, Any] | None = None

    @property
    def state(self) -> str:
        """The status's state; "off" or "booting" without one."""
        if not self.on:
            return "off"
        return str(self.shown["state"]) if self.shown else "booting"

    @property
    def stage(self) -> str:
        """The status's stage, with the state where that says more."""
        stage = str(self.shown["stage"]) if self.on and self.shown else self.state
        return f"{stage} ({self.state})" if self.state == "degraded" else stage

    @property
    def sentence(self) -> str:
        """What the host does or waits for."""
        if not self.on:
            return "This machine is off."
        return str(self.shown["sentence"]) if self.shown else NOTHING_SAID

    def get(self, key: str) -> str:
        """A text of the status, "-" where there is none."""
        return str((self.shown or {}).get(key) or "-")

    @property
    def cells(self) -> tuple[str, ...]:
        """Name, role, stage, sentence, address."""
        name = self.get("name") if self.get("name") != "-" else self.host
        return name, self.get("role"), self.stage, self.sentence, self.get("address")

    @property
    def problems(self) -> list[str]:
        """Every problem as one line, with its remedy."""
        found = (self.shown or {}).get("problems", ())
        return [" ".join(t for t in (f"{p['code']}:", p["text"], p["hint"]) if t) for p in found]


def table(*columns: str) -> Table:
    """A table without frame."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def view(looks: Sequence[Look]) -> Group:
    """All hosts at this moment. Texts are never markup: a sentence may hold ``[1a2b3c4d]``."""
    rows = table("host", "role", "stage", "it says", "address", "elapsed")
    for look in looks:
        *cells, address = look.cells
        elapsed = f"{look.after:.1f} s"
        style = COLOURS.get(look.state, "")
        rows.add_row(*(Text(cell) for cell in (*cells, address, elapsed)), style=style)
    problems = [Text(f"{x.host}  {p}", "yellow") for x in looks for p in x.problems]
    running = sum(look.state == "running" for look in looks)
    title = f"{running} of {len(looks)} hosts are running"
    return Group(Text(title, "bold"), rows, *problems)


def changes(look: Look, before: Look | None) -> list[str]:
    """The lines that tell what is new about a host; counting seconds is not."""

    def still(text: str) -> str:
        return re.sub(r"\d+ s\b|attempt \d+", "", text)

    prefix = f"{look.after:7.1f} s  {look.host}"
    lines = []
    if before is None or [*map(still, look.cells)] != [*map(still, before.cells)]:
        _, role, stage, sentence, address = look.cells
        lines.append(f"{prefix}  {role:6}  {stage:11}  {address:10}  {sentence}")
    known = [still(text) for text in before.problems] if before else []
    return lines + [f"{prefix}  {p}" for p in look.problems if still(p) not in known]


def hopeless(looks: Iterable[Look]) -> str:
    """Why waiting longer is no use; "" if it may be."""
    ended = [x for x in looks if x.state in ("off", "failed", "unconfigured")]
    return " ".join(f"{x.host} is {x.state}: {x.sentence}" for x in ended)


def late(looks: Sequence[Look], timeout: float) -> str:
    """Who is not running, and what they wait for."""
    missing = [x for x in looks if x.state != "running"]
    names = ", ".join(x.host for x in missing)
    are = "is" if len(missing) == 1 else "are"
    says = " ".join(f"{x.host} ({x.stage}): {x.sentence}" for x in missing)
    return f"After {timeout:g} s {names} {are} not running. {says}"


def faults(statuses: Sequence[Mapping[str, Any]], masters: int) -> list[str]:
    """What keeps these hosts from being one cluster with so many masters and one founder."""
    found = []
    clusters = {str(s.get("cluster_id")) for s in statuses}
    founders = {str((s.get("master") or {}).get("node_id")) for s in statuses}
    ruling = [s for s in statuses if s.get("role") == "master"]
    if len(clusters) != 1 or clusters == {"None"}:
        found.append(f"the hosts are in clusters {', '.join(sorted(clusters))}")
    if len(founders) != 1 or not founders <= {str(s["node_id"]) for s in ruling}:
        found.append(f"the hosts follow the masters {', '.join(sorted(founders))}")
    if len(ruling) != masters:
        found.append(f"{len(ruling)} hosts are master instead of {masters}")
    if len({s["name"] for s in statuses}) != len(statuses):
        found.append("two hosts have the same name")
    found += [f"{s['name']} holds no certificate" for s in statuses if not s.get("certificates")]
    return found


def result(looks: Sequence[Look], units: Mapping[str, Mapping[str, str]]) -> Table:
    """One line per host of a finished cluster. `units` are each host's, with their states."""
    rows = table("host", "role", "state", "address", "valid until", "units")
    for look in looks:
        ends = [c["not_after"] for c in (look.shown or {}).get("certificates", ())]
        day = time.strftime("%Y-%m-%d", time.gmtime(min(ends))) if ends else "-"
        states = [f"{n.removesuffix('.service')} {s}" for n, s in units[look.host].items()]
        name, role, _, _, address = look.cells
        cells = (name, role, look.state, address, day, ", ".join(states))
        rows.add_row(*map(Text, cells), style=COLOURS.get(look.state, ""))
    return rows


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the last host's network-up to each mark of each host; negative before it."""

    hosts: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, looks: Iterable[Look]) -> Timings:
        """The first mark of each name counts. ValueError if no host knows its network-up."""
        marks: dict[str, dict[str, float]] = {}
        for look in looks:
            recorded = (look.shown or {}).get("timeline", ())
            found = {mark["what"]: mark["at"] for mark in reversed(recorded)}
            marks[look.host] = (
                {"enrolling": found["signing"], **found} if "signing" in found else found
            )
        start = max(m["network"] for m in marks.values() if "network" in m)
        return cls({host: {k: at - start for k, at in m.items()} for host, m in marks.items()})

    def last(self, what: str, otherwise: str = "") -> float | None:
        """When the last host got there; None if one has no such mark."""
        found = [marks.get(what, marks.get(otherwise)) for marks in self.hosts.values()]
        known = [at for at in found if at is not None]
        return max(known) if len(known) == len(found) else None

    def rows(self) -> Table:
        """Host by phase."""
        phases = [p for p in PHASES if any(p in marks for marks in self.hosts.values())]
        rows = table("host", *phases)
        for column in rows.columns[1:]:
            column.justify = "right"
        for host, marks in self.hosts.items():
            cells = (f"{marks[p]:.2f}" if p in marks else "-" for p in phases)
            rows.add_row(Text(host), *cells)
        return rows

    def sentence(self) -> str:
        """The two figures that count."""
        held, active = self.last("certificates", "starting"), self.last("running")
        texts = [f"{at:.2f} s" if at is not None else "not recorded" for at in (held, active)]
        return (
            f"From the last machine's network-up: {texts[0]} to all certificates held,"
            f" {texts[1]} to all units active."
        )
