"""The core, the host and the disk with one rule broken each; the campaign must notice every one.

``python -m tests.sim.mutants`` (``make mutants``) looks for the first seed at which it does, and
prints the score. What breaks is the docstring.

Not here, since nothing can tell them from the core, so that a sharper one stands for each:

- promising a ballot below the promised one without lowering that: the Accept is refused anyway
  (instead: *promise below promise*, which lowers it);
- voting after ACTIVE, or founding after having met it, while 2q > V: the first phase finds ACTIVE
  (instead: *found over what was found*);
- CANDIDATE(e + 1) counting as newer than ACTIVE(e): no such value can come to be chosen
  (instead: *change another value than the base*);
- signing after CLOSE while the channel is shut: nobody can ask (instead: *close not enforced*);
- forgetting over a restart that admission was closed: all have confirmed, it closes again at once
  (instead: *never closes*).

And not here, since what they need is too rare for 2,000 seeds:

- counting acceptors by address: one must come back elsewhere within a round of 2 s (instead:
  *answers counted, not hosts*, and *voters counted by address*);
- counting a promise that was given to an earlier ballot: it must arrive after the next round began
  (instead: *refusals counted as promises*).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from unittest import mock

from firstboot.protocol import assembly, election, enrolment, events, messages, voter
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.model import (
    Ballot,
    Channel,
    ClusterConfig,
    Register,
    Stored,
    Value,
)
from firstboot.protocol.peers import AddressBook, Peer
from firstboot.protocol.situation import Start
from tests.sim import world
from tests.sim.machine import Host, digest

Thing = TypeVar("Thing", bound=Callable[..., Any])


@dataclass(frozen=True)
class Mutant:
    """One broken rule: another class for the core or the host, or another function somewhere."""

    name: str
    breaks: str
    core: type[Assembly] = Assembly
    place: Any = None
    attribute: Any = ""
    instead: Any = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[type[Assembly]]:
        """The core to run, with the rest put in place."""
        if self.place is None:
            yield self.core
        elif isinstance(self.place, dict):
            with mock.patch.dict(self.place, {self.attribute: self.instead}):
                yield self.core
        else:
            with mock.patch.object(self.place, self.attribute, self.instead):
                yield self.core


MUTANTS: list[Mutant] = []


def mutant(name: str, at: tuple[Any, Any] | None = None) -> Callable[[Thing], Thing]:
    """Enlist a core, a host, or what is to stand at that attribute (or key) of a place."""

    def decorated(thing: Thing) -> Thing:
        breaks = (thing.__doc__ or "").strip()
        if isinstance(thing, type) and issubclass(thing, Assembly):
            MUTANTS.append(Mutant(name, breaks, thing))
        else:
            place, attribute = at or (world, "Host")
            MUTANTS.append(Mutant(name, breaks, Assembly, place, attribute, thing))
        return thing

    return decorated


# ---------------------------------------------------------------- the disk


@mutant("skip fsync")
class SkipsFsync(Host):
    """A power cut loses what was written in the last 5 s, though it was said to be done."""

    def __init__(self, world: world.World, index: int) -> None:
        super().__init__(world, index)
        self.written: list[tuple[float, str, Stored]] = []

    def _write(self, action: events.Persist) -> None:
        super()._write(action)
        self.written.append((self.world.now, self.node_id, self.disk.stored))

    def crash(self) -> None:
        if self.core is not None:
            old, self.disk.stored = self.world.now - 5.0, Stored()
            for when, node_id, stored in self.written:
                if when <= old and node_id == self.node_id:
                    self.disk.stored = stored
            self.written = []
        super().crash()


@mutant("reply before fsync")
class RepliesBeforeDisk(Assembly):
    """What must wait for the disk is done at once."""

    def _store(self, then: Callable[[], None] | None = None, **changes: Any) -> None:
        super()._store(None, **changes)
        if then is not None:
            then()


@mutant("ask before fsync")
class AsksBeforeDisk(Assembly):
    """Whoever is met hears of a ballot that this host would forget with its power."""

    def _on_hello(self, peer: Peer, hello: messages.Hello) -> None:
        fresh = peer.hello is None
        super()._on_hello(peer, hello)
        this = self.round
        if fresh and this is not None and self.me.node_id not in this.promises:
            self._send_round(peer.node_id, this)


@mutant("promise in memory only")
class PromisesInMemory(Assembly):
    """A promise is given without a write."""

    def _on_prepare(self, sender: str, message: messages.Prepare) -> None:
        promised = election.promise(self.stored.register, message.ballot)
        if promised is not None and self._may_vote(sender):
            self.stored = replace(self.stored, register=promised)
            reply = messages.Promise(message.ballot, promised.accepted, promised.value)
            self._send(sender, reply)


@mutant("votes in memory only")
class VotesInMemory(Assembly):
    """After a restart a host has no memory of what it promised and accepted."""

    def __init__(self, start: Start) -> None:
        super().__init__(replace(start, stored=replace(start.stored, register=Register())))


@mutant("vote after losing the votes")
class VotesAgain(Assembly):
    """A host whose state file was lost votes as if it had never voted."""

    def __init__(self, start: Start) -> None:
        super().__init__(replace(start, me=replace(start.me, voter=True)))


@mutant("failed write not repeated", at=(assembly._HANDLERS, events.PersistFailed))
def _gives_up_writing(core: Assembly, event: events.PersistFailed) -> None:
    """A state that could not be written is not written again."""
    core.disk_error = event.reason


# ---------------------------------------------------------------- who is counted


@mutant("quorum off by one", at=(election, "quorum"))
def _too_small(config: ClusterConfig, **_: object) -> int:
    """One voter less than a majority is enough."""
    return max(1, config.majority - 1)


@mutant("grace shrinks q under a majority", at=(election, "quorum"))
def _shrinks(config: ClusterConfig, *, in_grace: bool, voters_seen: int) -> int:
    """After grace a majority of those who came is enough."""
    return config.expect if in_grace or config.strict else voters_seen // 2 + 1


@mutant("surplus voters not counted", at=(election, "quorum"))
def _plain_majority(config: ClusterConfig, *, in_grace: bool, voters_seen: int) -> int:
    """The quorum stays a majority of `expect` however many voters were seen."""
    return config.expect if in_grace or config.strict else config.majority


@mutant("strict ignored", at=(election, "quorum"))
def _lax(config: ClusterConfig, *, in_grace: bool, voters_seen: int) -> int:
    """With `election: strict` a majority is enough after grace."""
    return config.expect if in_grace else max(config.majority, voters_seen // 2 + 1)


@mutant("overlaunch ignored", at=(election, "overlaunched"))
def _never_too_many(config: ClusterConfig, **_: object) -> bool:
    """Too many voters for one cluster are no reason to stop."""
    return False


@mutant("answers counted, not hosts")
class CountsAnswers(Assembly):
    """A host that answers twice counts as two acceptors."""

    answers = 0

    def _on_promise(self, sender: str, message: messages.Promise) -> None:
        self.answers += 1
        super()._on_promise(f"{sender}, answer {self.answers}", message)

    def _on_accepted(self, sender: str, message: messages.Accepted) -> None:
        self.answers += 1
        super()._on_accepted(f"{sender}, answer {self.answers}", message)


@mutant("voters counted by address")
class CountsVotersByAddress(Assembly):
    """A host that was wiped and comes back at its old address counts as one."""

    @property
    def quorum(self) -> int:
        peers = [self.peers[i].hello for i in self.voters if i in self.peers]
        seen = len({h.endpoint.host for h in peers if h is not None}) + self.me.voter
        return election.quorum(self.config, in_grace=self.in_grace, voters_seen=seen)


@mutant("copies of one identity go on")
class IgnoresCopies(Assembly):
    """Two running copies of one disk take each other for themselves."""

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        mine = isinstance(event, events.MessageReceived) and event.node_id == self.me.node_id
        return super().receive(events.DeadlineReached() if mine else event, now)


# ---------------------------------------------------------------- windows


class WallClock(Assembly):
    step = 0.0

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.set_at = start.now + 3.0

    def wall(self, moment: float) -> float:
        return moment + (self.step if moment >= self.set_at else 0.0)

    @property
    def in_grace(self) -> bool:
        since = self.majority_since
        return since is None or self.wall(self.now) < self.wall(since) + self.config.grace


@mutant("wall clock in a window, set forward")
class ClockSetForward(WallClock):
    """Grace is measured by a clock that is set right, a year ahead, 3 s after the start."""

    step = 3.15e7


@mutant("wall clock in a window, set back")
class ClockSetBack(WallClock):
    """Grace is measured by a clock that is set right, a year back, 3 s after the start."""

    step = -3.15e7


@mutant("no grace")
class Impatient(Assembly):
    """The first majority does not wait for the others."""

    in_grace = False


HASTE = "A candidate master is replaced after 2 s without a word."
MUTANTS.append(
    Mutant("replace without silence", HASTE, Assembly, voter, "MASTER_SILENT", instead=2.0)
)


@mutant("dead candidate defended")
class NeverReplaces(Assembly):
    """Whoever is asked says that the candidate master still lives."""

    def _master_lives(self, sender: str, epoch: int) -> bool:
        return True


# ---------------------------------------------------------------- acceptors


@mutant("forget the accepted value in a promise")
class PromisesWithoutValue(Assembly):
    """A promise does not say what was accepted before."""

    def _send(self, node_id: str, message: messages.Message, *channel: Any) -> None:
        if isinstance(message, messages.Promise):
            message = messages.Promise(message.ballot, Ballot(), None)
        super()._send(node_id, message, *channel)


@mutant("promising forgets what was accepted", at=(election, "promise"))
def _promise_forgets(register: Register, ballot: Ballot) -> Register | None:
    """A new promise wipes the accepted value from the register."""
    return Register(promised=ballot) if ballot >= register.promised else None


@mutant("promise below promise", at=(election, "promise"))
def _promises_any(register: Register, ballot: Ballot) -> Register | None:
    """Any ballot is promised, also one below the promised."""
    return replace(register, promised=ballot)


@mutant("accept below promise", at=(election, "accept"))
def _accepts_any(register: Register, ballot: Ballot, value: Value) -> Register | None:
    """A promise does not keep a host from accepting a lower ballot."""
    if ballot < register.accepted:
        return None
    return Register(max(register.promised, ballot), accepted=ballot, value=value)


# ---------------------------------------------------------------- proposers


@mutant("ballot in memory only", at=(election, "next_ballot"))
def _counts_in_memory(_register: Register, seen: int, node_id: str) -> Ballot:
    """Ballots begin at 1 again after a restart."""
    return Ballot(seen + 1, node_id)


@mutant("ballot not above the promised", at=(election, "next_ballot"))
def _last_ballot(register: Register, seen: int, node_id: str) -> Ballot:
    """A new round may carry the ballot of an earlier one."""
    return Ballot(max(register.promised.number, register.accepted.number, seen), node_id)


@mutant("ballots without a tie-breaker", at=(election, "next_ballot"))
def _nobodys(register: Register, seen: int, _node_id: str) -> Ballot:
    """Two hosts may propose under the same ballot."""
    number = max(register.promised.number, register.accepted.number, seen) + 1
    return Ballot(number, "0" * 32)


@mutant("found over what was found", at=(Round, "changes"))
def _founds_anyway(this: Round) -> bool:
    """A founder proposes itself though the promises hold a value."""
    base = this.base is not None and this.found() == this.base
    return this.purpose is Purpose.FOUND or (this.purpose is not Purpose.READ and base)


@mutant("change another value than the base", at=(Round, "changes"))
def _changes_anyway(this: Round) -> bool:
    """REPLACE and ACTIVATE do not look whether the value is still the one they start from."""
    empty = this.found() is None
    return empty if this.purpose is Purpose.FOUND else this.purpose is not Purpose.READ


@mutant("take an older accepted value", at=(Round, "found"))
def _oldest(this: Round) -> Value | None:
    """Of several accepted values the one with the lowest ballot is proposed again."""
    held = [p for p in this.promises.values() if p.value is not None]
    return min(held, key=lambda p: p.accepted).value if held else None


@mutant("refusals counted as promises")
class CountsRefusals(Assembly):
    """Who answers at all has promised."""

    def _on_formation_message(self, sender: str, message: messages.Message) -> None:
        if isinstance(message, messages.Refused):
            message = messages.Promise(message.ballot, Ballot(), None)
        super()._on_formation_message(sender, message)


@mutant("count acceptances of another ballot")
class CountsOldAcceptances(Assembly):
    """An acceptance of an earlier ballot counts for the present one."""

    def _on_accepted(self, sender: str, message: messages.Accepted) -> None:
        if self.round is not None:
            message = messages.Accepted(self.round.ballot)
        super()._on_accepted(sender, message)


@mutant("decide on the own acceptance")
class DecidesAlone(Assembly):
    """A proposer takes its value for chosen when it has accepted it itself."""

    def _on_accepted(self, sender: str, message: messages.Accepted) -> None:
        this = self.round
        if this is not None and this.value is not None and sender == self.me.node_id:
            this.accepted.add(sender)
            self.round = None
            self._learn(this.value)


@mutant("activate without asking")
class ActivatesAlone(Assembly):
    """A candidate whose members are enrolled declares itself ACTIVE."""

    def _start_round(self, purpose: Purpose, base: Value | None) -> None:
        if purpose is Purpose.ACTIVATE and base is not None:
            self._learn(replace(base, active=True, members=len(self.roster.issued)))
        else:
            super()._start_round(purpose, base)


@mutant("activate without reading back")
class ActivatesUnread(Assembly):
    """A candidate takes its own register for that of a quorum when it moves to ACTIVE."""

    def _on_promise(self, sender: str, message: messages.Promise) -> None:
        this = self.round
        if this is not None and this.purpose is Purpose.ACTIVATE and sender == self.me.node_id:
            this.promises |= dict.fromkeys(sorted(self.voters)[: self.quorum - 1], message)
        super()._on_promise(sender, message)


@mutant("act on CANDIDATE")
class ActsOnCandidate(Assembly):
    """Units are started as soon as a master is elected and has signed for this host."""

    def _advance(self) -> None:
        super()._advance()
        if not self.may_start:
            self._run_plan()


# ---------------------------------------------------------------- the cluster CA


@mutant("drop the CA before the decision is on disk")
class DropsEarly(Assembly):
    """A loser destroys its CA first and writes down why afterwards."""

    def _learn(self, value: Value) -> None:
        old = self.decided
        if election.supersedes(value, old) and not (old and old.active):
            self._drop_authority(self._stale_until(value))
        super()._learn(value)


@mutant("stale CA kept")
class KeepsAuthority(Assembly):
    """A host that lost, or was replaced, keeps the key of its CA."""

    def _drop_authority(self, epoch: int) -> None:
        pass


@mutant("another CA each time")
class MakesAuthorityAnew(Host):
    """Asked again for an epoch's CA, the host makes a second one."""

    def _authority(self, epoch: int) -> None:
        self.disk.authorities.pop(epoch, None)
        super()._authority(epoch)


