"""The replicated register as an executable specification: every interleaving of three voters.

The rules are the real ones (`firstboot.protocol.election`); what surrounds them here is only what
the world may do. A state is three hosts and the set of all messages ever sent: any of them may
arrive any number of times, in any order, or never. A host has a register on disk, a newer one in
memory, replies that wait for the disk, and perhaps a round of its own; a crash leaves the disk.

Three simplifications, each of which only adds behaviour. What is known to be chosen is known to
every host at once. Nobody vetoes the replacement of a master. A proposer looks for promises in
the messages sent, so it may begin its second phase with any quorum of them, seen in any order.

What is bounded or left out: each host starts only the rounds its plan lists; a new ballot is one
above the host's own register, not above what refusals told it; only hosts with a slow disk crash
in the open (with a quick one a crash loses no more than the round, which a new round does too);
no host is wiped, and nobody beyond the three votes.

Numbers stand for ballots, values and registers (`Numbers`), so that a state is quick to compare.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

from firstboot.protocol import election
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.messages import Promise
from firstboot.protocol.model import Ballot, ClusterConfig, Member, Register, Value

CONFIG = ClusterConfig("demo", 3)
MEMBERS = tuple(Member(c * 32, f"host-{c}", f"10.0.0.{i + 1}") for i, c in enumerate("abc"))
Note = tuple[Any, ...]  # ("prepare", ballot), ("promise", ballot, sender, accepted, value), …
Label = tuple[int, str, Note | None]  # which host does what with which message
Plan = tuple[tuple[Purpose, ...], ...]  # the rounds each host may start, in order


class Broken(AssertionError):
    """A rule does not hold; the text tells which, and the shortest way there."""


@dataclass(frozen=True)
class Rules:
    """What a host goes by. The defaults are the product's own; a control breaks one."""

    promise: Callable[[Register, Ballot], Register | None] = election.promise
    accept: Callable[[Register, Ballot, Value], Register | None] = election.accept
    next_ballot: Callable[[Register, int, str], Ballot] = election.next_ballot
    quorum: Callable[..., int] = election.quorum
    changes: Callable[[Round], bool] = Round.changes
    found: Callable[[Round], Value | None] = Round.found
    report: Callable[[Register], Register] = lambda register: register  # what a promise tells
    acts: Callable[[Value], bool] = lambda value: value.active  # on a chosen value
    disk_first: bool = True  # no reply before what it depends on is on disk


class Numbers:
    """Things as small numbers, equal things as the same; 0 is None."""

    def __init__(self) -> None:
        self.things: list[Any] = [None]
        self._known: dict[Any, int] = {None: 0}

    def of(self, thing: Any) -> int:
        number = self._known.setdefault(thing, len(self.things))
        if number == len(self.things):
            self.things.append(thing)
        return number


class Host(NamedTuple):
    """One voter; `waiting` replies leave when `memory` is on `disk`."""

    disk: int
    memory: int
    waiting: frozenset[Note] = frozenset()
    round: tuple[int, Purpose, int] | None = None  # ballot, purpose, base; until phase 2
    started: int = 0


class State(NamedTuple):
    """All there is."""

    hosts: tuple[Host, ...]
    sent: frozenset[Note]


