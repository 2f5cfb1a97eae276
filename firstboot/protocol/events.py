"""Event: what happened to this host. Action: what it shall do. Two unions of small dataclasses.

No key and no token ever travels in either, so a host's history can be kept and replayed.
"""

from __future__ import annotations

from firstboot.protocol.messages import Certificate, Item, Message, Place, Supplies
from firstboot.protocol.model import Channel, Endpoint, Member, Profile, Stored
from firstboot.protocol.plan import Step
from firstboot.protocol.record import dataclass

# ---------------------------------------------------------------- what happened


@dataclass(frozen=True, slots=True)
class PeerFound:
    """A provider named an address; nothing about it is trusted."""

    endpoint: Endpoint
    provider: str


@dataclass(frozen=True, slots=True)
class StrangerSeen:
    """Somebody not of this formation: `kind` is ``token``, ``admits``, ``garbage`` or ``flood``.

    ``token`` means the same cluster name and formation with another token; ``admits`` that it says
    to be the master of an active cluster which lets hosts in: `source` is its name and address.
    """

    kind: str
    source: str


@dataclass(frozen=True, slots=True)
class Connected:
    """A mutually authenticated connection stands.

    `endpoint` is the one this host dialled, None if the peer dialled; `remote` is the peer's IP
    address as TCP shows it.
    """

    node_id: str
    channel: Channel
    endpoint: Endpoint | None
    remote: str


@dataclass(frozen=True, slots=True)
class ConnectFailed:
    """A dial ended without a connection. `reason` is ``refused``, ``timeout``, ``token``, …"""

    endpoint: Endpoint
    channel: Channel
    reason: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The last connection to that host on that channel is gone."""

    node_id: str
    channel: Channel


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """A well-formed message from an authenticated peer."""

    node_id: str
    channel: Channel
    message: Message


@dataclass(frozen=True, slots=True)
class PeerMisbehaved:
    """An authenticated peer broke the protocol; its connection was closed."""

    node_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PersistDone:
    """The state of that `Persist`, and of all before it, is on disk."""

    sequence: int


@dataclass(frozen=True, slots=True)
class PersistFailed:
    """That `Persist` did not reach the disk; 0 stands for a key or a CA that could not be made."""

    sequence: int
    reason: str


@dataclass(frozen=True, slots=True)
class AuthorityMade:
    """This host's cluster CA for that epoch is on disk."""

    epoch: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class RequestMade:
    """This host's key is on disk; `csr` is the request (DER) and `key` its key's SHA-256 (hex)."""

    csr: bytes
    key: str


@dataclass(frozen=True, slots=True)
class Signed:
    """The request was signed and the answer journalled."""

    member: Member
    epoch: int
    key: str
    certificates: tuple[Certificate, ...]
    authority: bytes


@dataclass(frozen=True, slots=True)
class SignFailed:
    """The request was not signed."""

    node_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class CertificatesStored:
    """This host's certificates for that epoch were checked and are on disk."""

    epoch: int


@dataclass(frozen=True, slots=True)
class CertificatesRejected:
    """What the master sent does not verify against the pinned fingerprint, or was not stored."""

    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class RequestsMade:
    """The keys for that step's certificates are on disk; these are the requests (DER)."""

    index: int
    requests: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class RequestsSigned:
    """A member's requests were signed by the payload's signers."""

    node_id: str
    supplies: Supplies


@dataclass(frozen=True, slots=True)
class RequestsRefused:
    """A member's requests were not signed; `reason` says what was wrong with which."""

    node_id: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class StepDone:
    """That step of the plan holds."""

    index: int


@dataclass(frozen=True, slots=True)
class StepFailed:
    """That step of the plan failed; `reason` is one sentence, `detail` the last log lines."""

    index: int
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DeadlineReached:
    """The clock reached `Assembly.deadline`."""


Event = (
    PeerFound
    | StrangerSeen
    | Connected
    | ConnectFailed
    | Disconnected
    | MessageReceived
    | PeerMisbehaved
    | PersistDone
    | PersistFailed
    | AuthorityMade
    | RequestMade
    | Signed
    | SignFailed
    | CertificatesStored
    | CertificatesRejected
    | RequestsMade
    | RequestsSigned
    | RequestsRefused
    | StepDone
    | StepFailed
    | DeadlineReached
)

# ---------------------------------------------------------------- what to do


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the providers where this host is, and ask them again who else is there."""


@dataclass(frozen=True, slots=True)
class Connect:
    """Dial that endpoint on that channel; answer with Connected or ConnectFailed."""

    endpoint: Endpoint
    channel: Channel


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close every connection to that host."""

    node_id: str


@dataclass(frozen=True, slots=True)
class Send:
    """Send once, if a connection stands; a lost message is no error."""

    node_id: str
    channel: Channel
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Write the state durably, then answer PersistDone(sequence) or PersistFailed.

    Of several waiting, only the newest needs to be written.
    """

    sequence: int
    state: Stored


@dataclass(frozen=True, slots=True)
class MakeAuthority:
    """Make the random cluster CA of that epoch, durably and once; the same answer ever after."""

    epoch: int


@dataclass(frozen=True, slots=True)
class DropAuthority:
    """Destroy the cluster CA of that epoch and every earlier one, and what they signed.

    But not that of the epoch `kept`; 0 is none.
    """

    epoch: int
    kept: int = 0


@dataclass(frozen=True, slots=True)
class MakeRequest:
    """Make the key for this host's certificates, durably and once, and a request for it."""


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign the request for that member, journal the answer, then tell.

    `key` is the SHA-256 of the key the peer says the request is for: refuse if it is not. For a
    member and key that were answered before in this epoch, the journalled answer is given again.
    """

    member: Member
    epoch: int
    csr: bytes
    key: str
    profiles: tuple[Profile, ...]


@dataclass(frozen=True, slots=True)
class StoreCertificates:
    """Check that these are `member`'s, from the pinned CA; write durably, then tell."""

    epoch: int
    fingerprint: str
    member: Member
    certificates: tuple[Certificate, ...]
    authority: bytes


@dataclass(frozen=True, slots=True)
class RunStep:
    """Make that step of the plan true; doing it again must be harmless.

    `GetCertificates` answers with RequestsMade unless its certificates are on disk already.
    """

    index: int
    step: Step


@dataclass(frozen=True, slots=True)
class SignRequests:
    """Sign a member's requests with the payload's signers, and tell it who is a member."""

    member: Member
    epoch: int
    requests: tuple[Item, ...]
    places: tuple[Place, ...]


@dataclass(frozen=True, slots=True)
class StoreSupplies:
    """Check these certificates and keys and write them durably: then that step is done."""

    index: int
    supplies: Supplies


@dataclass(frozen=True, slots=True)
class Close:
    """Admission has ended: the bootstrap channel stops answering, derived keys are dropped."""


@dataclass(frozen=True, slots=True)
class Finish:
    """This host runs its role and nobody needs this process any more: it ends, for good."""


Action = (
    Announce
    | Connect
    | Disconnect
    | Send
    | Persist
    | MakeAuthority
    | DropAuthority
    | MakeRequest
    | Sign
    | StoreCertificates
    | RunStep
    | SignRequests
    | StoreSupplies
    | Close
    | Finish
)
