"""Whom this host knows: addresses to dial, and peers that proved who they are.

Kept up to date event by event, never counted anew: a master of thousands of hosts asks at every
message who is present and whom to dial.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from firstboot.protocol.messages import MAX_PEERS, Hello, Known
from firstboot.protocol.model import NEVER, Channel, Endpoint

FIRST_RETRY = 0.2  # seconds before a failed dial is tried again; doubles each time
LAST_RETRY = 5.0
SILENT_AFTER = 15.0  # seconds without a word before a peer no longer counts as present
BEST_KNOWN, OTHERS_KNOWN = 6, 3  # peers named in the Hello of a large formation

Standing = tuple[bool, int, str]  # the lowest proposes first: cannot, preference, node id


def standing(node_id: str, rank: int, *, able: bool) -> Standing:
    """Where a host stands among those that may propose; who is not `able` to comes last."""
    return (not able, rank, node_id)


@dataclass(slots=True)
class Contact:
    """An address a provider or a peer named. Only a `wanted` one is dialled."""

    endpoint: Endpoint
    via: set[str]
    dial_at: float
    retry: float = FIRST_RETRY
    dialling: bool = False
    node_id: str = ""  # who answered there last, or has said since that it is there
    error: str = ""
    wanted: bool = True
    forgotten: bool = False


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
            and now < self.heard + SILENT_AFTER
        )

    @property
    def standing(self) -> Standing:
        """Where it says it stands."""
        hello = self.hello
        assert hello is not None
        return standing(self.node_id, hello.rank, able=hello.eligible and hello.voter)


class Company:
    """The peers that are present, in the order they were last heard."""

    def __init__(self, node_id: str) -> None:
        self._me = node_id
        self._present: OrderedDict[str, Peer] = OrderedDict()  # who was heard last is last
        self._entries: dict[str, tuple[Standing, bool, Endpoint]] = {}
        self.standings: list[Standing] = []  # of all that are present, the best first
        self.voters = 0  # how many of them vote
        self.version = 0  # another number whenever something here has changed

    def __len__(self) -> int:
        return len(self._present)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._present.values())

    def __contains__(self, node_id: object) -> bool:
        """Whether that host is here: this one always is."""
        return node_id == self._me or node_id in self._present

    def at(self, node_id: str) -> str | None:
        """The IP address where that host is present, as it says itself."""
        entry = self._entries.get(node_id)
        return None if entry is None else entry[2].host

    @property
    def silent_at(self) -> float:
        """When the first of them counts as silent if it says nothing more; monotonic seconds."""
        for peer in self._present.values():
            return peer.heard + SILENT_AFTER
        return NEVER

    def update(self, peer: Peer, now: float) -> None:
        """Something about that peer has changed, or it was heard just now."""
        node_id = peer.node_id
        old = self._entries.get(node_id)
        if not peer.present(now):
            if old is not None:
                self._drop(node_id)
            return
        hello = peer.hello
        assert hello is not None
        entry = peer.standing, hello.voter, hello.endpoint
        if entry != old:
            if old is not None:
                self._drop(node_id)
            insort(self.standings, entry[0])
            self._entries[node_id] = entry
            self.voters += hello.voter
            self.version += 1
        self._present[node_id] = peer
        self._present.move_to_end(node_id)
        if peer.heard < now:  # a rare case: it was not heard just now, so it is not the last
            self._present = OrderedDict(sorted(self._present.items(), key=lambda i: i[1].heard))

    def heard(self, peer: Peer, now: float) -> None:
        """A word from that peer, whatever it was."""
        peer.heard = now
        if peer.node_id in self._present:
            self._present.move_to_end(peer.node_id)
        else:
            self.update(peer, now)

    def expire(self, now: float) -> None:
        """Those not heard for too long do not count any more."""
        while self.silent_at <= now:
            self._drop(next(iter(self._present)))

    def _drop(self, node_id: str) -> None:
        stands, votes, _ = self._entries.pop(node_id)
        del self._present[node_id]
        del self.standings[bisect_left(self.standings, stands)]
        self.voters -= votes
        self.version += 1

    def before(self, mine: Standing) -> int:
        """How many of them come before that standing."""
        return bisect_left(self.standings, mine)

    def best(self, count: int) -> list[Peer]:
        """The `count` that stand best, able to propose or not."""
        return [self._present[node_id] for _, _, node_id in self.standings[:count]]

    def known(self, turn: int, *, everybody: bool) -> tuple[Known, ...]:
        """Whom to hand on: everybody, or of many the best and, by turns, some others."""
        chosen = self.standings[:MAX_PEERS]
        others = len(self.standings) - BEST_KNOWN
        if not everybody and others > OTHERS_KNOWN:
            at = BEST_KNOWN + turn * OTHERS_KNOWN % others
            chosen = self.standings[:BEST_KNOWN] + self.standings[at : at + OTHERS_KNOWN]
        return tuple(self._known(*stands) for stands in chosen)

    def _known(self, unable: bool, rank: int, node_id: str) -> Known:
        return Known(node_id, self._entries[node_id][2], rank, not unable)


class AddressBook:
    """The addresses worth dialling, bounded, each with its own back-off.

    With `parks`, a new address is only kept: somebody must `want` it before it is dialled.
    """

    def __init__(self, limit: int, *, parks: bool = False) -> None:
        self.limit, self.parks = limit, parks
        self.contacts: dict[Endpoint, Contact] = {}
        self.parked: dict[Endpoint, None] = {}  # known and not wanted, the newest last
        self.dropped = 0  # addresses beyond the limit
        self.dialling = 0
        self._connected: set[str] = set()
        self._where: dict[str, set[Endpoint]] = {}  # node id -> where it answered
        self._hopeless: dict[Endpoint, None] = {}  # failed, and nobody ever answered there
        self._queue: list[tuple[float, int, Contact]] = []  # by dial_at; stale entries are skipped
        self._count = 0

    def found(self, endpoint: Endpoint, via: str, now: float) -> None:
        """Note an address; naming it again makes a waiting retry due at once."""
        contact = self.contacts.get(endpoint)
        if contact is None:
            if len(self.contacts) >= self.limit and not self._made_room():
                self.dropped += 1
                return
            contact = Contact(endpoint, {via}, dial_at=now, wanted=not self.parks)
            self.contacts[endpoint] = contact
            if self.parks:
                self.parked[endpoint] = None
            self._enqueue(contact)
            return
        if via != "peer":
            # A provider hears the host itself, so it is worth trying now; what a peer hands on
            # may be long gone.
            contact.retry = FIRST_RETRY
            if now < contact.dial_at:
                contact.dial_at = now
                self._enqueue(contact)
        contact.via.add(via)

    def want(self, endpoint: Endpoint) -> None:
        """From now on that address is dialled."""
        contact = self.contacts.get(endpoint)
        if contact is not None and not contact.wanted:
            contact.wanted = True
            self.parked.pop(endpoint, None)
            self._enqueue(contact)

    def _made_room(self) -> bool:
        """Forget an address where nobody of ours ever answered: anyone can name those."""
        for endpoint in self._hopeless or self.parked:
            self._hopeless.pop(endpoint, None)
            self.parked.pop(endpoint, None)
            self.contacts.pop(endpoint).forgotten = True
            self.dropped += 1
            return True
        return False

    def connected(self, endpoint: Endpoint, node_id: str, again_at: float = 0.0) -> None:
        """A dial succeeded; should nobody be met there after all, it is tried after `again_at`."""
        contact = self.contacts.get(endpoint)
        if contact is not None:
            self._ended(contact)
            self._holds(contact, node_id)
            contact.retry, contact.error = FIRST_RETRY, ""
            contact.dial_at = max(contact.dial_at, again_at)
            self._hopeless.pop(endpoint, None)
            self._enqueue(contact)

    def holder(self, endpoint: Endpoint) -> str:
        """Who is there, as far as is known; empty if nobody ever answered."""
        contact = self.contacts.get(endpoint)
        return "" if contact is None else contact.node_id

    def moved(self, endpoint: Endpoint, node_id: str) -> None:
        """Another host is there now than answered last: it is to be dialled if that one parts."""
        contact = self.contacts[endpoint]
        self._holds(contact, node_id)
        self._enqueue(contact)

    def _holds(self, contact: Contact, node_id: str) -> None:
        self._where.get(contact.node_id, set()).discard(contact.endpoint)
        self._where.setdefault(node_id, set()).add(contact.endpoint)
        contact.node_id = node_id

    def failed(self, endpoint: Endpoint, reason: str, now: float) -> None:
        """A dial failed: try later."""
        contact = self.contacts.get(endpoint)
        if contact is not None:
            self._ended(contact)
            contact.error = reason
            contact.dial_at = now + contact.retry
            contact.retry = min(contact.retry * 2, LAST_RETRY)
            if not contact.node_id:
                self._hopeless[endpoint] = None
            self._enqueue(contact)

    def _ended(self, contact: Contact) -> None:
        self.dialling -= contact.dialling
        contact.dialling = False

    def met(self, node_id: str) -> None:
        """That host is connected, whoever dialled: nobody else needs to be sought there."""
        self._connected.add(node_id)

    def parted(self, node_id: str) -> None:
        """That host is not connected any more: it is worth dialling again."""
        self._connected.discard(node_id)
        for endpoint in sorted(self._where.get(node_id, ()), key=str):
            self._enqueue(self.contacts[endpoint])

    @property
    def reached(self) -> int:
        """How many hosts are connected."""
        return len(self._connected)

    def waits(self, contact: Contact) -> bool:
        """Whether that contact shall be dialled, now or later: nobody connected is behind it."""
        if contact.dialling or not contact.wanted or contact.forgotten:
            return False
        return contact.node_id not in self._connected

    def _enqueue(self, contact: Contact) -> None:
        if self.waits(contact):
            self._count += 1
            heapq.heappush(self._queue, (contact.dial_at, self._count, contact))

    @property
    def due_at(self) -> float:
        """When the next contact is to be dialled; monotonic seconds."""
        queue = self._queue
        while queue:
            at, _, contact = queue[0]
            if at == contact.dial_at and self.waits(contact):
                return at
            heapq.heappop(queue)
        return NEVER

    def due(self, now: float) -> Iterator[Contact]:
        """Each contact that is to be dialled now; it counts as being dialled from then on."""
        while self.due_at <= now:
            contact = heapq.heappop(self._queue)[2]
            contact.dialling = True
            self.dialling += 1
            self._hopeless.pop(contact.endpoint, None)
            yield contact
