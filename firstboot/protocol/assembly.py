"""One host's way from booted to running.

`Assembly.receive(event, now)` is the only entrance and returns what to do. It first takes note
of the event, then looks at the whole situation and does whatever is due (`_advance`). Every step
there is idempotent and asked again on a deadline, so lost messages and restarts need no path of
their own. `now` is monotonic seconds; `deadline` says when to come back if nothing happens.

The transitions, each in the file that owns it::

    DISCOVERING  -> DECIDING   a quorum is present                      situation.stage
    DECIDING     -> SIGNING    CANDIDATE(e) naming this host is chosen  voter._learn
                 -> ENROLLING  ... naming another
    ENROLLING    -> ENROLLING  the master was replaced: epoch e + 1     voter._learn
    SIGNING      -> STARTING   ACTIVE is chosen and on disk             voter._decide
    ENROLLING    -> STARTING   the master's ACTIVE is on disk           membership._activated
    STARTING     -> RUNNING    every step of the plan holds             assembly._run_plan
    any          -> FAILED     this identity is used twice              assembly._on_message
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firstboot.protocol import events, messages
from firstboot.protocol.enrolment import full
from firstboot.protocol.membership import LEAVE_ANYWAY, LEAVE_TRIES
from firstboot.protocol.model import NEVER, Channel, Endpoint, soonest
from firstboot.protocol.peers import Peer
from firstboot.protocol.plan import make_plan
from firstboot.protocol.situation import HEARTBEAT, Start
from firstboot.protocol.supplying import Supplying

STEP_RETRY = (2.0, 4.0, 8.0, 15.0, 30.0)  # seconds before a failed step is tried again


class Assembly(Supplying):
    """One host. All attributes are for reading; only `receive` changes them."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.step_failures = 0
        self.step_error: events.StepFailed | None = None
        self._step_asked = False
        self._step_at = self._next = start.now
        self._left = False  # also of a host that lost power between `finished` and its stamp

    def receive(self, event: events.Event, now: float) -> list[events.Action]:
        """Take note of an event and return what to do about it, in order."""
        self.now = now
        self._actions = []
        if self.failure:
            # It stands still, as two copies of one identity must not vote; but the other copy is
            # told, whenever it turns up.
            if isinstance(event, events.Connected) and event.node_id == self.me.node_id:
                self._on_connected(event)
            return self._actions
        if now < self._next and _only_an_address(event):
            # Most events while a host waits: nothing else can have become due by them.
            _HANDLERS[type(event)](self, event)
            if self.open:
                self._dial()
                self._next = soonest(now, self._next, self.book.due_at)
            return self._actions
        self.company.expire(now)
        _HANDLERS[type(event)](self, event)
        if not self.failure:
            self._advance()
            self._next = self._soonest()
        return self._actions

    @property
    def deadline(self) -> float:
        """When to call `receive` with DeadlineReached if nothing else happens (monotonic)."""
        return NEVER if self.failure else self._next

    def _soonest(self) -> float:
        return soonest(
            self.now,
            self._announce_at,
            self._hello_at,
            self._step_at,
            self._persist_again,
            self._deed_again,
            self.company.silent_at,
            self.book.due_at if self.open else NEVER,
            self._decision_at(),
            self._membership_at(),
            self._apply_at,
        )

    def _on_connected(self, event: events.Connected) -> None:
        if event.endpoint is not None and event.channel is Channel.BOOTSTRAP:
            again_at = self.now + HEARTBEAT if event.node_id == self.me.node_id else 0.0
            self.book.connected(event.endpoint, event.node_id, again_at)
        if event.node_id == self.me.node_id:
            # Only the Hello tells whether this is a dial to oneself or a cloned identity; until it
            # has come, that address is dialled again.
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
            self.book.met(event.node_id)
            self.company.heard(peer, self.now)
            self._send(event.node_id, self._hello())
            if self.decided is not None and self.decided.founder.node_id == event.node_id:
                self._ask_now()  # what was asked on an earlier connection may be lost
        elif self.founder and self.may_start:
            self._tell_active(event.node_id)

    def _on_message(self, event: events.MessageReceived) -> None:
        message = event.message
        peer = self.peers.get(event.node_id)
        if event.node_id == self.me.node_id and isinstance(message, messages.Hello):
            if message.boot == self.me.boot:
                self.book.met(event.node_id)
            else:
                self.failure = "DUPLICATE_IDENTITY"
            self._actions.append(events.Disconnect(event.node_id))
        elif peer is not None:
            self.company.heard(peer, self.now)
            if self._from_working_master(peer):
                self.master_heard = self.now
            if isinstance(message, messages.Hello):
                self._on_hello(peer, message)
            elif isinstance(message, messages.Activated | messages.Confirmed | messages.Noted):
                if event.channel is Channel.CLUSTER:
                    self._on_cluster_message(peer, message)
            elif isinstance(message, messages.Apply | messages.Supplies):
                if event.channel is Channel.CLUSTER and self.may_start and self.enrolled:
                    self._on_supply_message(event.node_id, message)
            elif isinstance(message, messages.Denied):
                self._on_denied(event.node_id, message)
            elif peer.hello is not None and not peer.mismatch:
                self._on_formation_message(event.node_id, message)

    def _from_working_master(self, peer: Peer) -> bool:
        """A master that lost its votes cannot activate: for replacing it, it counts as silent."""
        lost = peer.hello is not None and not peer.hello.voter
        founder = self.decided.founder.node_id if self.decided else ""
        return peer.node_id == founder and not (lost and not self.active_seen)

    def _on_hello(self, peer: Peer, hello: messages.Hello) -> None:
        fresh = peer.hello is None
        peer.hello = hello
        peer.mismatch = self._mismatch(hello)
        self.company.update(peer, self.now)
        if hello.voter:
            # Reaches the disk with the next vote: before that it matters to nobody.
            self.voters.add(peer.node_id)
        if peer.mismatch:
            self.mismatched[peer.node_id] = peer
            return  # but its vote counts: it may be forming a cluster with others like itself
        self.mismatched.pop(peer.node_id, None)
        self.book.found(hello.endpoint, "peer", self.now)
        self._note_address(peer.node_id, hello.endpoint)
        for known in hello.peers:
            if known.node_id not in self.company and known.node_id not in self.peers:
                self.book.found(known.endpoint, "peer", self.now)
                if self.hubs is not None:
                    self.hubs.hear_of(known)
        if self.decided is None and (fresh if self.hubs is None else self.hubs.news()):
            self._hand_on()
        if hello.decided is not None:
            self._learn(hello.decided)
        if fresh and self.round is not None and self.me.node_id in self.round.promises:
            # Not before: a ballot that a crash makes this host forget would be used again.
            self._send_round(peer.node_id, self.round)

    def _note_address(self, node_id: str, endpoint: Endpoint) -> None:
        """That peer says it is there: who answered there before may have moved away since."""
        holder = self.peers.get(self.book.holder(endpoint))
        if holder is not None and holder.hello is not None and holder.hello.endpoint != endpoint:
            self.book.moved(endpoint, node_id)

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

    def _on_denied(self, sender: str, message: messages.Denied) -> None:
        value = self.decided
        told = value and message.epoch == value.epoch and sender == value.founder.node_id
        if told and not (self.enrolled and not self.may_start):
            self.denied = message.reason

    def _run_plan(self) -> None:
        value, member = self.decided, self.stored.enrolled
        if value is None or member is None or not self.enrolled:
            return
        if self.plan is None:
            self.plan = make_plan(self.payload, value, member, self.config.cluster, self.options)
        if self.running:
            if self.running_since is None:
                self.running_since = self.now
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

    def _wind_up(self) -> None:
        """Close admission when it is over; leave when nobody needs this process any more."""
        if self.founder and self.now >= self._tell_at:
            self._tell_unconfirmed()
        if self.now >= self._confirm_at:
            self._note_confirmed()
        if not self.closed and (self.admission_over or not self.founder):
            self.closed = True
            self._store(lambda: self._actions.append(events.Close()), closed=True)
        if not self.running:
            return
        if not self._left and self._nobody_waits():
            self._left = True
            self._store(lambda: self._actions.append(events.Finish()), finished=True)

    @property
    def admission_over(self) -> bool:
        """Whether no further host will be let in or told: all are, or the window has ended."""
        if self.stored.closed:
            return True
        if self._active_since is None:
            return False
        if self.now >= self._active_since + self.config.join_window:
            return True
        members = self.roster.issued.keys()
        if not full(self.config, len(members)) or len(self.confirmed) < len(members) - 1:
            return False
        return self.now >= self._stays_until and members - {self.me.node_id} <= self.confirmed

    def _nobody_waits(self) -> bool:
        if self.founder:
            return self.closed
        if self.noted or self.running_since is None:
            return self.noted
        # By tries as well: a host that was suspended meanwhile has not asked for that long.
        return self.tries >= LEAVE_TRIES and self.now >= self.running_since + LEAVE_ANYWAY

    def _advance(self) -> None:
        """Do whatever is due. Looked through at every event, so what is not due costs nothing."""
        now = self.now
        if now >= self._persist_again:
            self._persist_again = NEVER
            self._store()
        if now >= self._deed_again:
            self._deed_again = NEVER
            self._request_asked = self.request is not None
            if self._dropped:
                self._drop_authority(self._dropped)
        if not self._swept:
            self._sweep()
        if now >= self._announce_at:
            self._announce()
        if self.open:
            self._dial()
        if now >= self._hello_at:
            self._greet_everyone()
        if self.decided is None or not self.decided.active:
            self._decide()
        if not self._request_asked:
            self._make_request()
        if self.decided is not None:
            if now >= self._enrol_at and not (self.enrolled and self.may_start):
                self._enrol()
            if self.enrolled and not self.noted:
                self._keep_cluster_channel()
        if self.may_start:
            if now >= self._apply_at:
                self._apply()
            self._run_plan()
            self._wind_up()


