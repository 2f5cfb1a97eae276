"""The master's roster: whom it signs for, under which name, and whom it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from firstboot.protocol.enrolment import Roster, full
from firstboot.protocol.messages import Enrol
from firstboot.protocol.model import LABEL, ClusterConfig, Issued, Member, Value

MASTER = Member("a" * 32, "host", "10.0.0.1")
SECOND = Member("b" * 32, "host-bbbbbbbb", "10.0.0.2")
THIRD = Member("c" * 32, "host-cccccccc", "10.0.0.3")
ONE = Value(2, "1" * 64, (MASTER,))
THREE = Value(2, "1" * 64, (MASTER, SECOND, THIRD))
CONFIG = ClusterConfig("demo", 3)
KEY, OTHER_KEY = "5" * 64, "6" * 64


def node(number: int) -> str:
    return f"{number:08x}" + "0" * 24


def ask(name: str = "host", host: str = "10.0.0.9", *, key: str = KEY, epoch: int = 2) -> Enrol:
    return Enrol(epoch, b"csr", key, name, host)


def decide(
    roster: Roster,
    node_id: str,
    request: Enrol,
    *,
    value: Value = ONE,
    config: ClusterConfig = CONFIG,
    seen_at: tuple[str, ...] | None = None,
) -> Member | str:
    seen = (request.host,) if seen_at is None else seen_at
    return roster.decide(config, value, node_id, request, seen)


def admit(roster: Roster, node_id: str, request: Enrol, value: Value = ONE) -> Member:
    """Decide and journal, as the master does once the answer is signed."""
    answer = decide(roster, node_id, request, value=value)
    assert isinstance(answer, Member), answer
    roster.add(Issued(answer, value.epoch, request.key))
    return answer


@pytest.mark.parametrize("epoch", [1, 3])
def test_another_epochs_request_is_refused_even_of_a_known_member(epoch: int) -> None:
    roster = Roster()
    admit(roster, node(1), ask())
    for asker in (node(1), node(2), MASTER.node_id):
        answer = decide(roster, asker, ask(epoch=epoch))
        assert answer == f"the master of epoch 2 signs no request of epoch {epoch}"
    assert not roster.pending


def test_a_repeated_request_gets_the_same_answer_also_while_it_is_being_signed() -> None:
    roster = Roster()
    first = decide(roster, node(1), ask())
    assert isinstance(first, Member)
    assert decide(roster, node(1), ask()) == first
    roster.add(Issued(first, 2, KEY))
    # Neither its name, its address, nor where it was met matters any more.
    assert decide(roster, node(1), ask("other", "10.0.0.77"), seen_at=()) == first
    assert not roster.pending


@pytest.mark.parametrize("signed", [True, False])
def test_a_second_key_is_refused_and_the_first_stays(signed: bool) -> None:
    roster = Roster()
    first = decide(roster, node(1), ask())
    assert isinstance(first, Member)
    if signed:
        roster.add(Issued(first, 2, KEY))
    answer = decide(roster, node(1), ask(key=OTHER_KEY))
    assert answer == "this host was already enrolled with another key"
    assert decide(roster, node(1), ask()) == first


def test_a_master_too_has_only_one_key() -> None:
    roster = Roster()
    admit(roster, MASTER.node_id, ask(host=MASTER.host))
    answer = decide(roster, MASTER.node_id, ask(host=MASTER.host, key=OTHER_KEY))
    assert answer == "this host was already enrolled with another key"


def test_an_address_where_the_peer_was_not_met_is_refused() -> None:
    roster = Roster()
    for seen in ((), ("10.0.0.8",), ("10.0.0.90", "10.0.0.99")):
        answer = decide(roster, node(1), ask(), seen_at=seen)
        assert answer == "address 10.0.0.9 is not where this host was met"
    assert not roster.pending
    assert isinstance(decide(roster, node(1), ask(), seen_at=("10.0.0.8", "10.0.0.9")), Member)


@pytest.mark.parametrize("signed", [True, False])
def test_an_address_belongs_to_one_member(signed: bool) -> None:
    roster = Roster()
    first = decide(roster, node(1), ask())
    assert isinstance(first, Member)
    if signed:
        roster.add(Issued(first, 2, KEY))
    answer = decide(roster, node(2), ask(key=OTHER_KEY))
    assert answer == "address 10.0.0.9 belongs to another member"


def test_a_masters_address_belongs_to_it_before_it_has_enrolled() -> None:
    """The decided value gives 10.0.0.2 to a master: nobody else's certificate may hold it."""
    roster = Roster()
    answer = decide(roster, node(1), ask(host=SECOND.host), value=THREE)
    assert answer == f"address {SECOND.host} belongs to another member"


def test_a_request_that_came_to_nothing_frees_its_place() -> None:
    roster = Roster()
    assert isinstance(decide(roster, node(1), ask()), Member)
    roster.drop(node(1))  # what the master does when signing failed
    assert isinstance(decide(roster, node(2), ask(key=OTHER_KEY)), Member)


