"""I1-I8 and I11 of the formation, checked while a simulated run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstboot.protocol import events, messages
from firstboot.protocol.election import Round
from firstboot.protocol.model import Ballot, ClusterConfig, Issued, Register, Stored, Value
from tests.sim.conduct import Conduct, Violation
from tests.sim.outcome import must_describe

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World

DESCRIBE_EVERY = 64  # events


class Witness(Conduct):
    """Sees every durable write, message and unit start, and remembers what must agree."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config)
        self.active: dict[str, str] = {}  # cluster id -> founder
        self.by_ballot: dict[Ballot, Value] = {}
        self.acceptors: dict[tuple[Ballot, Value], set[str]] = {}
        self.voters: set[str] = set()
        self.copied = False  # whether two disks with one identity are in use
        self.smallest = config.expect  # quorum really used
        self.keys: dict[tuple[str, int], str] = {}
        self.made: set[tuple[str, int]] = set()
        self._looks = 0

    @property
    def safe(self) -> bool:
        """Whether the promise applies: any two quorums that were used meet (2q > V).

        Copies of one identity vote twice under the same ballots until they meet: no promise then.
        """
        return not self.copied and 2 * self.smallest > len(self.voters)

    def booted(self, host: Host) -> None:
        """One more that may vote."""
        if host.disk.lost:
            return
        self.copied |= host.identity_of is not None
        self.voters.add(host.node_id)

    def persisted(self, host: Host, old: Stored, new: Stored) -> None:
        """I4, I5 and I11, and who accepted what."""
        before, after = old.register, new.register
        self.must(after.promised >= before.promised, "I4: a promised ballot decreased")
        self.must(after.accepted >= before.accepted, "I4: an accepted ballot decreased")
        self.kept(old, new)
        if after.value is not None:
            self.first_held.setdefault(after.value, host.world.now)
        self._accepted(host.node_id, after)
        if new.decided is not None and new.decided.active:
            self._active(new.decided)
        if new.decided is not old.decided or after.value is not before.value:
            again = messages.from_plain(Stored, messages.to_plain(new))
            self.must(again == new, "I11: the state does not parse back")

    def _accepted(self, node_id: str, register: Register) -> None:
        if register.value is None:
            return
        known = self.by_ballot.setdefault(register.accepted, register.value)
        self.must(
            known == register.value or self.copied, "I5: two values accepted under one ballot"
        )
        self.acceptors.setdefault((register.accepted, register.value), set()).add(node_id)

    def _active(self, value: Value) -> None:
        self.active[value.cluster_id] = value.founder.node_id
        if self.safe:
            self.must(len(self.active) == 1, "I1: two clusters are ACTIVE")
            self.must(len(set(self.active.values())) == 1, "I2: two founding masters")

    def sent(self, host: Host, action: events.Send) -> None:
        """I4: no reply leaves before its Persist is done."""
        disk = host.disk.stored.register
        match action.message:
            case messages.Promise(ballot=ballot):
                self.must(disk.promised >= ballot, "I4: a promise left before it was on disk")
            case messages.Accepted(ballot=ballot):
                self.must(disk.accepted >= ballot, "I4: an acceptance left before it was on disk")
            case message:
                self.told(host, message, action.node_id)

    def look(self, host: Host, event: events.Event, before: Round | None) -> None:
        """After every event: which quorum a round got by with, and what is held for decided."""
        core = host.core
        if core is None:
            return
        self.heard(host, event)
        if before is not None and before is not core.round and self.wins(core, event, before):
            self.smallest = min(self.smallest, len(before.accepted), len(before.promises))
            self.won(host, before)
        if core.round is not None and core.round is not before:
            self.begun(host, core.round)
        if core.decided is not None and core.decided.active:
            self._active(core.decided)
        self._looks += 1
        if self._looks % DESCRIBE_EVERY == 0:
            must_describe(host)

    def unit_started(self, host: Host) -> None:
        """I3: a unit starts only once a quorum holds ACTIVE on disk. I8: with its certificates."""
        value = host.disk.stored.decided
        self.must(value is not None and value.active, "I3: a unit started before ACTIVE")
        accepted = [len(ids) for (_, v), ids in self.acceptors.items() if v == value]
        enough = max(accepted, default=0) >= self.config.majority
        self.must(enough, "I3: a unit started though no quorum holds ACTIVE")
        chosen = value.fingerprint if value is not None else ""
        self.must(host.disk.certificates == chosen, "I8: certificates of another CA")

    def authority_made(self, host: Host, epoch: int) -> None:
        """I6: one CA key per epoch and host."""
        where = (f"{host.node_id} {host.index}", epoch)  # a copied disk makes its own
        self.must(where not in self.made, "I6: a second CA key for one epoch")
        self.made.add(where)

    def signed(self, host: Host, entry: Issued) -> None:
        """I7: one key per host and epoch, and no more members than may be admitted."""
        where = (host.disk.authorities[entry.epoch] + entry.member.node_id, entry.epoch)
        known = self.keys.setdefault(where, entry.key)
        self.must(known == entry.key, "I7: two keys for one host in one epoch")
        self.answered(host, entry)
        if self.config.join_extra is not None:
            members = sum(epoch == entry.epoch for epoch, _ in host.disk.issued)
            bound = self.config.expect + self.config.join_extra + self.config.masters
            self.must(members <= bound, "I7: more members than may be admitted")

    def finish(self, world: World) -> None:
        """At the end: one cluster, no CA key but its master's, a sentence from everybody."""
        for host in world.hosts:
            must_describe(host)
        cores = [h.core for h in world.hosts if h.core is not None and h.core.open]
        alone = [c for c in cores if c.founder and c.decided and c.decided.active and not c.failure]
        if self.safe:
            held = [h.disk.stored.decided for h in world.hosts]
            values = {v.cluster_id for v in held if v is not None and v.active}
            self.must(len(values) <= 1, "I1: hosts hold different clusters at the end")
            for host in world.hosts:
                self._no_stale_authority(host)
        elif len(alone) > 1 and not self.copied:
            told = all(c.conflict is not None for c in alone)
            self.must(told, "two clusters are ACTIVE, their masters meet and do not say so")

    def _no_stale_authority(self, host: Host) -> None:
        value, kept = host.disk.stored.decided, set(host.disk.authorities)
        if value is None or not value.active or host.core is None:
            return
        allowed = {value.epoch} if value.founder.node_id == host.node_id else set()
        self.must(kept <= allowed, "I6: a CA key of another epoch, or of no master, is still kept")


__all__ = ["Violation", "Witness"]
