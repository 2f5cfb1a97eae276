"""This host as a member: it gets its certificates, or signs those of others."""

from __future__ import annotations

from firstboot.protocol import events, messages
from firstboot.protocol.model import (
    NEVER,
    Channel,
    Endpoint,
    Issued,
    Member,
    soonest,
)
from firstboot.protocol.peers import Peer
from firstboot.protocol.situation import Start
from firstboot.protocol.voter import Voter

DIAL_TIME = 5.0  # seconds after which a dial has failed
CLUSTER_RETRY = 0.05  # seconds before a refused dial is tried again; doubles each time
RESEND = 2.0  # seconds before a request without an answer is sent again
LAST_RESEND = 15.0  # and for certificates, as a master of many hosts signs for minutes
NOTE_WITHIN = 0.5  # seconds before the last of many Confirmed is noted
# A node stops waiting for a master that cannot note its Confirmed after so long and so many tries.
LEAVE_ANYWAY, LEAVE_TRIES = 60.0, 10


class Membership(Voter):
    """Adds enrolment, and the cluster channel over which ACTIVE is told."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self.request: events.RequestMade | None = None
        self.denied = ""  # why the master, or this host, refused
        self.running_since: float | None = None
        self.tries = 0  # to tell the master that this host has ACTIVE
        self.noted = False  # the master knows that this host has ACTIVE on disk
        self.confirmed = set(start.stored.confirmed)
        self._confirming: list[str] = []  # who told so, to be written next
        self._noting: set[str] = set()  # those being written
        self._confirm_at = NEVER
        self._request_asked = False
        self._cluster_retry = CLUSTER_RETRY
        self._storing: Member | None = None  # whose certificates are being stored
        self._enrol_at = self._cluster_dial_at = self._tell_at = start.now
        self._enrol_pause = RESEND
        self._active_since: float | None = start.now if start.stored.activated else None

    def _membership_at(self) -> float:
        """When this host is next to do something as a member, if nothing happens before."""
        enrol = dial = leave = end = NEVER
        if self.decided is not None:
            if not (self.enrolled and self.may_start):
                enrol = self._enrol_at
            if self.enrolled and not self.noted and not self.founder:
                dial = self._cluster_dial_at
                if self.running_since is not None:
                    leave = self.running_since + LEAVE_ANYWAY
        if self._active_since is not None:
            end = soonest(self.now, self._stays_until, self._active_since + self.config.join_window)
        return soonest(self.now, self._tell_at, self._confirm_at, enrol, dial, leave, end)

    @property
    def _stays_until(self) -> float:
        """When nobody more is waited for, though all are in.

        Hosts launched beyond `expect` form a cluster of their own once their own grace is over,
        unless they meet one that is active before: so its master can be met for as long.
        """
        stays = self.config.grace if self.config.expect > 1 else 0.0
        return NEVER if self._active_since is None else self._active_since + stays

    @property
    def supplied(self) -> bool:
        """Whether this host has all it needs from its master, see `supplying`."""
        return True

    def _make_request(self) -> None:
        self._request_asked = True
        self._actions.append(events.MakeRequest())

    def _enrol(self) -> None:
        """Get this host's certificates for the decided cluster.

        Who has them asks as well, seldom: the master's disk may be an older copy of itself, and it
        would wait for this host for ever.
        """
        value, request = self.decided, self.request
        if value is None or request is None or self._storing:
            return
        self._enrol_at = self.now + self._enrol_pause
        self._enrol_pause = (
            LAST_RESEND if self.enrolled else min(2 * self._enrol_pause, LAST_RESEND)
        )
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
        signing = self.roster.pending.get(sender)
        if signing is not None and signing.key == message.key and message.epoch == value.epoch:
            return  # asked again while its turn has not come: it is answered once
        peer = self.peers.get(sender)
        if self.may_start and sender in self.confirmed:
            self._tell_active(sender)  # it had ACTIVE, or it would not ask: it lost its state
        seen_at = peer.seen_at if peer is not None else {self.me.endpoint.host}
        answer = (
            "admission is closed"
            if self.stored.closed
            else self.roster.decide(self.config, value, sender, message, seen_at, self.company.at)
        )
        if isinstance(answer, Member):
            rows = self.payload.for_role(value.role_of(sender))
            self._actions.append(
                events.Sign(answer, value.epoch, message.csr, message.key, rows.profiles)
            )
        else:
            self._send(sender, messages.Denied(value.epoch, answer))

    def _on_signed(self, event: events.Signed) -> None:
        value = self.decided
        if value is None or not self.founder or event.epoch != value.epoch:
            return
        entry = Issued(event.member, event.epoch, event.key)
        self.journal[event.epoch, event.member.node_id] = entry
        self.roster.add(entry)
        granted = messages.Granted(
            event.epoch, event.member.name, event.certificates, event.authority
        )
        if event.member.node_id == self.me.node_id:
            self._on_granted(self.me.node_id, granted)
        else:
            self._send(event.member.node_id, granted)

    def _on_sign_failed(self, event: events.SignFailed) -> None:
        self.roster.drop(event.node_id)
        if event.node_id == self.me.node_id:
            self.denied = event.reason
        else:
            self._send(event.node_id, messages.Denied(event.epoch, event.reason))

    def _on_granted(self, sender: str, message: messages.Granted) -> None:
        value = self.decided
        if value is None or sender != value.founder.node_id or self.enrolled:
            return
        if message.epoch == value.epoch and not self._storing:
            member = Member(self.me.node_id, message.name, self.me.endpoint.host)
            self._storing = member
            self._actions.append(
                events.StoreCertificates(
                    value.epoch,
                    value.fingerprint,
                    member,
                    message.certificates,
                    message.authority,
                )
            )

    def _on_certificates(self, event: events.CertificatesStored) -> None:
        value = self.decided
        member = self._storing
        if value is None or event.epoch != value.epoch or member is None:
            return
        self._storing, self.denied = None, ""
        self._cluster_dial_at, self._enrol_at = self.now, self.now + LAST_RESEND
        self._store(enrolled=member, enrolled_fingerprint=value.fingerprint)

    def _on_certificates_rejected(self, event: events.CertificatesRejected) -> None:
        self._storing, self.denied = None, event.reason

    def _cluster_refused(self) -> None:
        """Usually the master is still storing its own certificates: ask again soon."""
        self._cluster_dial_at = self.now + self._cluster_retry
        self._cluster_retry = min(2 * self._cluster_retry, RESEND)

    def _cluster_lost(self) -> None:
        """It may have restarted: it shall have its time to note that this host has ACTIVE."""
        self._cluster_refused()
        if self.running_since is not None:
            self.running_since, self.tries = self.now, 0

    def _keep_cluster_channel(self) -> None:
        """A member keeps a connection to its master until the master noted it has ACTIVE."""
        value = self.decided
        if value is None or self.founder:
            return
        peer = self.peers.get(value.founder.node_id)
        if peer is not None and Channel.CLUSTER in peer.channels:
            if self.may_start and self.supplied and self.now >= self._tell_at:
                self._tell_at = self.now + RESEND
                self.tries += 1
                self._send(peer.node_id, messages.Confirmed(value.epoch), Channel.CLUSTER)
        elif self.now >= self._cluster_dial_at:
            self._cluster_dial_at = self.now + 2 * DIAL_TIME  # until an answer says better
            self.tries += 1
            port = peer.hello.endpoint.port if peer and peer.hello else self.me.endpoint.port
            endpoint = Endpoint(value.founder.host, port)
            self._actions.append(events.Connect(endpoint, Channel.CLUSTER))

    def _on_cluster_message(
        self, peer: Peer, message: messages.Activated | messages.Confirmed | messages.Noted
    ) -> None:
        value = self.decided
        if value is None or not self.enrolled:
            return
        self._cluster_retry = CLUSTER_RETRY
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
                    self.noted = True

    def _confirm(self, node_id: str, epoch: int) -> None:
        if node_id in self._noting or node_id in self._confirming:
            return  # it is told as soon as that is on disk
        if node_id in self.confirmed:
            self._send(node_id, messages.Noted(epoch), Channel.CLUSTER)
        else:
            self._confirming.append(node_id)
            self._confirm_at = min(self._confirm_at, self.now + NOTE_WITHIN)
            self._note_confirmed()

    def _note_confirmed(self) -> None:
        """Write down who has ACTIVE: in batches that grow, as each write holds all of them."""
        batch, written = self._confirming, self.stored.confirmed
        total = len(written) + len(batch)
        last = total >= len(self.roster.issued) - 1
        if not last and len(batch) * 8 < total and self.now < self._confirm_at:
            return
        self._confirming, self._confirm_at = [], NEVER
        self._noting.update(batch)
        epoch = self.decided.epoch if self.decided else 0

        def noted() -> None:
            self._noting.difference_update(batch)
            self.confirmed.update(batch)  # not before: a member that is noted may leave for good
            for node_id in batch:
                self._send(node_id, messages.Noted(epoch), Channel.CLUSTER)

        self._store(noted, confirmed=tuple(sorted({*written, *batch})))

    def _forget_enrolment(self) -> None:
        self.denied, self._storing = "", None
        self._ask_now()

    def _ask_now(self) -> None:
        """The master may not have heard this host's request yet."""
        self._enrol_at, self._enrol_pause = self.now, RESEND

    def _activated(self) -> None:
        super()._activated()
        self._active_since = self._tell_at = self.now
        if self.founder:
            self._tell_unconfirmed()

    def _tell_unconfirmed(self) -> None:
        self._tell_at = self.now + RESEND
        for peer in self.peers.values():
            if Channel.CLUSTER in peer.channels and peer.node_id not in self.confirmed:
                self._tell_active(peer.node_id)

    def _tell_active(self, node_id: str) -> None:
        if self.decided is not None:
            self._send(node_id, messages.Activated(self.decided), Channel.CLUSTER)
