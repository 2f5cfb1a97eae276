"""Which certificate requests the master may sign, and when admission ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from firstboot.protocol.election import unique_name
from firstboot.protocol.messages import Enrol
from firstboot.protocol.model import ClusterConfig, Issued, Member, Value


@dataclass(slots=True)
class Roster:
    """The master's members of one epoch: every answer it journalled, by node id."""

    issued: dict[str, Issued] = field(default_factory=dict)
    pending: dict[str, Issued] = field(default_factory=dict)  # being signed just now

    def add(self, entry: Issued) -> None:
        """Record a journalled answer."""
        self.pending.pop(entry.member.node_id, None)
        self.issued[entry.member.node_id] = entry

    def decide(
        self,
        config: ClusterConfig,
        value: Value,
        node_id: str,
        request: Enrol,
        seen_at: Collection[str],
        present: Collection[str] | None = None,
    ) -> Member | str:
        """The member to sign for, or why not, in one sentence.

        `seen_at` are the IP addresses at which this host itself met the peer: a request for any
        other address is refused, whoever sends it. `present` are the hosts that are connected now:
        only they still hold their address, others may have been re-created. None: all of them.
        """
        if request.epoch != value.epoch:
            return f"the master of epoch {value.epoch} signs no request of epoch {request.epoch}"
        known = self.issued.get(node_id) or self.pending.get(node_id)
        if known is not None:
            if known.key != request.key:
                return "this host was already enrolled with another key"
            if known.member.host != request.host and value.active:
                return f"this host was enrolled with another address, {known.member.host}"
            return known.member
        if request.host not in seen_at:
            return f"address {request.host} is not where this host was met"
        everyone = [*self.issued.values(), *self.pending.values()]
        if self._held(request.host, node_id, value, present):
            return f"address {request.host} belongs to another member"
        here = {e.member.node_id for e in everyone}
        reserved = sum(m.node_id not in here for m in value.masters)
        named = any(m.node_id == node_id for m in value.masters)
        if full(config, len(everyone) + reserved) and not named:
            return "all expected hosts are enrolled; to admit more, set join.extra"
        member = self._named(value, node_id, request)
        self.pending[node_id] = Issued(member, value.epoch, request.key)
        return member

    def _held(
        self, address: str, node_id: str, value: Value, present: Collection[str] | None
    ) -> bool:
        """Whether another host holds that address: a named master always does."""
        members = [e.member for e in (*self.issued.values(), *self.pending.values())]
        holders = [m for m in members if present is None or m.node_id in present]
        return any(m.host == address and m.node_id != node_id for m in (*value.masters, *holders))

    def _named(self, value: Value, node_id: str, request: Enrol) -> Member:
        for master in value.masters:
            if master.node_id == node_id:
                return master  # its name and address are part of the decided value
        taken = {m.name for m in value.masters}
        taken |= {e.member.name for e in (*self.issued.values(), *self.pending.values())}
        return Member(node_id, unique_name(request.name, node_id, taken), request.host)


def full(config: ClusterConfig, members: int) -> bool:
    """Whether no further host may be enrolled."""
    return config.join_extra is not None and members >= config.expect + config.join_extra
