"""The nouns of formation. Every value is frozen and checked when it is made.

Times are seconds: ``float`` of a monotonic clock unless a name ends in ``_wall`` (Unix time).
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import field
from enum import StrEnum

from firstboot.protocol.record import dataclass

NODE_ID = re.compile(r"[0-9a-f]{32}\Z")
FINGERPRINT = re.compile(r"[0-9a-f]{64}\Z")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")  # RFC 1123, section 2.1
MASTER_COUNTS = (1, 3, 5)
MAX_HOSTS = 10_000
NEVER = float("inf")  # a deadline that does not come


ZONE = re.compile(r"[0-9A-Za-z._-]{1,15}\Z")  # an interface's name, as in fe80::1%eth0


def require(condition: bool, message: str) -> None:
    """Raise ``ValueError(message)`` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def soonest(now: float, *times: float) -> float:
    """The first of these moments that is still to come."""
    found = NEVER
    for at in times:
        if now < at < found:
            found = at
    return found


def check_address(text: str) -> None:
    """Raise ``ValueError`` unless `text` is an IP address, a link-local one perhaps with a zone."""
    host, percent, zone = text.partition("%")
    ip = ipaddress.ip_address(host)
    require(not percent or (ip.version == 6 and bool(ZONE.match(zone))), "not an IP address")


class Role(StrEnum):
    """What a host is in the cluster."""

    MASTER = "master"
    NODE = "node"


class Channel(StrEnum):
    """Which certificate authority authenticated a connection."""

    BOOTSTRAP = "bootstrap"  # derived from the token: the peer holds the token
    CLUSTER = "cluster"  # the cluster's own: the peer was enrolled


class Stage(StrEnum):
    """Where one host is on its way from booted to running."""

    DISCOVERING = "discovering"
    DECIDING = "deciding"
    ENROLLING = "enrolling"
    SIGNING = "signing"
    STARTING = "starting"
    RUNNING = "running"
    FAILED = "failed"


class Profile(StrEnum):
    """What a certificate may be used for (RFC 5280, section 4.2.1.12)."""

    SERVER = "server"  # serverAuth
    CLIENT = "client"  # clientAuth
    PEER = "peer"  # both, as etcd members need toward each other


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An IP address and a TCP port; written ``10.0.0.5:7443`` or ``[fd00::5]:7443``."""

    host: str
    port: int

    def __post_init__(self) -> None:
        check_address(self.host)
        require(0 < self.port < 65536, f"port {self.port} is not between 1 and 65535")

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ClusterConfig:
    """What every host of a formation shares, as the core needs it.

    ``agreed`` is the hash of the agreed configuration: peers compare it. ``join_extra`` is how
    many hosts beyond ``expect`` may join, None for any number; ``grace`` and ``join_window`` are
    in seconds.
    """

    cluster: str
    expect: int
    masters: int = 1
    strict: bool = False
    grace: float = 120.0
    payload: str = "none"
    formation: str = ""
    join_extra: int | None = 0
    join_window: float = 86_400.0
    agreed: str = ""

    def __post_init__(self) -> None:
        require(bool(LABEL.match(self.cluster)), f"cluster {self.cluster!r} is not a DNS label")
        require(1 <= self.expect <= MAX_HOSTS, f"expect must be between 1 and {MAX_HOSTS}")
        require(self.masters in MASTER_COUNTS, "masters must be 1, 3 or 5")
        require(self.masters <= self.expect, "masters cannot be more than expect")
        require(self.grace >= 0 and self.join_window >= 0, "durations cannot be negative")

    @property
    def majority(self) -> int:
        """The smallest number of voters that is more than half of ``expect``."""
        return self.expect // 2 + 1


@dataclass(frozen=True, slots=True)
class Topology:
    """Who connects to whom.

    Up to `mesh` expected hosts everybody connects to everybody. In a larger formation a host keeps
    to the `hubs` that stand best: those see everybody, so one of them will propose.
    """

    mesh: int = 16
    hubs: int = 5


USUAL = Topology()


@dataclass(frozen=True, slots=True, order=True)
class Ballot:
    """A proposal's number; the proposer's identity breaks ties."""

    number: int = 0
    node_id: str = ""

    def __post_init__(self) -> None:
        require(0 <= self.number < 2**53, "ballot number out of range")
        require(self.node_id == "" or bool(NODE_ID.match(self.node_id)), "ballot names no host")


@dataclass(frozen=True, slots=True)
class Member:
    """A host as the cluster knows it: identity, unique name, IP address."""

    node_id: str
    name: str
    host: str

    def __post_init__(self) -> None:
        require(bool(NODE_ID.match(self.node_id)), "a member needs a node id")
        require(bool(LABEL.match(self.name)), f"member name {self.name!r} is not a DNS label")
        check_address(self.host)


@dataclass(frozen=True, slots=True)
class Value:
    """What the register holds; ``None`` stands for EMPTY.

    Not ``active`` is CANDIDATE. The founding master comes first in ``masters``. ``members``
    counts the enrolled hosts when the cluster became active. ``fingerprint`` is the SHA-256 of
    the cluster CA's certificate, in hex: a node pins it before it trusts that CA.
    """

    epoch: int
    fingerprint: str
    masters: tuple[Member, ...]
    active: bool = False
    members: int = 0

    def __post_init__(self) -> None:
        require(1 <= self.epoch < 2**31, "epoch out of range")
        require(bool(FINGERPRINT.match(self.fingerprint)), "fingerprint is not a SHA-256")
        require(len(self.masters) in MASTER_COUNTS, "a cluster has 1, 3 or 5 masters")
        ids = {m.node_id for m in self.masters}
        require(len(ids) == len(self.masters), "a host is listed as master twice")
        require(0 <= self.members <= 2 * MAX_HOSTS, "members out of range")

    @property
    def founder(self) -> Member:
        """The host that was elected, owns the cluster CA and signs."""
        return self.masters[0]

    @property
    def cluster_id(self) -> str:
        """128 bits that no two clusters share: they come from the random CA's certificate."""
        return self.fingerprint[:32]

    def role_of(self, node_id: str) -> Role:
        """The role this value gives to a host."""
        return Role.MASTER if any(m.node_id == node_id for m in self.masters) else Role.NODE


