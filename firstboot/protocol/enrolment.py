"""Which certificate requests the master may sign, and when admission ends."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from firstboot.protocol.election import unique_name
from firstboot.protocol.messages import Enrol
from firstboot.protocol.model import ClusterConfig, Issued, Member, Value


@dataclass(slots=True)
class Roster:
    """The master's members of one epoch: every answer it journalled, by node id.

    Names and addresses are looked up, not searched: the last of ten thousand hosts asks too.
    """

    issued: dict[str, Issued] = field(default_factory=dict)
    pending: dict[str, Issued] = field(default_factory=dict)  # being signed just now
    _names: dict[str, str] = field(init=False, repr=False)  # name -> node id
    _holders: dict[str, set[str]] = field(init=False, repr=False)  # address -> node ids

    def __post_init__(self) -> None:
        self._names, self._holders = {}, {}
        for entry in (*self.issued.values(), *self.pending.values()):
            self._index(entry.member)

    def add(self, entry: Issued) -> None:
        """Record a journalled answer."""
        self.drop(entry.member.node_id)
        self.issued[entry.member.node_id] = entry
        self._index(entry.member)

    def drop(self, node_id: str) -> None:
        """Its request came to nothing."""
        entry = self.pending.pop(node_id, None)
        if entry is not None and node_id not in self.issued:
            self._names.pop(entry.member.name, None)
            self._holders[entry.member.host].discard(node_id)

    def _index(self, member: Member) -> None:
        self._names[member.name] = member.node_id
        self._holders.setdefault(member.host, set()).add(member.node_id)

    def decide(
        self,
        config: ClusterConfig,
        value: Value,
        node_id: str,
        request: Enrol,
        seen_at: Collection[str],
        at: Callable[[str], str | None] | None = None,
    ) -> Member | str:
        """The member to sign for, or why not, in one sentence.

        `seen_at` are the IP addresses at which this host itself met the peer: a request for any
        other address is refused, whoever sends it. `at` tells where a connected host is now: only
        there it still holds its address, others may have moved or been re-created. None: all hold.
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
        if self._held(request.host, node_id, value, at):
            return f"address {request.host} belongs to another member"
        taken = len(self.issued) + len(self.pending)
        absent = [m.node_id for m in value.masters if m.node_id not in self.issued]
        reserved = sum(master not in self.pending for master in absent)
        named = any(m.node_id == node_id for m in value.masters)
        if full(config, taken + reserved) and not named:
            return "all expected hosts are enrolled; to admit more, set join.extra"
        member = self._named(value, node_id, request)
        self.pending[node_id] = Issued(member, value.epoch, request.key)
        self._index(member)
        return member

    def _held(
        self, address: str, node_id: str, value: Value, at: Callable[[str], str | None] | None
    ) -> bool:
        """Whether another host holds that address: a named master always does."""
        if any(m.host == address and m.node_id != node_id for m in value.masters):
            return True
        others = self._holders.get(address, set()) - {node_id}
        return any(at is None or at(other) == address for other in others)

    def _named(self, value: Value, node_id: str, request: Enrol) -> Member:
        for master in value.masters:
            if master.node_id == node_id:
                return master  # its name and address are part of the decided value
        masters = {m.name: m.node_id for m in value.masters}
        name = unique_name(request.name, node_id, ChainMap(self._names, masters))
        return Member(node_id, name, request.host)


def full(config: ClusterConfig, members: int) -> bool:
    """Whether no further host may be enrolled."""
    return config.join_extra is not None and members >= config.expect + config.join_extra
