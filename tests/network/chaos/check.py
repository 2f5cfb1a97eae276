"""I1-I8 of the formation, looked for in a finished run's trail. Pure: evidence in, findings out.

Each check stands alone and trusts the core as little as it can: that a vote was on disk is told by
the voter's own history, that it was counted by the proposer's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from firstboot import pki
from firstboot.protocol import events, messages
from firstboot.protocol.model import Ballot, Stored, Value
from tests.network.chaos.evidence import Life, Trail


@dataclass
class Findings:
    """What was checked, how often, and what does not hold."""

    checks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    active: set[str] = field(default_factory=set)  # cluster ids
    voters: int = 0
    quorum: int = 0  # the smallest that decided anything
    split: bool = False  # two clusters where the promise does not reach: 2q <= V

    def must(self, invariant: str, holds: bool, what: str) -> None:
        """Count a check, and note it if it fails."""
        self.checks[invariant] += 1
        if not holds:
            self.wrong.append(f"{invariant}: {what}")


def check(trail: Trail, lives: Collection[Life], told: Collection[str] = ()) -> Findings:
    """Everything; `told` are the problem codes that any host's status named after the faults."""
    found = Findings()
    if not trail.wakings:
        return found
    _one_cluster(trail, lives, found, told)
    _nothing_before_active(trail, found)
    _ballots(trail, lives, found)
    _replies(trail, found)
    _one_value_per_ballot(trail, found)
    _keys(trail, found)
    _certificates(trail, lives, found)
    return found


def _short(value: Value) -> str:
    kind = "ACTIVE" if value.active else "CANDIDATE"
    return f"{kind}({value.epoch}, {value.founder.node_id[:8]}, {value.cluster_id[:8]})"


def _decided(trail: Trail, lives: Collection[Life]) -> Iterator[Value | None]:
    """What anybody ever held for decided, or told others: from disks and messages as well, so that
    a host that broke the rules is not believed to have kept them."""
    yield from (life.state.decided for life in lives if life.state is not None)
    yield from (w.found.decided for w in trail.wakings)
    for moment in trail.moments:
        yield moment.decided
        yield moment.durable.decided
        if isinstance(moment.event, events.MessageReceived):
            match moment.event.message:
                case messages.Hello(decided=value) | messages.Activated(value=value):
                    yield value


def _one_cluster(
    trail: Trail, lives: Collection[Life], found: Findings, told: Collection[str]
) -> None:
    """I1 and I2; where the promise does not reach, that a split is told."""
    active = {v for v in _decided(trail, lives) if v is not None and v.active}
    quorums = [m.chosen[0] for m in trail.moments if m.chosen is not None]
    found.active = {v.cluster_id for v in active}
    found.voters = len(trail.voters)
    found.quorum = min(quorums, default=trail.config.expect)
    values = ", ".join(sorted(map(_short, active)))
    if 2 * found.quorum > found.voters:
        found.must("I1", len(found.active) <= 1, f"several clusters: {values}")
        founders = {v.founder.node_id for v in active}
        found.must("I2", len(founders) <= 1, f"several founding masters: {values}")
    elif len(found.active) > 1:
        found.split = True
        found.must("I1", "CONFLICT" in told, f"a split that nobody names: {values}")
    owners = {m.node_id for m in trail.moments if isinstance(m.event, events.StepDone)}
    owners = {o for o in owners if any(v.founder.node_id == o for v in active)}
    found.must("I2", len(owners) <= max(1, len(found.active)), f"founders ran: {owners}")


def _accepted_when(trail: Trail) -> dict[tuple[Ballot, Value], dict[str, float]]:
    """For each ballot and value: which voters had accepted it on disk, and since when."""
    when: dict[tuple[Ballot, Value], dict[str, float]] = {}
    for at, node_id, stored in _durable(trail):
        register = stored.register
        if register.value is not None:
            since = when.setdefault((register.accepted, register.value), {})
            since[node_id] = min(at, since.get(node_id, at))
    return when


def _durable(trail: Trail) -> Iterator[tuple[float, str, Stored]]:
    """Every state that is known to have been on a disk, in no order."""
    yield from ((w.at, w.node_id, w.found) for w in trail.wakings)
    yield from ((m.at, m.node_id, m.durable) for m in trail.moments)


def _nothing_before_active(trail: Trail, found: Findings) -> None:
    """I3: a step of the role runs only once a quorum has that ACTIVE value on disk."""
    when = _accepted_when(trail)
    config = trail.config
    quorum = config.expect if config.strict else config.majority
    for moment in trail.moments:
        starts = any(isinstance(a, events.RunStep) for a in moment.actions)
        if not starts and not isinstance(moment.event, events.StepDone):
            continue
        value = moment.decided
        who = f"{moment.life} at {moment.at:.3f}"
        found.must("I3", value is not None and value.active, f"{who} acts early")
        if value is not None:
            # Once ACTIVE is on as many disks under one ballot, it is chosen, whatever comes later.
            counts = [
                sum(at <= moment.at for at in since.values())
                for (_, v), since in when.items()
                if (v.cluster_id, v.active) == (value.cluster_id, True)
            ]
            most = max(counts, default=0)
            found.must(
                "I3",
                most >= quorum,
                f"{who} acts while {most} of {quorum} hold ACTIVE",
            )


