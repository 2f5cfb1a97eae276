"""Who is present, kept up to date; and whom a host of a large formation connects to."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firstboot.protocol.hubs import Hubs
from firstboot.protocol.messages import MAX_PEERS, VERSION, Hello, Known
from firstboot.protocol.model import NEVER, Channel, Endpoint, Stage
from firstboot.protocol.peers import (
    BEST_KNOWN,
    OTHERS_KNOWN,
    SILENT_AFTER,
    AddressBook,
    Company,
    Peer,
    standing,
)

HELLO = Hello(
    version=VERSION,
    boot="b",
    expect=3,
    agreed="x",
    name="host",
    endpoint=Endpoint("10.0.0.1", 7443),
    rank=1000,
    eligible=True,
    voter=True,
    stage=Stage.DISCOVERING,
    decided=None,
    peers=(),
)
ME = "8" * 32


def node(number: int) -> str:
    return f"{number:032x}"


def at(number: int) -> Endpoint:
    return Endpoint(f"10.0.{number // 250}.{number % 250 + 1}", 7443)


def peer(number: int, now: float = 0.0, **changes: object) -> Peer:
    hello = replace(HELLO, endpoint=at(number), **changes)  # type: ignore[arg-type]
    return Peer(node(number), now, now, {Channel.BOOTSTRAP}, hello=hello)


class Counting(RuleBasedStateMachine):
    """Whatever happens to peers, the company is what counting them anew would give."""

    numbers = st.integers(0, 6)

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.peers: dict[str, Peer] = {}
        self.company = Company(ME)

    @rule(number=numbers, rank=st.sampled_from([0, 1000]), voter=st.booleans(), able=st.booleans())
    def hello(self, number: int, rank: int, voter: bool, able: bool) -> None:
        known = self.peers.setdefault(node(number), Peer(node(number), self.now, self.now))
        self.company.heard(known, self.now)
        known.hello = replace(HELLO, endpoint=at(number), rank=rank, voter=voter, eligible=able)
        self.company.update(known, self.now)

    @rule(number=numbers, up=st.booleans())
    def connection(self, number: int, up: bool) -> None:
        known = self.peers.setdefault(node(number), Peer(node(number), self.now, self.now))
        (known.channels.add if up else known.channels.discard)(Channel.BOOTSTRAP)
        self.company.update(known, self.now)

    @rule(number=numbers, mismatch=st.sampled_from(["", "has expect: 5"]))
    def mismatch(self, number: int, mismatch: str) -> None:
        if node(number) in self.peers:
            self.peers[node(number)].mismatch = mismatch
            self.company.update(self.peers[node(number)], self.now)

    @rule(number=numbers)
    def word(self, number: int) -> None:
        if node(number) in self.peers:
            self.company.heard(self.peers[node(number)], self.now)

    @rule(passed=st.sampled_from([0.1, 7.0, 16.0]))
    def wait(self, passed: float) -> None:
        self.now += passed
        self.company.expire(self.now)

    @invariant()
    def counted_anew(self) -> None:
        present = [p for p in self.peers.values() if p.present(self.now)]
        assert {p.node_id for p in self.company} == {p.node_id for p in present}
        assert self.company.voters == sum(p.hello.voter for p in present if p.hello)
        assert self.company.standings == sorted(p.standing for p in present)
        soonest = min((p.heard + SILENT_AFTER for p in present), default=NEVER)
        assert self.company.silent_at == soonest


TestCounting = Counting.TestCase
TestCounting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def company(*numbers: int) -> Company:
    made = Company(ME)
    for number in numbers:
        made.update(peer(number), 0.0)
    return made


def test_the_best_come_first_and_who_cannot_propose_last() -> None:
    made = company(3, 1)
    made.update(peer(0, eligible=False), 0.0)
    made.update(peer(4, voter=False), 0.0)
    made.update(peer(9, rank=0), 0.0)
    assert [p.node_id for p in made.best(9)] == [node(n) for n in (9, 1, 3, 0, 4)]
    assert made.before(standing(node(2), 1000, able=True)) == 2
    assert ME in made and node(9) in made and node(5) not in made


def test_a_hello_hands_on_everybody_or_of_many_the_best_and_others_by_turns() -> None:
    small = company(*range(12))
    assert [k.node_id for k in small.known(0, everybody=True)] == [node(n) for n in range(12)]
    made = company(*range(100))
    assert len(made.known(0, everybody=True)) == MAX_PEERS
    seen: set[str] = set()
    for turn in range(40):
        known = [k.node_id for k in made.known(turn, everybody=False)]
        assert known[:BEST_KNOWN] == [node(n) for n in range(BEST_KNOWN)]
        assert len(known) <= BEST_KNOWN + OTHERS_KNOWN
        seen |= set(known)
    assert len(seen) == 100


# ---------------------------------------------------------------- hubs


def large(mine: int, *present: int) -> tuple[Hubs, Company, AddressBook]:
    book, made = AddressBook(1000, parks=True), company(*present)
    for number in present:
        book.met(node(number))
    return Hubs(3, standing(node(mine), 1000, able=True), made, book), made, book


def wanted(book: AddressBook) -> list[Endpoint]:
    return [c.endpoint for c in book.contacts.values() if c.wanted]


def hear(hubs: Hubs, book: AddressBook, number: int) -> None:
    book.found(at(number), "peer", 0.0)
    hubs.hear_of(Known(node(number), at(number)))


def test_who_stands_better_than_the_last_hub_is_dialled_and_nobody_else() -> None:
    hubs, _, book = large(50, 10, 20, 30)
    for number in (5, 25, 35, 40):
        hear(hubs, book, number)
    hubs.seek()
    assert set(wanted(book)) == {at(5), at(25)}
    assert len(list(book.due(0.0))) == 2 and not hubs.lonely


def test_a_host_that_knows_nobody_dials_a_few_the_newest_first() -> None:
    hubs, _, book = large(50)
    for number in range(10):
        book.found(at(number), "mdns", 0.0)
    dialled = []
    while hubs.lonely:
        hubs.want_another()
        dialled += [c.endpoint for c in book.due(0.0)]
    assert dialled == [at(9), at(8), at(7)]
    book.failed(at(9), "refused", 0.0)
    assert hubs.lonely  # another in its place, while that one waits for its next try


def test_while_hosts_are_missing_a_hub_dials_all_and_others_one_more() -> None:
    hubs, _, book = large(5, *range(10, 16))
    for number in range(100, 110):
        book.found(at(number), "mdns", 0.0)
    hubs.explore()
    assert len(wanted(book)) == 10
    hubs, _, book = large(5, *range(10, 15))  # too few to know that it is one
    for number in range(100, 110):
        book.found(at(number), "mdns", 0.0)
    hubs.explore()
    assert len(wanted(book)) == 1
    hubs, _, book = large(50, 10, 20, 30)
    for number in range(100, 110):
        book.found(at(number), "mdns", 0.0)
    hubs.explore()
    assert wanted(book) == [at(109)]


def test_only_a_hub_has_news_and_only_when_the_best_have_changed() -> None:
    hubs, made, _ = large(15, 10, 20, 30)
    assert hubs.news() and not hubs.news()
    made.update(peer(40), 0.0)
    assert not hubs.news()
    made.update(peer(5), 0.0)
    assert hubs.news() and not hubs.news()
    assert not large(50, 10, 20, 30)[0].news()


def test_a_hub_tells_how_many_it_counts() -> None:
    hubs, made, _ = large(50, 10)
    made.update(peer(20, present=77), 0.0)
    assert hubs.present() == 77


def test_what_peers_hand_on_is_bounded_and_a_dead_address_is_forgotten() -> None:
    hubs, _, book = large(50, 10, 20, 30)
    for number in range(60, 5, -1):
        hear(hubs, book, number)
    assert len(hubs._candidates) == 6
    hubs.seek()
    assert at(6) in wanted(book)
    hear(hubs, book, 6)
    hubs.failed(at(6))
    assert node(6) not in hubs._candidates
