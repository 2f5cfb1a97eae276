"""Whom this host knows: addresses to dial, and peers that proved who they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from firstboot.protocol.messages import Hello
from firstboot.protocol.model import Channel, Endpoint

FIRST_RETRY = 0.2  # seconds before a failed dial is tried again; doubles each time
LAST_RETRY = 5.0
SILENT_AFTER = 15.0  # seconds without a word before a peer no longer counts as present


@dataclass(slots=True)
class Contact:
    """An address a provider or a peer named."""

    endpoint: Endpoint
    via: set[str]
    dial_at: float
    retry: float = FIRST_RETRY
    dialling: bool = False
    node_id: str = ""  # who answered there last
    error: str = ""


@dataclass(slots=True)
class Peer:
    """A host that passed the handshake; `heard` and `since` are monotonic seconds."""

    node_id: str
    since: float
    heard: float
    channels: set[Channel] = field(default_factory=set)
    seen_at: set[str] = field(default_factory=set)
    hello: Hello | None = None
    mismatch: str = ""  # why it cannot be counted, in words

    def present(self, now: float) -> bool:
        """Whether it counts: connected, heard of lately, and of the same configuration."""
        return (
            Channel.BOOTSTRAP in self.channels
            and self.hello is not None
            and not self.mismatch
            and now - self.heard < SILENT_AFTER
        )


class AddressBook:
    """The addresses worth dialling, bounded, each with its own back-off."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.contacts: dict[Endpoint, Contact] = {}
        self.dropped = 0  # addresses beyond the limit

    def found(self, endpoint: Endpoint, via: str, now: float) -> None:
        """Note an address; naming it again makes a waiting retry due at once."""
        contact = self.contacts.get(endpoint)
        if contact is None:
            if len(self.contacts) >= self.limit and not self._made_room():
                self.dropped += 1
                return
            self.contacts[endpoint] = Contact(endpoint, {via}, dial_at=now)
            return
        if via != "peer":
            # A provider hears the host itself, so it is worth trying now; what a peer hands on
            # may be long gone.
            contact.dial_at = min(contact.dial_at, now)
            contact.retry = FIRST_RETRY
        contact.via.add(via)

    def _made_room(self) -> bool:
        """Forget the oldest address where nobody of ours ever answered: anyone can name those."""
        for contact in self.contacts.values():
            if contact.error and not contact.node_id and not contact.dialling:
                self.dropped += 1
                del self.contacts[contact.endpoint]
                return True
        return False

    def connected(self, endpoint: Endpoint, node_id: str) -> None:
        """A dial succeeded."""
        contact = self.contacts.get(endpoint)
        if contact is not None:
            contact.dialling, contact.node_id = False, node_id
            contact.retry, contact.error = FIRST_RETRY, ""

    def failed(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """A dial failed: try later."""
        contact = self.contacts.get(endpoint)
        if contact is not None:
            contact.dialling, contact.error = False, reason
            contact.dial_at = now + contact.retry
            contact.retry = min(contact.retry * 2, LAST_RETRY)

    def waiting(self, connected: set[str]) -> list[Contact]:
        """The contacts that should be dialled, now or later: nobody connected is behind them."""
        return [c for c in self.contacts.values() if not c.dialling and c.node_id not in connected]
