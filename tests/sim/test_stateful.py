"""The same simulated world, with Hypothesis as the adversary: it chooses every fault and moment.

The campaign draws faults from a seed; here a failure shrinks to the few steps that make it. By
default the examples are always the same; ``HYPOTHESIS_PROFILE=long`` tries many and new ones.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from firstboot.protocol import election, events
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import Ballot, ClusterConfig, Register
from tests.sim.machine import Host
from tests.sim.outcome import left_behind, must_describe
from tests.sim.world import Faults, World

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
SETTINGS = settings(
    max_examples=3000 if LONG else 400,
    stateful_step_count=60 if LONG else 30,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
FOR_EVER = 1e9  # the faults end when the machine says so


class Stage(World):
    """A world whose faults are switched, not drawn; it remembers what was delivered where."""

    crash_in = -1  # action boundaries until the power fails there; negative: it does not
    remembered: list[tuple[Host, Host, int, events.MessageReceived]]

    def crash_now(self, host: Host, actions: list[events.Action], gap: int) -> bool:
        self.crash_in -= 1
        return self.crash_in == 0

    def send(self, source: Host, action: events.Send) -> None:
        connection, target = source.channels.get((action.node_id, action.channel), (-1, source))
        received = events.MessageReceived(source.node_id, action.channel, action.message)
        self.remembered.append((source, target, connection, received))
        super().send(source, action)

    def replay(self, index: int) -> None:
        """Deliver an earlier message once more, if its connection still stands."""
        if not self.remembered:
            return
        source, target, connection, received = self.remembered[index % len(self.remembered)]
        if target.channels.get((source.node_id, received.channel), (None,))[0] == connection:
            self.count("replay")
            target.feed(received)


numbers = st.integers(0, 4)
moments = st.sampled_from([0.001, 0.005, 0.02, 0.1, 0.5, 3.0, 16.0, 35.0])


class Adversary(RuleBasedStateMachine):
    """Everything that may befall a formation, one thing at a time."""

    core: type[Assembly] = Assembly
    world: Stage

    @initialize(
        hosts=st.sampled_from([3, 3, 2, 4, 5]),
        masters=st.sampled_from([1, 1, 3]),
        strict=st.booleans(),
        seed=st.integers(0, 3),
        asleep=st.sets(numbers, max_size=2),
    )
    def begin(self, hosts: int, masters: int, strict: bool, seed: int, asleep: set[int]) -> None:
        masters = masters if masters <= hosts else 1
        config = ClusterConfig("demo", hosts, masters, strict, grace=30.0, agreed="x")
        self.world = Stage(seed, hosts, config, Faults(until=FOR_EVER, delay=0.005), self.core)
        self.world.remembered = []
        for host in self.world.hosts:
            if host.index not in asleep:
                host.boot()

    def host(self, number: int) -> Host:
        return self.world.hosts[number % len(self.world.hosts)]

    # ------------------------------------------------------------ time

    @rule(seconds=moments)
    def wait(self, seconds: float) -> None:
        self.world.run(self.world.now + seconds)

    @rule(events=st.integers(1, 12))
    def a_few_events(self, events: int) -> None:
        count = itertools.count(1)
        self.world.run(self.world.now + 60.0, lambda: next(count) >= events)

    # ------------------------------------------------------------ machines

    @rule(number=numbers)
    def crash(self, number: int) -> None:
        self.host(number).crash()

    @rule(boundaries=st.integers(1, 12), seconds=moments)
    def crash_between_two_actions(self, boundaries: int, seconds: float) -> None:
        self.world.crash_in = boundaries
        self.world.run(self.world.now + seconds)

    @rule()
    def boot_who_is_down(self) -> None:
        for host in self.world.hosts:
            host.boot()

    @rule(number=numbers, seconds=moments)
    def pause(self, number: int, seconds: float) -> None:
        self.host(number).paused_until = self.world.now + seconds

    @precondition(lambda self: self.world.counts.get("wipe", 0) < 2)
    @rule(number=numbers)
    def wipe(self, number: int) -> None:
        self.host(number).wipe()

    @precondition(lambda self: self.world.counts.get("lost state", 0) < 1)
    @rule(number=numbers)
    def lose_state(self, number: int) -> None:
        self.host(number).lose_state()

    @rule(on=st.booleans())
    def disks_fail(self, on: bool) -> None:
        self.world.faults.disk_errors = 0.5 if on else 0.0

    # ------------------------------------------------------------ network

    @rule(one=numbers, other=numbers, both=st.booleans())
    def cut_a_link(self, one: int, other: int, both: bool) -> None:
        a, b = self.host(one).index, self.host(other).index
        if a != b:
            self.world.partition({(a, b), (b, a)} if both else {(a, b)})

    @rule(side=st.sets(numbers, min_size=1, max_size=2))
    def partition(self, side: set[int]) -> None:
        every = range(len(self.world.hosts))
        links = {(a, b) for a in every for b in every if (a in side) != (b in side)}
        self.world.heal(set(self.world.blocked))
        self.world.partition(links)

    @rule()
    def heal(self) -> None:
        self.world.heal(set(self.world.blocked))

    @rule(loss=st.sampled_from([0.0, 0.3]), duplicate=st.sampled_from([0.0, 0.5]))
    def weather(self, loss: float, duplicate: float) -> None:
        self.world.faults.loss, self.world.faults.duplicate = loss, duplicate

    @rule(works=st.booleans())
    def multicast(self, works: bool) -> None:
        self.world.faults.multicast_dead_until = 0.0 if works else FOR_EVER

    @rule(index=st.integers(0, 10_000))
    def replay(self, index: int) -> None:
        self.world.replay(index)

    # ------------------------------------------------------------ what must hold

    @invariant()
    def every_host_speaks_and_at_most_one_cluster_is_on_disk(self) -> None:
        """The witness has looked at every event; this looks at all hosts at once."""
        world = self.world
        for host in world.hosts:
            must_describe(host)
        held = [h.disk.stored.decided for h in world.hosts]
        active = {v.cluster_id for v in held if v is not None and v.active}
        world.witness.must(len(active) <= 1 or not world.witness.safe, "I1: two on disk")

    def teardown(self) -> None:
        """Peace: all faults end, every host is on, and within the bound every host runs."""
        world = self.world
        world.crash_in, world.faults.until = -1, world.now
        world.faults.disk_errors = world.faults.duplicate = 0.0
        world.peace()
        ended = world.run(world.bound, world.all_running)
        if len(world.witness.active) > 1:
            world.run(world.now + 30.0)
        world.witness.finish(world)
        stuck = [] if ended else left_behind(world)
        assert not stuck, f"{stuck}\n{world.picture()}"


TestAdversary = Adversary.TestCase
TestAdversary.settings = SETTINGS


# ---------------------------------------------------------------- it would notice


class RepliesBeforeDisk(Assembly):
    def _store(self, then: Callable[[], None] | None = None, **changes: Any) -> None:
        super()._store(None, **changes)
        if then is not None:
            then()


class AnnouncesOnce(Assembly):
    """Safe, but hosts whose first multicast was lost never meet."""

    def _announce(self) -> None:
        if not self._announced:
            super()._announce()


def found(core: type[Assembly] = Assembly) -> str:
    """What the adversary finds first; not shrunk, which would take long."""

    class Broken(Adversary):
        pass

    Broken.core = core
    once = settings(SETTINGS, phases=[Phase.generate])
    with pytest.raises(AssertionError) as caught:
        run_state_machine_as_test(Broken, settings=once)
    return f"{type(caught.value).__name__} {caught.value}"


def test_a_reply_that_does_not_wait_for_the_disk_is_found() -> None:
    assert found(RepliesBeforeDisk).startswith("Violation I4")


def test_hosts_that_never_meet_are_found() -> None:
    assert "AssertionError ['" in found(AnnouncesOnce)


def test_an_acceptor_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(register: Register, ballot: Ballot) -> Register | None:
        return Register(promised=ballot) if ballot >= register.promised else None

    monkeypatch.setattr(election, "promise", forget)
    assert found().startswith("Violation I")


def test_a_quorum_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(config: ClusterConfig, **_: object) -> int:
        return max(1, config.majority - 1)

    monkeypatch.setattr(election, "quorum", too_small)
    assert found().startswith(("Violation I", "Violation W"))
