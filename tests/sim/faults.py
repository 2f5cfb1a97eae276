"""How hostile one simulated run is. Every number is drawn from the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from firstboot.protocol.model import ClusterConfig


@dataclass
class Faults:
    """Strengths of the faults; probabilities, counts and seconds. `until` ends all of them."""

    skew: float = 0.0  # seconds between the first and the last boot
    loss: float = 0.0
    duplicate: float = 0.0
    delay: float = 0.002  # mean one-way delay, seconds
    multicast_loss: float = 0.0
    multicast_dead_until: float = 0.0
    static: bool = False  # multicast is dead for ever; every host has the list of all
    refused_until: float = 0.0  # one host's bootstrap channel refuses all dials until then
    crash_boundary: float = 0.0  # probability of a crash just before or after an action
    crashes: int = 0  # at random moments
    partitions: int = 0
    disk_errors: float = 0.0
    step_failures: float = 0.0
    sign_failures: float = 0.0
    rejections: float = 0.0  # of certificates, by the host that got them
    wipes: int = 0  # a disk re-created: a new identity without memory
    lost_states: int = 0  # the state file torn: the identity stays, the votes are lost
    moves: float = 0.0  # probability of another address at a restart, perhaps a dead host's
    surplus: int = 0  # hosts launched beyond expect
    absent: int = 0  # hosts that never boot
    clones: int = 0  # disks copied with their identity, and both started
    foreign: int = 0  # hosts of another formation on this network
    pauses: int = 0
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
            loss=some(0.4),
            duplicate=some(0.3),
            delay=rng.choice((0.0005, 0.002, 0.02, 0.2)),
            multicast_loss=some(0.9),
            multicast_dead_until=some(25.0),
            static=rng.random() < 0.1,
            refused_until=some(30.0, 0.2),
            crash_boundary=some(0.03),
            crashes=int(some(6)),
            partitions=int(some(5)),
            disk_errors=some(0.2),
            step_failures=some(0.6, 0.3),
            sign_failures=some(0.5, 0.2),
            rejections=some(0.5, 0.2),
            wipes=few(3, 0.2),
            lost_states=few(2, 0.15),
            moves=some(0.5, 0.2),
            surplus=few(3, 0.15),
            absent=few(2, 0.15),
            clones=few(1, 0.1),
            foreign=few(3, 0.15),
            pauses=int(some(3)),
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
