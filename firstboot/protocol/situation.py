"""What one host knows: its peers, what it must not forget, and how it speaks to the outside.

The base of `voter`, `membership` and `assembly`, which add what to do about it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from firstboot.protocol import election, events, messages
from firstboot.protocol.hubs import Hubs
from firstboot.protocol.model import (
    NEVER,
    USUAL,
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Role,
    Self,
    Stage,
    Stored,
    Topology,
    Value,
)
from firstboot.protocol.peers import AddressBook, Company, Peer, standing
from firstboot.protocol.plan import Payload, Step

ANNOUNCE_EVERY = (1.0, 1.0, 2.0, 3.0, 5.0)  # seconds; zeroconf alone gives up after about 14 s
HEARTBEAT = 5.0
DISK_RETRY = 1.0
GOSSIP, LAST_GOSSIP = 0.05, 1.0  # seconds before peers hear of hosts they may not know
MAX_STRANGERS = 16


class Random(Protocol):
    """The only randomness the core uses."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Start:
    """What one run of the core is made from.

    `issued` is everything this host journalled as a master; `options` are the payload's own
    variables; `now` is monotonic seconds.
    """

    config: ClusterConfig
    me: Self
    stored: Stored
    issued: tuple[Issued, ...]
    payload: Payload
    options: Mapping[str, str]
    rng: Random
    now: float
    topology: Topology = USUAL


