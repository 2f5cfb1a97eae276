"""One run of the campaign, drawn from its seed: the hosts, their document, and what befalls them.

The same seed gives the same plan; when exactly the processes do what is the machine's affair.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import permutations

from tests.network.rig import Network

FOR_GOOD = 1e6  # seconds; a fault that lasts so long is never healed
LATE_MULTICAST = 20.0  # seconds; longer than zeroconf's own queries go on
STAGE_WAIT = 10.0  # seconds for which a kill waits for a host to get to a stage
STAGES = ("deciding", "enrolling", "signing", "signing", "starting")


@dataclass(frozen=True)
class Fault:
    """`at` seconds after the first start `kind` happens, and `lasts` so long.

    With `stage` a kill waits, at most STAGE_WAIT, for the first host that gets there, and hits it.
    """

    at: float
    kind: str
    lasts: float = 0.0
    host: int = 0
    stage: str = ""
    amount: int = 0
    group: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        more = [f"host {self.host}"] if self.host else []
        more += [f"whoever is {self.stage}"] if self.stage else []
        more += [str(list(self.group))] if self.group else []
        more += [" ".join(f"{a}>{b}" for a, b in self.pairs)] if self.pairs else []
        more += [str(self.amount)] if self.amount else []
        span = "for good" if self.lasts >= FOR_GOOD else f"for {self.lasts:.2f} s"
        return f"{self.at:6.2f} {self.kind} {' '.join(more)} {span}"


@dataclass(frozen=True)
class Plan:
    """What one run is; seconds from the first start. `hosts` need not be `expect`."""

    seed: int
    hosts: int
    expect: int
    masters: int
    strict: bool
    grace: float
    extra: int
    discovery: str
    stranger: bool
    starts: tuple[float, ...]
    faults: tuple[Fault, ...]

    @property
    def peace(self) -> float:
        """When the last fault that ends has ended, and everybody was started."""
        ends = [f.at + (f.lasts if f.lasts < FOR_GOOD else 0.0) for f in self.faults]
        # A kill that waits for a stage may come late.
        ends += [f.at + STAGE_WAIT + f.lasts for f in self.faults if f.stage and f.lasts < FOR_GOOD]
        return max([*self.starts, *ends])

    @property
    def mortal(self) -> bool:
        """Whether a host is killed and never comes back."""
        return any(f.lasts >= FOR_GOOD for f in self.faults)

    @property
    def late_multicast(self) -> bool:
        """Whether multicast, the only way to meet, begins to work late and is what all wait for."""
        in_time = self.peace <= LATE_MULTICAST and not self.mortal
        return self.discovery == "late" and in_time and self.hosts >= self.expect

    def document_lines(self) -> dict[str, str]:
        """The document's lines beyond cluster, token and expect."""
        listed = ", ".join(Network.address(n) for n in range(1, self.hosts + 1))
        mdns = self.discovery != "static"
        static = self.discovery in ("static", "both")
        ways = ["mdns"] * mdns + [f"{{static: [{listed}]}}"] * static
        election = f"{{strict: {str(self.strict).lower()}, grace: {round(self.grace * 1000)}ms}}"
        lines = {"payload": "none", "masters": str(self.masters), "election": election}
        lines |= {"join": f"{{extra: {self.extra}}}"} if self.extra else {}
        return lines | {"discovery": f"[{', '.join(ways)}]"}

    def __str__(self) -> str:
        shape = f"seed {self.seed}: {self.hosts} hosts, expect {self.expect}"
        shape += f", masters {self.masters}, grace {self.grace:.1f} s"
        shape += ", strict" * self.strict + f", extra {self.extra}" * bool(self.extra)
        shape += f", discovery {self.discovery}" + ", a stranger" * self.stranger
        starts = " ".join(f"{at:.2f}" for at in self.starts)
        return "\n".join([shape, f"  starts {starts}", *(f"  {f}" for f in self.faults)])


def draw(seed: int) -> Plan:
    """The plan of that seed."""
    rng = random.Random(f"chaos {seed}")
    hosts = rng.choice((3, 3, 3, 3, 3, 3, 2, 4, 5, 5))
    plan = Plan(
        seed=seed,
        hosts=hosts,
        expect=_expect(rng, hosts),
        masters=3 if hosts >= 3 and rng.random() < 0.25 else 1,
        strict=rng.random() < 0.15,
        grace=rng.uniform(1.0, 6.0) if rng.random() < 0.5 else rng.uniform(30.0, 60.0),
        extra=0,
        discovery=rng.choices(("mdns", "both", "static", "late"), (45, 30, 13, 12))[0],
        stranger=rng.random() < 0.15,
        starts=tuple(rng.choice((0.0, 0.3, 5.0)) * rng.random() for _ in range(hosts)),
        faults=(),
    )
    until = rng.choice((3.0, 8.0, 8.0, 15.0, 25.0))
    if plan.discovery == "late":
        until = 12.0  # so that whoever is killed or paused is back when multicast works
    faults = [_fault(rng, plan, until) for _ in range(rng.randint(2, 7))]
    if rng.random() < 0.5:  # a bad network from the start: it forms while the faults go on
        kind = rng.choice(("loss", "slow", "cut", "partition"))
        faults.append(replace(_drawn(rng, plan, kind, until), at=0.0))
    return _consistent(rng, replace(plan, faults=_apart(faults)))


