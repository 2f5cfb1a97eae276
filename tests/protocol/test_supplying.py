"""A payload's own certificates, in the core: who may apply, what is asked again, who leaves."""

from __future__ import annotations

import random
from typing import Any

import pytest

from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import events, messages, status
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.membership import RESEND
from firstboot.protocol.messages import Item, Place, Supplies
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Self,
    Stored,
    Value,
)
from firstboot.protocol.plan import GetCertificates
from firstboot.protocol.situation import Start

MASTER = Member("1" * 32, "host-1", "10.0.0.1")
NODE = Member("2" * 32, "host-2", "10.0.0.2")
STRANGER = "3" * 32
VALUE = Value(1, "ab" * 32, (MASTER,), True, 2)
REQUESTS = (Item("node.client", b"1"), Item("node.server", b"2"))
SUPPLIES = Supplies(1, (Item("node.client", b"3"),), (), (), (Place("host-1", "10.0.0.1"),))
CLUSTER = Channel.CLUSTER


def core(me: Member, payload: str = "origin") -> Assembly:
    """A host of an ACTIVE cluster, enrolled, that was started anew."""
    return Assembly(
        Start(
            config=ClusterConfig("demo", 2, payload=payload),
            me=Self(me.node_id, "boot", me.name, Endpoint(me.host, 7443)),
            stored=Stored(
                decided=VALUE,
                activated=True,
                enrolled=me,
                enrolled_fingerprint=VALUE.fingerprint,
            ),
            issued=tuple(Issued(m, 1, f"{n:064x}") for n, m in enumerate((MASTER, NODE))),
            payload=PAYLOADS[payload],
            options=OPTIONS[payload],
            rng=random.Random(1),
            now=0.0,
        )
    )


def connect(one: Assembly, other: Member, now: float = 0.0) -> list[events.Action]:
    return one.receive(events.Connected(other.node_id, CLUSTER, None, other.host), now)


def get(one: Assembly, sender: str, message: Any, now: float, channel: Channel = CLUSTER) -> Any:
    return one.receive(events.MessageReceived(sender, channel, message), now)


def sent(actions: list[events.Action], kind: type[Any]) -> list[events.Send]:
    return [a for a in actions if isinstance(a, events.Send) and isinstance(a.message, kind)]


def of(actions: list[events.Action], kind: type[Any]) -> list[Any]:
    return [a for a in actions if isinstance(a, kind)]


@pytest.fixture
def node() -> Assembly:
    """A node that has made its requests, and is connected."""
    one = core(NODE)
    connect(one, MASTER)
    (step,) = of(one.receive(events.DeadlineReached(), 0.0), events.RunStep) or [None]
    if step is None:
        assert one.plan is not None
        step = events.RunStep(0, one.plan[0])
    assert isinstance(step.step, GetCertificates)
    return one


# ---------------------------------------------------------------- the one that applies


def test_a_node_applies_on_the_cluster_channel_and_again_until_answered(node: Assembly) -> None:
    (first,) = sent(node.receive(events.RequestsMade(0, REQUESTS), 1.0), messages.Apply)
    assert (first.node_id, first.channel) == (MASTER.node_id, CLUSTER)
    assert first.message == messages.Apply(1, REQUESTS)
    assert node.deadline <= 1.0 + RESEND
    assert not sent(node.receive(events.DeadlineReached(), 1.5), messages.Apply)
    assert sent(node.receive(events.DeadlineReached(), 1.0 + RESEND), messages.Apply)


def test_it_confirms_only_once_it_has_its_certificates(node: Assembly) -> None:
    node.receive(events.RequestsMade(0, REQUESTS), 1.0)
    for now in (1.5, 4.0, 20.0):
        assert not sent(node.receive(events.DeadlineReached(), now), messages.Confirmed)
    (store,) = of(get(node, MASTER.node_id, SUPPLIES, 21.0), events.StoreSupplies)
    assert store == events.StoreSupplies(0, SUPPLIES)
    assert not sent(node.receive(events.DeadlineReached(), 30.0), messages.Apply)
    did = node.receive(events.StepDone(0), 31.0)
    assert node.supplied
    assert sent(did, messages.Confirmed)