@mutant("certificates of a stale epoch kept")
class KeepsCertificates(Assembly):
    """Certificates of a replaced master count as those of its successor."""

    @property
    def enrolled(self) -> bool:
        return self.decided is not None and bool(self.stored.enrolled_fingerprint)


# ---------------------------------------------------------------- enrolment


@mutant("enrolment not idempotent: another answer")
class AnswersAnew(Host):
    """The same request, asked again, is answered with another name."""

    def _sign(self, action: events.Sign) -> None:
        self.disk.issued.pop((action.epoch, action.member.node_id), None)
        name = "host-" + digest(self.world.rng.random())[:8]
        super()._sign(replace(action, member=replace(action.member, name=name)))


@mutant("enrolment not idempotent: a second key")
class SignsAnyKey(Host):
    """A host makes a new key at every start, and its master signs for any."""

    def boot(self) -> None:
        if self.core is None:
            self.disk.key = ""
        super().boot()

    def feed(self, event: events.Event) -> None:
        if isinstance(event, events.MessageReceived) and self.core is not None:
            asked, known = event.message, self.core.roster.issued.get(event.node_id)
            if isinstance(asked, messages.Enrol) and known is not None:
                self.core.roster.issued[event.node_id] = replace(known, key=asked.key)
        super().feed(event)