def _expect(rng: random.Random, hosts: int) -> int:
    """Mostly all of them; sometimes one is never launched, or one too many is."""
    shift = rng.choices((0, 1, -1), (76, 9, 15))[0]
    return hosts - 1 if shift < 0 and hosts > 3 else hosts + 1 if shift > 0 else hosts


def _fault(rng: random.Random, plan: Plan, until: float) -> Fault:
    kind = rng.choices(
        ("kill", "pause", "loss", "slow", "cut", "partition", "wipe", "move", "flap"),
        (34, 14, 10, 7, 11, 12, 5, 4, 3),
    )[0]
    return _drawn(rng, plan, kind, until)


def _drawn(rng: random.Random, plan: Plan, kind: str, until: float) -> Fault:
    everybody = range(1, plan.hosts + 1)
    # A formation that nothing hinders takes about a second, most of it the start of Python.
    at = rng.uniform(0.2, min(3.0, until)) if rng.random() < 0.6 else rng.uniform(0.0, until)
    fault = Fault(at, kind, rng.uniform(0.5, max(1.0, until - at)), rng.choice(everybody))
    match kind:
        case "kill":
            stage = rng.choice(STAGES) if rng.random() < 0.5 else ""
            fault = replace(fault, lasts=rng.uniform(0.1, 3.0), stage=stage)
            return replace(fault, host=0) if stage else fault
        case "wipe":
            return replace(fault, lasts=rng.uniform(0.2, 3.0))
        case "pause":
            top = rng.choices((0.5, 3.0, 8.0, 20.0, 45.0), (30, 30, 20, 10, 10))[0]
            return replace(fault, lasts=top * rng.uniform(0.4, 1.0))
        case "loss":
            return replace(fault, host=0, amount=rng.randint(5, 40))
        case "slow":
            return replace(fault, amount=rng.choice((64, 128, 512)))
        case "cut":
            ways = list(permutations(everybody, 2))
            some = rng.sample(ways, rng.randint(1, max(1, len(ways) // 3)))
            return replace(fault, host=0, pairs=tuple(some))
        case "partition":
            group = rng.sample(everybody, rng.choice((1, max(1, plan.hosts // 2))))
            return replace(fault, host=0, group=tuple(sorted(group)))
        case _:  # an address that goes, and comes back ("flap") or is another one then ("move")
            return replace(fault, lasts=rng.uniform(0.1, 2.0))


def _apart(faults: list[Fault]) -> tuple[Fault, ...]:
    """In order, and of a kind that knows one state only (a loss, a move) not two at a time."""
    kept: list[Fault] = []
    busy: dict[tuple[str, int], float] = {}
    for fault in sorted(faults, key=lambda f: f.at):
        group = {"flap": "move", "wipe": "kill"}.get(fault.kind, fault.kind)
        if fault.stage or fault.at > busy.get((group, fault.host), -1.0):
            kept.append(fault)
            busy[group, fault.host] = fault.at + fault.lasts + 0.1
    return tuple(kept)


def _consistent(rng: random.Random, plan: Plan) -> Plan:
    """Add what makes the run a fair one, and now and then a host that never comes back."""
    faults = list(plan.faults)
    spare = plan.hosts - (plan.expect // 2 + 1)
    kills = [i for i, f in enumerate(faults) if f.kind == "kill"]
    quick = plan.grace < 10 and not plan.strict and plan.hosts - 1 >= plan.masters
    wiped = sum(f.kind == "wipe" for f in faults)
    if spare > 0 and kills and quick and not wiped and rng.random() < 0.6:
        index = rng.choice(kills)
        faults[index] = replace(faults[index], lasts=FOR_GOOD)
        dead = faults[index]
        if dead.host:
            faults = [f for f in faults if f is dead or f.host != dead.host or f.at < dead.at]
    if plan.hosts < plan.expect:
        # Who is never launched is waited for until the grace period ends: let that be soon.
        grace = min(plan.grace, rng.uniform(1.0, 8.0))
        masters = plan.masters if plan.hosts >= plan.masters else 1
        plan = replace(plan, strict=False, grace=grace, masters=masters)
    surplus = max(0, plan.hosts - plan.expect)
    extra = surplus + wiped if rng.random() < 0.8 else 0
    return replace(plan, faults=tuple(faults), extra=extra)