class Spec:
    """Explores what three hosts with these rules may do, given the rounds each may start."""

    def __init__(
        self,
        plan: Plan,
        rules: Rules | None = None,
        chosen: Value | None = None,
        *,
        slow: frozenset[int] = frozenset(),
    ) -> None:
        self.plan, self.rules, self.slow = plan, rules or Rules(), slow
        self.quorum = self.rules.quorum(CONFIG, in_grace=False, voters_seen=3)
        self.numbers = Numbers()
        self.promise, self.accept = cache(self._promise), cache(self._accept)
        self.ballot, self.outcome = cache(self._ballot), cache(self._outcome)
        self.chosen, self.counts = cache(self._chosen), cache(self._counts)
        self.chosen_before = chosen
        self.seen: dict[State, tuple[State, Label] | None] = {}
        self.reached: set[Value] = set()  # every value that was chosen somewhere

    # ------------------------------------------------------------ the product's rules, by number

    def _promise(self, me: int, register: int, ballot: int) -> tuple[int, Note] | None:
        of, things = self.numbers.of, self.numbers.things
        new = self.rules.promise(things[register], things[ballot])
        if new is None:
            return None
        told = self.rules.report(new)
        return of(new), ("promise", ballot, me, of(told.accepted), of(told.value))

    def _accept(self, me: int, register: int, ballot: int, value: int) -> tuple[int, Note] | None:
        things = self.numbers.things
        new = self.rules.accept(things[register], things[ballot], things[value])
        return None if new is None else (self.numbers.of(new), ("accepted", ballot, me, value))

    def _ballot(self, me: int, register: int) -> int:
        held = self.numbers.things[register]
        return self.numbers.of(self.rules.next_ballot(held, 0, MEMBERS[me].node_id))

    def _outcome(self, me: int, this: tuple[int, Purpose, int], notes: tuple[Note, ...]) -> int:
        """The value that a round with these promises proposes; 0 for none."""
        things, (ballot, purpose, base) = self.numbers.things, this
        round_ = Round(things[ballot], purpose, 0.0, things[base])
        for _, _, sender, accepted, value in notes:
            promise = Promise(things[ballot], things[accepted], things[value])
            round_.promises[MEMBERS[sender].node_id] = promise
        if not self.rules.changes(round_):
            return self.numbers.of(self.rules.found(round_))
        if purpose is Purpose.ACTIVATE:  # `members` differs between rounds, as it may
            return self.numbers.of(
                replace(things[base], active=True, members=things[ballot].number)
            )
        return self.numbers.of(candidate(me, things[base].epoch + 1 if base else 1))

    # ------------------------------------------------------------ what may happen next

    def first(self) -> State:
        """Nothing sent; or `chosen_before` accepted by a quorum, the last host knows nothing."""
        of, empty, start = self.numbers.of, Register(), Ballot(1, MEMBERS[0].node_id)
        if self.chosen_before is None:
            return State((Host(of(empty), of(empty)),) * 3, frozenset())
        holds, value = of(Register(start, start, self.chosen_before)), of(self.chosen_before)
        hosts = (Host(holds, holds), Host(holds, holds), Host(of(empty), of(empty)))
        told = [("accepted", of(start), me, value) for me in (0, 1)]
        return State(hosts, frozenset([("accept", of(start), value), *told]))

    def steps(self, state: State) -> Iterator[tuple[Label, State]]:
        """Every next state, with what leads to it."""
        for me, host in enumerate(state.hosts):
            if host.started < len(self.plan[me]):
                yield from self._starts(state, me, host)
            if host.round is not None:
                yield from self._second_phases(state, me, host)
            if host.disk != host.memory or host.waiting:
                written = host._replace(disk=host.memory, waiting=frozenset())
                yield (me, "persists", None), self._with(state, me, written, *host.waiting)
            if me in self.slow and (host.disk != host.memory or host.waiting or host.round):
                left = Host(host.disk, host.disk, started=host.started)
                yield (me, "crashes", None), self._with(state, me, left)
            for note in state.sent:
                done = None
                if note[0] == "prepare":
                    done = self.promise(me, host.memory, note[1])
                elif note[0] == "accept":
                    done = self.accept(me, host.memory, note[1], note[2])
                if done is not None:
                    yield (me, "gets", note), self._stored(state, me, host, *done)

    def _starts(self, state: State, me: int, host: Host) -> Iterator[tuple[Label, State]]:
        purpose, bases = self.plan[me][host.started], [0]
        if purpose in (Purpose.REPLACE, Purpose.ACTIVATE):
            held = {v: self.numbers.things[v] for _, v in self.chosen(votes(state.sent))}
            bases = [v for v in held if not held[v].active]
        if purpose is Purpose.ACTIVATE:
            bases = [v for v in bases if held[v].founder == MEMBERS[me]]
        for base in bases:
            ballot = self.ballot(me, host.memory)
            done = self.promise(me, host.memory, ballot)
            if done is not None:
                mine = host._replace(round=(ballot, purpose, base), started=host.started + 1)
                asks = ("prepare", ballot)
                yield (
                    (me, f"starts to {purpose} with", asks),
                    self._stored(state, me, mine, *done, asks),
                )

    def _second_phases(self, state: State, me: int, host: Host) -> Iterator[tuple[Label, State]]:
        assert host.round is not None
        ballot, values = host.round[0], set()
        promises = sorted(n for n in state.sent if n[0] == "promise" and n[1] == ballot)
        for size in range(self.quorum, len(promises) + 1):
            for some in itertools.combinations(promises, size):
                if len({sender for _, _, sender, _, _ in some}) == size:
                    values.add(self.outcome(me, host.round, some))
        for value in sorted(values - {0}):
            if self.accept(me, host.memory, ballot, value) is not None:
                note, over = ("accept", ballot, value), host._replace(round=None)
                yield (me, "sends", note), self._with(state, me, over, note)

    def _stored(self, state: State, me: int, host: Host, memory: int, *notes: Note) -> State:
        """The register changes; with a quick disk it is there at once."""
        if me not in self.slow:
            return self._with(state, me, host._replace(disk=memory, memory=memory), *notes)
        if not self.rules.disk_first:
            return self._with(state, me, host._replace(memory=memory), *notes)
        later = host.waiting | frozenset(n for n in notes if n not in state.sent)
        return self._with(state, me, host._replace(memory=memory, waiting=later))

    def _with(self, state: State, me: int, host: Host, *notes: Note) -> State:
        """`host` becomes this, and sends these; of all that was sent, what still counts is kept.

        What changes nothing any more must not tell two states apart, or there would be too many:
        promises to a round that is over, and what no disk would answer. None of them ever will
        again as long as ballots only rise, which `_wrong` checks.
        """
        hosts = (*state.hosts[:me], host, *state.hosts[me + 1 :])
        disks = tuple(h.disk for h in hosts)
        open_ = {h.round[0] for h in hosts if h.round is not None}
        kept = [
            note
            for note in state.sent.union(notes)
            if (note[1] in open_ if note[0] == "promise" else self.counts(note, disks))
        ]
        return State(hosts, frozenset(kept))

    def _counts(self, note: Note, disks: tuple[int, ...]) -> bool:
        if note[0] == "prepare":
            return any(self.promise(i, disk, note[1]) for i, disk in enumerate(disks))
        if note[0] == "accept":
            return any(self.accept(i, disk, note[1], note[2]) for i, disk in enumerate(disks))
        return True  # who accepted what is the history that is judged

    # ------------------------------------------------------------ what must hold

    def explore(self, limit: int = 10_000_000) -> int:
        """Visit every state there is, nearest first; how many. Broken at the first bad one."""
        first = self.first()
        self.seen = {first: None}
        queue = deque([first])
        while queue:
            state = queue.popleft()
            for label, after in self.steps(state):
                if after not in self.seen:
                    self.seen[after] = (state, label)
                    wrong = self._wrong(state, after)
                    if wrong:
                        raise Broken(f"{wrong}\n{self.trace(after)}")
                    queue.append(after)
            if len(self.seen) > limit:
                raise Broken(f"more than {limit} states: the bounds do not bound")
        return len(self.seen)

    def _wrong(self, before: State, after: State) -> str:
        for old, new in zip(before.hosts, after.hosts, strict=True):
            if new.disk != old.disk:
                was, now = self.numbers.things[old.disk], self.numbers.things[new.disk]
                if now.promised < was.promised or now.accepted < was.accepted:
                    return "a promised or accepted ballot decreased"
        told = votes(after.sent)
        return "" if len(told) == len(votes(before.sent)) else self._order(told)

    def _order(self, told: frozenset[Note]) -> str:
        things = self.numbers.things
        if len({n[1] for n in told}) < len({(n[1], n[3]) for n in told}):
            return "two values were accepted under one ballot"
        chosen = sorted((things[b], v) for b, v in self.chosen(told))
        values = [things[v] for _, v in chosen]
        self.reached.update(values)
        for old, new in itertools.pairwise(values):
            if not (new == old or follows(new, old)):
                return f"{brief(new)} was chosen after {brief(old)}"
        if len({v.cluster_id for v in values if self.rules.acts(v)}) > 1:
            return "two clusters act"
        return ""

    def _chosen(self, told: frozenset[Note]) -> frozenset[tuple[int, int]]:
        """Each ballot and value that a quorum says it accepted."""
        count: dict[tuple[int, int], int] = {}
        for _, ballot, _, value in told:
            count[ballot, value] = count.get((ballot, value), 0) + 1
        return frozenset(what for what, voters in count.items() if voters >= self.quorum)

    def trace(self, state: State) -> str:
        """How to get there, and where every host then stands."""
        things, lines = self.numbers.things, []
        for name, host in zip("abc", state.hosts, strict=True):
            lines.append(f"  {name} holds {brief(things[host.disk])}")
        step = self.seen[state]
        while step is not None:
            state, (me, what, note) = step
            told = " ".join([note[0], *(brief(things[n]) for n in note[1:])]) if note else ""
            lines.insert(0, f"  {'abc'[me]} {what} {told}".rstrip())
            step = self.seen[state]
        return "\n".join(lines)