def test_an_answer_that_is_not_right_is_asked_for_again(node: Assembly) -> None:
    node.receive(events.RequestsMade(0, REQUESTS), 1.0)
    get(node, MASTER.node_id, SUPPLIES, 2.0)
    node.receive(events.StepFailed(0, "the certificate node.client is for another key"), 3.0)
    (problem,) = (p for p in status.problems(node) if p.code == "STEP_FAILED")
    assert "another key" in problem.text
    (again,) = of(node.receive(events.DeadlineReached(), 6.0), events.RunStep)
    assert isinstance(again.step, GetCertificates)
    assert sent(node.receive(events.RequestsMade(0, REQUESTS), 7.0), messages.Apply)


@pytest.mark.parametrize(
    ("sender", "message", "channel"),
    [
        (STRANGER, SUPPLIES, CLUSTER),
        (MASTER.node_id, Supplies(2, (), (), (), ()), CLUSTER),
        (MASTER.node_id, SUPPLIES, Channel.BOOTSTRAP),
    ],
    ids=["a stranger's", "of another epoch", "on the other channel"],
)
def test_answers_that_are_none(
    node: Assembly, sender: str, message: Supplies, channel: Channel
) -> None:
    connect(node, Member(sender, "x", "10.0.0.9"))
    node.receive(events.RequestsMade(0, REQUESTS), 1.0)
    assert not of(get(node, sender, message, 2.0, channel), events.StoreSupplies)


def test_a_refusal_is_said_and_asked_again(node: Assembly) -> None:
    node.receive(events.RequestsMade(0, REQUESTS), 1.0)
    reason = "the request for node.client names CN=x, but this host is CN=y"
    get(node, MASTER.node_id, messages.Denied(1, reason), 2.0)
    (problem,) = (p for p in status.problems(node) if p.code == "DENIED")
    assert reason in problem.text
    assert sent(node.receive(events.DeadlineReached(), 3.5), messages.Apply)
    get(node, MASTER.node_id, SUPPLIES, 4.0)
    assert not any(p.code == "DENIED" for p in status.problems(node))


def test_a_stranger_cannot_refuse(node: Assembly) -> None:
    connect(node, Member(STRANGER, "x", "10.0.0.9"))
    get(node, STRANGER, messages.Denied(1, "go away"), 2.0)
    assert node.denied == ""


def test_other_payloads_need_nothing() -> None:
    one = core(NODE, "etcd")
    assert one.supplied
    assert sent(connect(one, MASTER), messages.Confirmed)


# ---------------------------------------------------------------- the one that signs


@pytest.fixture
def master() -> Assembly:
    one = core(MASTER)
    connect(one, NODE)
    return one


def test_a_member_is_signed_for_and_told_who_is_a_member(master: Assembly) -> None:
    (sign,) = of(get(master, NODE.node_id, messages.Apply(1, REQUESTS), 1.0), events.SignRequests)
    assert (sign.member, sign.epoch, sign.requests) == (NODE, 1, REQUESTS)
    assert sign.places == (Place("host-1", "10.0.0.1"), Place("host-2", "10.0.0.2"))
    (answer,) = sent(master.receive(events.RequestsSigned(NODE.node_id, SUPPLIES), 2.0), Supplies)
    assert (answer.node_id, answer.channel) == (NODE.node_id, CLUSTER)


def test_one_request_of_a_member_at_a_time(master: Assembly) -> None:
    ask = messages.Apply(1, REQUESTS)
    assert of(get(master, NODE.node_id, ask, 1.0), events.SignRequests)
    assert not of(get(master, NODE.node_id, ask, 2.0), events.SignRequests)
    refused = events.RequestsRefused(NODE.node_id, 1, "no")
    (denied,) = sent(master.receive(refused, 3.0), messages.Denied)
    assert (denied.channel, denied.message) == (CLUSTER, messages.Denied(1, "no"))
    assert of(get(master, NODE.node_id, ask, 4.0), events.SignRequests)