@mutant("journal forgotten over a restart")
class ForgetsJournal(Assembly):
    """A master that starts again does not know whom it has enrolled."""

    def __init__(self, start: Start) -> None:
        super().__init__(replace(start, issued=()))


@mutant("answer before the journal")
class AnswersBeforeJournal(Host):
    """Certificates are handed out before it is written down for whom."""

    def feed(self, event: events.Event) -> None:
        if isinstance(event, events.Signed):
            boot, issued = self.boots, self.disk.issued
            where = event.epoch, event.member.node_id
            entry = issued.pop(where)
            self.world.after(
                0.05, lambda: issued.update({where: entry} if boot == self.boots else {})
            )
        super().feed(event)


@mutant("names not made unique", at=(enrolment, "unique_name"))
def _same_name(wanted: str, _node_id: str, _taken: object) -> str:
    """Hosts of one image get one name."""
    return wanted


@mutant("admission without bound", at=(enrolment, "full"))
def _never_full(_config: ClusterConfig, _members: int) -> bool:
    """Any number of hosts is enrolled."""
    return False


# ---------------------------------------------------------------- CLOSE, and leaving


@mutant("close not enforced")
class LeavesOpen(Assembly):
    """Admission is closed on paper; the bootstrap channel goes on answering."""

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        return [a for a in super().receive(event, now) if not isinstance(a, events.Close)]