# ---------------------------------------------------------------- how many


@pytest.mark.parametrize("signed", [True, False])
def test_no_more_than_expect_are_let_in_and_those_being_signed_count(signed: bool) -> None:
    roster = Roster()
    admit(roster, MASTER.node_id, ask(host=MASTER.host))
    for number in (1, 2):
        answer = decide(roster, node(number), ask(host=f"10.0.1.{number}"))
        assert isinstance(answer, Member)
        if signed:
            roster.add(Issued(answer, 2, KEY))
    answer = decide(roster, node(3), ask(host="10.0.1.3"))
    assert answer == "all expected hosts are enrolled; to admit more, set join.extra"
    assert isinstance(decide(roster, node(1), ask()), Member)  # who is in stays in


def test_places_are_kept_for_the_masters() -> None:
    roster = Roster()
    answer = decide(roster, node(1), ask(host="10.0.1.1"), value=THREE)
    assert answer == "all expected hosts are enrolled; to admit more, set join.extra"
    for master in THREE.masters:
        assert admit(roster, master.node_id, ask("any", master.host), THREE) == master
    assert len(roster.issued) == CONFIG.expect


def test_a_master_has_the_name_and_address_that_were_decided() -> None:
    answer = decide(Roster(), SECOND.node_id, ask("other", "10.0.0.55"), value=THREE)
    assert answer == SECOND


@pytest.mark.parametrize(
    ("extra", "members", "is_full"),
    [(0, 2, False), (0, 3, True), (0, 4, True), (2, 4, False), (2, 5, True), (None, 9999, False)],
)
def test_full(extra: int | None, members: int, is_full: bool) -> None:
    assert full(replace(CONFIG, join_extra=extra), members) is is_full


# ---------------------------------------------------------------- names

NAMES = st.sampled_from(
    ("host", "host-00000001", "host-00000002", "host-bbbbbbbb", "host-cccccccc")
) | st.text("ab0-", max_size=61).map(lambda t: f"a{t}b")


@given(st.lists(NAMES, max_size=8), st.booleans())
@example(["host-00000002", "host"], False)
def test_no_two_members_share_a_name(wanted: list[str], master_first: bool) -> None:
    roster = Roster()
    config = replace(CONFIG, join_extra=None)
    asks = [(node(n), ask(name, f"10.0.1.{n}")) for n, name in enumerate(wanted, start=1)]
    masters = [(m.node_id, ask("host", m.host)) for m in THREE.masters]
    for node_id, request in [*masters, *asks] if master_first else [*asks, *masters]:
        answer = decide(roster, node_id, request, value=THREE, config=config)
        assert isinstance(answer, Member), answer
        roster.add(Issued(answer, 2, KEY))
    names = [entry.member.name for entry in roster.issued.values()]
    assert len(set(names)) == len(names), names
    assert all(LABEL.match(name) for name in names)


# ---------------------------------------------------------------- hosts that move or come again


def test_an_address_is_free_again_once_its_member_is_gone() -> None:
    roster = Roster()
    admit(roster, node(1), ask())
    request, seen = ask(key=OTHER_KEY), ("10.0.0.9",)
    held = roster.decide(CONFIG, ONE, node(2), request, seen, at={node(1): request.host}.get)
    assert held == "address 10.0.0.9 belongs to another member"
    free = roster.decide(CONFIG, ONE, node(2), request, seen, at={node(2): request.host}.get)
    assert isinstance(free, Member) and free.node_id == node(2)


def test_an_address_is_free_again_once_its_member_has_moved() -> None:
    roster = Roster()
    admit(roster, node(1), ask())
    request = ask(key=OTHER_KEY)
    seen = (request.host,)
    moved = {node(1): "10.0.0.77"}.get
    assert isinstance(roster.decide(CONFIG, ONE, node(2), request, seen, at=moved), Member)


def test_a_masters_address_is_held_also_while_it_is_away() -> None:
    request = ask(host=SECOND.host)
    answer = Roster().decide(CONFIG, THREE, node(1), request, (SECOND.host,), at=lambda _: None)
    assert answer == f"address {SECOND.host} belongs to another member"


def test_a_member_of_an_active_cluster_does_not_move() -> None:
    roster, active = Roster(), replace(ONE, active=True, members=1)
    admit(roster, node(1), ask(), active)
    answer = decide(roster, node(1), ask(host="10.0.0.77"), value=active)
    assert answer == "this host was enrolled with another address, 10.0.0.9"


def test_places_are_kept_for_masters_that_have_not_come_yet() -> None:
    roster = Roster()
    for number in (1, 2, 3):
        answer = decide(roster, node(number), ask(host=f"10.0.1.{number}"), value=THREE)
        assert answer == "all expected hosts are enrolled; to admit more, set join.extra"
    for master in THREE.masters:
        assert admit(roster, master.node_id, ask("any", master.host), THREE) == master