@pytest.mark.parametrize("why", ["a stranger", "the other channel", "another epoch", "no master"])
def test_nobody_else_is_signed_for(master: Assembly, why: str) -> None:
    sender = STRANGER if why == "a stranger" else NODE.node_id
    channel = Channel.BOOTSTRAP if why == "the other channel" else CLUSTER
    one = core(NODE) if why == "no master" else master
    connect(one, Member(sender if one is master else MASTER.node_id, "x", "10.0.0.9"))
    ask = messages.Apply(2 if why == "another epoch" else 1, REQUESTS)
    teller = MASTER.node_id if why == "no master" else sender
    assert not of(get(one, teller, ask, 1.0, channel), events.SignRequests)


def test_the_master_stays_until_its_members_are_supplied(master: Assembly) -> None:
    assert master.plan is not None or master.receive(events.DeadlineReached(), 0.5) is not None
    assert master.plan is not None
    for index in range(len(master.plan)):
        master.receive(events.StepDone(index), 1.0)
    assert master.running
    assert not of(master.receive(events.DeadlineReached(), 50.0), events.Close)
    did = get(master, NODE.node_id, messages.Confirmed(1), 51.0)
    for action in list(did):
        if isinstance(action, events.Persist):
            did += master.receive(events.PersistDone(action.sequence), 52.0)
    for action in list(did):
        if isinstance(action, events.Persist):
            did += master.receive(events.PersistDone(action.sequence), 53.0)
    assert not of(did, events.Close)
    assert master.deadline <= 120.0
    assert of(master.receive(events.DeadlineReached(), 120.0), events.Persist)
    assert master.closed


def until_certificates(one: Assembly) -> int:
    """Do every step before that one; its index."""
    (asked,) = of(one.receive(events.DeadlineReached(), 0.0), events.RunStep)
    while not isinstance(asked.step, GetCertificates):
        (asked,) = of(one.receive(events.StepDone(asked.index), 0.5), events.RunStep)
    index: int = asked.index
    return index


def test_the_master_supplies_itself() -> None:
    one = core(MASTER)
    index = until_certificates(one)
    (sign,) = of(one.receive(events.RequestsMade(index, REQUESTS), 1.0), events.SignRequests)
    assert sign.member == MASTER
    (store,) = of(
        one.receive(events.RequestsSigned(MASTER.node_id, SUPPLIES), 2.0), events.StoreSupplies
    )
    assert store.supplies == SUPPLIES


def test_its_own_refusal_is_said() -> None:
    one = core(MASTER)
    one.receive(events.RequestsMade(until_certificates(one), REQUESTS), 1.0)
    one.receive(events.RequestsRefused(MASTER.node_id, 1, "the disk is full"), 2.0)
    assert any(p.code == "DENIED" and "disk is full" in p.text for p in status.problems(one))
    assert of(one.receive(events.DeadlineReached(), 3.5), events.SignRequests)


def test_places_are_as_many_as_a_message_holds() -> None:
    one = core(MASTER)
    for n in range(300):
        member = Member(f"{n + 10:032x}", f"a-{n}", f"10.1.{n // 200}.{n % 200 + 1}")
        one.roster.issued[member.node_id] = Issued(member, 1, "0" * 64)
    places = one.places()
    assert len(places) == messages.MAX_PLACES
    assert places[0].name == "host-1"


# ---------------------------------------------------------------- a bad network, and crashes


