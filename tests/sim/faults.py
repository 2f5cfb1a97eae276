"""How hostile one simulated run is. Every number is drawn from the seed.

Two sorts of fault: *occurrences* befall one host or link at one moment, *chances* are asked for
at every message, write or dial. Both are recorded as they happen, so that a failing run can be
run again with any of them left out (`tests/sim/minimise.py`).

Elsewhere: wall clocks, of which the core has none (``tests/adapters/test_a24_clocks``); malformed
and oversize frames, which the transport answers with a misbehaviour (``tests/fuzz``,
``tests/adapters/test_transport``). All hosts of a run have one host name, as images do.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from firstboot.protocol.model import ClusterConfig

DAYS = 3 * 86_400.0  # how late a joiner may be, seconds
Links = frozenset[tuple[int, int]]  # (source, target), by index of the host


@dataclass(frozen=True, slots=True)
class Occurrence:
    """One fault at one moment. `length` is seconds, or a number of things for a flood."""

    at: float
    kind: str
    host: int = 0
    other: int = 0
    length: float = 0.0
    links: Links = frozenset()


@dataclass
class Faults:
    """Strengths of the faults; probabilities, counts and seconds. `until` ends all of them."""

    # ---- the network
    skew: float = 0.0  # seconds between the first and the last boot
    loss: float = 0.0
    duplicate: float = 0.0
    replays: float = 0.0  # probability that with a message an old one arrives once more
    delay: float = 0.002  # mean one-way delay, seconds; each message has its own: they overtake
    half_open: float = 0.0  # dials that hang, and connections that stand on one side only
    multicast_loss: float = 0.0
    multicast_dead_until: float = 0.0
    static: bool = False  # multicast is dead for ever; every host has the list of all
    refused_until: float = 0.0  # one host's bootstrap channel refuses all dials until then
    partitions: int = 0  # halves, one host, one way, single links; still, flapping, moving
    foreign: int = 0  # hosts of another formation, or with a wrong token, on this network
    floods: int = 0  # strangers by the dozen: dead addresses and garbage
    misbehaviour: int = 0  # an authenticated peer breaks the protocol and is hung up on
    # ---- the machines
    crash_boundary: float = 0.0  # probability of a power cut just before or after an action
    crashes: int = 0  # at random moments
    master_crashes: int = 0  # of whoever is the candidate or about to be it
    reboot_loops: int = 0
    pauses: int = 0
    moves: float = 0.0  # probability of another address at a restart, perhaps a dead host's
    # ---- the disks
    disk_errors: float = 0.0  # now and then
    disk_full: int = 0  # for a while
    read_only: int = 0  # until the faults end
    wipes: int = 0  # a disk re-created: a new identity without memory
    lost_states: int = 0  # the state file torn: the identity stays, the votes are lost
    rollbacks: int = 0  # a disk set back to an older snapshot of itself
    clones: int = 0  # disks copied and both started; before the first boot that is harmless
    # ---- the rest
    step_failures: float = 0.0
    sign_failures: float = 0.0
    rejections: float = 0.0  # of certificates, by the host that got them
    surplus: int = 0  # hosts launched beyond expect
    absent: int = 0  # hosts that never boot: expect is too high
    mixed: int = 0  # hosts whose document has another expect
    joiners: int = 0  # hosts first booted when all is done, up to days later
    until: float = 60.0

    @classmethod
    def drawn(cls, rng: random.Random) -> Faults:
        """Swarm style: each kind of fault is on in some of the runs, at its own strength."""

        def some(top: float, share: float = 0.5) -> float:
            return rng.random() * top if rng.random() < share else 0.0

        def few(top: int, share: float) -> int:
            return rng.randint(1, top) if rng.random() < share else 0

        return cls(
            skew=some(600.0) if rng.random() < 0.1 else some(20.0),
            loss=some(0.6, 0.4),
            duplicate=some(0.3),
            replays=some(0.1, 0.2),
            delay=rng.choice((0.0005, 0.002, 0.02, 0.2)),
            half_open=some(0.5, 0.2),
            multicast_loss=some(0.9),
            multicast_dead_until=some(25.0),
            static=rng.random() < 0.1,
            refused_until=some(30.0, 0.2),
            partitions=int(some(5)),
            foreign=few(3, 0.15),
            floods=few(3, 0.08),
            misbehaviour=few(5, 0.15),
            crash_boundary=some(0.03),
            crashes=int(some(6)),
            master_crashes=few(3, 0.2),
            reboot_loops=few(2, 0.12),
            pauses=int(some(3)),
            moves=some(0.5, 0.2),
            disk_errors=some(0.2),
            disk_full=few(2, 0.12),
            read_only=few(1, 0.08),
            wipes=few(3, 0.2),
            lost_states=few(2, 0.15),
            rollbacks=few(2, 0.12),
            clones=few(1, 0.1),
            step_failures=some(0.6, 0.3),
            sign_failures=some(0.5, 0.2),
            rejections=some(0.5, 0.2),
            surplus=few(3, 0.15),
            absent=few(2, 0.15),
            mixed=few(2, 0.08),
            joiners=few(1, 0.08),
            until=rng.choice((10.0, 20.0, 40.0, 60.0)),
        )


def drawn_config(rng: random.Random, expect: int) -> ClusterConfig:
    """A document of that many hosts: masters, strict and grace as the seed has it."""
    masters = [n for n in (1, 1, 1, 3, 5) if n <= expect]
    return ClusterConfig(
        "demo",
        expect,
        masters=rng.choice(masters),
        strict=rng.random() < 0.15,
        grace=rng.choice((2.0, 30.0, 30.0)),
        join_extra=rng.choice((0, 0, 0, 1, None)),
        agreed="x",
    )


def other_expect(rng: random.Random, config: ClusterConfig) -> ClusterConfig:
    """The same document with a wrong expect, too high or too low but more than one."""
    low, high = max(2, config.masters, config.expect - 2), config.expect + 2
    wrong = [n for n in range(low, high + 1) if n != config.expect]
    return replace(config, expect=rng.choice(wrong))


# ---------------------------------------------------------------- what befalls whom, and when


def drawn_occurrences(rng: random.Random, faults: Faults, hosts: int) -> list[Occurrence]:
    """Everything that shall befall these hosts, in order of time."""

    def moment() -> float:
        # Formations are short: half of all faults shall meet them in their first seconds.
        return rng.random() * (min(5.0, faults.until) if rng.random() < 0.5 else faults.until)

    def befall(kind: str, times: int, longest: float = 0.0) -> Iterator[Occurrence]:
        for _ in range(times):
            yield Occurrence(
                moment(), kind, rng.randrange(hosts), rng.randrange(hosts), rng.random() * longest
            )

    drawn = [
        *befall("crash", faults.crashes),
        *befall("master crash", faults.master_crashes),
        *befall("reboot loop", faults.reboot_loops, 30.0),
        *befall("pause", faults.pauses, 60.0),
        *befall("wipe", faults.wipes),
        *befall("lost state", faults.lost_states),
        *befall("rollback", faults.rollbacks, 20.0),
        *befall("disk full", faults.disk_full, 30.0),
        *befall("read-only", faults.read_only),
        *befall("flood", faults.floods, 60.0),
        *befall("misbehaviour", faults.misbehaviour),
        *(o for _ in range(faults.partitions) for o in _partition(rng, moment(), hosts)),
    ]
    return sorted(drawn, key=lambda o: o.at)


def _partition(rng: random.Random, start: float, hosts: int) -> Iterator[Occurrence]:
    """One that stands still, mostly; else one that comes and goes, or moves on."""
    manner, links = rng.randrange(6), _drawn_links(rng, hosts)
    if manner >= 2:
        yield Occurrence(start, "partition", length=rng.random() * 40, links=links)
        return
    for _ in range(rng.randint(2, 6)):
        length = 0.5 + rng.random() * (3.0 if manner == 0 else 10.0)
        kind = "partition flaps" if manner == 0 else "partition moves"
        yield Occurrence(start, kind, length=length, links=links)
        if manner == 0:
            start += length * (1 + rng.random())
        else:
            start, links = start + length, _drawn_links(rng, hosts)


def _drawn_links(rng: random.Random, hosts: int) -> Links:
    """Halves, one host alone, one host deaf or mute, or single links (then not transitive)."""
    every = [(a, b) for a in range(hosts) for b in range(hosts) if a != b]
    manner, one = rng.randrange(5), rng.randrange(hosts)
    if manner == 0:
        side = {h for h in range(hosts) if rng.random() < 0.5}
        return frozenset(x for x in every if (x[0] in side) != (x[1] in side))
    if manner == 1:
        return frozenset(x for x in every if one in x)
    if manner == 2:
        way = rng.randrange(2)
        return frozenset(x for x in every if x[way] == one)
    if manner == 3:
        return frozenset(x for x in every if rng.random() < 0.3)
    pairs = {x for x in every if x[0] < x[1] and rng.random() < 0.4}
    return frozenset(x for x in every if (min(x), max(x)) in pairs)
