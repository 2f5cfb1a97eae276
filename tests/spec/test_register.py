"""All that three voters may do, within bounds; and that a broken rule is found by the same search.

`make explore` runs larger bounds (``python -m tests.spec``).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from firstboot.protocol import election
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.model import Ballot, ClusterConfig, Register, Value
from tests.spec.register import (
    MEMBERS,
    Broken,
    Host,
    Note,
    Plan,
    Rules,
    Spec,
    State,
    candidate,
)

FOUND, READ, REPLACE, ACTIVATE = Purpose.FOUND, Purpose.READ, Purpose.REPLACE, Purpose.ACTIVATE
CHOSEN = candidate(0, 1)  # a is the master of epoch 1; a and b know it, c does not

# Name, the rounds that a, b and c may start, what was chosen before, hosts whose disk takes time,
# and how many states there are at least: a search that reaches fewer has lost its way.
BOUNDED: dict[str, tuple[Plan, Value | None, set[int], int]] = {
    "three found": (((FOUND,), (FOUND,), (FOUND,)), None, set(), 25_000),
    "found again": (((FOUND, FOUND), (FOUND,), ()), None, set(), 10_000),
    "a reader": (((FOUND,), (FOUND,), (READ,)), None, set(), 15_000),
    "two replace": (((ACTIVATE,), (REPLACE,), (REPLACE,)), CHOSEN, set(), 60_000),
    "activate twice": (((ACTIVATE, ACTIVATE), (REPLACE,), ()), CHOSEN, set(), 20_000),
    "from empty to active": (((FOUND, ACTIVATE), (REPLACE, ACTIVATE), ()), None, set(), 20_000),
    "a proposer's crashes": (((FOUND, FOUND), (FOUND,), ()), None, {0}, 50_000),
    "an acceptor's crashes": (((FOUND,), (FOUND,), ()), None, {2}, 5_000),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_whatever_happens_the_register_keeps_its_promise(name: str) -> None:
    plan, chosen, slow, least = BOUNDED[name]
    spec = Spec(plan, chosen=chosen, slow=frozenset(slow))
    states = spec.explore()
    print(f"{name}: {states} states, chosen in some of them: {len(spec.reached)} values")
    assert states >= least
    purposes = {p for rounds in plan for p in rounds}
    founded = {candidate(me, 1) for me, rounds in enumerate(plan) if FOUND in rounds}
    assert founded <= spec.reached
    if REPLACE in purposes:
        assert any(v.epoch == 2 for v in spec.reached)
    assert any(v.active for v in spec.reached) is (ACTIVATE in purposes)


def test_a_reader_finishes_what_it_finds() -> None:
    """Nobody but a founds, and the crash of a is c's READ coming second."""
    spec = Spec(((FOUND,), (), (READ,)))
    assert spec.explore() > 100
    finished = [
        state
        for state in spec.seen
        if sum(spec.numbers.things[h.disk].accepted.node_id == "c" * 32 for h in state.hosts) > 1
    ]
    assert finished


class KeepsEverything(Spec):
    """Messages that can change nothing any more still tell two states apart."""

    def _with(self, state: State, me: int, host: Host, *notes: Note) -> State:
        hosts = (*state.hosts[:me], host, *state.hosts[me + 1 :])
        return State(hosts, state.sent.union(notes))


@pytest.mark.parametrize(
    ("plan", "chosen"),
    [(((FOUND,), (FOUND,), ()), None), (((ACTIVATE,), (REPLACE,), ()), CHOSEN)],
    ids=["found", "after a candidate"],
)
def test_forgetting_spent_messages_loses_no_behaviour(plan: Plan, chosen: Value | None) -> None:
    """The same registers are reached on the three disks, in a small part of the states."""
    short, long = Spec(plan, chosen=chosen), KeepsEverything(plan, chosen=chosen)
    assert 10 * short.explore() < long.explore()
    disks = [
        {tuple(spec.numbers.things[h.disk] for h in state.hosts) for state in spec.seen}
        for spec in (short, long)
    ]
    assert disks[0] == disks[1]
    assert short.reached == long.reached


# ---------------------------------------------------------------- one broken rule each