@mutant("never closes")
class NeverCloses(Assembly):
    """Admission goes on though everybody is in."""

    admission_over = False


@mutant("closes too early")
class ClosesEarly(Assembly):
    """Admission ends with ACTIVE, whoever has not heard of it yet."""

    @property
    def admission_over(self) -> bool:
        return self._active_since is not None


@mutant("master leaves at once")
class LeavesEarly(Assembly):
    """A master that runs its role ends its process, whoever waits for it."""

    def _nobody_waits(self) -> bool:
        return True


@mutant("note before it is on disk")
class NotesEarly(Assembly):
    """A repeated Confirmed is answered though the first is not yet on disk."""

    def _confirm(self, node_id: str, epoch: int) -> None:
        if node_id in self._noting:
            self._send(node_id, messages.Noted(epoch), Channel.CLUSTER)
        super()._confirm(node_id, epoch)


# ---------------------------------------------------------------- getting there


@mutant("browser never re-queried")
class AnnouncesOnce(Assembly):
    """Hosts whose first multicast was lost never meet."""

    def _announce(self) -> None:
        if not self._announced:
            super()._announce()


@mutant("failed dial not repeated", at=(AddressBook, "failed"))
def _never_again(book: AddressBook, endpoint: Any, reason: str, _now: float) -> None:
    """An address that did not answer once is not dialled again."""
    contact = book.contacts.get(endpoint)
    if contact is not None:
        contact.error = reason