def _ballots(trail: Trail, lives: Collection[Life], found: Findings) -> None:
    """I4: what was promised or accepted is never taken back, over restarts neither."""
    histories: dict[str, list[tuple[float, int, Stored]]] = {}
    for order, (at, node_id, stored) in enumerate(_durable(trail)):
        histories.setdefault(node_id, []).append((at, order, stored))
    for node_id, states in histories.items():
        for (_, _, old), (at, _, new) in pairwise(sorted(states, key=lambda s: s[:2])):
            if old is new:
                continue
            before, after = old.register, new.register
            down = after.promised < before.promised or after.accepted < before.accepted
            found.must("I4", not down, f"{node_id[:8]} took a vote back at {at:.3f}")
    for waking in trail.wakings:
        known = _without_voters(waking.found) in map(_without_voters, waking.possible)
        found.must("I11", known, f"{waking.life} woke at {waking.at:.3f} with another state")
    for life in lives:
        possible = [_without_voters(s) for s in trail.ends.get(life.name, ())]
        if life.state is not None and possible:
            known = _without_voters(life.state) in possible
            found.must("I11", known, f"{life.name} ended with another state")


def _without_voters(stored: Stored) -> tuple[object, ...]:
    """What must be one of the states asked for: not who was seen, which is written along."""
    return (stored.register, stored.decided, stored.activated, stored.authority_epoch)


def _replies(trail: Trail, found: Findings) -> None:
    """I4: no reply arrives anywhere that was not on its sender's disk before."""
    promised: dict[str, Ballot] = {}
    accepted: dict[str, Ballot] = {}
    timeline: list[tuple[float, int, str, object]] = [
        *((at, 0, node_id, stored) for at, node_id, stored in _durable(trail)),
        *(
            (m.at, 1, m.event.node_id, m.event.message)
            for m in trail.moments
            if isinstance(m.event, events.MessageReceived)
        ),
    ]
    for at, _, node_id, item in sorted(timeline, key=lambda t: t[:2]):
        match item:
            case Stored():
                promised[node_id] = max(promised.get(node_id, Ballot()), item.register.promised)
                accepted[node_id] = max(accepted.get(node_id, Ballot()), item.register.accepted)
            case messages.Promise() if node_id in trail.voters:
                sound = item.ballot <= promised.get(node_id, Ballot())
                found.must(
                    "I4",
                    sound,
                    f"{node_id[:8]}'s promise at {at:.3f} was not on disk",
                )
            case messages.Accepted() if node_id in trail.voters:
                sound = item.ballot <= accepted.get(node_id, Ballot())
                found.must(
                    "I4",
                    sound,
                    f"{node_id[:8]}'s vote at {at:.3f} was not on disk",
                )


def _one_value_per_ballot(trail: Trail, found: Findings) -> None:
    """I5, in what was accepted and in what was asked for."""
    values: dict[Ballot, Value] = {}

    def see(ballot: Ballot, value: Value) -> None:
        known = values.setdefault(ballot, value)
        found.must(
            "I5",
            known == value,
            f"ballot {ballot.number}: {_short(known)} and {_short(value)}",
        )

    for ballot, value in _accepted_when(trail):
        see(ballot, value)
    for moment in trail.moments:
        if isinstance(moment.event, events.MessageReceived):
            message = moment.event.message
            if isinstance(message, messages.Accept):
                see(message.ballot, message.value)


def _keys(trail: Trail, found: Findings) -> None:
    """I6 and I7: one CA per host and epoch, one key per member and CA, no surplus members."""
    made: dict[tuple[str, int], str] = {}
    keys: dict[tuple[str, int, str], str] = {}
    for moment in trail.moments:
        match moment.event:
            case events.AuthorityMade(epoch=epoch, fingerprint=fingerprint):
                known = made.setdefault((moment.node_id, epoch), fingerprint)
                found.must(
                    "I6",
                    known == fingerprint,
                    f"{moment.life} made two CAs of an epoch",
                )
            case events.Signed(member=member, epoch=epoch, key=key):
                known = keys.setdefault((moment.node_id, epoch, member.node_id), key)
                found.must("I7", known == key, f"two keys signed for {member.node_id[:8]}")
    config = trail.config
    members = Counter((node_id, epoch) for node_id, epoch, _ in keys)
    bound = config.expect + (config.join_extra or 0) + config.masters
    for (node_id, _), number in members.items():
        found.must("I7", number <= bound, f"{node_id[:8]} signed for {number} members")


def _certificates(trail: Trail, lives: Collection[Life], found: Findings) -> None:
    """I8: whoever acts on ACTIVE holds certificates of the CA that was decided, and no others."""
    for life in lives:
        state = life.state
        if state is None or not state.activated or state.decided is None:
            continue
        name, pinned = life.name, state.decided.fingerprint
        if state.enrolled is None or state.enrolled_fingerprint != pinned:
            continue  # it is being enrolled
        granted = life.granted
        found.must("I8", granted is not None, f"{name} holds no certificates")
        if granted is None:
            continue
        ders = [c.der for c in granted.certificates]
        laid = [pki.to_der(pem) for file, pem in life.laid.items() if file.endswith(".crt")]
        laid = [der for der in laid if pki.fingerprint(der) != pinned]  # but for the CA's own
        reason = _why_no_chain([*ders, *laid], granted.authority, pinned, state.enrolled.node_id)
        found.must("I8", not reason, f"{name}: {reason}")


def _why_no_chain(ders: list[bytes], authority: bytes, pinned: str, node_id: str) -> str:
    if pki.fingerprint(authority) != pinned:
        return "the CA on disk is not the one that was decided"
    issuer = x509.load_der_x509_certificate(authority)
    for der in ders:
        certificate = x509.load_der_x509_certificate(der)
        try:
            certificate.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature):
            return "a certificate is not from the CA that was decided"
        if pki.cluster_node_id(der) != node_id:
            return "a certificate names another host"
    return "" if ders else "no certificate"
