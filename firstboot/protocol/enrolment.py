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
    ) -> Member | str:
        """The member to sign for, or why not, in one sentence.

        `seen_at` are the IP addresses at which this host itself met the peer: a request for any
        other address is refused, whoever sends it.
        """
        if request.epoch != value.epoch:
            return f"the master of epoch {value.epoch} signs no request of epoch {request.epoch}"
        known = self.issued.get(node_id) or self.pending.get(node_id)
        if known is not None:
            if known.key != request.key:
                return "this host was already enrolled with another key"
            return known.member
        if request.host not in seen_at:
            return f"address {request.host} is not where this host was met"
        everyone = [*self.issued.values(), *self.pending.values()]
        if any(e.member.host == request.host for e in everyone):
            return f"address {request.host} belongs to another member"
        if full(config, len(everyone)) and value.role_of(node_id).value != "master":
            return "all expected hosts are enrolled; to admit more, set join.extra"
        member = self._named(value, node_id, request)
        self.pending[node_id] = Issued(member, value.epoch, request.key)
        return member

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