class World:
    """One master and some nodes: messages are lost, hosts are started anew at any moment."""

    def __init__(self, seed: int, nodes: int = 3) -> None:
        self.rng = random.Random(seed)
        self.now = 0.0
        self.members = [MASTER] + [
            Member(f"{n:032x}", f"host-{n}", f"10.0.0.{n}") for n in range(2, nodes + 2)
        ]
        self.issued = tuple(Issued(m, 1, f"{n:064x}") for n, m in enumerate(self.members))
        self.has: set[str] = set()  # whose certificates are on disk
        self.disk = {m.node_id: self.stored(m) for m in self.members}
        self.gone: set[str] = set()
        self.signed: dict[str, int] = {}
        self.cores = {m.node_id: self.start(m) for m in self.members}

    def stored(self, member: Member) -> Stored:
        return Stored(
            decided=VALUE,
            activated=True,
            enrolled=member,
            enrolled_fingerprint=VALUE.fingerprint,
        )

    def start(self, me: Member) -> Assembly:
        config = ClusterConfig("demo", len(self.members), payload="origin")
        endpoint = Endpoint(me.host, 7443)
        start = Start(
            config=config,
            me=Self(me.node_id, "boot", me.name, endpoint),
            stored=self.disk[me.node_id],
            issued=self.issued if me is MASTER else (),
            payload=PAYLOADS["origin"],
            options=OPTIONS["origin"],
            rng=random.Random(1),
            now=self.now,
        )
        return Assembly(start)

    def tell(self, node_id: str, event: events.Event) -> None:
        if node_id in self.gone:
            return
        for action in self.cores[node_id].receive(event, self.now):
            self.do(node_id, action)

    def do(self, me: str, action: events.Action) -> None:
        match action:
            case events.Persist():
                self.disk[me] = action.state
                self.tell(me, events.PersistDone(action.sequence))
            case events.Connect() if action.channel is CLUSTER:
                if MASTER.node_id in self.gone or self.rng.random() < 0.2:
                    refused = events.ConnectFailed(action.endpoint, CLUSTER, "refused")
                    self.tell(me, refused)
                else:
                    self.connect(me)
            case events.Send() if action.channel is CLUSTER and self.rng.random() > 0.4:
                got = events.MessageReceived(me, CLUSTER, action.message)
                self.tell(action.node_id, got)
            case events.RunStep():
                self.step(me, action)
            case events.SignRequests():
                self.signed[action.member.node_id] = self.signed.get(action.member.node_id, 0) + 1
                self.tell(me, events.RequestsSigned(action.member.node_id, SUPPLIES))
            case events.StoreSupplies():
                self.has.add(me)
                self.tell(me, events.StepDone(action.index))
            case events.Finish():
                self.gone.add(me)

    def step(self, me: str, action: events.RunStep) -> None:
        if isinstance(action.step, GetCertificates) and me not in self.has:
            self.tell(me, events.RequestsMade(action.index, REQUESTS))
        else:
            self.tell(me, events.StepDone(action.index))

    def connect(self, node: str) -> None:
        host = next(m.host for m in self.members if m.node_id == node)
        self.tell(node, events.Connected(MASTER.node_id, CLUSTER, None, MASTER.host))
        self.tell(MASTER.node_id, events.Connected(node, CLUSTER, None, host))

    def crash(self, me: str) -> None:
        """It is started anew; whoever was connected to it notices."""
        for other in self.cores:
            if other != me and MASTER.node_id in (me, other):
                self.tell(other, events.Disconnected(me, CLUSTER))
        member = next(m for m in self.members if m.node_id == me)
        self.cores[me] = self.start(member)
        self.tell(me, events.DeadlineReached())

    def run(self, seconds: float) -> None:
        while self.now < seconds and len(self.gone) < len(self.members):
            self.now += 0.25
            for node_id in list(self.cores):
                self.tell(node_id, events.DeadlineReached())
                crashes = self.now < 20 and self.rng.random() < 0.02
                if crashes and node_id not in self.gone:
                    self.crash(node_id)


@pytest.mark.parametrize("seed", range(40))
def test_everybody_gets_its_certificates_before_the_master_leaves(seed: int) -> None:
    world = World(seed)
    world.run(400.0)
    ids = {m.node_id for m in world.members}
    assert world.gone == ids, f"left behind: {ids - world.gone}"
    assert world.has == ids
    assert set(world.signed) == ids


def test_a_master_that_does_not_wait_would_leave_some_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule above, broken: a member confirms before it has its certificates."""
    monkeypatch.setattr(Assembly, "supplied", True)
    behind = 0
    for seed in range(40):
        world = World(seed)
        world.run(100.0)
        behind += len(world.has) < len(world.members)
    assert behind