@mutant("request sent once")
class AsksOnce(Assembly):
    """A lost request for certificates is not sent again."""

    def _enrol(self) -> None:
        super()._enrol()
        if self._enrol_at > self.now:
            self._enrol_at = float("inf")


@mutant("ACTIVE told once")
class TellsOnce(Assembly):
    """A member that missed the master's ACTIVE is not told again."""

    def _tell_unconfirmed(self) -> None:
        if self._tell_at == self._active_since:
            super()._tell_unconfirmed()


@mutant("failed step not repeated")
class StopsAtFailure(Assembly):
    """A unit that failed to start is not started again."""

    def _run_plan(self) -> None:
        if self.step_error is None:
            super()._run_plan()


@mutant(
    "rejected certificates not asked for again",
    at=(assembly._HANDLERS, events.CertificatesRejected),
)
def _stays_rejected(core: Assembly, event: events.CertificatesRejected) -> None:
    """A host that could not store its certificates waits for ever."""
    core.denied = event.reason


@mutant("conflict not told")
class KeepsQuiet(Assembly):
    """A master that meets another ACTIVE cluster of its formation says nothing."""

    def _learn(self, value: Value) -> None:
        super()._learn(value)
        self.conflict = None


if __name__ == "__main__":
    from tests.sim.score import main

    sys.exit(main())
