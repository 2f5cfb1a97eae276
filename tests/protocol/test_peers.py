"""The address book: bounded, never dialling twice at once, each address at its own pace."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from firstboot.protocol.messages import VERSION, Hello
from firstboot.protocol.model import NEVER, Channel, Endpoint, Stage
from firstboot.protocol.peers import (
    FIRST_RETRY,
    LAST_RETRY,
    SILENT_AFTER,
    AddressBook,
    Contact,
    Peer,
)

LIMIT = 4


def at(number: int) -> Endpoint:
    return Endpoint(f"10.0.{number // 250}.{number % 250 + 1}", 7443)


def book(*numbers: int, limit: int = LIMIT) -> AddressBook:
    made = AddressBook(limit)
    for number in numbers:
        made.found(at(number), "mdns", 0.0)
    return made


def only(made: AddressBook) -> Contact:
    (contact,) = made.contacts.values()
    return contact


# ---------------------------------------------------------------- pace


def test_a_new_address_is_due_at_once() -> None:
    made = AddressBook(LIMIT)
    made.found(at(1), "mdns", 7.0)
    assert made.due_at == 7.0 and list(made.due(6.9)) == []
    assert list(made.due(7.0)) == [only(made)] and only(made).dialling


def test_each_failure_doubles_the_pause_up_to_a_limit() -> None:
    made, now, pauses = book(1), 0.0, []
    for _ in range(8):
        made.failed(at(1), "refused", now)
        pauses.append(round(only(made).dial_at - now, 6))
        now = only(made).dial_at
    assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert (pauses[0], pauses[-1]) == (FIRST_RETRY, LAST_RETRY)


def test_a_success_starts_the_pauses_over() -> None:
    made = book(1)
    for now in (0.0, 1.0, 2.0):
        made.failed(at(1), "refused", now)
    made.connected(at(1), "a" * 32)
    assert only(made).error == "" and not only(made).dialling
    made.failed(at(1), "timeout", 9.0)
    assert only(made).dial_at == pytest.approx(9.0 + FIRST_RETRY)


def test_a_provider_that_hears_the_host_again_makes_it_due_now() -> None:
    made = book(1)
    for _ in range(6):
        made.failed(at(1), "refused", 10.0)
    made.found(at(1), "mdns", 11.0)
    assert only(made).dial_at == 11.0
    made.found(at(1), "mdns", 12.0)
    assert only(made).dial_at == 11.0  # never later than it was


def test_what_a_peer_hands_on_does_not_hurry() -> None:
    made = book(1)
    made.failed(at(1), "refused", 10.0)
    made.found(at(1), "peer", 10.1)
    assert only(made).dial_at == pytest.approx(10.0 + FIRST_RETRY)
    assert only(made).via == {"mdns", "peer"}


def test_nobody_is_dialled_twice_at_once_nor_while_connected() -> None:
    made = book(1, 2)
    first, second = made.contacts.values()
    assert list(made.due(0.0)) == [first, second] and made.dialling == 2
    assert list(made.due(99.0)) == [] and made.due_at == NEVER
    made.connected(at(1), "a" * 32)
    made.met("a" * 32)
    made.failed(at(2), "refused", 1.0)
    assert list(made.due(99.0)) == [second] and made.dialling == 1
    made.parted("a" * 32)
    assert list(made.due(99.0)) == [first]  # it hung up: dial again


def test_who_dialled_us_is_not_dialled_however_often_it_is_heard() -> None:
    made = book(1)
    made.connected(at(1), "a" * 32)
    made.met("a" * 32)
    made.found(at(1), "mdns", 5.0)
    assert list(made.due(99.0)) == [] and made.reached == 1


def test_an_address_that_changed_hands_is_dialled_for_its_new_holder() -> None:
    made = book(1)
    made.connected(at(1), "a" * 32)
    for node_id in ("a" * 32, "b" * 32):
        made.met(node_id)
    made.moved(at(1), "b" * 32)  # a went elsewhere, b says it is there now
    assert made.holder(at(1)) == "b" * 32 and list(made.due(99.0)) == []
    made.parted("b" * 32)
    assert [contact.endpoint for contact in made.due(99.0)] == [at(1)]


def test_news_of_an_address_that_was_forgotten_is_no_error() -> None:
    made = book()
    made.failed(at(1), "timeout", 1.0)
    made.connected(at(1), "a" * 32)
    assert not made.contacts


# ---------------------------------------------------------------- bounds


def test_a_full_book_takes_no_more_and_counts_them() -> None:
    made = book(1, 2, 3, 4, 5, 6)
    assert list(made.contacts) == [at(n) for n in (1, 2, 3, 4)]
    assert made.dropped == 2
    made.found(at(1), "static", 3.0)  # one it knows is no new one
    assert made.dropped == 2 and made.contacts[at(1)].via == {"mdns", "static"}


def test_a_full_book_forgets_the_oldest_where_nobody_ever_answered() -> None:
    made = book(1, 2, 3, 4)
    made.connected(at(1), "a" * 32)
    made.failed(at(1), "timeout", 1.0)  # it answered once: ours
    made.failed(at(2), "token", 1.0)
    assert [c.endpoint for c in made.due(1.5)][-1] == at(2)  # under way: may yet succeed
    made.failed(at(3), "refused", 1.0)
    made.failed(at(4), "refused", 1.0)
    made.found(at(5), "mdns", 2.0)
    assert list(made.contacts) == [at(n) for n in (1, 2, 4, 5)]
    assert made.dropped == 1


def test_a_flood_of_addresses_does_not_keep_out_a_host_of_ours() -> None:
    made = book(*range(100, 100 + LIMIT))
    for contact in list(made.contacts.values()):
        made.failed(contact.endpoint, "refused", 1.0)
    made.found(at(1), "mdns", 2.0)
    assert at(1) in made.contacts
    made.connected(at(1), "a" * 32)
    for number in range(200, 300):
        made.found(at(number), "mdns", 3.0)
        if at(number) in made.contacts:
            made.failed(at(number), "refused", 3.0)
    assert at(1) in made.contacts and len(made.contacts) == LIMIT


class Book(RuleBasedStateMachine):
    """Any sequence of events, dials included, as the core makes them."""

    numbers = st.integers(1, 9)

    def __init__(self) -> None:
        super().__init__()
        self.book = AddressBook(LIMIT)
        self.now = 0.0
        self.dialling: set[Endpoint] = set()
        self.ours: set[Endpoint] = set()

    @rule(number=numbers, via=st.sampled_from(("mdns", "static", "peer")))
    def find(self, number: int, via: str) -> None:
        self.book.found(at(number), via, self.now)

    @rule(passed=st.floats(0.01, 20))
    def dial(self, passed: float) -> None:
        self.now += passed
        for contact in self.book.due(self.now):
            assert contact.endpoint not in self.dialling and contact.dial_at <= self.now
            self.dialling.add(contact.endpoint)
        assert self.book.dialling == len(self.dialling)

    @rule(number=numbers, good=st.booleans())
    def answer(self, number: int, good: bool) -> None:
        if at(number) not in self.dialling:
            return
        self.dialling.discard(at(number))
        if good:
            self.book.connected(at(number), f"{number:032x}")
            self.ours.add(at(number))
        else:
            self.book.failed(at(number), "refused", self.now)

    @invariant()
    def bounded(self) -> None:
        assert len(self.book.contacts) <= LIMIT

    @invariant()
    def paced(self) -> None:
        for contact in self.book.contacts.values():
            assert FIRST_RETRY <= contact.retry <= LAST_RETRY
            assert contact.dial_at <= self.now + LAST_RETRY

    @invariant()
    def never_forgets(self) -> None:
        """Who answered once, and who is being dialled, stays."""
        assert self.ours <= set(self.book.contacts)
        assert self.dialling <= set(self.book.contacts)


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


# ---------------------------------------------------------------- presence


def hello() -> Hello:
    return Hello(
        version=VERSION,
        boot="b",
        expect=3,
        agreed="x",
        name="host",
        endpoint=at(1),
        rank=1,
        eligible=True,
        voter=True,
        stage=Stage.DISCOVERING,
        decided=None,
        peers=(),
    )


def test_present_is_who_is_connected_was_heard_and_agrees() -> None:
    peer = Peer("a" * 32, since=0.0, heard=10.0, channels={Channel.BOOTSTRAP}, hello=hello())
    assert peer.present(10.0)
    assert peer.present(10.0 + SILENT_AFTER - 0.01)
    assert not peer.present(10.0 + SILENT_AFTER)
    peer.mismatch = "has expect: 5"
    assert not peer.present(10.0)
    peer.mismatch, peer.channels = "", {Channel.CLUSTER}
    assert not peer.present(10.0)
    peer.channels, peer.hello = {Channel.BOOTSTRAP, Channel.CLUSTER}, None
    assert not peer.present(10.0)


# ---------------------------------------------------------------- the tests themselves


def test_tests_of_the_core_cannot_reach_outside(outside: list[str]) -> None:
    with pytest.raises(AssertionError, match="in a test of the core"):
        socket.socket()
    with pytest.raises(AssertionError, match="in a test of the core"):
        subprocess.run(["true"], check=True)
    with pytest.raises(AssertionError, match="in a test of the core"):
        os.system("true")
    assert outside == ["socket.__new__", "subprocess.Popen", "os.system"]
    outside.clear()