def _only_an_address(event: events.Event) -> bool:
    """Whether an event concerns nothing but whom to dial, or a stranger."""
    if isinstance(event, events.ConnectFailed):
        return event.channel is Channel.BOOTSTRAP
    return isinstance(event, events.PeerFound | events.StrangerSeen)


_HANDLERS: dict[type[events.Event], Callable[[Any, Any], None]] = {
    events.PeerFound: Assembly._on_peer_found,
    events.StrangerSeen: Assembly._on_stranger,
    events.Connected: Assembly._on_connected,
    events.ConnectFailed: Assembly._on_connect_failed,
    events.Disconnected: Assembly._on_disconnected,
    events.MessageReceived: Assembly._on_message,
    events.PeerMisbehaved: Assembly._on_misbehaved,
    events.PersistDone: Assembly._on_persist_done,
    events.PersistFailed: Assembly._on_persist_failed,
    events.AuthorityMade: Assembly._on_authority,
    events.RequestMade: Assembly._on_request,
    events.Signed: Assembly._on_signed,
    events.SignFailed: Assembly._on_sign_failed,
    events.CertificatesStored: Assembly._on_certificates,
    events.CertificatesRejected: Assembly._on_certificates_rejected,
    events.RequestsMade: Assembly._on_requests_made,
    events.RequestsSigned: Assembly._on_requests_signed,
    events.RequestsRefused: Assembly._on_requests_refused,
    events.StepDone: Assembly._on_step_done,
    events.StepFailed: Assembly._on_step_failed,
    events.DeadlineReached: lambda _self, _event: None,
}
