"""The acceptance scenarios of the protocol, each a named test over several seeds.

``pytest -m scenario -v`` runs every test of every scenario, here and elsewhere, and ends with a
table. Those that need no simulator are elsewhere only: A21 with real tokens, tags and sockets in
``tests/network`` (here hosts of another formation never connect), A24, clocks, in
``tests/adapters/test_a24_clocks`` (the core has no wall clock), A31, token hygiene, in
``tests/machines``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from firstboot.protocol import events, messages, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import Channel, ClusterConfig, Endpoint, Register, Role, Stage
from firstboot.protocol.situation import Start
from tests.sim.boundaries import Boundaries, count, crashed
from tests.sim.invariants import Violation
from tests.sim.outcome import must_change_nothing, runs
from tests.sim.world import Faults, Host, World

TESTS = Path(__file__).parents[1]
scenario = pytest.mark.scenario
seeds = pytest.mark.parametrize("seed", range(12))


def config_of(expect: int, **changes: Any) -> ClusterConfig:
    return replace(ClusterConfig("demo", expect, grace=30.0, agreed="x"), **changes)


def started(
    seed: int, hosts: int, on: Iterable[int] | None = None, skew: float = 0.0, **options: Any
) -> World:
    """A world in which those hosts (default: all) boot within `skew` seconds, and no faults."""
    faults = options.pop("faults", None) or Faults(until=0.0, delay=0.005)
    config = options.pop("config", None) or config_of(hosts)
    world = World(seed, hosts=hosts, config=config, faults=faults, **options)
    for index in range(hosts) if on is None else on:
        world.at(world.rng.random() * skew, world.hosts[index].boot)
    return world


def said(host: Host) -> dict[str, Any]:
    assert host.core is not None
    return status.describe(host.core, 1_800_000_000.0)


def codes(host: Host) -> set[str]:
    return {p["code"] for p in said(host)["problems"]}


def all_run(hosts: Iterable[Host]) -> Callable[[], bool]:
    wanted = list(hosts)
    return lambda: all(runs(h) for h in wanted)


def founder_of(world: World) -> Host:
    (founder,) = world.witness.active.values()
    return world.by_id[founder]


def names_of(world: World) -> set[str]:
    return {h.disk.stored.enrolled.name for h in world.hosts if h.disk.stored.enrolled}


def halves(world: World, first: set[int]) -> set[tuple[int, int]]:
    every = range(len(world.hosts))
    return {(a, b) for a in every for b in every if (a in first) != (b in first)}


def one_cluster(world: World) -> None:
    assert len(world.witness.active) == 1
    assert all(h.disk.stored.enrolled for h in world.hosts)
    held = {h.disk.stored.decided for h in world.hosts}
    assert len(held) == 1
    assert all(h.disk.certificates == next(iter(held)).fingerprint for h in world.hosts)  # type: ignore[union-attr]


@scenario("A01")
@seeds
def test_a01_three_hosts_form_at_once(seed: int) -> None:
    world = started(seed, 3, skew=2.0)
    assert world.run(10.0, world.all_running)
    one_cluster(world)


@scenario("A02")
@seeds
@pytest.mark.parametrize("hosts", [5, 9])
def test_a02_five_and_nine_hosts(seed: int, hosts: int) -> None:
    world = started(seed, hosts, skew=2.0)
    assert world.run(10.0, world.all_running)
    one_cluster(world)


@scenario("A03")
@seeds
def test_a03_a_host_ten_minutes_late_joins_what_the_majority_formed(seed: int) -> None:
    world = started(seed, 3, on=(0, 1), skew=2.0)
    assert world.run(40.0, all_run(world.hosts[:2]))
    world.at(600.0, world.hosts[2].boot)
    world.run(600.0)
    assert world.run(602.0, all_run(world.hosts)), world.picture()
    one_cluster(world)


@scenario("A04")
def test_a04_one_host_forms_without_the_network() -> None:
    world = started(0, 1)
    assert world.run(1.0, world.all_running)
    one_cluster(world)


@scenario("A05")
@seeds
def test_a05_one_of_two_waits_for_ever_and_says_so(seed: int) -> None:
    world = started(seed, 2, on=(0,))
    world.run(7200.0)
    assert not world.witness.active
    assert said(world.hosts[0])["sentence"].startswith("1 of 2 hosts are present; waiting for 1")


@scenario("A06")
@seeds
def test_a06_two_of_three_form_after_grace_and_are_degraded(seed: int) -> None:
    world = started(seed, 3, on=(0, 1))
    world.run(29.0)
    assert not world.witness.active
    assert "waiting for 1 more" in said(world.hosts[0])["sentence"]
    assert world.run(40.0, all_run(world.hosts[:2]))
    assert world.witness.smallest == 2
    founder = said(founder_of(world))
    assert founder["state"] == "degraded"
    assert "INCOMPLETE" in codes(founder_of(world))
    assert "1 of 3 expected hosts" in str(founder["problems"])


@scenario("A07")
@seeds
def test_a07_the_minority_joins_when_the_partition_heals(seed: int) -> None:
    world = started(seed, 3)
    world.blocked = halves(world, {0, 1})
    world.run(60.0)
    assert [runs(h) for h in world.hosts] == [True, True, False]
    assert said(world.hosts[2])["sentence"].startswith("1 of 3 hosts are present; waiting for 2")
    world.blocked.clear()
    assert world.run(75.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A08")
@seeds
def test_a08_two_halves_of_four_form_nothing_until_healed(seed: int) -> None:
    world = started(seed, 4)
    world.blocked = halves(world, {0, 1})
    world.run(120.0)
    assert not world.witness.active
    assert all("2 of 4 hosts are present" in said(h)["sentence"] for h in world.hosts)
    world.blocked.clear()
    assert world.run(140.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A09")
@seeds
def test_a09_one_link_dead_for_ever(seed: int) -> None:
    world = started(seed, 3)
    world.blocked = {(0, 1), (1, 0)}
    assert world.run(60.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A10")
@seeds
def test_a10_one_way_loss(seed: int) -> None:
    world = started(seed, 3)
    world.partition({(0, 1)})
    assert world.run(60.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A11")
@seeds
def test_a11_the_first_twenty_seconds_of_multicast_are_lost(seed: int) -> None:
    faults = Faults(until=0.0, multicast_dead_until=20.0)
    world = started(seed, 3, skew=2.0, faults=faults)
    world.run(19.9)
    assert not world.witness.active
    assert world.run(30.0, world.all_running)
    one_cluster(world)


@scenario("A12")
@seeds
def test_a12_a_static_list_instead_of_multicast(seed: int) -> None:
    faults = Faults(until=0.0, multicast_dead_until=1e9, static=True)
    world = started(seed, 3, skew=10.0, faults=faults)
    assert world.run(15.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A13")
@pytest.mark.parametrize("part", range(4))
def test_a13_a_power_cut_at_every_boundary(part: int) -> None:
    """Each gap beside a Persist or a Send; the host comes back, or never does."""
    total = count(0)
    assert total > 100
    for at in range(1 + part, total + 1, 4):
        for back in (True, False):
            world = Boundaries(0, at, back=back)
            world.play()
            assert world.victim is not None
            assert len(world.witness.active) <= 1
            if back:
                one_cluster(world)


def test_a13_a_core_that_forgets_in_a_gap_is_found() -> None:
    """The enumeration would notice: this one starts again as if it had promised nothing."""
    with pytest.raises(Violation):
        for world in crashed([0], core=Forgetful):
            world.play()


class Forgetful(Assembly):
    def __init__(self, start: Start) -> None:
        super().__init__(replace(start, stored=replace(start.stored, register=Register())))


def _when_signed(world: World, others: int) -> Host:
    """Run until a candidate has signed for that many other hosts; the candidate."""

    def there() -> list[Host]:
        return [
            h
            for h in world.hosts
            if h.core is not None
            and h.core.stage is Stage.SIGNING
            and sum(node != h.node_id for _, node in h.disk.issued) >= others
        ]

    assert world.run(20.0, lambda: bool(there())), world.picture()
    return there()[0]


@scenario("A14")
@seeds
def test_a14_a_candidate_that_dies_before_any_certificate_is_replaced(seed: int) -> None:
    world = started(seed, 3)
    _replaced(world, _when_signed(world, 0))


@scenario("A15")
@seeds
def test_a15_a_host_enrolled_by_a_candidate_that_died_enrols_anew(seed: int) -> None:
    world = started(seed, 3)
    master = _when_signed(world, 1)
    held: list[Host] = []

    def one_holds() -> bool:
        held[:] = [h for h in world.hosts if h is not master and h.disk.certificates]
        return bool(held)

    assert world.run(world.now + 5.0, one_holds), world.picture()
    old = held[0].disk.certificates
    assert old == master.disk.authorities[1]
    assert not world.witness.active
    _replaced(world, master)
    assert held[0].disk.certificates != old


def _replaced(world: World, master: Host) -> None:
    """Its power is cut: the others form epoch 2, and it joins them when it is back."""
    first = dict(master.disk.authorities)
    master.crash()
    others = [h for h in world.hosts if h is not master]
    assert world.run(150.0, all_run(others)), world.picture()
    assert all(h.disk.certificates not in first.values() for h in others)
    world.at(world.now, master.boot)
    assert world.run(300.0, world.all_running), world.picture()
    one_cluster(world)
    assert founder_of(world) is not master
    value = master.disk.stored.decided
    assert value is not None
    assert (value.epoch, value.role_of(master.node_id)) == (2, Role.NODE)
    assert not master.disk.authorities


@scenario("A16")
@seeds
def test_a16_a_master_lost_after_active_is_told_and_not_replaced(seed: int) -> None:
    world = started(seed, 3)
    assert world.run(10.0, lambda: bool(world.witness.active))
    master = founder_of(world)
    world.run(world.now + 0.001 * seed)
    master.crash()
    waiting = [h for h in world.hosts if h is not master]
    world.run(50.0)
    for host in waiting:
        assert host.gone or "MASTER_LOST" in codes(host), said(host)["sentence"]
    world.run(900.0)
    assert list(world.witness.active.values()) == [master.node_id]


@scenario("A17")
@seeds
def test_a17_a_voter_created_anew_with_strict(seed: int) -> None:
    world = started(seed, 3, config=config_of(3, strict=True))
    world.blocked = halves(world, {0, 1})
    world.run(10.0)
    world.hosts[1].wipe()
    world.blocked = halves(world, {0})
    world.at(world.now, world.hosts[1].boot)
    world.run(300.0)
    assert not world.witness.active
    world.blocked.clear()
    assert world.run(330.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A18")
@seeds
@pytest.mark.parametrize("first", [{0, 1, 2}, {0, 1}])
def test_a18_five_launched_with_expect_three_and_strict(seed: int, first: set[int]) -> None:
    world = started(seed, 5, config=config_of(3, strict=True))
    world.blocked = halves(world, first)
    world.run(60.0)
    world.blocked.clear()
    world.run(120.0)
    assert len(world.witness.active) == 1


@scenario("A18")
@seeds
def test_a18_five_launched_with_expect_three_and_strict_at_any_time(seed: int) -> None:
    world = started(seed, 5, config=config_of(3, strict=True), skew=10.0)
    world.run(120.0)
    assert len(world.witness.active) == 1
    assert sum(runs(h) for h in world.hosts) == 3


@scenario("A18")
@seeds
def test_a18_five_launched_with_expect_three_together(seed: int) -> None:
    world = started(seed, 5, config=config_of(3))
    world.run(120.0)
    assert len(world.witness.active) == 1
    assert sum(runs(h) for h in world.hosts) == 3


@scenario("A18")
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("skew", [1.0, 10.0, 30.0])
def test_a18_whoever_comes_within_grace_meets_the_master(seed: int, skew: float) -> None:
    """Outside 2q > V, as two are a majority of expect: but the master is there to tell them."""
    world = started(seed, 5, config=config_of(3), skew=skew)
    world.run(150.0)
    assert len(world.witness.active) == 1
    assert sum(runs(h) for h in world.hosts) == 3


@scenario("A18")
@seeds
def test_a18_two_that_come_when_the_master_has_left_are_outside_the_promise(seed: int) -> None:
    """Nobody is left to tell them; README says so under its limits."""
    world = started(seed, 5, on=(0, 1, 2), config=config_of(3))
    for host in world.hosts[3:]:
        world.at(60.0, host.boot)
    world.run(150.0)
    assert len(world.witness.active) == 2
    assert not world.witness.safe


@scenario("A19")
@seeds
def test_a19_mixed_expect_is_named_on_both(seed: int) -> None:
    world = started(seed, 5, on=(0, 1, 2), config=config_of(5))
    world.run(2.0)
    world.config = config_of(3)
    for host in world.hosts[3:]:
        world.at(2.0, host.boot)
    world.run(20.0)
    assert not world.witness.active
    assert all("CONFIG_MISMATCH" in codes(h) for h in world.hosts[3:])
    strangers = [p for h in world.hosts[3:] if h.core for p in h.core.peers.values()]
    assert sum(p.mismatch == "has expect: 5, this host has expect: 3" for p in strangers) == 6


@scenario("A20")
@seeds
def test_a20_hosts_of_another_formation_on_one_network(seed: int) -> None:
    faults = Faults(until=0.0, foreign=3)
    world = started(seed, 3, skew=2.0, faults=faults)
    assert world.run(10.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A22")
@seeds
def test_a22_a_cloned_identity_stops_and_the_rest_forms(seed: int) -> None:
    faults = Faults(until=0.0, clones=1)
    world = started(seed, 5, on=range(4), config=config_of(5), faults=faults)
    world.run(5.0)
    original, copy = world.hosts[3], world.hosts[5]
    copy.copy_disk_of(original)
    world.at(20.0, world.hosts[4].boot)
    assert world.run(120.0, all_run(h for h in world.hosts if h not in (original, copy)))
    assert len(world.witness.active) == 1
    for host in (original, copy):
        assert host.core is not None
        assert host.core.failure == "DUPLICATE_IDENTITY"
        assert "DUPLICATE_IDENTITY" in codes(host)


@scenario("A23")
@seeds
def test_a23_one_host_name_on_all(seed: int) -> None:
    world = started(seed, 3)
    assert world.run(10.0, world.all_running)
    one_cluster(world)
    assert len(names_of(world)) == 3


@scenario("A25")
@seeds
def test_a25_the_address_of_a_dead_host_is_used_by_another(seed: int) -> None:
    world = started(seed, 4, on=range(3), config=config_of(3))
    world.run(0.002 * seed)
    dead, heir = world.hosts[2], world.hosts[3]
    dead.crash()
    del world.by_endpoint[heir.endpoint]
    heir.endpoint, dead.endpoint = dead.endpoint, Endpoint("10.0.0.99", 7443)
    world.by_endpoint[heir.endpoint] = heir
    world.at(1.0, heir.boot)
    assert world.run(120.0, all_run((*world.hosts[:2], heir))), world.picture()
    assert len(world.witness.active) == 1


@scenario("A27")
@seeds
def test_a27_a_recorded_transcript_moves_nothing(seed: int) -> None:
    """What comes from nobody who is connected is not even looked at."""
    recorded: list[events.MessageReceived] = []
    old = started(seed, 3)
    for host in old.hosts:
        feed = host.feed

        def listen(event: events.Event, feed: Any = feed) -> None:
            if isinstance(event, events.MessageReceived):
                recorded.append(event)
            feed(event)

        host.feed = listen  # type: ignore[method-assign]
    assert old.run(10.0, old.all_running)
    world = started(seed + 100, 3, on=(0,))
    world.run(1.0)
    victim = world.hosts[0]
    before = victim.disk.stored
    for event in recorded:
        victim.feed(event)
    assert victim.core is not None
    assert (victim.disk.stored, victim.core.peers) == (before, {})
    assert len(recorded) > 20
    for host in world.hosts[1:]:
        world.at(1.0, host.boot)
    assert world.run(10.0, world.all_running)
    one_cluster(world)


@scenario("A28")
@seeds
def test_a28_a_flood_of_strangers_changes_little(seed: int) -> None:
    calm = started(seed, 3)
    assert calm.run(10.0, calm.all_running)
    world = started(seed, 3)
    for n in range(3000):
        stranger = Endpoint(f"10.66.{n // 250}.{n % 250 + 1}", 7443)
        for host in world.hosts:
            world.at(n * 0.0001, lambda h=host, e=stranger: h.feed(events.PeerFound(e, "mdns")))
            seen = events.StrangerSeen("flood", stranger.host)
            world.at(n * 0.0001, lambda h=host, e=seen: h.feed(e))
    assert world.run(10.0, world.all_running), world.picture()
    one_cluster(world)
    assert world.now <= 3 * calm.now, (world.now, calm.now)


@scenario("A30")
@seeds
@pytest.mark.parametrize(("hosts", "masters"), [(5, 3), (7, 5), (3, 3)])
def test_a30_all_masters_hold_the_same_list(seed: int, hosts: int, masters: int) -> None:
    world = started(seed, hosts, config=config_of(hosts, masters=masters))
    assert world.run(20.0, world.all_running), world.picture()
    one_cluster(world)
    value = world.hosts[0].disk.stored.decided
    assert value is not None
    assert len({m.name for m in value.masters}) == masters
    roles = [value.role_of(h.node_id) for h in world.hosts]
    assert roles.count(Role.MASTER) == masters


@scenario("A30")
@seeds
def test_a30_a_slow_master_among_five_does_not_start_a_race_of_epochs(seed: int) -> None:
    config = config_of(7, masters=5)
    world = started(seed, 7, on=range(6), config=config, faults=Faults(until=0.0, delay=0.2))
    assert world.run(120.0, all_run(world.hosts[:6])), world.picture()
    value = founder_of(world).disk.stored.decided
    assert value is not None
    assert value.epoch <= 2


@scenario("A32")
@seeds
def test_a32_a_full_disk_never_answers_says_so_and_recovers(seed: int) -> None:
    world = started(seed, 3, config=config_of(3, strict=True))
    victim = world.hosts[seed % 3]
    full = [True]
    victim._fails = lambda: full[0]  # type: ignore[method-assign]
    answers: list[events.Send] = []
    send = world.send

    def listen(source: Host, action: events.Send) -> None:
        if source is victim and not isinstance(action.message, messages.Hello | messages.Refused):
            answers.append(action)
        send(source, action)

    world.send = listen  # type: ignore[method-assign]
    world.run(60.0)
    assert not world.witness.active
    assert answers == []
    assert "DISK" in codes(victim)
    assert "no space left on device" in str(said(victim)["problems"])
    full[0] = False
    assert world.run(100.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A33")
@seeds
def test_a33_expect_one_too_high_with_strict(seed: int) -> None:
    world = started(seed, 3, config=config_of(4, strict=True))
    world.run(600.0)
    assert not world.witness.active
    for host in world.hosts:
        told = said(host)
        assert told["sentence"].startswith("3 of 4 hosts are present; waiting for 1 more")
        assert {p["state"] for p in told["peers"]} == {"present"}
        present = {(p["node_id"], p["address"]) for p in told["peers"]}
        others = {(h.node_id, h.endpoint.host) for h in world.hosts if h is not host}
        assert present == others
        assert told["hint"]


@seeds
def test_l3_running_again_after_active_changes_nothing(seed: int) -> None:
    world = started(seed, 3)
    assert world.run(10.0, world.all_running)
    world.run(30.0)
    for host in world.hosts:
        must_change_nothing(world, host)
    one_cluster(world)


@seeds
def test_a_founder_that_lost_its_votes_is_replaced(seed: int) -> None:
    world = started(seed, 5)
    master = _when_signed(world, 1)
    master.lose_state()
    world.at(world.now + 3.0, master.boot)
    assert world.run(200.0, world.all_running), world.picture()
    one_cluster(world)


@seeds
def test_one_failed_request_is_made_again(seed: int) -> None:
    world = started(seed, 3)
    victim = world.hosts[seed % 3]
    request, failures = victim._request, [1]

    def once() -> None:
        if failures:
            failures.pop()
            victim.feed(events.PersistFailed(0, "no space left on device"))
        else:
            request()

    victim._request = once  # type: ignore[method-assign]
    assert world.run(60.0, world.all_running), world.picture()
    one_cluster(world)


@scenario("A29")
@seeds
def test_a29_a_token_holder_is_refused_after_close(seed: int) -> None:
    """Every host is still there here, as its role does not come up, and all have closed."""
    world = started(seed, 4, on=range(3), config=config_of(3))
    old, stranger = world.hosts[:3], world.hosts[3]
    for host in old:
        host._run_step = partial(fail_step, host)  # type: ignore[method-assign]
    assert world.run(60.0, lambda: all(h.shut for h in old)), world.picture()
    assert not any(h.gone for h in old)
    assert not any(c is Channel.BOOTSTRAP for h in old for _, c in h.channels)
    seen: list[events.Event] = []
    feed = stranger.feed

    def listen(event: events.Event) -> None:
        seen.append(event)
        feed(event)

    stranger.feed = listen  # type: ignore[method-assign]
    stranger.boot()
    for host in old:
        stranger.feed(events.PeerFound(host.endpoint, "static"))
    world.run(world.now + 60.0)
    assert not [e for e in seen if isinstance(e, events.Connected)]
    refused = [e for e in seen if isinstance(e, events.ConnectFailed) and e.reason == "refused"]
    assert {e.endpoint for e in refused} == {h.endpoint for h in old}
    assert stranger.core is not None
    assert stranger.core.stage is Stage.DISCOVERING
    assert not stranger.disk.certificates


def fail_step(host: Host, action: events.RunStep) -> None:
    host.later(0.1, events.StepFailed(action.index, "Could not start it: it failed"))


@scenario("A26")
@seeds
def test_a26_a_host_ninety_days_late_waits_and_says_what_to_do(seed: int) -> None:
    """How it is let in then: with real processes, ``tests/network/test_a26``."""
    world = started(seed, 4, on=range(3), config=config_of(3))
    assert world.run(10.0, all_run(world.hosts[:3]))
    before = {h.node_id: h.disk.stored for h in world.hosts[:3]}
    world.run(90 * 86_400.0)
    assert all(h.gone for h in world.hosts[:3])
    late = world.hosts[3]
    late.boot()
    world.run(world.now + 600.0)
    told = said(late)
    assert told["stage"] == "discovering"
    assert told["sentence"].startswith("1 of 3 hosts are present; waiting for 2 more")
    assert "`firstboot admit`" in told["hint"]
    assert "`firstboot join`" in told["hint"]
    assert late.disk.stored.decided is None
    assert not late.disk.certificates
    stored = {h.node_id: h.disk.stored for h in world.hosts[:3]}
    assert {i: s.decided for i, s in stored.items()} == {i: s.decided for i, s in before.items()}
    assert len(world.witness.active) == 1


@scenario("A19")
@seeds
def test_a19_mixed_expect_never_makes_two_clusters(seed: int) -> None:
    world = started(seed, 5, on=(0, 1, 2), config=config_of(5))
    world.run(0.1)
    world.config = config_of(3)
    for host in world.hosts[3:]:
        world.at(0.1, host.boot)
    world.run(300.0)
    assert len(world.witness.active) <= 1


# ---------------------------------------------------------------- none is missing

REAL = ("A01", "A02", "A04", "A07", "A11", "A12", "A13", "A20", "A26")


def marked(*directories: str) -> set[str]:
    """The scenarios that the tests in these directories are marked with."""
    found: set[str] = set()
    for directory in directories:
        for path in (TESTS / directory).glob("test_*.py"):
            found |= set(re.findall(r'\bscenario\("(A\d\d)"\)', path.read_text()))
    return found


def test_every_scenario_has_a_test() -> None:
    everywhere = marked("sim", "network", "machines", "adapters")
    assert sorted(everywhere) == [f"A{n:02}" for n in range(1, 34)]


def test_those_for_real_processes_have_them() -> None:
    assert set(REAL) <= marked("network", "machines")
