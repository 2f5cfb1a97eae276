"""The replicated register: single-decree Paxos whose value may still change, step by step.

Every host is an acceptor. A value is *chosen* once a quorum accepted it under one ballot, and
any later ballot's first phase then finds it, because two quorums share a voter (Lamport, "Paxos
Made Simple", 2001; change functions after Rystsov, "CASPaxos", 2018). The functions here are the
whole of that argument; `assembly` decides when to call them and persists before it answers.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from firstboot.protocol.messages import Promise
from firstboot.protocol.model import Ballot, ClusterConfig, Member, Register, Value


def quorum(config: ClusterConfig, *, in_grace: bool, voters_seen: int) -> int:
    """How many voters must promise and accept.

    All of ``expect`` while in the grace period or with ``election: strict``; later a majority of
    ``expect`` and of all voters ever seen, whichever is more. Never less than a majority of
    ``expect``, so any two quorums meet as long as no surplus host votes.
    """
    if config.strict or in_grace:
        return config.expect
    return max(config.majority, voters_seen // 2 + 1)


def overlaunched(config: ClusterConfig, *, in_grace: bool, voters_seen: int) -> bool:
    """Whether so many voters exist that two quorums need not meet: then nobody may propose."""
    return voters_seen > 2 * quorum(config, in_grace=in_grace, voters_seen=voters_seen) - 1


# ---------------------------------------------------------------- acceptor


def promise(register: Register, ballot: Ballot) -> Register | None:
    """The register after promising `ballot`, or None if a higher one was promised."""
    return replace(register, promised=ballot) if ballot >= register.promised else None


def accept(register: Register, ballot: Ballot, value: Value) -> Register | None:
    """The register after accepting, or None if a higher ballot was promised."""
    if ballot < register.promised:
        return None
    if ballot == register.accepted and value != register.value:
        return None  # only two copies of one identity can ask for that
    return Register(promised=ballot, accepted=ballot, value=value)


# ---------------------------------------------------------------- proposer


class Purpose(StrEnum):
    """What a round is for: the change it makes if the register allows it."""

    FOUND = "found"  # EMPTY -> CANDIDATE(1) with this host as master
    READ = "read"  # finish what others began, change nothing
    REPLACE = "replace"  # CANDIDATE(e) -> CANDIDATE(e + 1) with this host as master
    ACTIVATE = "activate"  # CANDIDATE(e) -> ACTIVE(e), by e's master


@dataclass(slots=True)
class Round:
    """One ballot of this host's, from Prepare to chosen."""

    ballot: Ballot
    purpose: Purpose
    expires: float
    base: Value | None = None  # what REPLACE and ACTIVATE start from
    promises: dict[str, Promise] = field(default_factory=dict)
    value: Value | None = None  # set when phase 2 begins
    accepted: set[str] = field(default_factory=set)

    @property
    def replacing(self) -> int:
        """The epoch whose master this round wants to replace, or 0."""
        return self.base.epoch if self.purpose is Purpose.REPLACE and self.base else 0

    def found(self) -> Value | None:
        """The accepted value with the highest ballot among the promises; None for EMPTY."""
        newest = max(self.promises.values(), key=lambda p: p.accepted)
        return newest.value

    def changes(self) -> bool:
        """Whether this round may change what it found, rather than re-propose it."""
        current = self.found()
        if self.purpose is Purpose.FOUND:
            return current is None
        return self.purpose is not Purpose.READ and current is not None and current == self.base


def next_ballot(register: Register, seen: int, node_id: str) -> Ballot:
    """A ballot above all this host promised or heard of; `seen` is the highest number heard."""
    return Ballot(max(register.promised.number, register.accepted.number, seen) + 1, node_id)


def supersedes(new: Value, old: Value | None) -> bool:
    """Whether `new` comes later in the order of the register's values; ACTIVE is last."""
    return old is None or (new.active, new.epoch) > (old.active, old.epoch)


# ---------------------------------------------------------------- who is named


def unique_name(wanted: str, node_id: str, taken: Container[str]) -> str:
    """`wanted`, or with the start of the node id behind it if that name is `taken`.

    Images boot with one host name on every machine more often than not.
    """
    name, length = wanted, 8
    while name in taken:
        suffix = node_id[:length] if length <= len(node_id) else f"{node_id}-{length}"
        name = f"{wanted[: 62 - len(suffix)].rstrip('-')}-{suffix}"
        length += 1
    return name


def name_members(hosts: Iterable[Member]) -> tuple[Member, ...]:
    """The same members in order, with names made unique."""
    named: list[Member] = []
    for host in hosts:
        names = {m.name for m in named}
        name = unique_name(host.name, host.node_id, names)
        named.append(replace(host, name=name))
    return tuple(named)
