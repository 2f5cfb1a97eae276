"""This host as a voter: it promises, accepts and proposes, by the rules of `election`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firstboot.protocol import election, events, messages
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.enrolment import Roster
from firstboot.protocol.model import NEVER, Member, Value, soonest
from firstboot.protocol.situation import HEARTBEAT, Situation, Start

RANK_STEP = 0.3  # head start of each better-ranked host before the next proposes, seconds
YIELD = 1.0  # how long a promise keeps a host from proposing itself
ROUND_TIME = 2.0
MASTER_SILENT = 30.0  # before a master of a CANDIDATE may be replaced


class Voter(Situation):
    """Adds the register to the situation: acceptor, proposer, and what was learnt."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.roster = self._roster(start.stored.decided.epoch if start.stored.decided else 0)
        self.round: Round | None = None
        self.can_since: float | None = None  # since when a quorum is present
        self.master_heard = start.now
        self._yield_until = start.now
        self._backoff = 0.0
        self._failed_rounds = 0
        self._seen_number = 0
        self._authority_asked = 0
        self._dropped = 0  # the epoch up to which this host's CAs were to be destroyed
        self._swept = start.stored.decided is None  # else what was decided is on disk

    def _on_prepare(self, sender: str, message: messages.Prepare) -> None:
        ballot = message.ballot
        self._seen_number = max(self._seen_number, ballot.number)
        if not self._may_vote(sender):
            return
        if message.replacing and self._master_lives(sender, message.replacing):
            self._send(sender, messages.Refused(ballot, self.stored.register.promised, True))
            return
        promised = election.promise(self.stored.register, ballot)
        if promised is None:
            self._send(sender, messages.Refused(ballot, self.stored.register.promised))
            return
        self._yield_until = self.now + YIELD
        reply = messages.Promise(ballot, promised.accepted, promised.value)
        self._store(lambda: self._send(sender, reply), register=promised)

    def _on_accept(self, sender: str, message: messages.Accept) -> None:
        self._seen_number = max(self._seen_number, message.ballot.number)
        if not self._may_vote(sender):
            return
        accepted = election.accept(self.stored.register, message.ballot, message.value)
        if accepted is None:
            refusal = messages.Refused(message.ballot, self.stored.register.promised)
            self._send(sender, refusal)
            return
        self._yield_until = self.now + YIELD
        reply = messages.Accepted(message.ballot)
        self._store(lambda: self._send(sender, reply), register=accepted)

    def _may_vote(self, sender: str) -> bool:
        """Votes end with ACTIVE: whoever still asks is told about it."""
        if self.decided is not None and self.decided.active:
            self._send(sender, self._hello())
            return False
        return self.me.voter

    def _master_lives(self, sender: str, epoch: int) -> bool:
        """Whether the master of `epoch` needs no replacing, as far as this host can tell."""
        value = self.decided or self.stored.register.value
        if value is None or value.epoch != epoch or value.founder.node_id == sender:
            return False
        return self.founder or self.now - self.master_heard < MASTER_SILENT

    def _decision_at(self) -> float:
        """When something is next to be decided, if nothing happens before."""
        value = self.decided
        if value is not None and value.active:
            return NEVER
        since, grace = self.majority_since, NEVER
        if since is not None:
            grace = since + self.config.grace
        if self.round is not None:
            return soonest(self.now, grace, self.round.expires)
        if value is None:
            propose = NEVER if self.can_since is None else self._propose_at()
            return soonest(self.now, grace, propose)
        silent, again = self.master_heard + MASTER_SILENT, self._yield_until + self._backoff
        return soonest(self.now, grace, silent, self._replace_at(), again)

    def _decide(self) -> None:
        """Propose, replace or activate if it is this host's turn."""
        if self.round is not None and self.now >= self.round.expires:
            self._give_up()
        present = self.present_voters()
        if self.majority_since is None and present >= self.config.majority:
            self.majority_since = self.now  # the quorum depends on it
        if not self.me.voter or present < self.quorum or self.overlaunched:
            self.can_since = None
            return
        if self.can_since is None:
            self.can_since = self.now
        if self.round is not None:
            return
        if self.decided is None:
            self._found_or_finish()
        elif self.founder:
            self._activate_when_enrolled(self.decided)
        elif self.now >= self._replace_at() and self.me.eligible:
            self._start_round(Purpose.REPLACE, self.decided)

    def _found_or_finish(self) -> None:
        """Propose this host as master, or finish what it saw another begin."""
        if self.active_seen or self.now < self._propose_at():
            return
        if self.me.eligible and self._masters():
            self._start_round(Purpose.FOUND, None)
        elif self.stored.register.value is not None:
            self._start_round(Purpose.READ, None)

    def _rank(self) -> int:
        """How many present hosts come before this one as proposers."""
        return self.company.before(self.standing)

    def _propose_at(self) -> float:
        can_since = self.now if self.can_since is None else self.can_since
        return max(can_since, self._yield_until) + self._rank() * RANK_STEP + self._backoff

    def _replace_at(self) -> float:
        silent = max(self.master_heard + MASTER_SILENT, self._yield_until)
        return silent + self._rank() * RANK_STEP + self._backoff

    def _start_round(self, purpose: Purpose, base: Value | None) -> None:
        ballot = election.next_ballot(self.stored.register, self._seen_number, self.me.node_id)
        promised = election.promise(self.stored.register, ballot)
        if promised is None:
            return
        this = Round(ballot, purpose, self.now + ROUND_TIME, base)
        self.round = this
        if purpose is Purpose.FOUND:
            self._ask_authority(1)  # while the promises travel
        own = messages.Promise(ballot, promised.accepted, promised.value)

        def promised_myself() -> None:
            if self.round is this:
                for peer in self.company:
                    self._send_round(peer.node_id, this)
                self._on_promise(self.me.node_id, own)

        self._store(promised_myself, register=promised)

    def _send_round(self, node_id: str, this: Round) -> None:
        if this.value is not None:
            self._send(node_id, messages.Accept(this.ballot, this.value))
        else:
            self._send(node_id, messages.Prepare(this.ballot, this.replacing))

    def _on_promise(self, sender: str, message: messages.Promise) -> None:
        this = self.round
        if this is None or message.ballot != this.ballot or this.value is not None:
            return
        this.promises[sender] = message
        self._second_phase(this)

    def _second_phase(self, this: Round) -> None:
        """With a quorum of promises, propose what they call for."""
        if self.round is not this or this.value is not None or len(this.promises) < self.quorum:
            return
        value = self._change(this) if this.changes() else this.found()
        accepted = value and election.accept(self.stored.register, this.ballot, value)
        if value is None or accepted is None:
            if not self._authority_asked:
                # Nothing to propose: others, who may reach more voters, get their turn first.
                self._give_up(rest=2 * HEARTBEAT if value is None else 0.0)
            return
        this.value = value
        own = messages.Accepted(this.ballot)
        self._store(lambda: self._on_accepted(self.me.node_id, own), register=accepted)
        for peer in self.company:
            self._send(peer.node_id, messages.Accept(this.ballot, value))

    def _change(self, this: Round) -> Value | None:
        """The round's change applied; None while the cluster CA it needs is being made."""
        if this.purpose is Purpose.ACTIVATE and this.base is not None:
            return replace(this.base, active=True, members=len(self.roster.issued))
        epoch = this.base.epoch + 1 if this.purpose is Purpose.REPLACE and this.base else 1
        if self.stored.authority_epoch != epoch:
            self._ask_authority(epoch)
            return None
        masters = self._masters()
        if not masters:
            return None
        return Value(epoch, self.stored.authority_fingerprint, masters)

    def _masters(self) -> tuple[Member, ...]:
        """This host first, then the best-ranked present hosts; empty if there are too few."""
        chosen = [Member(self.me.node_id, self.me.name, self.me.endpoint.host)]
        for _, _, node_id in self.company.standings:
            if len(chosen) == self.config.masters:
                break
            hello = self.peers[node_id].hello
            # An address that just changed hands is its old holder's only until that says so.
            taken = {member.host for member in chosen}
            if hello is not None and hello.eligible and hello.endpoint.host not in taken:
                chosen.append(Member(node_id, hello.name, hello.endpoint.host))
        return election.name_members(chosen) if len(chosen) == self.config.masters else ()

    def _ask_authority(self, epoch: int) -> None:
        if self.stored.authority_epoch != epoch and self._authority_asked != epoch:
            self._authority_asked = epoch
            self._actions.append(events.MakeAuthority(epoch))

    def _on_authority(self, event: events.AuthorityMade) -> None:
        self._authority_asked = 0
        value = self.decided
        if value is not None and self._kept != event.epoch <= self._stale_until(value):
            # Made for a round that was won meanwhile, by another host or in an earlier epoch.
            self._store(lambda: self._drop_authority(event.epoch))
            return

        def on_disk() -> None:
            if self.round is not None:
                self._second_phase(self.round)

        self._store(on_disk, authority_epoch=event.epoch, authority_fingerprint=event.fingerprint)

    def _on_accepted(self, sender: str, message: messages.Accepted) -> None:
        this = self.round
        if this is None or this.value is None or message.ballot != this.ballot:
            return
        this.accepted.add(sender)
        if len(this.accepted) >= self.quorum:
            self.round = None
            self._failed_rounds, self._backoff = 0, 0.0
            self._learn(this.value)

    def _on_refused(self, message: messages.Refused) -> None:
        self._seen_number = max(self._seen_number, message.promised.number)
        if self.round is not None and message.ballot == self.round.ballot:
            self._give_up()
            if message.master_alive:
                self._backoff = max(self._backoff, HEARTBEAT)

    def _give_up(self, rest: float = 0.0) -> None:
        """This ballot lost: wait `rest` and a random while, longer each time, before the next."""
        self.round = None
        self._authority_asked = 0
        self._failed_rounds += 1
        self._backoff = rest + self.rng.random() * min(0.1 * 2**self._failed_rounds, 3.0)
        self._yield_until = max(self._yield_until, self.now)

    def _roster(self, epoch: int) -> Roster:
        """The members this host journalled in that epoch, should it have been its master."""
        return Roster({node: i for (e, node), i in self.journal.items() if e == epoch})

    def _learn(self, value: Value) -> None:
        """A value is known to be chosen."""
        old = self.decided
        self.active_seen |= value.active
        if old is not None and old.active:
            if value.active and value.cluster_id != old.cluster_id:
                self.conflict = value  # two clusters: raise the alarm, touch nothing
            return
        if not election.supersedes(value, old):
            return
        changes: dict[str, Any] = {"decided": value}
        if old is None or old.fingerprint != value.fingerprint:
            self.master_heard = self.now
            self._forget_enrolment()
        stale = self._stale_until(value)
        kept = self._kept_of(value)
        self.journal = {k: i for k, i in self.journal.items() if k[0] > stale or k[0] == kept}
        self.roster = self._roster(value.epoch)
        if 0 < self.stored.authority_epoch <= stale:
            fingerprint = value.fingerprint if kept else ""
            changes |= {"authority_epoch": kept, "authority_fingerprint": fingerprint}
        self.round = None
        acts = value.active and value.founder.node_id == self.me.node_id
        changes["activated"] = self.stored.activated or acts

        def on_disk() -> None:
            # Not before: a host that forgot the decision would make that CA a second time.
            if stale:
                self._drop_authority(stale)
            if acts:
                self._activated()

        self._store(on_disk, **changes)
        self._greet_everyone()

    def _forget_enrolment(self) -> None:
        """Another cluster CA was decided: what was asked of the old one is void."""

    def _activated(self) -> None:
        """ACTIVE is on this host's disk: from here on it may act on it."""
        self.may_start = True

    def _sweep(self) -> None:
        """Once after a start: a CA that a crash left unrecorded is destroyed as well."""
        self._swept = True
        stale = self._stale_until(self.decided) if self.decided is not None else 0
        if stale:
            self._drop_authority(stale)

    def _drop_authority(self, epoch: int) -> None:
        self._dropped = max(self._dropped, epoch)  # asked again should the disk fail
        self._actions.append(events.DropAuthority(self._dropped, self._kept))

    def _kept_of(self, value: Value) -> int:
        """The epoch of the one cluster CA this host must keep once `value` is chosen, or 0."""
        return value.epoch if value.founder.node_id == self.me.node_id else 0

    @property
    def _kept(self) -> int:
        return self._kept_of(self.decided) if self.decided is not None else 0

    def _stale_until(self, value: Value) -> int:
        """The epoch up to which any other cluster CA of this host's is void, with that value."""
        # ACTIVE is last: what was made for the next epoch is void, also if a crash left it unnoted.
        last = max(value.epoch + 1, self.stored.authority_epoch) if value.active else value.epoch
        return last - 1 if last == self._kept_of(value) else last

    def _activate_when_enrolled(self, value: Value) -> None:
        if not self.enrolled or self.now < self._yield_until + self._backoff:
            return
        issued = self.roster.issued
        if not all(m.node_id in issued for m in value.masters):
            # Those it named had their time to enrol: `master_heard` is when the value was chosen.
            late = not self.in_grace and self.now >= self.master_heard + MASTER_SILENT
            if late and self._masters():
                self._start_round(Purpose.REPLACE, value)
        elif self._moved(value):
            self._start_round(Purpose.REPLACE, value)  # all must learn the new address
        elif len(issued) >= self._wanted_members():
            self._start_round(Purpose.ACTIVATE, value)

    def _moved(self, value: Value) -> bool:
        """Whether this founder, or another master it names, is elsewhere now."""
        if value.founder.host != self.me.endpoint.host:
            return True
        return any(self.company.at(m.node_id) not in (None, m.host) for m in value.masters)

    def _wanted_members(self) -> int:
        whole = self.in_grace or self.config.strict
        # More may have to vote than may become members, where surplus hosts were seen.
        return self.config.expect if whole else min(self.quorum, self.config.expect)
