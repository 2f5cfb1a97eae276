"""Quorums, ballots, rounds and names: the argument that two quorums meet, as tables."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from firstboot.protocol import election
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.messages import Promise
from firstboot.protocol.model import LABEL, Ballot, ClusterConfig, Member, Register, Value

A, B, C = "a" * 32, "b" * 32, "c" * 32
CA, OTHER_CA = "1" * 64, "2" * 64
ME = Member(A, "host", "10.0.0.1")
CANDIDATE = Value(1, CA, (ME,))
ACTIVE = replace(CANDIDATE, active=True, members=3)
# expect, its majority, and the quorum after the grace period with 1, 2, ... 2 * expect voters
AFTER_GRACE = (
    (1, 1, (1, 2)),
    (2, 2, (2, 2, 2, 3)),
    (3, 2, (2, 2, 2, 3, 3, 4)),
    (4, 3, (3, 3, 3, 3, 3, 4, 4, 5)),
    (5, 3, (3, 3, 3, 3, 3, 4, 4, 5, 5, 6)),
    (6, 4, (4, 4, 4, 4, 4, 4, 4, 5, 5, 6, 6, 7)),
    (7, 4, (4, 4, 4, 4, 4, 4, 4, 5, 5, 6, 6, 7, 7, 8)),
    (8, 5, (5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 7, 7, 8, 8, 9)),
    (9, 5, (5, 5, 5, 5, 5, 5, 5, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10)),
)
EXPECTS = range(1, 10)


def config(expect: int, *, strict: bool = False) -> ClusterConfig:
    return ClusterConfig("demo", expect, strict=strict)


# ---------------------------------------------------------------- quorums


@pytest.mark.parametrize(("expect", "majority", "quorums"), AFTER_GRACE)
def test_after_grace_a_majority_of_expect_and_of_all_voters_seen(
    expect: int, majority: int, quorums: tuple[int, ...]
) -> None:
    assert len(quorums) == 2 * expect
    assert config(expect).majority == majority
    for seen, wanted in enumerate(quorums, start=1):
        got = election.quorum(config(expect), in_grace=False, voters_seen=seen)
        assert got == wanted, f"{seen} voters seen"


@pytest.mark.parametrize("expect", EXPECTS)
@pytest.mark.parametrize(("strict", "in_grace"), [(True, True), (True, False), (False, True)])
def test_in_grace_and_strict_want_all_that_are_expected(
    expect: int, strict: bool, in_grace: bool
) -> None:
    for seen in range(1, 3 * expect):
        got = election.quorum(config(expect, strict=strict), in_grace=in_grace, voters_seen=seen)
        assert got == expect


@pytest.mark.parametrize("expect", EXPECTS)
@pytest.mark.parametrize(
    ("strict", "in_grace"), [(a, b) for a in (True, False) for b in (True, False)]
)
def test_overlaunched_exactly_when_two_quorums_need_not_meet(
    expect: int, strict: bool, in_grace: bool
) -> None:
    cluster = config(expect, strict=strict)
    for seen in range(1, 4 * expect):
        q = election.quorum(cluster, in_grace=in_grace, voters_seen=seen)
        apart = 2 * q <= seen  # room for two quorums without a common voter
        got = election.overlaunched(cluster, in_grace=in_grace, voters_seen=seen)
        assert got == apart, f"{seen} voters, quorum {q}"


@pytest.mark.parametrize("expect", EXPECTS)
def test_quorums_of_different_moments_meet_among_the_expected_voters(expect: int) -> None:
    """One host may be in grace, another past it, and each may have seen another number."""
    sizes = {
        election.quorum(config(expect), in_grace=grace, voters_seen=seen)
        for grace in (True, False)
        for seen in range(1, expect + 1)
    }
    assert 2 * min(sizes) > expect


# ---------------------------------------------------------------- acceptor


def test_an_acceptor_promises_only_upwards_and_keeps_what_it_accepted() -> None:
    held = Register(Ballot(3, B), Ballot(2, B), CANDIDATE)
    assert election.promise(held, Ballot(2, C)) is None
    assert election.promise(held, Ballot(3, A)) is None  # the identity breaks the tie
    assert election.promise(held, Ballot(3, B)) == held  # a repeated Prepare is answered again
    assert election.promise(held, Ballot(3, C)) == replace(held, promised=Ballot(3, C))


def test_an_acceptor_accepts_what_it_promised_or_more() -> None:
    held = Register(Ballot(3, B), Ballot(2, B), CANDIDATE)
    assert election.accept(held, Ballot(3, A), ACTIVE) is None
    for ballot in (Ballot(3, B), Ballot(4, A)):
        assert election.accept(held, ballot, ACTIVE) == Register(ballot, ballot, ACTIVE)


@given(
    st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**40), st.sampled_from((A, B, C))
)
def test_a_new_ballot_is_above_all_that_was_promised_or_heard(
    promised: int, accepted: int, heard: int, node: str
) -> None:
    held = Register(Ballot(promised, C), Ballot(accepted, C), CANDIDATE)
    ballot = election.next_ballot(held, heard, node)
    assert ballot > held.promised and ballot > held.accepted
    assert ballot.number > heard and ballot.node_id == node


# ---------------------------------------------------------------- rounds


def around(purpose: Purpose, base: Value | None, *found: tuple[int, Value | None]) -> Round:
    this = Round(Ballot(9, A), purpose, 0.0, base)
    for index, (number, value) in enumerate(found):
        node = f"{index:032x}"
        accepted = Ballot(number, B) if number else Ballot()
        this.promises[node] = Promise(this.ballot, accepted, value)
    return this


def test_a_round_finds_the_value_of_the_highest_ballot_whatever_the_order() -> None:
    replies = [
        (0, None),
        (2, CANDIDATE),
        (5, ACTIVE),
        (1, replace(CANDIDATE, fingerprint="3" * 64)),
    ]
    for order in itertools.permutations(replies):
        assert around(Purpose.READ, None, *order).found() == ACTIVE
    assert around(Purpose.READ, None, (0, None), (0, None)).found() is None


NEXT = replace(CANDIDATE, epoch=2, fingerprint=OTHER_CA)


@pytest.mark.parametrize(
    ("purpose", "base", "found", "changes"),
    [
        (Purpose.FOUND, None, None, True),
        (Purpose.FOUND, None, CANDIDATE, False),
        (Purpose.FOUND, None, ACTIVE, False),
        (Purpose.READ, None, None, False),
        (Purpose.READ, None, CANDIDATE, False),
        (Purpose.REPLACE, CANDIDATE, CANDIDATE, True),
        (Purpose.REPLACE, CANDIDATE, NEXT, False),  # somebody was faster
        (Purpose.REPLACE, CANDIDATE, ACTIVE, False),  # ACTIVE is never replaced
        (Purpose.REPLACE, CANDIDATE, replace(CANDIDATE, fingerprint=OTHER_CA), False),
        (Purpose.REPLACE, CANDIDATE, None, False),
        (Purpose.ACTIVATE, CANDIDATE, CANDIDATE, True),
        (Purpose.ACTIVATE, CANDIDATE, NEXT, False),  # this master was replaced
        (Purpose.ACTIVATE, CANDIDATE, ACTIVE, False),
        (Purpose.ACTIVATE, None, None, False),
        (Purpose.REPLACE, None, None, False),
    ],
)
def test_a_round_changes_only_what_it_set_out_from(
    purpose: Purpose, base: Value | None, found: Value | None, changes: bool
) -> None:
    this = around(purpose, base, (0, None), (4 if found else 0, found))
    assert this.changes() is changes


def test_only_a_round_that_replaces_says_whom() -> None:
    assert around(Purpose.REPLACE, NEXT).replacing == 2
    assert around(Purpose.REPLACE, None).replacing == 0
    assert around(Purpose.ACTIVATE, NEXT).replacing == 0
    assert around(Purpose.FOUND, None).replacing == 0


def test_the_order_of_values_is_strict_and_ends_with_active() -> None:
    order = [None, CANDIDATE, NEXT, ACTIVE, replace(NEXT, active=True)]
    for (i, old), (j, new) in itertools.product(enumerate(order), repeat=2):
        if new is not None:
            assert election.supersedes(new, old) is (j > i), f"{new} after {old}"


# ---------------------------------------------------------------- names

labels = st.text("ab0-", min_size=1, max_size=63).map(lambda t: f"a{t[:61]}b")
# Few letters and few ids, so that names and the beginnings of ids do collide.
narrow = st.sampled_from(("host", "host-aaaaaaaa", "host-aaaaaaaa-aaaaaaaa", "a"))
long = st.integers(50, 63).map(lambda n: "h" * n) | st.integers(1, 9).map(
    lambda n: "h" * 50 + "-" * n + "h"
)
names = narrow | long | labels
node_ids = st.sampled_from((A, B, "a" * 31 + "b", "a" * 8 + "b" * 24, "b" * 8 + "a" * 24)) | (
    st.text("0123456789abcdef", min_size=32, max_size=32)
)


@given(names, node_ids, st.lists(names, max_size=6))
@example("host", A, ["host", "host-aaaaaaaa"])
@example("host", A, ["host", *(f"host-{A[:n]}" for n in range(1, 33))])
@example("h" * 63, A, ["h" * 63, "h" * 54 + "-aaaaaaaa"])
def test_a_unique_name_is_a_label_and_free_whatever_is_taken(
    wanted: str, node_id: str, taken: list[str]
) -> None:
    name = election.unique_name(wanted, node_id, taken)
    assert LABEL.match(name), name
    assert name not in taken
    assert name == wanted or wanted in taken


@given(st.lists(st.tuples(node_ids, names), max_size=7, unique_by=lambda pair: pair[0]))
def test_members_in_one_cluster_never_share_a_name(hosts: list[tuple[str, str]]) -> None:
    members = [Member(node, name, "10.0.0.1") for node, name in hosts]
    named = election.name_members(members)
    assert [m.node_id for m in named] == [m.node_id for m in members]
    assert len({m.name for m in named}) == len(named)


def test_hosts_of_one_image_are_told_apart_by_their_ids() -> None:
    named = election.name_members(Member(i, "host", "10.0.0.1") for i in (A, B, C))
    assert [m.name for m in named] == ["host", "host-bbbbbbbb", "host-cccccccc"]


def test_the_longest_name_is_cut_so_that_the_id_fits() -> None:
    assert election.unique_name("h" * 63, B, ["h" * 63]) == "h" * 54 + "-bbbbbbbb"
    dashes = "h" * 53 + "-" * 9 + "h"
    assert election.unique_name(dashes, B, [dashes]) == "h" * 53 + "-bbbbbbbb"
