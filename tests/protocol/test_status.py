"""What a host tells about itself, at every stage and for every problem."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from firstboot.payloads.rows import ETCD, NONE, OPTIONS
from firstboot.protocol import events, messages, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Self,
    Stage,
    Stored,
    Value,
)
from firstboot.protocol.plan import ReachTarget
from firstboot.protocol.situation import MAX_STRANGERS, Start
from tests.recording import WALL, formed
from tests.sim.world import Faults

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
ME, PEER, THIRD = "a" * 32, "b" * 32, "c" * 32
MASTER = Member(PEER, "m-1", "10.0.0.2")
OWN = Member(ME, "host", "10.0.0.1")
VALUE = Value(1, "1" * 64, (MASTER,))
MINE = Value(1, "1" * 64, (OWN,))
CONFIG = ClusterConfig("demo", 3, agreed="x")
KEY = "5" * 64


def make(
    config: ClusterConfig = CONFIG,
    stored: Stored | None = None,
    issued: tuple[Issued, ...] = (),
    *,
    voter: bool = True,
    payload: str = "none",
) -> Assembly:
    me = Self(ME, "boot-of-mine", "host", Endpoint("10.0.0.1", 7443), voter=voter)
    kinds = {"none": NONE, "etcd": ETCD}
    start = Start(
        config=config,
        me=me,
        stored=stored or Stored(),
        issued=issued,
        payload=kinds[payload],
        options=OPTIONS[payload],
        rng=random.Random(1),
        now=100.0,
    )
    return Assembly(start)


def hello(node: str = PEER, **changes: Any) -> messages.Hello:
    plain = messages.Hello(
        version=messages.VERSION,
        boot="boot-of-theirs",
        expect=3,
        agreed="x",
        name="host",
        endpoint=Endpoint(f"10.0.0.{ord(node[0]) % 16}", 7443),
        rank=1000,
        eligible=True,
        voter=True,
        stage=Stage.DISCOVERING,
        decided=None,
        peers=(),
    )
    return replace(plain, **changes)


def meet(core: Assembly, node: str = PEER, now: float = 100.0, **changes: Any) -> None:
    said = hello(node, **changes)
    core.receive(events.Connected(node, Channel.BOOTSTRAP, None, said.endpoint.host), now)
    core.receive(events.MessageReceived(node, Channel.BOOTSTRAP, said), now)


def tick(core: Assembly, now: float = 100.0) -> dict[str, Any]:
    core.receive(events.DeadlineReached(), now)
    return status.describe(core, WALL)


def enrolled(value: Value, member: Member, **more: Any) -> Stored:
    return Stored(decided=value, enrolled=member, enrolled_fingerprint=value.fingerprint, **more)


def activated(value: Value, member: Member) -> Stored:
    return enrolled(replace(value, active=True, members=3), member, activated=True)


ISSUED = Issued(OWN, 1, KEY)

# ---------------------------------------------------------------- every stage


def _stages() -> Iterator[tuple[str, str, Assembly]]:
    yield "alone", "discovering", make()
    core = make()
    meet(core)
    yield "a majority, in grace", "discovering", core
    core = make()
    meet(core)
    core.receive(events.Disconnected(PEER, Channel.BOOTSTRAP), 101.0)
    yield "a peer that went away", "discovering", core
    core = make(replace(CONFIG, strict=True))
    meet(core)
    yield "strict", "discovering", core
    core = make()
    for peer in (PEER, THIRD):
        meet(core, peer)
    yield "all are here", "deciding", core
    core = make()
    meet(core, decided=replace(VALUE, active=True, members=3), expect=3)
    yield "told of an active cluster", "enrolling", core
    yield "a candidate", "enrolling", make(stored=Stored(decided=VALUE))
    yield "enrolled", "enrolling", make(stored=enrolled(VALUE, OWN))
    yield "the master", "signing", make(stored=Stored(decided=MINE))
    core = make(stored=enrolled(MINE, OWN), issued=(ISSUED,))
    meet(core)
    yield "the master with a request", "signing", core
    yield "a node starts", "starting", make(stored=activated(VALUE, OWN))
    core = make(stored=activated(VALUE, OWN))
    core.receive(events.DeadlineReached(), 100.0)
    core.receive(events.StepFailed(0, "Could not write /x: the disk is full", "a\nb"), 100.0)
    yield "a step fails", "starting", core
    yield "a node runs", "running", ran(make(stored=activated(VALUE, OWN)))
    core = ran(make(stored=activated(MINE, OWN), issued=(ISSUED,)))
    yield "the master runs, admission open", "running", core
    core = ran(make(stored=replace(activated(MINE, OWN), closed=True), issued=(ISSUED,)))
    yield "the master runs, admission closed", "running", core
    core = make()
    other = hello(ME, boot="another boot")
    core.receive(events.MessageReceived(ME, Channel.BOOTSTRAP, other), 100.0)
    yield "a clone", "failed", core


def ran(core: Assembly) -> Assembly:
    core.receive(events.DeadlineReached(), 100.0)
    for index in range(len(core.plan or ())):
        core.receive(events.StepDone(index), 100.0)
    return core


STAGES = {name: (stage, core) for name, stage, core in _stages()}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_told_in_one_sentence(name: str) -> None:
    stage, core = STAGES[name]
    shown = tick(core, core.now)
    assert shown["stage"] == stage, shown["sentence"]
    check(shown)
    expected = {"running": "running", "failed": "failed"}.get(stage, "waiting")
    blocked = any(p["blocking"] for p in shown["problems"])
    assert shown["state"] == ("degraded" if blocked and expected != "failed" else expected)


def test_there_is_a_case_for_every_stage() -> None:
    assert {stage for stage, _ in STAGES.values()} == set(Stage)


def sentence_like(text: str) -> bool:
    """One sentence: a capital or a number first, one full stop and that at the end, one line."""
    starts = text[:1].isupper() or text[:1].isdigit()
    return starts and text.endswith(".") and ". " not in text and text.isprintable()


def check(shown: dict[str, Any]) -> None:
    """What holds of every status there can be."""
    assert sentence_like(shown["sentence"]), shown["sentence"]
    assert shown["hint"] == "" or shown["hint"].endswith("."), shown["hint"]
    for problem in shown["problems"]:
        documented(problem["code"])
        assert problem["text"].isprintable(), problem
        end = (".", ").")
        assert problem["text"].endswith(end) and not problem["text"].endswith(".."), problem
        assert "..)" not in problem["text"] and ". (" not in problem["text"], problem
    assert json.loads(json.dumps(shown)) == shown  # what reads status.json gets exactly this
    assert len(json.dumps(shown)) < 100_000


def documented(code: str) -> None:
    assert re.search(rf"^\| `{code}` \| .+ \| .+ \|$", README, re.MULTILINE), code


# ---------------------------------------------------------------- no secret


def test_no_status_of_a_formation_holds_what_it_need_not() -> None:
    """Boot nonces, key digests, requests and certificates stay inside."""
    world = formed(0)
    for opening, core in world.cores:
        for shown in core.statuses:
            text = json.dumps(shown)
            check(shown)
            assert opening.me.boot not in text.split('"')
            assert "PRIVATE" not in text and "csr" not in text
            if core.request is not None:
                assert core.request.key not in text


@cache
def hostile() -> list[dict[str, Any]]:
    """Every status that was shown while everything went wrong."""
    faults = Faults(loss=0.3, crash_boundary=0.02, crashes=4, disk_errors=0.2, until=40.0)
    shown = []
    for seed in range(4):
        world = formed(seed, 4, replace(faults))
        shown += [s for _, core in world.cores for s in core.statuses]
    return shown


def test_every_status_of_hostile_formations_is_in_order() -> None:
    stages = set()
    for shown in hostile():
        check(shown)
        stages.add(shown["stage"])
    assert stages >= set(Stage) - {Stage.FAILED}


def test_texts_of_strangers_are_bounded() -> None:
    core = make()
    for number in range(1000):
        source = f"10.1.{number // 250}.{number % 250}"
        core.receive(events.StrangerSeen("token", source), 100.0)
        core.receive(events.PeerFound(Endpoint(source, 1000 + number), "mdns"), 100.0)
    shown = tick(core)
    assert shown["strangers"]["count"] == 1000
    assert len(shown["strangers"]["sources"]) == MAX_STRANGERS
    assert shown["addresses_dropped"] == 1000 - core.book.limit
    check(shown)


def test_many_peers_are_counted_and_some_listed() -> None:
    core = make(replace(CONFIG, expect=200))
    for number in range(199):
        meet(
            core,
            f"{number:032x}",
            expect=200,
            endpoint=Endpoint(f"10.1.{number // 250}.{number % 250}", 7443),
        )
    shown = tick(core)
    assert shown["peers_total"] == 199 and len(shown["peers"]) == status.MAX_LISTED
    check(shown)


def test_addresses_where_nobody_was_met_are_told_by_provider() -> None:
    core = make()
    for provider, host, reason in (
        ("dns", "10.0.0.7", "refused"),
        ("dns", "10.0.0.8", "timeout"),
        ("dns", "10.0.0.9", "timeout"),
        ("static", "10.0.0.9", "timeout"),
        ("sweep", "10.0.0.10", ""),
    ):
        there = Endpoint(host, 7443)
        core.receive(events.PeerFound(there, provider), 100.0)
        if reason:
            core.receive(events.ConnectFailed(there, Channel.BOOTSTRAP, reason), 100.0)
    assert status.unreached(core, "dns") == {"refused": 1, "timeout": 2}
    assert status.unreached(core, "static") == {"timeout": 1}
    assert status.unreached(core, "sweep") == {}
    met = events.Connected(PEER, Channel.BOOTSTRAP, Endpoint("10.0.0.9", 7443), "10.0.0.9")
    core.receive(met, 101.0)
    assert status.unreached(core, "dns") == status.unreached(core, "static") == {}


def test_when_providers_look_again() -> None:
    core = make()
    core.receive(events.DeadlineReached(), 100.0)
    assert status.looks_again(core, 1000.0) == 1101.0  # the first pause is a second
    done = make(stored=activated(MINE, OWN), issued=(ISSUED,))
    done.stored = replace(done.stored, closed=True)
    assert done.may_start and status.looks_again(done, 1000.0) is None


# ---------------------------------------------------------------- problems


def problem(core: Assembly, code: str, now: float = 100.0) -> dict[str, Any]:
    """That problem as it is shown; everything else in the status is checked as well."""
    shown = tick(core, now)
    check(shown)
    found = [p for p in shown["problems"] if p["code"] == code]
    assert len(found) == 1, shown["problems"]
    return dict(found[0])


def test_every_code_in_the_source_is_documented() -> None:
    source = Path(status.__file__).read_text(encoding="utf-8")
    codes = set(re.findall(r'Problem\("([A-Z_]+)"', source)) | {"DUPLICATE_IDENTITY"}
    assert len(codes) >= 10
    for code in codes:
        documented(code)


def test_duplicate_identity() -> None:
    core = STAGES["a clone"][1]
    assert problem(core, "DUPLICATE_IDENTITY")["blocking"]
    assert status.describe(core, WALL)["state"] == "failed"


def test_conflict() -> None:
    core = make(stored=activated(VALUE, OWN))
    other = Value(1, "2" * 64, (Member(THIRD, "x", "10.0.0.3"),), active=True, members=3)
    meet(core, THIRD, decided=other)
    text = problem(core, "CONFLICT")["text"]
    assert "1" * 32 in text and "2" * 32 in text and "10.0.0.3" in text


def test_overlaunched() -> None:
    core = make(replace(CONFIG, expect=2))
    for number in range(3):
        meet(core, f"{number:032x}", expect=2, endpoint=Endpoint(f"10.1.0.{number}", 7443))
    assert problem(core, "OVERLAUNCHED")["text"].startswith("4 hosts ")


def test_lost_state() -> None:
    assert not problem(make(voter=False), "LOST_STATE")["blocking"]


@pytest.mark.parametrize("reason", ["cannot write /x: the disk is full", "No space."])
def test_disk(reason: str) -> None:
    core = make()
    core.receive(events.PersistFailed(1, reason), 100.0)
    assert problem(core, "DISK")["blocking"]
    core.receive(events.PersistDone(2), 100.1)
    assert not [p for p in tick(core, 100.1)["problems"] if p["code"] == "DISK"]


@pytest.mark.parametrize(
    "reason", ["admission is closed", "Ask somebody else.", "why?", "x" * 1024]
)
def test_denied(reason: str) -> None:
    core = make(stored=Stored(decided=VALUE))
    meet(core)
    refusal = messages.Denied(1, reason)
    core.receive(events.MessageReceived(PEER, Channel.BOOTSTRAP, refusal), 100.0)
    assert reason.rstrip(".") in problem(core, "DENIED")["text"]


@pytest.mark.parametrize(
    "reason", ["Could not write /x: the disk is full", "Could not start x.service: it failed."]
)
def test_step_failed(reason: str) -> None:
    core = make(stored=activated(VALUE, OWN))
    tick(core)
    core.receive(events.StepFailed(0, reason, "one\ntwo\n"), 100.0)
    found = problem(core, "STEP_FAILED")
    assert found["hint"] == "one\ntwo\n"
    shown = tick(core)
    assert shown["steps"][0]["state"] == "failed 1 times"
    assert shown["steps"][1]["state"] == "waiting"


def test_token_mismatch_blocks_only_who_is_alone() -> None:
    core = make()
    for number in range(5):
        core.receive(events.StrangerSeen("token", f"10.0.0.{number}"), 100.0)
    found = problem(core, "TOKEN_MISMATCH")
    assert found["blocking"] and "10.0.0.0, 10.0.0.1, 10.0.0.2, …" in found["text"]
    meet(core)
    assert not problem(core, "TOKEN_MISMATCH")["blocking"]


def test_config_mismatch_while_the_peer_is_there() -> None:
    core = make()
    meet(core, expect=5)
    text = problem(core, "CONFIG_MISMATCH")["text"]
    assert "has expect: 5, this host has expect: 3" in text and "10.0.0.2" in text
    core.receive(events.Disconnected(PEER, Channel.BOOTSTRAP), 101.0)
    assert not tick(core, 101.0)["problems"]


def test_master_lost() -> None:
    core = make(stored=activated(VALUE, OWN))
    assert not tick(core, 129.0)["problems"]
    assert "m-1 at 10.0.0.2" in problem(core, "MASTER_LOST", 131.0)["text"]


def test_a_problem_that_lasts_says_the_same_all_the_time() -> None:
    """The journal gets every text that is new: a count of seconds would fill it."""
    core = make(stored=activated(VALUE, OWN))
    texts = {problem(core, "MASTER_LOST", now)["text"] for now in (131.0, 136.0, 900.0)}
    assert len(texts) == 1, texts


def test_incomplete_blocks_as_long_as_something_can_be_done() -> None:
    core = make(stored=activated(MINE, OWN), issued=(ISSUED,))
    found = problem(core, "INCOMPLETE")
    assert found["blocking"] and "without 2 of 3" in found["text"]
    late = make(stored=replace(activated(MINE, OWN), closed=True), issued=(ISSUED,))
    assert not problem(late, "INCOMPLETE")["blocking"]


# ---------------------------------------------------------------- facts


def test_the_end_of_grace_is_told_in_unix_time_while_it_matters() -> None:
    core = make()
    assert tick(core)["grace_ends"] is None
    meet(core, now=105.0)
    assert tick(core, 106.0)["grace_ends"] == 105.0 + CONFIG.grace + WALL
    meet(core, THIRD, now=107.0)
    assert tick(core, 107.0)["grace_ends"] is None
    strict = make(replace(CONFIG, strict=True))
    meet(strict)
    assert tick(strict)["grace_ends"] is None


def test_a_member_is_told_under_its_name_in_the_cluster() -> None:
    named = replace(OWN, name="host-aaaaaaaa")
    assert tick(make(stored=enrolled(VALUE, named)))["name"] == "host-aaaaaaaa"
    assert tick(make())["name"] == "host"


def test_peers_are_present_away_left_or_mismatched() -> None:
    core = make()
    meet(core)
    assert [p["state"] for p in tick(core)["peers"]] == ["present"]
    core.receive(events.Disconnected(PEER, Channel.BOOTSTRAP), 101.0)
    assert [p["state"] for p in tick(core, 101.0)["peers"]] == ["away"]
    meet(core, agreed="y", now=102.0)
    assert [p["state"] for p in tick(core, 102.0)["peers"]] == ["mismatch"]
    runs = ran(make(stored=activated(VALUE, OWN)))
    meet(runs)
    runs.receive(events.Disconnected(PEER, Channel.BOOTSTRAP), 101.0)
    assert [p["state"] for p in tick(runs, 101.0)["peers"]] == ["left"]


def test_every_step_of_every_payload_has_words() -> None:
    for payload in (ETCD, NONE):
        for rows in (payload.master, payload.node):
            for step in (*rows.steps, ReachTarget(())):
                words = status.say(step)
                assert words and words[0].islower() and not words.endswith(".")
