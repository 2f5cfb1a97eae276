"""A host with a one-time token: it joins, never votes or proposes, and says what it waits for."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from firstboot.payloads.rows import NONE, OPTIONS
from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.model import (
    Ballot,
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Self,
    Stored,
    Value,
)
from firstboot.protocol.situation import Start
from tests.protocol.test_status import CONFIG, ME, PEER, THIRD, meet, problem, tick

MASTER = Member(PEER, "m-1", "10.0.0.2")
ACTIVE = Value(1, "1" * 64, (MASTER,), active=True, members=3)
VOTES = messages.Prepare | messages.Promise | messages.Accept | messages.Accepted


def make(*, late: bool = True, config: ClusterConfig = CONFIG, **more: Any) -> Assembly:
    me = Self(ME, "boot", "host", Endpoint("10.0.0.1", 7443), voter=not late, late=late)
    start = Start(
        config=config,
        me=me,
        stored=Stored(),
        issued=(),
        payload=NONE,
        options=OPTIONS["none"],
        rng=random.Random(1),
        now=100.0,
    )
    return Assembly(replace(start, **more))


def votes(core: Assembly, until: float) -> list[messages.Message]:
    """What it sends of an election, its disk working, while two other hosts are there."""
    sent: list[messages.Message] = []
    meet(core)
    meet(core, THIRD)
    asked = events.MessageReceived(PEER, Channel.BOOTSTRAP, messages.Prepare(Ballot(1, PEER)))
    inbox: list[events.Event] = [asked]
    now = 100.0
    while now < until:
        now += 0.5
        for node in (PEER, THIRD):
            meet(core, node, now)
        inbox.append(events.DeadlineReached())
        while inbox:
            for action in core.receive(inbox.pop(0), now):
                if isinstance(action, events.Send) and isinstance(action.message, VOTES):
                    sent.append(action.message)
                if isinstance(action, events.Persist):
                    inbox.append(events.PersistDone(action.sequence))
                if isinstance(action, events.MakeAuthority):
                    inbox.append(events.AuthorityMade(action.epoch, "2" * 64))
    return sent


@pytest.mark.parametrize("expect", [1, 2, 3])
def test_it_neither_promises_nor_proposes(expect: int) -> None:
    config = replace(CONFIG, expect=expect, grace=2.0)
    assert votes(make(config=config), until=200.0) == []


def test_the_same_host_with_the_documents_token_would() -> None:
    kinds = {type(m) for m in votes(make(late=False), until=110.0)}
    assert messages.Promise in kinds
    assert messages.Prepare in kinds


def test_it_is_not_counted_as_present_where_voters_are() -> None:
    core = make(late=False)
    meet(core, voter=False)
    assert core.present_voters() == 1
    assert PEER not in core.voters


def test_it_says_what_it_looks_for_and_claims_no_lost_state() -> None:
    shown = tick(make())
    assert shown["sentence"].startswith("This host holds a one-time token; looking for the master")
    assert "firstboot admit" in shown["hint"]
    assert shown["problems"] == []
    assert shown["state"] == "waiting"


def test_it_asks_the_master_as_soon_as_it_meets_it() -> None:
    core = make()
    core.receive(events.RequestMade(b"csr", "5" * 64), 100.0)
    meet(core, decided=ACTIVE)
    asked = [
        a.message
        for a in core.receive(events.DeadlineReached(), 102.1)
        if isinstance(a, events.Send) and isinstance(a.message, messages.Enrol)
    ]
    assert [m.epoch for m in asked] == [1]
    shown = tick(core, 102.2)
    assert shown["stage"] == "enrolling"
    assert "firstboot admit" in shown["hint"]


# ---------------------------------------------------------------- JOIN_NEEDS_TOKEN


def hears(core: Assembly, source: str = "m-1 at 10.0.0.2", kind: str = "admits") -> None:
    core.receive(events.StrangerSeen(kind, source), 100.0)


def test_who_hears_an_open_admission_is_told_what_to_do() -> None:
    core = make(late=False)
    hears(core, "10.0.0.9", "token")
    hears(core)
    found = problem(core, "JOIN_NEEDS_TOKEN")
    assert found["blocking"]
    assert "Cluster demo is active already; m-1 at 10.0.0.2 lets hosts in" in found["text"]
    assert "`firstboot join` here" in found["hint"]
    assert "`firstboot admit`" in found["hint"]
    assert len(tick(core)["problems"]) == 1


def test_a_wrong_one_time_token_is_told_from_none() -> None:
    core = make()
    hears(core)
    assert "one-time token is not the one" in problem(core, "JOIN_NEEDS_TOKEN")["text"]


def test_what_a_stranger_says_does_not_stop_hosts_that_meet() -> None:
    core = make(late=False)
    hears(core)
    assert {type(m) for m in votes(core, until=110.0)} >= {messages.Promise, messages.Prepare}
    assert not problem(core, "JOIN_NEEDS_TOKEN", 110.0)["blocking"]


def test_who_met_its_master_needs_no_token() -> None:
    core = make()
    hears(core)
    meet(core, decided=ACTIVE)
    assert [p["code"] for p in tick(core)["problems"]] == ["TOKEN_MISMATCH"]
    assert not tick(core)["problems"][0]["blocking"]


# ---------------------------------------------------------------- the master, re-opened


def test_a_re_opened_master_enrols_so_many_and_not_one_more() -> None:
    me = Member(ME, "m-0", "10.0.0.1")
    active = replace(ACTIVE, masters=(me,))
    others = [Member(f"{n:032x}", f"n-{n}", f"10.0.0.{10 + n}") for n in (1, 2)]
    core = make(
        late=False,
        # Three members of an expect of 3, and room for one more.
        config=replace(CONFIG, join_extra=1, join_window=60.0),
        stored=Stored(
            decided=active,
            activated=True,
            enrolled=me,
            enrolled_fingerprint=active.fingerprint,
            confirmed=tuple(m.node_id for m in others),
        ),
        issued=tuple(Issued(m, 1, "5" * 64) for m in (me, *others)),
    )
    answers = {}
    for node in (PEER, THIRD):
        meet(core, node)
        address = f"10.0.0.{ord(node[0]) % 16}"
        ask = messages.Enrol(1, b"csr", "6" * 64, "late", address)
        actions = core.receive(events.MessageReceived(node, Channel.BOOTSTRAP, ask), 101.0)
        answers[node] = [
            type(a) if isinstance(a, events.Sign) else type(a.message)
            for a in actions
            if isinstance(a, events.Sign)
            or (isinstance(a, events.Send) and isinstance(a.message, messages.Denied))
        ]
    assert answers == {PEER: [events.Sign], THIRD: [messages.Denied]}
    # It proposes nothing, makes no other CA, and ends by itself when the window does.
    assert not core.admission_over
    core.receive(events.DeadlineReached(), 161.0)
    assert core.admission_over
