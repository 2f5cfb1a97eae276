"""I1-I5 of the formation, checked while a simulated run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from firstboot.protocol import events, messages
from firstboot.protocol.model import Ballot, ClusterConfig, Issued, Register, Stored, Value

if TYPE_CHECKING:
    from tests.sim.world import Host, World


class Violation(AssertionError):
    """An invariant does not hold."""


class Witness:
    """Sees every durable write, message and unit start, and remembers what must agree."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.checks = 0
        self.active: dict[str, str] = {}  # cluster id -> founder
        self.by_ballot: dict[Ballot, Value] = {}
        self.acceptors: dict[tuple[Ballot, Value], set[str]] = {}
        self.voters: set[str] = set()
        self.keys: dict[tuple[str, int], str] = {}

    def must(self, holds: bool, what: str) -> None:
        """Raise Violation(what) unless it holds."""
        self.checks += 1
        if not holds:
            raise Violation(what)

    @property
    def safe(self) -> bool:
        """Whether the promise applies: any two quorums meet (2q > V)."""
        return 2 * self.config.majority > len(self.voters)

    def persisted(self, host: Host, old: Stored, new: Stored) -> None:
        """I4 and I5, and who accepted what."""
        before, after = old.register, new.register
        self.must(after.promised >= before.promised, "I4: a promised ballot decreased")
        self.must(after.accepted >= before.accepted, "I4: an accepted ballot decreased")
        self._accepted(host.node_id, after)
        if new.decided is not None and new.decided.active:
            self._active(new.decided)

    def _accepted(self, node_id: str, register: Register) -> None:
        if register.value is None:
            return
        known = self.by_ballot.setdefault(register.accepted, register.value)
        self.must(known == register.value, "I5: two values accepted under one ballot")
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

    def look(self, host: Host) -> None:
        """After every event: what this host holds for decided."""
        core = host.core
        if core is not None and core.decided is not None and core.decided.active:
            self._active(core.decided)

    def unit_started(self, host: Host) -> None:
        """I3: a unit starts only once a quorum holds ACTIVE on disk."""
        value = host.disk.stored.decided
        self.must(value is not None and value.active, "I3: a unit started before ACTIVE")
        accepted = [len(ids) for (_, v), ids in self.acceptors.items() if v == value]
        enough = max(accepted, default=0) >= self.config.majority
        self.must(enough, "I3: a unit started though no quorum holds ACTIVE")

    def signed(self, host: Host, entry: Issued) -> None:
        """One key per host and epoch."""
        where = (host.disk.authorities[entry.epoch] + entry.member.node_id, entry.epoch)
        known = self.keys.setdefault(where, entry.key)
        self.must(known == entry.key, "I7: two keys for one host in one epoch")

    def finish(self, world: World) -> None:
        """At the end: everybody is in the one cluster."""
        values = {h.disk.stored.decided.cluster_id for h in world.hosts if h.disk.stored.decided}
        if self.safe:
            self.must(len(values) <= 1, "I1: hosts hold different clusters at the end")
