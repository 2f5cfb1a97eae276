"""What the design page demands beside agreement: windows, CLOSE, and answers that stay the same.

The half of the witness that knows when something may be done; `invariants` has the other, what
must agree. The windows are checked on the world's own clock, not on what a host makes of it::

    W1  fewer than `expect` decide only after the grace period, and never with `strict`
    W2  a candidate master is replaced by another only after 30 s of silence
    W3  a quorum is a majority of the voters that its proposer has met
    W4  nobody founds a cluster while it knows of too many voters for one
    I4  what depends on the disk is said only once it is there: the messages after ACTIVE
    I6  a CA is destroyed only once it is on disk that it lost
    I7  one answer for one host and epoch, one name for one member
    I9  after CLOSE no bootstrap handshake succeeds, and nobody new is signed for
    L4  the master closes once all have confirmed, and leaves not before
    L5  two running copies of one identity stop as soon as they meet
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from firstboot.protocol import events, messages
from firstboot.protocol.assembly import Assembly
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.enrolment import full
from firstboot.protocol.model import Ballot, Channel, ClusterConfig, Issued, Member, Stored, Value
from firstboot.protocol.voter import MASTER_SILENT
from tests.sim.outcome import runs

if TYPE_CHECKING:
    from tests.sim.machine import Host
    from tests.sim.world import World

CLOSES_WITHIN = 130.0  # seconds; a node sends its Confirmed again every 2, and leaves after 60


class Violation(AssertionError):
    """An invariant does not hold."""


class Conduct:
    """Sees what hosts do, and when."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.checks: Counter[str] = Counter()  # by the sentence that would be said
        self.first_held: dict[Value, float] = {}  # when a value first was on some disk
        self.met: dict[tuple[int, int], set[str]] = {}  # host, boot -> the voters it met
        self.answered_to: dict[tuple[int, int, type, Ballot], set[str]] = {}
        self.answers: dict[tuple[str, str], Member] = {}  # CA, node id -> who it was signed as
        self.named: dict[tuple[str, str], str] = {}  # CA, name -> node id

    def must(self, holds: bool, what: str, detail: str = "") -> None:
        """Raise Violation unless it holds; `what` begins with the rule, and is always the same."""
        self.checks[what] += 1
        if not holds:
            raise Violation(what + detail)

    # ------------------------------------------------------------ deciding

    def heard(self, host: Host, event: events.MessageReceived) -> None:
        """Who answered which ballot; a Hello tells of one more voter, or of a copy of the host."""
        core = host.core
        if core is None:
            return
        message = event.message
        if type(message) is messages.Promise or type(message) is messages.Accepted:
            where = (host.index, host.boots, type(message), message.ballot)
            self.answered_to.setdefault(where, set()).add(event.node_id)
        elif type(message) is messages.Hello:
            if message.voter and event.node_id in core.peers:
                self.voters_met(host).add(event.node_id)
            if event.node_id == host.node_id and message.boot != core.me.boot:
                self.must(bool(core.failure), "L5: two copies of one identity met, and go on")

    def voters_met(self, host: Host) -> set[str]:
        """Every voter this host met since it was started, itself among them."""
        mine = set() if host.disk.lost else {host.node_id}
        return self.met.setdefault((host.index, host.boots), mine)

    def begun(self, host: Host, this: Round) -> None:
        """W2 and W4, when a host starts a round."""
        now, base = host.world.now, this.base
        if this.replacing and base is not None and base.founder.node_id != host.node_id:
            # With every disk full that value may be on none yet: since when it stands is not known.
            silent = now - self.first_held.get(base, -MASTER_SILENT)
            self.must(silent >= MASTER_SILENT, "W2: to be replaced, though not silent for 30 s")
        if this.purpose is Purpose.FOUND and self._in_grace(host):
            few = len(self.voters_met(host)) < 2 * host.document.expect
            self.must(few, "W4: a cluster is founded among too many voters")

    @staticmethod
    def wins(core: Assembly, event: events.Event, this: Round) -> bool:
        """Whether this round of the core's has just got by, and not learnt of what was chosen."""
        if isinstance(event, events.MessageReceived):
            if not isinstance(event.message, messages.Accepted):
                return False
        elif not isinstance(event, events.PersistDone):
            return False
        return bool(this.accepted) and core.decided == this.value

    def won(self, host: Host, this: Round) -> None:
        """W1 and W3, when a round has got by: whom it counted, and who really answered it."""
        counts = []
        for kind, counted in (
            (messages.Promise, this.promises),
            (messages.Accepted, this.accepted),
        ):
            answered = self.answered_to.get((host.index, host.boots, kind, this.ballot), set())
            counts.append(min(len(counted), 1 + len(answered)))
        voters = min(counts)
        if voters < host.document.expect:
            self.must(not self._in_grace(host), "W1: decided by fewer than expect within grace")
            # The promises were enough for the voters met when they came.
            enough = 2 * counts[1] > len(self.voters_met(host))
            self.must(enough, "W3: decided by no majority of the voters met")

    def _in_grace(self, host: Host) -> bool:
        """Whether the grace period cannot be over: it begins after the start of the process."""
        config = host.document
        return config.strict or host.world.now < host.started + config.grace

    # ------------------------------------------------------------ the disk, and what depends on it

    def kept(self, old: Stored, new: Stored) -> None:
        """What was once true of a host stays so."""
        self.must(new.activated or not old.activated, "I4: that it may act was forgotten")
        self.must(new.closed or not old.closed, "I9: that admission is closed was forgotten")

    def told(self, host: Host, message: messages.Message, node_id: str) -> None:
        """I4 and I7: the messages after the decision."""
        stored = host.disk.stored
        match message:
            case messages.Promise() | messages.Accepted():
                self.must(not host.disk.lost, "I4: a host votes that lost its votes")
            case messages.Activated():
                done = stored.activated and stored.decided is not None
                self.must(done, "I4: ACTIVE was told before it was on disk")
            case messages.Confirmed():
                self.must(stored.activated, "I4: ACTIVE was confirmed before it was on disk")
            case messages.Noted():
                done = node_id in stored.confirmed
                self.must(done, "I4: a confirmation was noted before it was on disk")
            case messages.Granted(epoch=epoch):
                done = (epoch, node_id) in host.disk.issued
                self.must(done, "I7: certificates were handed out before they were journalled")

    def dropped(self, host: Host, epoch: int) -> None:
        """I6: no CA is destroyed before it is on disk that it is void."""
        value = host.disk.stored.decided
        void = value is not None and (value.active or epoch <= value.epoch)
        if value is not None and value.founder.node_id == host.node_id:
            void = epoch != value.epoch if value.active else epoch < value.epoch
        self.must(void, "I6: a CA was dropped before its loss was on disk")

    def answered(self, host: Host, entry: Issued) -> None:
        """I7: the same request gets the same answer. I9: nobody new after CLOSE."""
        authority, node_id = host.disk.authorities[entry.epoch], entry.member.node_id
        new = (authority, node_id) not in self.answers
        self.must(not (new and host.disk.stored.closed), "I9: signed for a new host after CLOSE")
        known = self.answers.setdefault((authority, node_id), entry.member)
        self.must(known == entry.member, "I7: two answers to one host in one epoch")
        holder = self.named.setdefault((authority, entry.member.name), node_id)
        self.must(holder == node_id, "I7: two members with one name")

    # ------------------------------------------------------------ CLOSE

    def opened(self, target: Host, channel: Channel) -> None:
        """I9: whose bootstrap channel just answered."""
        if channel is Channel.BOOTSTRAP:
            stands_still = target.core is None or target.core.failure
            shut = target.disk.stored.closed and not stands_still
            self.must(not shut, "I9: a bootstrap handshake succeeded after CLOSE")

    def left(self, host: Host) -> None:
        """L4: a master leaves only once nobody waits for it any more."""
        core, stored = host.core, host.disk.stored
        if core is None or not core.founder:
            return
        waiting = core.roster.issued.keys() - {host.node_id} - set(stored.confirmed)
        over = not waiting or host.world.now >= self.config.join_window
        self.must(stored.closed and over, "L4: the master left while a member needed it")

    def must_close(self, world: World) -> None:
        """L4: once the faults are over, a master whose members all run closes before long."""
        if world.hostile or len(world.witness.active) > 1:
            return  # with two clusters, told elsewhere, a member of one may be signed by the other
        for host in world.hosts:
            if self._can_close(world, host):
                until = world.now + CLOSES_WITHIN
                done = world.run(until, lambda h=host: h.disk.stored.closed)  # type: ignore[misc]
                self.must(done, "L4: everybody confirmed, and admission does not close")

    def _can_close(self, world: World, host: Host) -> bool:
        core = host.core
        if core is None or core.failure or not (core.founder and core.may_start):
            return False
        members = core.roster.issued.keys()
        if not full(host.document, len(members)) or members & (world.copied | world.witness.forgot):
            return False
        others = members - {host.node_id} - set(host.disk.stored.confirmed)
        there = [(i, world.by_id[i]) for i in others]
        return all(h.node_id == i and not h.gone and runs(h) for i, h in there)
