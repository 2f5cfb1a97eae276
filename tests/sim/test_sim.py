"""The simulated campaign, and proof that it would notice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from firstboot.protocol import election
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import Ballot, ClusterConfig, Register, Stage
from tests.sim.campaign import campaign, narrated, world_of
from tests.sim.invariants import Violation
from tests.sim.world import Faults, Host, World, simulate

ROOT = Path(__file__).parents[2]
SEEDS = 5000
# Beyond those; what each of them found is told where it was mended.
ONCE_BAD = (
    *(8396, 87894, 244215, 251532, 253439, 259444, 267475, 293704, 318127, 433405, 499534),
    *(533047, 595215, 779406, 954208),
)


# Every kind of fault that the design page lists, as it is counted.
FAULTS = (
    *("crash", "crash at a boundary", "master crash", "reboot loop", "pause", "absent", "joiner"),
    *("disk error", "disk full", "read-only disk", "wipe", "lost state", "rollback"),
    *("clone", "clone without identity", "moved", "mixed expect", "started again"),
    *("lost", "duplicated", "replayed", "dial hung", "half open", "refused", "misbehaviour"),
    *("multicast lost", "multicast dead", "flood", "wrong token"),
    *("partition", "partition flaps", "partition moves", "partitioned"),
    *("step failed", "sign failed", "rejected", "write refused"),
)
RULES = {f"I{n}" for n in range(1, 12)} | {"L1", "L2", "L3"}


@pytest.mark.timeout(1200)  # about a minute on two processors of which it has all
def test_no_seed_splits_or_gets_stuck() -> None:
    report = campaign(0, SEEDS, jobs=os.cpu_count() or 1, tell=lambda _: None)
    print(report.text())
    assert report.seeds == SEEDS
    assert report.failed == 0, report.text()
    for fault in FAULTS:
        assert report.faults[fault] > SEEDS / 100, f"hardly any {fault}: the campaign is too kind"
    assert report.checks.keys() >= RULES
    assert report.splits == 0
    assert sum(report.formed.values()) > SEEDS / 2


@pytest.mark.parametrize("seed", ONCE_BAD)
def test_a_seed_that_was_bad_once_is_good(seed: int) -> None:
    world_of(seed)  # a violation raises


def test_a_report_is_for_people_and_programs(tmp_path: Path) -> None:
    report = campaign(7, 20, jobs=2, tell=lambda _: None)
    report.write(tmp_path / "report")
    told = json.loads((tmp_path / "report.json").read_text())
    assert (told["first"], told["seeds"], told["failed"]) == (7, 20, 0)
    assert told["checks"]["I1"] > 0
    assert "seeds 7 to 26" in (tmp_path / "report.txt").read_text()


def test_an_interrupted_campaign_reports_what_it_has(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "tests.sim", "--seeds", "1000000", "--boundaries", "0"]
    argv += ["--report", str(tmp_path / "report")]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    assert b"1000000 seeds" in process.stderr.readline()  # it has begun
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    told = json.loads((tmp_path / "report.json").read_text())
    assert 0 < told["seeds"] < 1_000_000
    assert f"{told['seeds']} formations" in out.decode()


def test_a_kind_network_forms_in_a_fraction_of_a_second() -> None:
    world = simulate(7, faults=Faults(until=0.0))
    assert world.formed is not None
    assert world.formed < 1.0  # virtual seconds, steps of the plan included


TRACED = (41, 43)  # everybody connected to everybody, and few hubs


def _trace(seeds: Iterable[int]) -> str:
    told = (line for seed in seeds for line in narrated(seed))
    return hashlib.sha256("\n".join(told).encode()).hexdigest()


def test_the_same_seed_gives_the_same_trace_under_any_hash_seed() -> None:
    program = f"from tests.sim.test_sim import _trace; print(_trace({TRACED}))"
    digests = {_trace(TRACED)}
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=env, check=True, capture_output=True
        )
        digests.add(done.stdout.decode().strip())
    assert len(digests) == 1
    assert _trace((42, 43)) not in digests


# ---------------------------------------------------------------- positive controls


class RepliesBeforeDisk(Assembly):
    def _store(self, then: Callable[[], None] | None = None, **changes: Any) -> None:
        super()._store(None, **changes)
        if then is not None:
            then()


def _found(core: type[Assembly] = Assembly, seeds: int = 200, **options: Any) -> str:
    """What the campaign finds first."""
    for seed in range(seeds):
        try:
            simulate(seed, core=core, hosts=3 + seed % 3, **options)
        except Violation as violation:
            return str(violation)
        except AssertionError:
            continue
    return ""


def test_a_reply_that_does_not_wait_for_the_disk_is_found() -> None:
    assert _found(RepliesBeforeDisk).startswith("I4")


def test_a_quorum_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_small(config: ClusterConfig, **_: object) -> int:
        return max(1, config.majority - 1)

    monkeypatch.setattr(election, "quorum", too_small)
    assert _found()[:2] in ("I1", "I3", "W1", "W3")


def test_an_acceptor_that_forgets_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget(register: Register, ballot: Ballot) -> Register | None:
        return Register(promised=ballot) if ballot >= register.promised else None

    monkeypatch.setattr(election, "promise", forget)
    assert _found().startswith("I")


def test_a_ballot_used_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def same_for_all(register: Register, seen: int, node_id: str) -> Ballot:
        number = max(register.promised.number, register.accepted.number, seen) + 1
        return Ballot(number, "0" * 32)

    monkeypatch.setattr(election, "next_ballot", same_for_all)
    assert _found().startswith("I")


# ---------------------------------------------------------------- named situations


def _config(hosts: int, **changes: Any) -> ClusterConfig:
    return replace(ClusterConfig("demo", hosts, grace=30.0, agreed="x"), **changes)


def test_a_single_host_needs_nobody() -> None:
    world = World(1, hosts=1, faults=Faults(until=0.0))
    world.at(0.0, world.hosts[0].boot)
    assert world.run(1.0, lambda: world.hosts[0].gone)


def test_two_of_three_form_when_the_grace_period_is_over_and_say_who_is_missing() -> None:
    world = World(3, hosts=3, faults=Faults(until=0.0))
    for host in world.hosts[:2]:
        world.at(0.0, host.boot)
    world.run(29.0)
    assert [h.core.stage for h in world.hosts[:2] if h.core] == [Stage.DISCOVERING] * 2
    assert world.run(60.0, lambda: all(_runs(h) for h in world.hosts[:2]))
    world.at(world.now, world.hosts[2].boot)
    assert world.run(90.0, world.all_running)


def _runs(host: Host) -> bool:
    return host.gone or (host.core is not None and host.core.stage is Stage.RUNNING)


def test_strict_waits_for_ever() -> None:
    config = _config(3, strict=True)
    world = World(3, hosts=3, config=config, faults=Faults(until=0.0))
    for host in world.hosts[:2]:
        world.at(0.0, host.boot)
    world.run(3600.0)
    assert [h.core.stage for h in world.hosts[:2] if h.core] == [Stage.DISCOVERING] * 2


def test_two_of_four_on_each_side_form_nothing_until_healed() -> None:
    world = World(5, hosts=4, faults=Faults(until=0.0))
    world.blocked = {(a, b) for a in range(4) for b in range(4) if (a < 2) != (b < 2)}
    for host in world.hosts:
        world.at(0.0, host.boot)
    world.run(200.0)
    assert not world.witness.active
    world.blocked.clear()
    assert world.run(300.0, world.all_running)
    assert len(world.witness.active) == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_master_that_dies_before_active_is_replaced(seed: int) -> None:
    world = World(seed, hosts=3, faults=Faults(until=0.0))
    for host in world.hosts:
        world.at(0.0, host.boot)

    def signing() -> list[Host]:
        return [h for h in world.hosts if h.core and h.core.stage is Stage.SIGNING]

    assert world.run(10.0, lambda: bool(signing()))
    master = signing()[0]
    master.crash()
    others = [h for h in world.hosts if h is not master]
    assert world.run(150.0, lambda: all(_runs(h) for h in others))
    assert {h.disk.stored.decided.epoch for h in others if h.disk.stored.decided} == {2}
    world.at(world.now, master.boot)
    assert world.run(200.0, world.all_running)
    assert not master.disk.authorities  # its epoch-1 CA is destroyed
    assert len(world.witness.active) == 1


def test_a_master_lost_after_active_is_not_replaced() -> None:
    world = World(11, hosts=3, faults=Faults(until=0.0))
    for host in world.hosts:
        world.at(0.0, host.boot)
    assert world.run(10.0, lambda: bool(world.witness.active))
    founder = next(iter(world.witness.active.values()))
    world.by_id[founder].crash()
    world.run(600.0)
    assert list(world.witness.active.values()) == [founder]


def test_three_masters_are_the_same_everywhere() -> None:
    world = World(2, hosts=5, config=_config(5, masters=3), faults=Faults(until=0.0))
    for host in world.hosts:
        world.at(0.0, host.boot)
    assert world.run(30.0, world.all_running)
    lists = {h.disk.stored.decided.masters for h in world.hosts if h.disk.stored.decided}
    assert len(lists) == 1
    names = [m.name for m in lists.pop()]
    assert len(set(names)) == 3  # all hosts boot with one host name


def test_seven_launched_with_expect_three_form_nothing() -> None:
    world = World(4, hosts=7, config=_config(3), faults=Faults(until=0.0, delay=0.05))
    for host in world.hosts:
        world.at(0.0, host.boot)
    world.run(5.0)
    told = [h.core.overlaunched for h in world.hosts if h.core]
    assert len(world.witness.active) <= 1
    assert any(told) or world.witness.active


def test_a_different_expect_is_named_on_both() -> None:
    world = World(6, hosts=2, config=_config(2), faults=Faults(until=0.0))
    world.at(0.0, world.hosts[0].boot)
    world.run(1.0)
    world.config = _config(3)
    world.at(1.0, world.hosts[1].boot)
    world.run(20.0)
    for host in world.hosts:
        assert host.core is not None
        assert [p.mismatch[:11] for p in host.core.peers.values()] == ["has expect:"]
    assert not world.witness.active


def test_a_cloned_identity_stops_both() -> None:
    world = World(8, hosts=3, faults=Faults(until=0.0))
    clone = world.hosts[2]
    for host in world.hosts[:2]:
        world.at(0.0, host.boot)
    world.run(2.0)
    original = world.hosts[1]
    clone.take_identity(*original.identity)
    world.copied.add(clone.node_id)
    world.at(2.0, clone.boot)
    world.run(20.0)
    assert {h.core.failure for h in (original, clone) if h.core} == {"DUPLICATE_IDENTITY"}