class Situation:
    """The state of one host. All attributes are for reading."""

    def __init__(self, start: Start) -> None:
        config, me, stored, now = start.config, start.me, start.stored, start.now
        self.config, self.me, self.stored, self.now = config, me, stored, now
        self.payload, self.options, self.rng = start.payload, start.options, start.rng
        self.journal = {(i.epoch, i.member.node_id): i for i in start.issued}
        self.standing = standing(me.node_id, me.rank, able=me.eligible and me.voter)
        self.peers: dict[str, Peer] = {}
        self.company = Company(me.node_id)
        large = config.expect > start.topology.mesh
        self.book = AddressBook(4 * config.expect + 64, parks=large)
        self.hubs = (
            Hubs(start.topology.hubs, self.standing, self.company, self.book) if large else None
        )
        self.mismatched: dict[str, Peer] = {}
        self.strangers: dict[str, str] = {}  # source -> kind, at most MAX_STRANGERS
        self.stranger_count = 0
        self.failure = ""  # a code of `status`; this host stands still
        self.disk_error = ""
        self.conflict: Value | None = None  # another ACTIVE cluster of this formation
        self.active_seen = bool(stored.decided and stored.decided.active)
        self.may_start = stored.activated  # ACTIVE is known here, and on this host's disk
        self.voters = set(stored.voters) | ({me.node_id} if me.voter else set())
        self.decided = stored.decided  # the newest value known to be chosen
        self.majority_since: float | None = None
        self.plan: tuple[Step, ...] | None = None
        self.steps_done = 0
        self.closed = False  # admission has ended and the bootstrap channel is shut
        self._actions: list[events.Action] = []
        self._sequence = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._persist_again = self._deed_again = NEVER
        self._announced = 0
        self._announce_at = now
        self._hello_at = now + HEARTBEAT
        self._greetings = 0
        self._hello_about: tuple[object, ...] = ()
        self._hello_made: messages.Hello | None = None

    @property
    def founder(self) -> bool:
        """Whether this host is the founding master of the decided value."""
        value = self.decided
        return value is not None and value.masters[0].node_id == self.me.node_id

    @property
    def role(self) -> Role | None:
        """This host's role, once one is decided."""
        return self.decided.role_of(self.me.node_id) if self.decided else None

    @property
    def enrolled(self) -> bool:
        """Whether this host's certificates are from the decided cluster's CA."""
        return self.decided is not None and (
            self.stored.enrolled_fingerprint == self.decided.fingerprint
        )

    @property
    def running(self) -> bool:
        """Whether every step of the plan holds."""
        return self.plan is not None and self.steps_done == len(self.plan)

    @property
    def stage(self) -> Stage:
        """Where this host is on its way."""
        if self.failure:
            return Stage.FAILED
        if self.may_start and self.enrolled:
            return Stage.RUNNING if self.running else Stage.STARTING
        if self.decided is not None:
            return Stage.SIGNING if self.founder else Stage.ENROLLING
        enough = self.active_seen or self.counted_voters() >= self.quorum
        return Stage.DECIDING if enough else Stage.DISCOVERING

    @property
    def in_grace(self) -> bool:
        """Whether all of ``expect`` are still waited for."""
        since = self.majority_since
        return since is None or self.now < since + self.config.grace

    @property
    def quorum(self) -> int:
        """How many voters must agree at this moment."""
        return election.quorum(self.config, in_grace=self.in_grace, voters_seen=len(self.voters))

    @property
    def overlaunched(self) -> bool:
        """Whether more voters were seen than one cluster can be decided among."""
        return self.decided is None and election.overlaunched(
            self.config, in_grace=self.in_grace, voters_seen=len(self.voters)
        )

    @property
    def open(self) -> bool:
        """Whether this host still looks for others, or may still let some in."""
        if self.may_start:
            return self.founder and not self.stored.closed
        return True

    def present_voters(self) -> int:
        """How many voters are present, this host included."""
        return self.company.voters + self.me.voter

    def counted_voters(self) -> int:
        """The same, or what a hub tells of them: in a large formation it sees more of them."""
        here = self.present_voters()
        return here if self.hubs is None else max(here, self.hubs.present())

    def _on_peer_found(self, event: events.PeerFound) -> None:
        if event.endpoint != self.me.endpoint:
            self.book.found(event.endpoint, event.provider, self.now)

    def _on_stranger(self, event: events.StrangerSeen) -> None:
        self.stranger_count += 1
        if event.source in self.strangers or len(self.strangers) < MAX_STRANGERS:
            self.strangers[event.source] = event.kind

    def _on_misbehaved(self, event: events.PeerMisbehaved) -> None:
        self._on_stranger(events.StrangerSeen("garbage", f"peer {event.node_id[:8]}"))

    def _on_connect_failed(self, event: events.ConnectFailed) -> None:
        if event.channel is Channel.CLUSTER:
            self._cluster_refused()
            return
        self.book.failed(event.endpoint, event.reason, self.now)
        if self.hubs is not None:
            self.hubs.failed(event.endpoint)
        if event.reason == "token":
            self._on_stranger(events.StrangerSeen("token", event.endpoint.host))

    def _cluster_refused(self) -> None:
        """The master does not answer on the cluster channel (yet)."""

    def _cluster_lost(self) -> None:
        """The master hung up on the cluster channel."""

    def _on_disconnected(self, event: events.Disconnected) -> None:
        peer = self.peers.get(event.node_id)
        if peer is not None:
            peer.channels.discard(event.channel)
            if not peer.channels:
                peer.since = self.now
            if event.channel is Channel.BOOTSTRAP:
                self.book.parted(peer.node_id)
                self.company.update(peer, self.now)
            elif self.decided is not None and peer.node_id == self.decided.founder.node_id:
                self._cluster_lost()

    def _mismatch(self, hello: messages.Hello) -> str:
        if hello.version != messages.VERSION:
            return f"speaks version {hello.version}, this host {messages.VERSION}"
        if hello.expect != self.config.expect:
            return f"has expect: {hello.expect}, this host has expect: {self.config.expect}"
        if hello.agreed != self.config.agreed:
            return "has another configuration than this host"
        return ""

    def _store(self, then: Callable[[], None] | None = None, **changes: Any) -> None:
        """Change what must not be forgotten; run `then` only once it is on disk."""
        if len(self.stored.voters) != len(self.voters):
            changes["voters"] = tuple(sorted(self.voters))
        self.stored = replace(self.stored, **changes)
        self.decided = self.stored.decided
        self._sequence += 1
        if then is not None:
            self._waiting.append((self._sequence, then))
        self._actions.append(events.Persist(self._sequence, self.stored))

    def _on_persist_done(self, event: events.PersistDone) -> None:
        self.disk_error, self._persist_again = "", NEVER
        ready = [then for number, then in self._waiting if number <= event.sequence]
        self._waiting = [(n, then) for n, then in self._waiting if n > event.sequence]
        for then in ready:
            then()

    def _on_persist_failed(self, event: events.PersistFailed) -> None:
        self.disk_error = event.reason
        if event.sequence:
            self._persist_again = self.now + DISK_RETRY
        else:  # a key or a CA, not the state
            self._deed_again = self.now + DISK_RETRY

    def _announce(self) -> None:
        if not self.open:
            self._announce_at = NEVER
        else:
            pause = ANNOUNCE_EVERY[min(self._announced, len(ANNOUNCE_EVERY) - 1)]
            if self.hubs is not None and self._announced and self._lacks_hosts():
                self.hubs.explore()
            self._announced += 1
            self._announce_at = self.now + pause
            self._actions.append(events.Announce())

    def _lacks_hosts(self) -> bool:
        return self.counted_voters() < self.config.expect

    def _dial(self) -> None:
        hubs = self.hubs
        if hubs is not None:
            hubs.seek()
            if self.decided is not None and not self.may_start:
                self._seek(self.decided.founder)
        if self.book.due_at <= self.now:
            self._dial_due()
        while hubs is not None and hubs.lonely:
            hubs.want_another()
            self._dial_due()

    def _dial_due(self) -> None:
        for contact in self.book.due(self.now):
            self._actions.append(events.Connect(contact.endpoint, Channel.BOOTSTRAP))

    def _seek(self, founder: Member) -> None:
        """Until ACTIVE the master needs everybody, and perhaps it is no hub any more."""
        if founder.node_id not in self.company:
            endpoint = Endpoint(founder.host, self.me.endpoint.port)
            self.book.found(endpoint, "peer", self.now)
            self.book.want(endpoint)

    def _send(
        self, node_id: str, message: messages.Message, channel: Channel = Channel.BOOTSTRAP
    ) -> None:
        self._actions.append(events.Send(node_id, channel, message))

    def _greet_everyone(self) -> None:
        self._hello_at = self.now + HEARTBEAT
        self._greetings += 1
        hello = self._hello()
        for peer in self.peers.values():
            if Channel.BOOTSTRAP in peer.channels:
                self._send(peer.node_id, hello)

    def _hand_on(self) -> None:
        """Tell everybody soon whom this host has met: the less often, the more they are."""
        pause = min(GOSSIP * (1 + len(self.company) // 32), LAST_GOSSIP)
        self._hello_at = min(self._hello_at, self.now + pause)

    def _hello(self) -> messages.Hello:
        turn = 0 if self.hubs is None else self._greetings
        about = (self.stage, self.decided, self.company.version, turn)
        if self._hello_made is None or about != self._hello_about:
            self._hello_about, self._hello_made = about, self._new_hello(turn)
        return self._hello_made

    def _new_hello(self, turn: int) -> messages.Hello:
        alone = self.hubs is not None and self.decided is not None  # who needs the master, seeks it
        return messages.Hello(
            version=messages.VERSION,
            boot=self.me.boot,
            expect=self.config.expect,
            agreed=self.config.agreed,
            name=self.me.name,
            endpoint=self.me.endpoint,
            rank=self.me.rank,
            eligible=self.me.eligible,
            voter=self.me.voter,
            stage=self.stage,
            decided=self.decided,
            peers=() if alone else self.company.known(turn, everybody=self.hubs is None),
            present=self.present_voters(),
        )