@dataclass(frozen=True, slots=True)
class Register:
    """One acceptor's part of the replicated register."""

    promised: Ballot = field(default_factory=Ballot)
    accepted: Ballot = field(default_factory=Ballot)
    value: Value | None = None


@dataclass(frozen=True, slots=True)
class Issued:
    """A journalled answer to a certificate request: who, which key, under which name."""

    member: Member
    epoch: int
    key: str  # SHA-256 of the request's SubjectPublicKeyInfo, hex


@dataclass(frozen=True, slots=True)
class Stored:
    """What a host must not forget, in one file written atomically before any reply.

    ``decided`` is the newest value known to be chosen; ``activated`` is set once this host may
    act on ACTIVE. ``authority_*`` name the cluster CA this host made and still owns.
    ``enrolled`` is this host's membership once its certificates are on disk. ``voters`` are the
    identities ever seen that may vote; ``confirmed`` the members that have ACTIVE on disk.
    """

    register: Register = field(default_factory=Register)
    decided: Value | None = None
    activated: bool = False
    authority_epoch: int = 0
    authority_fingerprint: str = ""
    enrolled: Member | None = None
    enrolled_fingerprint: str = ""
    voters: tuple[str, ...] = ()
    confirmed: tuple[str, ...] = ()
    closed: bool = False
    finished: bool = False


@dataclass(frozen=True, slots=True)
class Self:
    """This host: identity, and what it tells its peers about itself.

    ``boot`` is a nonce made anew at every start of the process; the same node id with another
    nonce at the same time is a cloned identity. ``rank`` is the operator's preference, lower
    first; ``eligible`` is False where `election.never` matches. ``voter`` is False for a host
    that lost its votes, and for one that is ``late``, for it holds a one-time token of a cluster
    that exists: such a host joins but takes no part in deciding.
    """

    node_id: str
    boot: str
    name: str
    endpoint: Endpoint
    rank: int = 1000
    eligible: bool = True
    voter: bool = True
    late: bool = False

    def __post_init__(self) -> None:
        require(bool(NODE_ID.match(self.node_id)), "a host needs a node id")
        require(bool(LABEL.match(self.name)), f"host name {self.name!r} is not a DNS label")
