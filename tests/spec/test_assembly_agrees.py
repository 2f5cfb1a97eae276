"""The core votes and proposes as the specification does: same messages in, same answers out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstboot.payloads.rows import NONE
from firstboot.protocol import election, events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.election import Purpose
from firstboot.protocol.messages import Accept, Accepted, Message, Prepare, Promise, Refused
from firstboot.protocol.model import (
    Ballot,
    Channel,
    ClusterConfig,
    Endpoint,
    Register,
    Self,
    Stage,
    Stored,
    Value,
)
from firstboot.protocol.situation import Start
from tests.spec.register import MEMBERS, Host, Note, Spec, candidate

EXAMPLES = settings(max_examples=300, deadline=None, derandomize=True)
ME, B, C = (m.node_id for m in MEMBERS)
CONFIG = ClusterConfig("demo", 3, grace=0.0, agreed="x")
VALUES = [candidate(1, 1), candidate(2, 1), candidate(1, 2)]
VALUES.append(replace(VALUES[0], active=True, members=3))
# Numbers first, so that ballots of both hosts meet and pass one another.
BALLOTS = [Ballot(number, node) for number in (1, 2, 3) for node in (B, C)]


class Real:
    """A real core as host a, with a disk that writes when told; b and c are connected."""

    def __init__(self, stored: Stored | None = None, *, eligible: bool) -> None:
        self.disk, self.eligible, self.now = stored or Stored(), eligible, 0.0
        self.boot()

    def boot(self) -> None:
        member, self.unwritten = MEMBERS[0], list[events.Persist]()
        endpoint = Endpoint(member.host, 7443)
        me = Self(ME, "boot", member.name, endpoint, rank=1, eligible=self.eligible)
        rng = random.Random(1)
        self.core = Assembly(Start(CONFIG, me, self.disk, (), NONE, {}, rng, self.now))
        for member in MEMBERS[1:]:
            self.feed(events.Connected(member.node_id, Channel.BOOTSTRAP, None, member.host))
            self.greet(MEMBERS.index(member))

    def greet(self, index: int) -> None:
        """A peer says that it is still there."""
        member = MEMBERS[index]
        hello = messages.Hello(
            version=messages.VERSION,
            boot="boot",
            expect=3,
            agreed="x",
            name=member.name,
            endpoint=Endpoint(member.host, 7443),
            rank=1,
            eligible=True,
            voter=True,
            stage=Stage.DISCOVERING,
            decided=None,
            peers=(),
        )
        self.hear(index, hello)

    def hear(self, index: int, message: Message) -> list[Message]:
        heard = events.MessageReceived(MEMBERS[index].node_id, Channel.BOOTSTRAP, message)
        return self.feed(heard)

    def feed(self, event: events.Event) -> list[Message]:
        """What it sends at once."""
        actions = self.core.receive(event, self.now)
        self.unwritten += [a for a in actions if isinstance(a, events.Persist)]
        return [a.message for a in actions if isinstance(a, events.Send)]

    def write(self) -> list[Message]:
        """The disk catches up; what it sends then."""
        if not self.unwritten:
            return []
        newest, self.unwritten = self.unwritten[-1], []
        self.disk = newest.state
        return self.feed(events.PersistDone(newest.sequence))

    def crash(self) -> None:
        self.boot()


def answers(spec: Spec, sent: list[Message]) -> set[Note]:
    """The votes among these messages, as the specification writes them."""
    of, notes = spec.numbers.of, set[Note]()
    for message in sent:
        match message:
            case Promise(ballot, accepted, value):
                notes.add(("promise", of(ballot), 0, of(accepted), of(value)))
            case Accepted(ballot):
                notes.add(("accepted", of(ballot), 0))
            case Refused(ballot):
                notes.add(("refused", of(ballot)))
    return notes


asked = st.tuples(st.sampled_from(BALLOTS), st.none() | st.sampled_from(VALUES))
happenings = st.lists(asked | st.sampled_from(["write", "crash"]), min_size=1, max_size=25)


@EXAMPLES
@given(happenings)
def test_the_core_votes_as_the_specification_does(happening: list[Any]) -> None:
    """A host that does not propose: every promise, acceptance and refusal, and when it leaves."""
    real, spec = Real(eligible=False), Spec(((), (), ()))
    empty = spec.numbers.of(Register())
    host = Host(empty, empty)
    for what in happening:
        expected: set[Note] = set()
        if what == "write":
            expected, host = set(host.waiting), Host(host.memory, host.memory)
            got = real.write()
        elif what == "crash":
            real.crash()
            host, got = Host(host.disk, host.disk), []
        else:
            ballot, value = what
            n, v = spec.numbers.of(ballot), spec.numbers.of(value)
            done = spec.accept(0, host.memory, n, v) if v else spec.promise(0, host.memory, n)
            if done is None:
                expected = {("refused", n)}
            else:
                note = done[1] if done[1][0] == "promise" else done[1][:3]
                host = host._replace(memory=done[0], waiting=host.waiting | {note})
            asks = Accept(ballot, value) if value else Prepare(ballot)
            got = real.hear(1 if ballot.node_id == B else 2, asks)
        assert answers(spec, got) == expected
        assert real.disk.register == spec.numbers.things[host.disk]
        assert real.core.stored.register == spec.numbers.things[host.memory]


def started(real: Real) -> Ballot:
    """Let time pass until the core begins a round; its ballot, once that is on disk."""
    for _ in range(600):
        real.now = max(real.now, min(real.core.deadline, real.now + 0.5))
        real.greet(2)
        real.feed(events.DeadlineReached())
        prepares = [m for m in real.write() if isinstance(m, Prepare)]
        if prepares:
            return prepares[0].ballot
    raise AssertionError("it starts no round")


held = st.sampled_from([None, *VALUES])


@EXAMPLES
@given(held, st.sampled_from([0, 1]), held, st.sampled_from([2, 3]), st.booleans())
def test_the_core_proposes_what_the_specification_does(
    value: Value | None, later: int, mine: Value | None, promised: int, replacing: bool
) -> None:
    """Any promise of a peer, against anything it holds itself: found again, or changed."""
    epoch_1 = candidate(1, 1)  # of b, which is silent
    register = Register(Ballot(promised, C), Ballot(2, C) if mine else Ballot(), mine)
    stored = Stored(register=register, decided=epoch_1 if replacing else None)
    real, spec = Real(stored, eligible=True), Spec(((), (), ()))
    of = spec.numbers.of
    ballot = started(real)
    assert of(ballot) == spec.ballot(0, of(register))
    purpose = Purpose.REPLACE if replacing else Purpose.FOUND
    accepted = Ballot(1 + 2 * later, B) if value else Ballot()
    notes: list[Note] = [
        ("promise", of(ballot), 0, of(register.accepted), of(register.value)),
        ("promise", of(ballot), 2, of(accepted), of(value)),
    ]
    this = (of(ballot), purpose, of(epoch_1 if replacing else None))
    expected = spec.numbers.things[spec.outcome(0, this, tuple(notes))]
    ca = candidate(0, 2 if replacing else 1)
    sent = real.hear(2, Promise(ballot, accepted, value))
    sent += real.feed(events.AuthorityMade(ca.epoch, ca.fingerprint))
    sent += real.write()
    proposed = {m.value for m in sent if isinstance(m, Accept)}
    assert proposed == {expected} - {None}


# ---------------------------------------------------------------- they would notice


def test_a_core_that_votes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def below_promise(register: Register, ballot: Ballot, value: Value) -> Register:
        return Register(max(register.promised, ballot), ballot, value)

    monkeypatch.setattr(election, "accept", below_promise)
    with pytest.raises(AssertionError):
        test_the_core_votes_as_the_specification_does()


def test_a_core_that_answers_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def store(core: Assembly, then: Callable[[], None] | None = None, **changes: Any) -> None:
        kept(core, None, **changes)
        if then is not None:
            then()

    kept = Assembly._store
    monkeypatch.setattr(Assembly, "_store", store)
    with pytest.raises(AssertionError):
        test_the_core_votes_as_the_specification_does()


def test_a_core_that_proposes_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def skip_one(register: Register, seen: int, node_id: str) -> Ballot:
        return Ballot(max(register.promised.number, seen) + 2, node_id)

    monkeypatch.setattr(election, "next_ballot", skip_one)
    with pytest.raises(AssertionError):
        test_the_core_proposes_what_the_specification_does()
