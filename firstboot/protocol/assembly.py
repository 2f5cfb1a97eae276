"""One host's way from booted to running: every state and every transition.

`Assembly.receive(event, now)` is the only entrance and returns what to do. It first takes note
of the event, then looks at the whole situation and does whatever is due (`_advance`). Every step
there is idempotent and asked again on a deadline, so lost messages and restarts need no path of
their own. `now` is monotonic seconds; `deadline` says when to come back if nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from firstboot.protocol import election, events, messages
from firstboot.protocol.election import Purpose, Round
from firstboot.protocol.enrolment import Roster, full
from firstboot.protocol.model import (
    Channel,
    ClusterConfig,
    Endpoint,
    Issued,
    Member,
    Profile,
    Role,
    Self,
    Stage,
    Stored,
    Value,
)
from firstboot.protocol.peers import SILENT_AFTER, AddressBook, Contact, Peer
from firstboot.protocol.plan import Payload, Step, make_plan

ANNOUNCE_EVERY = (1.0, 1.0, 2.0, 3.0, 5.0)  # seconds; zeroconf alone gives up after about 14 s
HEARTBEAT = 5.0
RANK_STEP = 0.3  # head start of each better-ranked host before the next proposes
YIELD = 1.0  # how long a promise keeps a host from proposing itself
ROUND_TIME = 2.0
MASTER_SILENT = 30.0  # before a master of a CANDIDATE may be replaced
RESEND = 2.0
STEP_RETRY = (2.0, 4.0, 8.0, 15.0, 30.0)
LEAVE_ANYWAY = 60.0  # a node stops waiting for a master that cannot note its Confirmed
MAX_STRANGERS = 16
NEVER = float("inf")


class Random(Protocol):
    """The only randomness the core uses: ``random()`` in [0, 1)."""

    def random(self) -> float:
        """A number in [0, 1)."""
        ...


class Assembly:
    """The state of one host. All attributes are for reading; only `receive` changes them."""

    def __init__(
        self,
        config: ClusterConfig,
        me: Self,
        stored: Stored,
        issued: Iterable[Issued],
        payload: Payload,
        options: Mapping[str, str],
        rng: Random,
        now: float,
    ) -> None:
        self.config, self.me, self.stored = config, me, stored
        self.payload, self.options, self.rng = payload, options, rng
        self.now = now
        self._journal = {(i.epoch, i.member.node_id): i for i in issued}
        self.roster = self._roster(stored.decided.epoch if stored.decided else 0)
        self.book = AddressBook(limit=4 * config.expect + 64)
        self.peers: dict[str, Peer] = {}
        self.strangers: dict[str, str] = {}  # source -> kind, at most MAX_STRANGERS
        self.stranger_count = 0
        self.failure = ""  # a code of status.FAILURES; this host stands still
        self.disk_error = ""
        self.conflict: Value | None = None
        self.active_seen = bool(stored.decided and stored.decided.active)
        self.may_start = stored.activated  # ACTIVE is known here, and on this host's disk

        self._actions: list[events.Action] = []
        self._sequence = 0
        self._waiting: list[tuple[int, Callable[[], None]]] = []
        self._persist_again = NEVER
        self._announced = 0
        self._announce_at = now
        self._hello_at = now + HEARTBEAT
        self.majority_since: float | None = None
        self.can_since: float | None = None
        self._yield_until = now
        self._backoff = 0.0
        self._failed_rounds = 0
        self._seen_number = 0
        self.round: Round | None = None
        self._master_heard = now
        self._authority_asked = 0
        self.request: events.RequestMade | None = None
        self._request_asked = False
        self._enrol_at = now
        self.denied = ""
        self._storing = ""
        self._cluster_dial_at = now
        self._active_since: float | None = now if stored.activated else None
        self._tell_at = now
        self._voters = set(stored.voters) | ({me.node_id} if me.voter else set())
        self._confirmed = set(stored.confirmed)
        self.plan: tuple[Step, ...] | None = None
        self.steps_done = 0
        self._step_asked = False
        self._step_at = now
        self.step_failures = 0
        self.step_error: events.StepFailed | None = None
        self._running_since: float | None = None
        self._noted = False
        self._reached = False  # told to reach firstboot.target
        self._left = stored.finished
        self._closed = False

    # ------------------------------------------------------------ entrance

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        """Take note of an event and return what to do about it, in order."""
        self.now = now
        self._actions = []
        self._handlers[type(event)](self, event)
        if not self.failure:
            self._advance()
        return self._actions

    @property
    def deadline(self) -> float:
        """When to call `receive` with DeadlineReached if nothing else happens (monotonic)."""
        if self.failure:
            return NEVER
        times = [self._announce_at, self._hello_at, self._persist_again]
        times += [c.dial_at for c in self._contacts_to_dial()]
        times += [p.heard + SILENT_AFTER for p in self.peers.values() if p.present(self.now)]
        times += self._decision_times()
        times += self._membership_times()
        return min((t for t in times if t > self.now), default=NEVER)

    # ------------------------------------------------------------ the situation, in words of code

    @property
    def decided(self) -> Value | None:
        """The newest value known to be chosen."""
        return self.stored.decided

    @property
    def founder(self) -> bool:
        """Whether this host is the founding master of the decided value."""
        return self.decided is not None and self.decided.founder.node_id == self.me.node_id

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
        enough = self.active_seen or self.present_voters() >= self.quorum
        return Stage.DECIDING if enough else Stage.DISCOVERING

    @property
    def in_grace(self) -> bool:
        """Whether all of ``expect`` are still waited for."""
        since = self.majority_since
        return since is None or self.now < since + self.config.grace

    @property
    def quorum(self) -> int:
        """How many voters must agree at this moment."""
        return election.quorum(self.config, in_grace=self.in_grace, voters_seen=len(self._voters))

    @property
    def overlaunched(self) -> bool:
        """Whether more voters were seen than one cluster can be decided among."""
        return self.decided is None and election.overlaunched(
            self.config, in_grace=self.in_grace, voters_seen=len(self._voters)
        )

    def present_peers(self) -> list[Peer]:
        """The peers that count at this moment."""
        return [p for p in self.peers.values() if p.present(self.now)]

    def present_voters(self) -> int:
        """How many voters are present, this host included."""
        peers = sum(1 for p in self.present_peers() if p.hello is not None and p.hello.voter)
        return peers + self.me.voter

    # ------------------------------------------------------------ what happened

    def _on_peer_found(self, event: events.PeerFound) -> None:
        if event.endpoint != self.me.endpoint:
            self.book.found(event.endpoint, event.provider, self.now)

    def _on_stranger(self, event: events.StrangerSeen) -> None:
        self.stranger_count += 1
        if event.source in self.strangers or len(self.strangers) < MAX_STRANGERS:
            self.strangers[event.source] = event.kind

    def _on_connected(self, event: events.Connected) -> None:
        if event.endpoint is not None and event.channel is Channel.BOOTSTRAP:
            self.book.connected(event.endpoint, event.node_id)
        if event.node_id == self.me.node_id:
            # Only the Hello tells whether this is a dial to oneself or a cloned identity.
            self._send(event.node_id, self._hello(), event.channel)
            return
        peer = self.peers.get(event.node_id)
        if peer is None:
            peer = self.peers[event.node_id] = Peer(event.node_id, self.now, self.now)
        if not peer.channels:
            peer.since = self.now
        peer.channels.add(event.channel)
        peer.seen_at.add(event.remote)
        if event.channel is Channel.BOOTSTRAP:
            self._send(event.node_id, self._hello())
        elif self.founder and self.may_start:
            self._tell_active(event.node_id)

    def _on_connect_failed(self, event: events.ConnectFailed) -> None:
        if event.channel is Channel.CLUSTER:
            return
        self.book.failed(event.endpoint, event.reason, self.now)
        if event.reason == "token":
            self._on_stranger(events.StrangerSeen("token", event.endpoint.host))

    def _on_disconnected(self, event: events.Disconnected) -> None:
        peer = self.peers.get(event.node_id)
        if peer is not None:
            peer.channels.discard(event.channel)
            if not peer.channels:
                peer.since = self.now

    def _on_message(self, event: events.MessageReceived) -> None:
        message = event.message
        peer = self.peers.get(event.node_id)
        if event.node_id == self.me.node_id and isinstance(message, messages.Hello):
            if message.boot != self.me.boot:
                self.failure = "DUPLICATE_IDENTITY"
            self._actions.append(events.Disconnect(event.node_id))
        elif peer is not None:
            peer.heard = self.now
            if self.decided is not None and event.node_id == self.decided.founder.node_id:
                self._master_heard = self.now
            if isinstance(message, messages.Hello):
                self._on_hello(peer, message)
            elif isinstance(message, messages.Activated | messages.Confirmed | messages.Noted):
                if event.channel is Channel.CLUSTER:
                    self._on_cluster_message(peer, message)
            elif peer.hello is not None and not peer.mismatch:
                self._on_formation_message(event.node_id, message)

    def _on_hello(self, peer: Peer, hello: messages.Hello) -> None:
        fresh = peer.hello is None
        peer.hello = hello
        peer.mismatch = self._mismatch(hello)
        if peer.mismatch:
            return
        if hello.voter and peer.node_id not in self._voters:
            self._voters.add(peer.node_id)
            self._store(voters=tuple(sorted(self._voters)))
        self.book.found(hello.endpoint, "peer", self.now)
        for known in hello.peers:
            if known.node_id != self.me.node_id and known.node_id not in self.peers:
                self.book.found(known.endpoint, "peer", self.now)
        if hello.decided is not None:
            self._learn(hello.decided)
        if fresh and self.round is not None:
            self._send_round(peer.node_id, self.round)

    def _mismatch(self, hello: messages.Hello) -> str:
        if hello.version != messages.VERSION:
            return f"speaks version {hello.version}, this host {messages.VERSION}"
        if hello.expect != self.config.expect:
            return f"has expect: {hello.expect}, this host has expect: {self.config.expect}"
        if hello.agreed != self.config.agreed:
            return "has another configuration than this host"
        return ""

    def _on_formation_message(self, sender: str, message: messages.Message) -> None:
        match message:
            case messages.Prepare():
                self._on_prepare(sender, message)
            case messages.Promise():
                self._on_promise(sender, message)
            case messages.Accept():
                self._on_accept(sender, message)
            case messages.Accepted():
                self._on_accepted(sender, message)
            case messages.Refused():
                self._on_refused(message)
            case messages.Enrol():
                self._on_enrol(sender, message)
            case messages.Granted():
                self._on_granted(sender, message)
            case messages.Denied():
                if self.decided and message.epoch == self.decided.epoch:
                    self.denied = message.reason

    def _on_misbehaved(self, event: events.PeerMisbehaved) -> None:
        self._on_stranger(events.StrangerSeen("garbage", f"peer {event.node_id[:8]}"))

    # ------------------------------------------------------------ durable state

    def _store(self, then: Callable[[], None] | None = None, **changes: Any) -> None:
        """Change what must not be forgotten; run `then` only once it is on disk."""
        self.stored = replace(self.stored, **changes)
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
        self._persist_again = self.now + 1.0

    # ------------------------------------------------------------ acceptor

    def _on_prepare(self, sender: str, message: messages.Prepare) -> None:
        ballot = message.ballot
        self._seen_number = max(self._seen_number, ballot.number)
        if not self._may_vote(sender):
            return
        if message.replacing and self._master_lives(sender, message.replacing):
            self._send(sender, messages.Refused(ballot, self.stored.register.promised, True))
            return
        promised = election.promise(self.stored.register, ballot)
        if promised is None:
            self._send(sender, messages.Refused(ballot, self.stored.register.promised))
            return
        self._yield_until = self.now + YIELD
        reply = messages.Promise(ballot, promised.accepted, promised.value)
        self._store(lambda: self._send(sender, reply), register=promised)

    def _on_accept(self, sender: str, message: messages.Accept) -> None:
        self._seen_number = max(self._seen_number, message.ballot.number)
        if not self._may_vote(sender):
            return
        accepted = election.accept(self.stored.register, message.ballot, message.value)
        if accepted is None:
            refusal = messages.Refused(message.ballot, self.stored.register.promised)
            self._send(sender, refusal)
            return
        self._yield_until = self.now + YIELD
        reply = messages.Accepted(message.ballot)
        self._store(lambda: self._send(sender, reply), register=accepted)

    def _may_vote(self, sender: str) -> bool:
        """Votes end with ACTIVE: whoever still asks is told about it."""
        if self.decided is not None and self.decided.active:
            self._send(sender, self._hello())
            return False
        return self.me.voter

    def _master_lives(self, sender: str, epoch: int) -> bool:
        """Whether the master of `epoch` needs no replacing, as far as this host can tell."""
        value = self.decided or self.stored.register.value
        if value is None or value.epoch != epoch or value.founder.node_id == sender:
            return False
        return self.founder or self.now - self._master_heard < MASTER_SILENT

    # ------------------------------------------------------------ proposer

    def _decision_times(self) -> list[float]:
        times = []
        if self.majority_since is not None and self.in_grace:
            times.append(self.majority_since + self.config.grace)
        if self.round is not None:
            times.append(self.round.expires)
        elif self.decided is None and self.can_since is not None:
            times.append(self._propose_at())
        elif self.decided is not None and not self.decided.active:
            times.append(self._yield_until + self._backoff if self.founder else self._replace_at())
        return times

    def _decide(self) -> None:
        """Propose, replace or activate if it is this host's turn."""
        if self.round is not None and self.now >= self.round.expires:
            self._give_up()
        enough = self.me.voter and self.present_voters() >= self.quorum
        if self.majority_since is None and self.present_voters() >= self.config.majority:
            self.majority_since = self.now
            enough = self.me.voter and self.present_voters() >= self.quorum
        if not enough or self.overlaunched:
            self.can_since = None
            return
        if self.can_since is None:
            self.can_since = self.now
        if self.round is not None:
            return
        if self.decided is None:
            self._found_or_finish()
        elif not self.decided.active:
            if self.founder:
                self._activate_when_enrolled(self.decided)
            elif self.now >= self._replace_at() and self.me.eligible:
                self._start_round(Purpose.REPLACE, self.decided)

    def _found_or_finish(self) -> None:
        """Propose this host as master, or finish what it saw another begin."""
        if self.active_seen or self.now < self._propose_at():
            return
        if self.me.eligible and self._masters():
            self._start_round(Purpose.FOUND, None)
        elif self.stored.register.value is not None:
            self._start_round(Purpose.READ, None)

    def _rank(self) -> int:
        """How many present hosts come before this one as proposers."""
        mine = (not self.me.eligible, self.me.rank, self.me.node_id)
        hellos = [(p.hello, p.node_id) for p in self.present_peers()]
        return sum((not h.eligible, h.rank, i) < mine for h, i in hellos if h is not None)

    def _propose_at(self) -> float:
        can_since = self.now if self.can_since is None else self.can_since
        return max(can_since, self._yield_until) + self._rank() * RANK_STEP + self._backoff

    def _replace_at(self) -> float:
        silent = max(self._master_heard + MASTER_SILENT, self._yield_until)
        return silent + self._rank() * RANK_STEP + self._backoff

    def _start_round(self, purpose: Purpose, base: Value | None) -> None:
        ballot = election.next_ballot(self.stored.register, self._seen_number, self.me.node_id)
        promised = election.promise(self.stored.register, ballot)
        if promised is None:
            return
        this = Round(ballot, purpose, self.now + ROUND_TIME, base)
        self.round = this
        if purpose is Purpose.FOUND:
            self._ask_authority(1)  # while the promises travel
        own = messages.Promise(ballot, promised.accepted, promised.value)

        def promised_myself() -> None:
            if self.round is this:
                for peer in self.present_peers():
                    self._send_round(peer.node_id, this)
                self._on_promise(self.me.node_id, own)

        self._store(promised_myself, register=promised)

    def _send_round(self, node_id: str, this: Round) -> None:
        if this.value is not None:
            self._send(node_id, messages.Accept(this.ballot, this.value))
        else:
            self._send(node_id, messages.Prepare(this.ballot, this.replacing))

    def _on_promise(self, sender: str, message: messages.Promise) -> None:
        this = self.round
        if this is None or message.ballot != this.ballot or this.value is not None:
            return
        this.promises[sender] = message
        self._second_phase(this)

    def _second_phase(self, this: Round) -> None:
        """With a quorum of promises, propose what they call for."""
        if self.round is not this or this.value is not None or len(this.promises) < self.quorum:
            return
        value = self._change(this) if this.changes() else this.found()
        accepted = value and election.accept(self.stored.register, this.ballot, value)
        if value is None or accepted is None:
            if not self._authority_asked:
                self._give_up()
            return
        this.value = value
        own = messages.Accepted(this.ballot)
        self._store(lambda: self._on_accepted(self.me.node_id, own), register=accepted)
        for peer in self.present_peers():
            self._send(peer.node_id, messages.Accept(this.ballot, value))

    def _change(self, this: Round) -> Value | None:
        """The round's change applied; None while the cluster CA it needs is being made."""
        if this.purpose is Purpose.ACTIVATE and this.base is not None:
            return replace(this.base, active=True, members=len(self.roster.issued))
        epoch = this.base.epoch + 1 if this.purpose is Purpose.REPLACE and this.base else 1
        if self.stored.authority_epoch != epoch:
            self._ask_authority(epoch)
            return None
        masters = self._masters()
        if not masters:
            return None
        return Value(epoch, self.stored.authority_fingerprint, masters)

    def _masters(self) -> tuple[Member, ...]:
        """This host first, then the best-ranked present hosts; empty if there are too few."""
        peers = [p for p in self.present_peers() if p.hello and p.hello.eligible]
        peers.sort(key=lambda p: (p.hello.rank if p.hello else 0, p.node_id))
        chosen = [Member(self.me.node_id, self.me.name, self.me.endpoint.host)]
        for peer in peers[: self.config.masters - 1]:
            if peer.hello is not None:
                chosen.append(Member(peer.node_id, peer.hello.name, peer.hello.endpoint.host))
        return election.name_members(chosen) if len(chosen) == self.config.masters else ()

    def _ask_authority(self, epoch: int) -> None:
        if self.stored.authority_epoch != epoch and self._authority_asked != epoch:
            self._authority_asked = epoch
            self._actions.append(events.MakeAuthority(epoch))

    def _on_authority(self, event: events.AuthorityMade) -> None:
        self._authority_asked = 0

        def on_disk() -> None:
            if self.round is not None:
                self._second_phase(self.round)

        self._store(on_disk, authority_epoch=event.epoch, authority_fingerprint=event.fingerprint)

    def _on_accepted(self, sender: str, message: messages.Accepted) -> None:
        this = self.round
        if this is None or this.value is None or message.ballot != this.ballot:
            return
        this.accepted.add(sender)
        if len(this.accepted) >= self.quorum:
            self.round = None
            self._failed_rounds, self._backoff = 0, 0.0
            self._learn(this.value)

    def _on_refused(self, message: messages.Refused) -> None:
        self._seen_number = max(self._seen_number, message.promised.number)
        if self.round is not None and message.ballot == self.round.ballot:
            self._give_up()
            if message.master_alive:
                self._backoff = max(self._backoff, HEARTBEAT)

    def _give_up(self) -> None:
        """This ballot lost: wait a random while, longer each time, before the next."""
        self.round = None
        self._failed_rounds += 1
        self._backoff = self.rng.random() * min(0.1 * 2**self._failed_rounds, 3.0)
        self._yield_until = max(self._yield_until, self.now)

    def _roster(self, epoch: int) -> Roster:
        """The members this host journalled in that epoch, should it have been its master."""
        return Roster({node: i for (e, node), i in self._journal.items() if e == epoch})

    def _learn(self, value: Value) -> None:
        """A value is known to be chosen."""
        old = self.decided
        self.active_seen |= value.active
        if old is not None and old.active:
            if value.active and value.cluster_id != old.cluster_id:
                self.conflict = value  # two clusters: raise the alarm, touch nothing
            return
        if not election.supersedes(value, old):
            return
        changes: dict[str, Any] = {"decided": value}
        if old is None or old.fingerprint != value.fingerprint:
            self._master_heard = self.now
            self._enrol_at, self.denied, self._storing = self.now, "", ""
            if self._owns_stale_authority(value):
                stale = self.stored.authority_epoch
                self._journal = {k: i for k, i in self._journal.items() if k[0] > stale}
                self._actions.append(events.DropAuthority(stale))
                changes |= {"authority_epoch": 0, "authority_fingerprint": ""}
            self.roster = self._roster(value.epoch)
        self.round = None
        if value.active and value.founder.node_id == self.me.node_id:
            changes["activated"] = True
        self._store(self._activated if "activated" in changes else None, **changes)
        self._greet_everyone()

    def _activated(self) -> None:
        """ACTIVE is on this host's disk: from here on it may act on it."""
        self.may_start = True
        self._active_since = self._tell_at = self.now
        if self.founder:
            self._tell_unconfirmed()

    def _owns_stale_authority(self, value: Value) -> bool:
        return (
            0 < self.stored.authority_epoch <= value.epoch
            and self.stored.authority_fingerprint != value.fingerprint
        )

    # ------------------------------------------------------------ membership

    def _membership_times(self) -> list[float]:
        times = [self._step_at, self._tell_at]
        if self.decided is not None and not self.enrolled:
            times.append(self._enrol_at)
        if self.enrolled and not self.founder and not self._noted:
            times.append(self._cluster_dial_at)
            if self._running_since is not None:
                times.append(self._running_since + LEAVE_ANYWAY)
        if self._active_since is not None:
            times.append(self._active_since + self.config.join_window)
        return times

    def _enrol(self) -> None:
        """Get this host's certificates for the decided cluster."""
        if not self._request_asked:
            self._request_asked = True
            self._actions.append(events.MakeRequest())
        value, request = self.decided, self.request
        if value is None or request is None or self.enrolled or self._storing:
            return
        if self.now < self._enrol_at:
            return
        self._enrol_at = self.now + RESEND
        ask = messages.Enrol(
            value.epoch, request.csr, request.key, self.me.name, self.me.endpoint.host
        )
        if self.founder:
            self._on_enrol(self.me.node_id, ask)
        else:
            self._send(value.founder.node_id, ask)

    def _on_request(self, event: events.RequestMade) -> None:
        self.request = event

    def _on_enrol(self, sender: str, message: messages.Enrol) -> None:
        value = self.decided
        if value is None or not self.founder:
            self._send(sender, self._hello())
            return
        peer = self.peers.get(sender)
        seen_at = peer.seen_at if peer is not None else {self.me.endpoint.host}
        answer = (
            "admission is closed"
            if self.stored.closed
            else self.roster.decide(self.config, value, sender, message, seen_at)
        )
        if isinstance(answer, Member):
            rows = self.payload.for_role(value.role_of(sender))
            profiles = rows.profiles or (Profile.SERVER, Profile.CLIENT)
            self._actions.append(
                events.Sign(answer, value.epoch, message.csr, message.key, profiles)
            )
        else:
            self._send(sender, messages.Denied(value.epoch, answer))

    def _on_signed(self, event: events.Signed) -> None:
        value = self.decided
        if value is None or not self.founder or event.epoch != value.epoch:
            return
        entry = Issued(event.member, event.epoch, event.key)
        self._journal[event.epoch, event.member.node_id] = entry
        self.roster.add(entry)
        granted = messages.Granted(
            event.epoch, event.member.name, event.certificates, event.authority
        )
        if event.member.node_id == self.me.node_id:
            self._on_granted(self.me.node_id, granted)
        else:
            self._send(event.member.node_id, granted)

    def _on_sign_failed(self, event: events.SignFailed) -> None:
        self.roster.pending.pop(event.node_id, None)
        if event.node_id == self.me.node_id:
            self.denied = event.reason
        else:
            self._send(event.node_id, messages.Denied(event.epoch, event.reason))

    def _on_granted(self, sender: str, message: messages.Granted) -> None:
        value = self.decided
        if value is None or sender != value.founder.node_id or self.enrolled:
            return
        if message.epoch == value.epoch and not self._storing:
            self._storing = message.name
            self._actions.append(
                events.StoreCertificates(
                    value.epoch,
                    value.fingerprint,
                    self.me.node_id,
                    message.certificates,
                    message.authority,
                )
            )

    def _on_certificates(self, event: events.CertificatesStored) -> None:
        value = self.decided
        if value is None or event.epoch != value.epoch or not self._storing:
            return
        member = Member(self.me.node_id, self._storing, self.me.endpoint.host)
        self._storing, self.denied = "", ""
        self._cluster_dial_at = self.now
        self._store(enrolled=member, enrolled_fingerprint=value.fingerprint)

    def _on_certificates_rejected(self, event: events.CertificatesRejected) -> None:
        self._storing, self.denied = "", event.reason

    def _activate_when_enrolled(self, value: Value) -> None:
        issued = self.roster.issued
        masters_in = all(m.node_id in issued for m in value.masters)
        enough = len(issued) >= (self.config.expect if self.in_grace else self.quorum)
        if self.config.strict:
            enough = len(issued) >= self.config.expect
        if not (self.enrolled and enough) or self.now < self._yield_until + self._backoff:
            return
        if masters_in:
            self._start_round(Purpose.ACTIVATE, value)
        elif not self.in_grace:
            self._start_round(Purpose.REPLACE, value)  # name other masters beside this host

    def _keep_cluster_channel(self) -> None:
        """A member keeps a connection to its master until the master noted it has ACTIVE."""
        value = self.decided
        if value is None or self.founder or not self.enrolled or self._noted:
            return
        peer = self.peers.get(value.founder.node_id)
        if peer is not None and Channel.CLUSTER in peer.channels:
            if self.may_start and self.now >= self._tell_at:
                self._tell_at = self.now + RESEND
                self._send(peer.node_id, messages.Confirmed(value.epoch), Channel.CLUSTER)
        elif self.now >= self._cluster_dial_at:
            self._cluster_dial_at = self.now + RESEND
            port = peer.hello.endpoint.port if peer and peer.hello else self.me.endpoint.port
            endpoint = Endpoint(value.founder.host, port)
            self._actions.append(events.Connect(endpoint, Channel.CLUSTER))

    def _on_cluster_message(
        self, peer: Peer, message: messages.Activated | messages.Confirmed | messages.Noted
    ) -> None:
        value = self.decided
        if value is None or not self.enrolled:
            return
        match message:
            case messages.Activated():
                same = message.value.fingerprint == value.fingerprint
                told = peer.node_id == value.founder.node_id and message.value.active
                if same and told and not self.stored.activated:
                    self._learn(message.value)
                    self._store(self._activated, activated=True)
            case messages.Confirmed():
                if self.founder and self.may_start and message.epoch == value.epoch:
                    self._confirm(peer.node_id, value.epoch)
            case messages.Noted():
                if self.may_start and message.epoch == value.epoch:
                    self._noted = True

    def _confirm(self, node_id: str, epoch: int) -> None:
        def noted() -> None:
            self._send(node_id, messages.Noted(epoch), Channel.CLUSTER)

        if node_id in self._confirmed:
            noted()
        else:
            self._confirmed.add(node_id)
            self._store(noted, confirmed=tuple(sorted(self._confirmed)))

    def _tell_unconfirmed(self) -> None:
        self._tell_at = self.now + RESEND
        for peer in self.peers.values():
            if Channel.CLUSTER in peer.channels:
                self._tell_active(peer.node_id)

    def _tell_active(self, node_id: str) -> None:
        if self.decided is not None and node_id not in self._confirmed:
            self._send(node_id, messages.Activated(self.decided), Channel.CLUSTER)

    # ------------------------------------------------------------ running the role

    def _run_plan(self) -> None:
        value, member = self.decided, self.stored.enrolled
        if value is None or member is None or not (self.may_start and self.enrolled):
            return
        if self.plan is None:
            self.plan = make_plan(self.payload, value, member, self.config.cluster, self.options)
        if self.running:
            if self._running_since is None:
                self._running_since = self.now
        elif not self._step_asked and self.now >= self._step_at:
            self._step_asked = True
            self._actions.append(events.RunStep(self.steps_done, self.plan[self.steps_done]))

    def _on_step_done(self, event: events.StepDone) -> None:
        if event.index == self.steps_done:
            self._step_asked, self.step_failures, self.step_error = False, 0, None
            self.steps_done += 1

    def _on_step_failed(self, event: events.StepFailed) -> None:
        if event.index == self.steps_done:
            self._step_asked, self.step_error = False, event
            pause = STEP_RETRY[min(self.step_failures, len(STEP_RETRY) - 1)]
            self.step_failures += 1
            self._step_at = self.now + pause

    # ------------------------------------------------------------ the end of formation

    def _wind_up(self) -> None:
        """Close admission when it is over; leave when nobody needs this process any more."""
        if not self.may_start:
            return
        if self.founder and self.now >= self._tell_at:
            self._tell_unconfirmed()
        if self.founder and not self._closed and self.admission_over:
            self._closed = True
            self._store(lambda: self._actions.append(events.Close()), closed=True)
        if not self.running:
            return
        if not self._reached:
            self._reached = True
            self._actions.append(events.Finish(leave=False))
        if not self._left and self._nobody_waits():
            self._left = True
            self._store(lambda: self._actions.append(events.Finish(leave=True)), finished=True)

    @property
    def admission_over(self) -> bool:
        """Whether no further host will be let in: all are, or the window has ended."""
        if self.stored.closed:
            return True
        if self._active_since is None:
            return False
        if self.now >= self._active_since + self.config.join_window:
            return True
        members = self.roster.issued.keys()
        everyone = members - {self.me.node_id} <= self._confirmed
        return everyone and full(self.config, len(members))

    def _nobody_waits(self) -> bool:
        if self.founder:
            return self._closed
        return self._noted or (
            self._running_since is not None and self.now >= self._running_since + LEAVE_ANYWAY
        )

    # ------------------------------------------------------------ what is due

    def _advance(self) -> None:
        if self.now >= self._persist_again:
            self._persist_again = NEVER
            self._store()
        self._announce()
        self._dial()
        if self.now >= self._hello_at:
            self._greet_everyone()
        self._decide()
        self._enrol()
        self._keep_cluster_channel()
        self._run_plan()
        self._wind_up()

    @property
    def open(self) -> bool:
        """Whether this host still looks for others, or may still let some in."""
        if self.may_start:
            return self.founder and not self._closed
        return True

    def _announce(self) -> None:
        if not self.open:
            self._announce_at = NEVER
        elif self.now >= self._announce_at:
            pause = ANNOUNCE_EVERY[min(self._announced, len(ANNOUNCE_EVERY) - 1)]
            self._announced += 1
            self._announce_at = self.now + pause
            self._actions.append(events.Announce())

    def _contacts_to_dial(self) -> list[Contact]:
        if not self.open:
            return []
        connected = {p.node_id for p in self.peers.values() if Channel.BOOTSTRAP in p.channels}
        return self.book.waiting(connected | {self.me.node_id})

    def _dial(self) -> None:
        for contact in self._contacts_to_dial():
            if self.now >= contact.dial_at:
                contact.dialling = True
                self._actions.append(events.Connect(contact.endpoint, Channel.BOOTSTRAP))

    def _send(
        self, node_id: str, message: messages.Message, channel: Channel = Channel.BOOTSTRAP
    ) -> None:
        self._actions.append(events.Send(node_id, channel, message))

    def _greet_everyone(self) -> None:
        self._hello_at = self.now + HEARTBEAT
        hello = self._hello()
        for peer in self.peers.values():
            if Channel.BOOTSTRAP in peer.channels:
                self._send(peer.node_id, hello)

    def _hello(self) -> messages.Hello:
        present = [(p.node_id, p.hello) for p in self.present_peers()]
        known = [messages.Known(i, h.endpoint) for i, h in present if h is not None]
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
            peers=tuple(known[: messages.MAX_PEERS]),
        )

    _handlers: ClassVar[dict[type[events.Event], Callable[[Any, Any], None]]] = {
        events.PeerFound: _on_peer_found,
        events.StrangerSeen: _on_stranger,
        events.Connected: _on_connected,
        events.ConnectFailed: _on_connect_failed,
        events.Disconnected: _on_disconnected,
        events.MessageReceived: _on_message,
        events.PeerMisbehaved: _on_misbehaved,
        events.PersistDone: _on_persist_done,
        events.PersistFailed: _on_persist_failed,
        events.AuthorityMade: _on_authority,
        events.RequestMade: _on_request,
        events.Signed: _on_signed,
        events.SignFailed: _on_sign_failed,
        events.CertificatesStored: _on_certificates,
        events.CertificatesRejected: _on_certificates_rejected,
        events.StepDone: _on_step_done,
        events.StepFailed: _on_step_failed,
        events.DeadlineReached: lambda _self, _event: None,
    }