def votes(sent: frozenset[Note]) -> frozenset[Note]:
    return frozenset(n for n in sent if n[0] == "accepted")


@cache
def candidate(me: int, epoch: int) -> Value:
    """CANDIDATE(epoch) with that host as master: its CA of an epoch is made once."""
    return Value(epoch, f"{me + 1:x}{epoch:x}" * 32, (MEMBERS[me],))


def follows(new: Value, old: Value) -> bool:
    """CANDIDATE(e) -> ACTIVE(e), the same cluster, or CANDIDATE(e + 1); nothing after ACTIVE."""
    activated = new.active and (new.epoch, new.cluster_id) == (old.epoch, old.cluster_id)
    replaced = not new.active and new.epoch == old.epoch + 1
    return not old.active and (activated or replaced) and election.supersedes(new, old)


def brief(thing: Any) -> str:
    """A ballot, a value or a register in few words."""
    if isinstance(thing, Ballot):
        return f"({thing.number}, {thing.node_id[:1]})" if thing.number else "()"
    if isinstance(thing, Register):
        promised, accepted = brief(thing.promised), brief(thing.accepted)
        return f"promised {promised}, accepted {accepted} {brief(thing.value)}"
    if thing is None:
        return "EMPTY"
    name = "ACTIVE" if thing.active else "CANDIDATE"
    return f"{name}({thing.epoch}, {thing.founder.name})"
