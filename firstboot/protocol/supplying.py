"""A payload's own certificates: every member applies to the founding master, which signs.

All of it happens after ACTIVE, on the cluster channel, where a peer is the member its certificate
names. A member reports that it has ACTIVE only once it has these too: until then the master's
process does not leave.
"""

from __future__ import annotations

from firstboot.protocol import events, messages
from firstboot.protocol.membership import RESEND, Membership
from firstboot.protocol.model import NEVER, Channel
from firstboot.protocol.plan import GetCertificates
from firstboot.protocol.situation import Start


class Supplying(Membership):
    """Adds what the step `GetCertificates` takes on both sides."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._applying: events.RequestsMade | None = None
        self._apply_at = NEVER
        self._serving: set[str] = set()  # members whose requests are being signed

    @property
    def supplied(self) -> bool:
        """Whether this host has all it needs from its master."""
        if not self.payload.signers:
            return True
        if self.plan is None:
            return False
        return not any(isinstance(s, GetCertificates) for s in self.plan[self.steps_done :])

    def _on_supply_message(self, sender: str, message: messages.Apply | messages.Supplies) -> None:
        if isinstance(message, messages.Apply):
            self._on_apply(sender, message)
        else:
            self._on_supplies(sender, message)

    # ------------------------------------------------------------ the one that applies

    def _on_requests_made(self, event: events.RequestsMade) -> None:
        if event.index == self.steps_done:
            self._applying, self._apply_at = event, self.now

    def _apply(self) -> None:
        value, made = self.decided, self._applying
        if value is None or made is None:
            return
        self._apply_at = self.now + RESEND
        message = messages.Apply(value.epoch, made.requests)
        if self.founder:
            self._on_apply(self.me.node_id, message)
        else:
            self._send(value.founder.node_id, message, Channel.CLUSTER)

    def _on_supplies(self, sender: str, message: messages.Supplies) -> None:
        value, made = self.decided, self._applying
        if value is None or made is None or sender != value.founder.node_id:
            return
        if message.epoch == value.epoch:
            self._applying, self._apply_at, self.denied = None, NEVER, ""
            self._actions.append(events.StoreSupplies(made.index, message))

    # ------------------------------------------------------------ the one that signs

    def _on_apply(self, sender: str, message: messages.Apply) -> None:
        value, entry = self.decided, self.roster.issued.get(sender)
        if value is None or not self.founder or message.epoch != value.epoch or entry is None:
            return
        if sender in self._serving:
            return  # it asks again before the answer is ready
        self._serving.add(sender)
        places = self.places()
        self._actions.append(
            events.SignRequests(entry.member, value.epoch, message.requests, places)
        )

    def places(self) -> tuple[messages.Place, ...]:
        """The members, masters first, as many as a message holds."""
        members = [e.member for e in self.roster.issued.values()]
        masters = {m.node_id for m in self.decided.masters} if self.decided else set[str]()
        members.sort(key=lambda m: (m.node_id not in masters, m.name))
        listed = members[: messages.MAX_PLACES]
        return tuple(messages.Place(m.name, m.host) for m in listed)

    def _on_requests_signed(self, event: events.RequestsSigned) -> None:
        self._serving.discard(event.node_id)
        if event.node_id == self.me.node_id:
            self._on_supplies(event.node_id, event.supplies)
        else:
            self._send(event.node_id, event.supplies, Channel.CLUSTER)

    def _on_requests_refused(self, event: events.RequestsRefused) -> None:
        self._serving.discard(event.node_id)
        if event.node_id == self.me.node_id:
            self.denied = event.reason
        else:
            denied = messages.Denied(event.epoch, event.reason)
            self._send(event.node_id, denied, Channel.CLUSTER)
