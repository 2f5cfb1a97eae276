"""The invariants of the formation, checked while a simulated run goes on.

====  ==============================================================================================
I1    At most one cluster id is ever ACTIVE, while any two quorums that were used meet (`safe`);
      where they need not, two masters that meet say CONFLICT or CONFIG_MISMATCH.
I2    At most one founding master is ever ACTIVE, under the same promise.
I3    A unit starts only on a host that holds ACTIVE on disk, as a quorum does; a master's unit only
      where that value names the host as master.
I4    Promised and accepted ballots never decrease; no Promise, Accepted, Granted, Activated,
      Confirmed or Noted leaves before what it says is on disk.
I5    Values accepted under one ballot are equal.
I6    One CA key per host and epoch; at the end only the master's own is left. That a key never
      leaves its host is in the types: no event, action or message carries one (and with
      ``masters: 3`` it travels in no message either); on disk ``tests/adapters/test_pki``.
I7    One key per host and epoch; no more certificates than may be admitted.
I8    What a unit starts with chains to the chosen fingerprint.
I9    A host that has closed neither dials nor accepts on the bootstrap channel, keeps no such
      connection, and whoever must close does. No token bytes on disk, in status or journal:
      ``tests/machines/test_cluster`` (A31), a token holder after CLOSE ``tests/network`` (A29).
I10   Unauthenticated input (an address, a stranger, a failed dial) changes neither what is stored,
      nor the voters, the round or the role, and makes a host do nothing but dial.
I11   What is stored always parses back to the same.
L1    After the faults, with a quorum on, all run within a bound.
L2    Below the quorum the status has the numbers and names who was there and is missing.
L3    Started again after ACTIVE, a host changes nothing (drawn for a share of the runs).
====  ==============================================================================================

W1-W4, L4 and L5, the windows and what comes after ACTIVE, are in `conduct`.

**The promise** holds while 2q > V: q is the smallest quorum that promised before a value was sent
to be accepted, V the number of voter identities that ever voted. A re-created disk is another
identity. A disk set back to a snapshot is one more voter as well, for it forgot what it promised -
unless it had already used a ballot of its own in the forgotten stretch: that it would use again, as
a clone does, and a ballot used for two values is outside of any promise. Copies of one identity
vote twice under the same ballots until they meet: no promise either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.election import Round
from firstboot.protocol.model import (
    Ballot,
    Channel,
    ClusterConfig,
    Issued,
    Register,
    Role,
    Stored,
    Value,
)
from firstboot.protocol.plan import StartUnit, Step
from tests.sim.conduct import Conduct, Violation
from tests.sim.outcome import must_describe

if TYPE_CHECKING:
    from tests.sim.machine import Disk, Host
    from tests.sim.world import World

DESCRIBE_EVERY = 256  # events
UNAUTHENTICATED = frozenset({events.PeerFound, events.StrangerSeen, events.ConnectFailed})


def carries_on(new: Value, old: Value) -> bool:
    """Whether the register may hold `new` once `old` was chosen: the same cluster, or a later one
    if it was not yet ACTIVE.
    """
    if new.cluster_id == old.cluster_id:
        return new.active or not old.active
    return not old.active and new.epoch > old.epoch


class Witness(Conduct):
    """Sees every durable write, message and unit start, and remembers what must agree."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config)
        self.active: dict[str, str] = {}  # cluster id -> founder
        self.by_ballot: dict[Ballot, Value] = {}
        self.acceptors: dict[tuple[Ballot, Value], set[str]] = {}
        self.voters: set[str] = set()
        self.copied = False  # whether one identity was in use twice, or as good as
        self.forgot: set[str] = set()  # identities whose disk was set back
        self.smallest = config.expect  # quorum really used
        self.split_told = False  # whether a split outside the promise was found, and told
        self.keys: dict[tuple[str, int], str] = {}
        self.made: set[tuple[str, int]] = set()
        self._own: dict[str, Ballot] = {}  # the highest ballot of its own that a host used
        self._parsed: set[tuple[Value | None, Value | None]] = set()
        self._looks = 0

    @property
    def safe(self) -> bool:
        """Whether the promise applies: any two quorums that were used meet (2q > V)."""
        return not self.copied and 2 * self.smallest > len(self.voters)

    # ------------------------------------------------------------ disks

    def booted(self, host: Host) -> None:
        """Whether it is a copy."""
        self.copied |= host.node_id in host.world.copied

    def rolled_back(self, host: Host, older: Disk) -> None:
        """One more voter, or as bad as a clone: see the promise above."""
        register, old = host.disk.stored.register, older.stored.register
        if (register, host.disk.authorities) != (old, older.authorities):
            self.copied |= self._own.get(host.node_id, Ballot()) > old.promised
            self.voters.add(f"{host.node_id} as it was before boot {host.boots}")
        self.forgot.add(host.node_id)

    def persisted(self, host: Host, old: Stored, new: Stored) -> None:
        """I4, I5 and I11, and who accepted what."""
        before, after = old.register, new.register
        if after is not before:
            self.must(after.promised >= before.promised, "I4: a promised ballot decreased")
            self.must(after.accepted >= before.accepted, "I4: an accepted ballot decreased")
            self.voters.add(host.node_id)
            if after.promised.node_id == host.node_id:
                self._own[host.node_id] = after.promised
            self._accepted(host, after)
            if after.value is not None:
                self.first_held.setdefault(after.value, host.world.now)
        self.kept(old, new)
        if new.decided is not old.decided and new.decided is not None and new.decided.active:
            self._active(new.decided)
        values = new.decided, after.value
        if values not in self._parsed:
            self._parsed.add(values)
            self._parses(new)

    def _parses(self, stored: Stored) -> None:
        again = messages.from_plain(Stored, messages.to_plain(stored))
        self.must(again == stored, "I11: the state does not parse back")

    def _accepted(self, host: Host, register: Register) -> None:
        if register.value is None:
            return
        known = self.by_ballot.setdefault(register.accepted, register.value)
        same = known == register.value or self.copied
        self.must(same, "I5: two values accepted under one ballot")
        holders = self.acceptors.setdefault((register.accepted, register.value), set())
        if host.node_id not in holders:
            holders.add(host.node_id)
            self._overturned(host.world, register.accepted, register.value)

    def _overturned(self, world: World, ballot: Ballot, value: Value) -> None:
        """I5: what so many accepted that no quorum can miss it, later ballots only carry on."""
        if self.copied:
            return
        enough = len(self.voters) - min(h.document.majority for h in world.hosts)
        chosen = len(self.acceptors[ballot, value]) > enough
        for (other, held), holders in self.acceptors.items():
            if chosen and other > ballot:
                self.must(carries_on(held, value), "I5: a chosen value was overturned")
            elif other < ballot and len(holders) > enough:
                self.must(carries_on(value, held), "I5: a chosen value was overturned")

    def _active(self, value: Value) -> None:
        self.active[value.cluster_id] = value.founder.node_id
        if self.safe:
            one = len(set(self.active.values())) == 1
            self.must(len(self.active) == 1, "I1: two clusters are ACTIVE")
            self.must(one, "I2: two founding masters")

    # ------------------------------------------------------------ messages and connections

    def sent(self, host: Host, action: events.Send) -> None:
        """I4: nothing is said before it is on disk."""
        self.told(host, action.message, action.node_id)
        register = host.disk.stored.register
        match action.message:
            case messages.Promise(ballot=ballot):
                done = register.promised >= ballot
                self.must(done, "I4: a promise left before it was on disk")
            case messages.Accepted(ballot=ballot):
                done = register.accepted >= ballot
                self.must(done, "I4: an acceptance left before it was on disk")
            case messages.Prepare(ballot=ballot) | messages.Accept(ballot=ballot):
                # A copy of this identity may have sent the ballot that this one goes on with.
                done = register.promised >= ballot or host.node_id in host.world.copied
                self.must(done, "I4: a ballot left before it was on disk")

    def dialled(self, host: Host, action: events.Connect) -> None:
        """I9: not on the bootstrap channel once it is shut."""
        quiet = action.channel is Channel.CLUSTER or not host.shut
        self.must(quiet, "I9: a host that has closed dials on the bootstrap channel")

    # ------------------------------------------------------------ events

    def stood(
        self,
        core: Assembly,
        before: tuple[Stored, Round | None, int],
        actions: list[events.Action],
    ) -> None:
        """I10: after an unauthenticated event, if nothing else was due."""
        same = (core.stored, core.round, len(core.voters)) == before
        self.must(same, "I10: a stranger changed what is stored or decided")
        dials = all(type(a) is events.Connect for a in actions)
        self.must(dials, "I10: a stranger made a host do more than dial")

    def look(self, host: Host, core: Assembly, event: events.Event, this: Round | None) -> None:
        """After every event: what quorum a round got by with, and what is held for decided."""
        if type(event) is events.MessageReceived:
            self.heard(host, event)
        if core.round is not this:
            if this is not None and self.wins(core, event, this):
                self.smallest = min(self.smallest, len(this.accepted), len(this.promises))
                self.won(host, this)
            if core.round is not None:
                self.begun(host, core.round)
        if core.round is not None and core.round.value is not None:
            # Whether it wins or not: others find what it asked them to accept.
            self.smallest = min(self.smallest, len(core.round.promises))
        decided = core.stored.decided
        if decided is not host.known:
            host.known = decided
            if decided is not None and decided.active:
                self._active(decided)
        self._looks += 1
        if self._looks % DESCRIBE_EVERY == 0:
            must_describe(host)

    def unit_started(self, host: Host, step: Step) -> None:
        """I3: a unit starts only once a quorum holds ACTIVE on disk. I8: with its certificates."""
        value = host.disk.stored.decided
        if value is None or not value.active:
            raise Violation("I3: a unit started before ACTIVE")
        accepted = [len(ids) for (_, v), ids in self.acceptors.items() if v == value]
        enough = max(accepted, default=0) >= host.document.majority
        # Beyond the promise a later ballot may have overwritten it on the only disk that had it.
        self.must(enough or not self.safe, "I3: a unit started though no quorum holds ACTIVE")
        if isinstance(step, StartUnit):
            wanted = Role.MASTER if step.unit == "master.service" else Role.NODE
            mine = value.role_of(host.node_id) is wanted
            self.must(mine, "I3: a unit of another role started")
        chains = host.disk.certificates == value.fingerprint
        self.must(chains, "I8: certificates of another CA")

    # ------------------------------------------------------------ certificates

    def authority_made(self, host: Host, epoch: int) -> None:
        """I6: one CA key per epoch and host."""
        forgot = host.boots if host.node_id in self.forgot else 0
        where = (f"{host.node_id} {host.index} {forgot}", epoch)  # a copied disk makes its own
        self.must(where not in self.made, "I6: a second CA key for one epoch")
        self.made.add(where)

    def signed(self, host: Host, entry: Issued) -> None:
        """I7: one key per host and epoch, and no more members than may be admitted."""
        where = (host.disk.authorities[entry.epoch] + entry.member.node_id, entry.epoch)
        known = self.keys.setdefault(where, entry.key)
        if host.node_id not in self.forgot | host.world.copied:
            self.must(known == entry.key, "I7: two keys for one host in one epoch")
            self.answered(host, entry)
        config = host.document
        if config.join_extra is not None:
            members = sum(epoch == entry.epoch for epoch, _ in host.disk.issued)
            bound = config.expect + config.join_extra + config.masters
            self.must(members <= bound, "I7: more members than may be admitted")

    # ------------------------------------------------------------ the end

    def finish(self, world: World) -> None:
        """At the end: one cluster, no CA key but its master's, a sentence from everybody."""
        for host in world.hosts:
            must_describe(host)
            self._parses(host.disk.stored)
            self._closed(host)
        cores = [h.core for h in world.hosts if h.core is not None and h.core.open]
        alone = [c for c in cores if c.founder and c.decided and c.decided.active and not c.failure]
        if self.safe:
            held = [h.disk.stored.decided for h in world.hosts]
            values = {v.cluster_id for v in held if v is not None and v.active}
            self.must(len(values) <= 1, "I1: hosts hold different clusters at the end")
            for host in world.hosts:
                self._no_stale_authority(world, host)
        elif len(alone) > 1 and not self.copied:
            told = all(c.conflict or any(p.mismatch for p in c.peers.values()) for c in alone)
            self.must(told, "I1: two clusters are ACTIVE, their masters meet and say nothing")
            self.split_told = True

    def _closed(self, host: Host) -> None:
        """I9: who runs a node's role, or left, has closed and keeps no bootstrap connection."""
        core = host.core
        if host.gone:
            self.must(host.shut, "I9: a host left without closing")
        elif core is not None and core.running and not core.founder:
            self.must(core.closed, "I9: a node that runs its role does not close")
        kept = host.shut and any(c is Channel.BOOTSTRAP for _, c in host.channels)
        self.must(not kept, "I9: a bootstrap connection outlived CLOSE")

    def _no_stale_authority(self, world: World, host: Host) -> None:
        value, kept = host.disk.stored.decided, set(host.disk.authorities)
        if value is None or not value.active or host.core is None or host.node_id in self.forgot:
            return
        if host.busy or (world.hostile and world.faults.disk_errors):
            return  # it is about to, or to try again
        allowed = {value.epoch} if value.founder.node_id == host.node_id else set()
        self.must(kept <= allowed, "I6: a CA key of another epoch, or no master's, is kept")


__all__ = ["Violation", "Witness"]