def accept_below_promise(register: Register, ballot: Ballot, value: Value) -> Register | None:
    if ballot <= register.accepted:
        return None
    return Register(max(register.promised, ballot), ballot, value)


def promise_below(register: Register, ballot: Ballot) -> Register:
    return replace(register, promised=ballot)


def ballot_forgotten(register: Register, seen: int, node_id: str) -> Ballot:
    return Ballot(max(register.accepted.number, seen) + 1, node_id)


def ballot_of_nobody(register: Register, seen: int, node_id: str) -> Ballot:
    return replace(election.next_ballot(register, seen, node_id), node_id=MEMBERS[0].node_id)


def too_small(config: ClusterConfig, **_: object) -> int:
    return config.majority - 1


def over_active(this: Round) -> bool:
    """REPLACE does not look at what it found."""
    return this.purpose is REPLACE or this.changes()


def over_another(this: Round) -> bool:
    """REPLACE spares ACTIVE, but does not look whether somebody was faster."""
    current = this.found()
    return this.changes() or (this.purpose is REPLACE and not (current and current.active))


def found_first(this: Round) -> Value | None:
    """Any value is taken, not that of the highest ballot."""
    held = [p for p in this.promises.values() if p.value is not None]
    return min(held, key=lambda p: p.accepted).value if held else None


TWO: Plan = ((FOUND,), (FOUND,), ())
ONE_AFTER_THE_OTHER: Plan = ((ACTIVATE,), (REPLACE,), ())
# Name, the broken rule, rounds, what was chosen, slow disks, and what is found to be wrong.
CONTROLS: dict[str, tuple[Rules, Plan, Value | None, set[int], str]] = {
    "accept below promise": (
        *(Rules(accept=accept_below_promise), TWO, None, set()),
        "CANDIDATE(1, host-b) was chosen after CANDIDATE(1, host-a)",
    ),
    "promise below promise": (
        *(Rules(promise=promise_below), TWO, None, set()),
        "a promised or accepted ballot decreased",
    ),
    "forget the accepted value": (
        *(Rules(report=lambda register: Register(register.promised)), TWO, None, set()),
        "CANDIDATE(1, host-b) was chosen after CANDIDATE(1, host-a)",
    ),
    "quorum off by one": (
        *(Rules(quorum=too_small), TWO, None, set()),
        "CANDIDATE(1, host-b) was chosen after CANDIDATE(1, host-a)",
    ),
    "reply before the disk": (
        *(Rules(disk_first=False), TWO, None, {2}),
        "CANDIDATE(1, host-b) was chosen after CANDIDATE(1, host-a)",
    ),
    "reuse a ballot": (
        *(Rules(next_ballot=ballot_forgotten), ((FOUND,), (FOUND, FOUND), ()), None, set()),
        "two values were accepted under one ballot",
    ),
    "a ballot names nobody": (
        *(Rules(next_ballot=ballot_of_nobody), TWO, None, set()),
        "two values were accepted under one ballot",
    ),
    "act on CANDIDATE": (
        *(Rules(acts=lambda _: True), ((), (REPLACE,), ()), CHOSEN, set()),
        "two clusters act",
    ),
    "overwrite ACTIVE": (
        *(Rules(changes=over_active), ONE_AFTER_THE_OTHER, CHOSEN, set()),
        "CANDIDATE(2, host-b) was chosen after ACTIVE(1, host-a)",
    ),
    "replace whom one did not mean": (
        *(Rules(changes=over_another), ((), (REPLACE,), (REPLACE,)), CHOSEN, set()),
        "CANDIDATE(2, host-c) was chosen after CANDIDATE(2, host-b)",
    ),
    "take any value found": (
        *(Rules(found=found_first), ((FOUND,), (FOUND,), (READ,)), None, set()),
        "CANDIDATE(1, host-a) was chosen after CANDIDATE(1, host-b)",
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_broken_rule_is_found(name: str) -> None:
    rules, plan, chosen, slow, wrong = CONTROLS[name]
    with pytest.raises(Broken) as caught:
        Spec(plan, rules, chosen, slow=frozenset(slow)).explore()
    print(f"{name}: {caught.value}")
    assert str(caught.value).splitlines()[0] == wrong
