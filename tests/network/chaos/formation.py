"""Carries out one plan: real processes in namespaces, faults at their moments, then peace.

A host that ends without being done is started again, as systemd would. What a wiped host leaves
is kept aside before it is gone: its votes count, so its history does.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from firstboot.userdata import make_token
from tests.machines.document import document
from tests.network.chaos.host import Chaotic
from tests.network.chaos.plan import FOR_GOOD, LATE_MULTICAST, STAGE_WAIT, Fault, Plan
from tests.network.rig import Network
from tests.network.run import Run

PATIENCE = 90.0  # seconds after peace, beside the grace period, in which all must run
LATE_PATIENCE = 10.0  # the same where all that was missing is multicast


class Stopped(Exception):
    """The campaign ends before its time."""


@dataclass
class Outcome:
    """What became of a run; `directory` holds every host's files. Seconds on the run's clock."""

    plan: Plan
    directory: Path
    peace: float
    ended: float
    running: bool
    statuses: dict[str, dict[str, Any]]
    up: list[str]
    exits: list[str]
    told: set[str]
    leaks: list[str]
    faults: Counter[str] = field(default_factory=Counter)
    timely: Counter[str] = field(default_factory=Counter)  # those before all ran


class Formation:
    """One run, in the network of a `Run` whose directory holds the hosts' files."""

    def __init__(self, plan: Plan, run: Run, stop: threading.Event) -> None:
        self.plan, self.stop, self.patience = plan, stop, PATIENCE
        self.directory = run.directory
        self.network = Network(plan.hosts + plan.stranger, run)
        self.hosts = [self._host(n, f"h{n}") for n in range(1, plan.hosts + 1)]
        self._token = make_token()
        self._text = document(plan.expect, self._token, **plan.document_lines())
        for host in self.hosts:
            host.configure(self._text)
        if plan.stranger:
            other = self._host(plan.hosts + 1, "stranger")
            other.configure(document(plan.expect, make_token(), **plan.document_lines()))
            self.stranger = other
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = count()
        self._waiting: list[tuple[float, Fault]] = []  # kills that wait for a stage, till when
        self._faults: Counter[str] = Counter()
        self._timely: Counter[str] = Counter()
        self._told: set[str] = set()

    def _host(self, number: int, name: str) -> Chaotic:
        return Chaotic(self.network, number, self.directory / name)

    # ------------------------------------------------------------ the run

    def carry_out(self) -> Outcome:
        """The whole run. Stopped if told to stop."""
        plan = self.plan
        if plan.discovery in ("late", "static"):
            self.network.no_multicast()
        self._began = time.monotonic()
        if plan.discovery == "late":
            self._later(LATE_MULTICAST, lambda: self.network.end("multicast"))
        for host, at in zip(self.hosts, plan.starts, strict=True):
            self._later(at, self._starter(host))
        if plan.stranger:
            self._later(0.5, self.stranger.start)
        for fault in plan.faults:
            self._later(fault.at, self._beginner(fault))
        peace = max(plan.peace, LATE_MULTICAST if plan.discovery == "late" else 0.0)
        self._until(peace, self._quiet)
        self._make_peace()
        peace = self._now()
        bound = LATE_PATIENCE if plan.late_multicast else self.patience + plan.grace
        running = self._until(peace + bound, self._settled)
        return self._outcome(peace, running)

    def _now(self) -> float:
        return time.monotonic() - self._began

    def _until(self, end: float, met: Callable[[], bool]) -> bool:
        """Do what is due until then, or until `met` and nothing more is due; whether it was."""
        while self._now() < end:
            while self._due and self._due[0][0] <= self._now():
                heapq.heappop(self._due)[2]()
            self._strike()
            for host in self.hosts:
                host.look()
            if met():
                return True
            pause = 0.01 if self._waiting else 0.05
            soon = self._due[0][0] - self._now() if self._due else pause
            if self.stop.wait(max(0.0, min(soon, pause))):
                raise Stopped
        return False

    def _quiet(self) -> bool:
        return not self._due and not self._waiting

    def _settled(self) -> bool:
        for host in self.hosts:
            self._told |= {p["code"] for p in host.says.get("problems", ())}
        return all(h.gone or h.runs for h in self.hosts)

    def _make_peace(self) -> None:
        """End every fault, and have everybody up that is not gone for good."""
        self.network.heal()
        self._waiting.clear()
        while self._due:
            heapq.heappop(self._due)[2]()  # what ends faults, and brings hosts and addresses back
        for host in self.hosts:
            host.pause(False)
            if not host.gone and not host.up:
                host.start()

    def _outcome(self, peace: float, running: bool) -> Outcome:
        ended = self._now()
        statuses = {f"h{h.number}": h.says for h in self.hosts}
        if self.plan.stranger:
            statuses["stranger"] = self.stranger.says
        return Outcome(
            plan=self.plan,
            directory=self.directory,
            peace=peace,
            ended=ended,
            running=running,
            statuses=statuses,
            up=[f"h{h.number}" for h in self.hosts if not h.gone],
            exits=[line for h in self.hosts for line in h.exits] + self._tracebacks(),
            told=self._told,
            leaks=self._leaks(),
            faults=self._faults,
            timely=self._timely,
        )

    def _tracebacks(self) -> list[str]:
        """A bug, whatever else went well."""
        logs = sorted(self.directory.glob("*/log"))
        return [f"a traceback in {p.parent.name}/log" for p in logs if "Traceback" in p.read_text()]

    def _leaks(self) -> list[str]:
        """I9: the files that hold the token, or a key for others to read, and must not."""
        token, found = self._token.encode(), []
        done = {host.root for host in self.hosts if host.complete}
        for path in (p for p in self.directory.rglob("*") if p.is_file()):
            content = path.read_bytes()
            if token in content and (path.name != "config.yaml" or path.parents[2] in done):
                found.append(f"the token is in {path.relative_to(self.directory)}")
            if b"PRIVATE KEY" in content and path.stat().st_mode & 0o077:
                found.append(f"others can read {path.relative_to(self.directory)}")
        return found

    # ------------------------------------------------------------ faults

    def _later(self, at: float, deed: Callable[[], None]) -> None:
        heapq.heappush(self._due, (at, next(self._ties), deed))

    def _then(self, fault: Fault, deed: Callable[[], None]) -> None:
        """At the fault's end, counted from when it was due, so that the order is the plan's."""
        if fault.lasts < FOR_GOOD:
            self._later(fault.at + fault.lasts, deed)

    def _starter(self, host: Chaotic) -> Callable[[], None]:
        def start() -> None:
            if not host.up and not host.gone:
                host.start()

        return start

    def _beginner(self, fault: Fault) -> Callable[[], None]:
        begin: Callable[[Fault], None] = getattr(self, f"_{fault.kind}")

        def deed() -> None:
            if fault.stage:
                self._waiting.append((self._now() + STAGE_WAIT, fault))
                return
            if fault.kind not in ("kill", "wipe", "pause") or self.hosts[fault.host - 1].alive:
                self._note(fault.kind)
            begin(fault)

        return deed

    def _note(self, kind: str) -> None:
        self._faults[kind] += 1
        self._timely[kind] += not all(h.gone or h.runs for h in self.hosts)

    def _strike(self) -> None:
        """Kill the first host that gets to the stage a kill waits for."""
        for until, fault in list(self._waiting):
            there = [h for h in self.hosts if h.up and h.says.get("stage") == fault.stage]
            if there or self._now() > until:
                self._waiting.remove((until, fault))
            if there:
                self._note("kill")
                there[0].kill()
                there[0].gone = fault.lasts >= FOR_GOOD
                self._later(self._now() + fault.lasts, self._starter(there[0]))

    def _kill(self, fault: Fault) -> None:
        host = self.hosts[fault.host - 1]
        host.gone |= fault.lasts >= FOR_GOOD  # also one that was not started yet
        if host.up:
            host.kill()
            self._then(fault, self._starter(host))

    def _wipe(self, fault: Fault) -> None:
        host = self.hosts[fault.host - 1]
        if host.up and not host.gone:
            host.kill()
            host.wipe(self.directory / f"h{host.number}-wiped-{host.wiped}")
            host.configure(self._text)  # a new disk's user-data has the token again
            self._then(fault, self._starter(host))

    def _pause(self, fault: Fault) -> None:
        host = self.hosts[fault.host - 1]
        host.pause(True)
        self._then(fault, lambda: host.pause(False))

    def _loss(self, fault: Fault) -> None:
        self.network.loss(fault.amount)
        self._then(fault, lambda: self.network.end("loss"))

    def _slow(self, fault: Fault) -> None:
        self.network.slow(fault.host, fault.amount)
        self._then(fault, lambda: self.network.slow(fault.host, 0))

    def _partition(self, fault: Fault) -> None:
        self.network.partition(set(fault.group))
        self._then(fault, lambda: self.network.end("partition"))

    def _cut(self, fault: Fault) -> None:
        self.network.cut(*fault.pairs)
        self._then(fault, lambda: self.network.end("cut"))

    def _flap(self, fault: Fault) -> None:
        host = self.hosts[fault.host - 1]
        self.network.take_address(host.number, host.address)
        self._then(fault, lambda: self.network.give_address(host.number, host.address))

    def _move(self, fault: Fault) -> None:
        host = self.hosts[fault.host - 1]
        self.network.take_address(host.number, host.address)
        head, _, last = host.address.rpartition(".")
        host.address = f"{head}.{int(last) + 50}"
        self._then(fault, lambda: self.network.give_address(host.number, host.address))
