"""The messages hosts exchange, and their wire codec.

A message is one JSON object, at most ``MAX_BYTES`` long, with its type under ``"t"``. The codec
is strict: unknown or missing fields, wrong types and values out of bounds raise RemoteError,
and nothing else is ever raised, whatever the bytes are.
"""

from __future__ import annotations

import base64
import json
import re
import types
import typing
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any

from firstboot.protocol.errors import RemoteError
from firstboot.protocol.model import (
    FINGERPRINT,
    LABEL,
    NODE_ID,
    Ballot,
    Endpoint,
    Profile,
    Stage,
    Value,
    check_address,
    require,
)
from firstboot.protocol.record import dataclass

VERSION = 1
MAX_BYTES = 64 * 1024
MAX_TEXT = 1024
MAX_BLOB = 8 * 1024
MAX_PEERS = 64
MAX_ENDPOINTS = 1024  # remembered as checked
Reader = Callable[[Any], Any]  # of JSON's types; ValueError or TypeError if they do not fit
MAX_ITEMS = 32
MAX_PLACES = 200  # members whose addresses fit into a message beside a master's certificates
ITEM_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}\Z")


@dataclass(frozen=True, slots=True)
class Known:
    """A peer's whereabouts, handed on so that partial discovery heals.

    `rank` and `able` tell where it stands among those that may propose.
    """

    node_id: str
    endpoint: Endpoint
    rank: int = 1000
    able: bool = True

    def __post_init__(self) -> None:
        require(bool(NODE_ID.match(self.node_id)), "a host is known by its node id")


@dataclass(frozen=True, slots=True)
class Hello:
    """Who I am and where I stand; sent on connecting, on every change, and as heartbeat.

    `present` is how many voters the sender counts, itself included.
    """

    version: int
    boot: str
    expect: int
    agreed: str
    name: str
    endpoint: Endpoint
    rank: int
    eligible: bool
    voter: bool
    stage: Stage
    decided: Value | None
    peers: tuple[Known, ...]
    present: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.present <= 2**31, "a count of hosts out of range")
        require(len(self.peers) <= MAX_PEERS, "too many peers in a Hello")
        # Texts of peers reach terminals and journals: no escape sequences, no lone surrogates.
        require((self.boot + self.agreed).isprintable(), "unprintable text")
        require(bool(LABEL.match(self.name)), "a host's name is a DNS label")


@dataclass(frozen=True, slots=True)
class Prepare:
    """Phase 1: promise me this ballot. ``replacing`` is the epoch whose master seems dead, or 0."""

    ballot: Ballot
    replacing: int = 0


@dataclass(frozen=True, slots=True)
class Promise:
    """I will accept nothing below this ballot; this is what I had accepted."""

    ballot: Ballot
    accepted: Ballot
    value: Value | None


@dataclass(frozen=True, slots=True)
class Accept:
    """Phase 2: accept this value under this ballot."""

    ballot: Ballot
    value: Value


@dataclass(frozen=True, slots=True)
class Accepted:
    """I accepted that ballot's value."""

    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Refused:
    """I did not promise or accept `ballot`: I promised `promised`, or I still hear the master."""

    ballot: Ballot
    promised: Ballot
    master_alive: bool = False


@dataclass(frozen=True, slots=True)
class Enrol:
    """Please sign this request (DER PKCS#10) for the key with that SHA-256, name and address."""

    epoch: int
    csr: bytes
    key: str
    name: str
    host: str

    def __post_init__(self) -> None:
        require(bool(LABEL.match(self.name)), "a host's name is a DNS label")
        require(bool(FINGERPRINT.match(self.key)), "a key is named by its SHA-256")
        check_address(self.host)


@dataclass(frozen=True, slots=True)
class Certificate:
    """One signed certificate (DER) and what it is for."""

    profile: Profile
    der: bytes


@dataclass(frozen=True, slots=True)
class Granted:
    """Your certificates, the name you have in the cluster, and the CA's certificate (DER)."""

    epoch: int
    name: str
    certificates: tuple[Certificate, ...]
    authority: bytes

    def __post_init__(self) -> None:
        require(bool(LABEL.match(self.name)), "a member's name is a DNS label")


@dataclass(frozen=True, slots=True)
class Denied:
    """I will not sign that request, and this is why."""

    epoch: int
    reason: str

    def __post_init__(self) -> None:
        require(self.reason.isprintable(), "unprintable text")


@dataclass(frozen=True, slots=True)
class Activated:
    """The cluster is ACTIVE with this value. Counts only on the cluster channel."""

    value: Value


@dataclass(frozen=True, slots=True)
class Confirmed:
    """I have the ACTIVE value on disk. Counts only on the cluster channel."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Noted:
    """I have your Confirmed on disk: nothing here waits for you any more."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Item:
    """A blob by the name of the row it belongs to."""

    name: str
    data: bytes

    def __post_init__(self) -> None:
        require(bool(ITEM_NAME.match(self.name)), "an item has a short name")


@dataclass(frozen=True, slots=True)
class Place:
    """A member's name and its IP address."""

    name: str
    host: str

    def __post_init__(self) -> None:
        require(bool(LABEL.match(self.name)), "a member's name is a DNS label")
        check_address(self.host)


@dataclass(frozen=True, slots=True)
class Apply:
    """Please sign these requests with the payload's signers. Counts only on the cluster channel."""

    epoch: int
    requests: tuple[Item, ...]

    def __post_init__(self) -> None:
        require(len(self.requests) <= MAX_ITEMS, "too many requests")


@dataclass(frozen=True, slots=True)
class Supplies:
    """The payload's certificates for you, and of its signers (DER), and who else is a member.

    `sealed` are private keys that masters share, each encrypted to this master's own key. Counts
    only on the cluster channel.
    """

    epoch: int
    certificates: tuple[Item, ...]
    signers: tuple[Item, ...]
    sealed: tuple[Item, ...]
    places: tuple[Place, ...]

    def __post_init__(self) -> None:
        counts = (len(self.certificates), len(self.signers), len(self.sealed))
        require(max(counts) <= MAX_ITEMS, "too many items")
        require(len(self.places) <= MAX_PLACES, "too many places")


Message = (
    Hello
    | Prepare
    | Promise
    | Accept
    | Accepted
    | Refused
    | Enrol
    | Granted
    | Denied
    | Activated
    | Confirmed
    | Noted
    | Apply
    | Supplies
)
TYPES: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in typing.get_args(Message) if isinstance(kind, type)
}


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    plain = {"t": type(message).__name__.lower(), **to_plain(message)}
    return json.dumps(plain, separators=(",", ":")).encode()


def decode(data: bytes) -> Message:
    """The message in these bytes, or RemoteError."""
    if len(data) > MAX_BYTES:
        raise RemoteError(f"a message of {len(data)} bytes; at most {MAX_BYTES} are allowed")
    try:
        plain = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise RemoteError("a message that is not JSON") from None
    if not isinstance(plain, dict):
        raise RemoteError("a message that is not a JSON object")
    kind = TYPES.get(str(plain.pop("t", "")))
    if kind is None:
        raise RemoteError("a message of unknown type")
    try:
        return typing.cast(Message, from_plain(kind, plain))
    except (ValueError, TypeError, OverflowError):
        raise RemoteError(f"a malformed {kind.__name__}") from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def to_plain(thing: Any) -> Any:
    """Dataclasses to JSON's types: bytes become base64, tuples lists, enums their values."""
    kind = type(thing)
    if kind in _AS_THEY_ARE:
        return thing
    if kind is tuple:
        return [to_plain(x) for x in thing]
    if kind is bytes:
        return base64.b64encode(thing).decode()
    names = _NAMES.get(kind)
    if names is None:
        if isinstance(thing, StrEnum):
            return thing.value
        names = _NAMES[kind] = tuple(f.name for f in fields(thing))
    return {
        name: item if type(item := getattr(thing, name)) in _AS_THEY_ARE else to_plain(item)
        for name in names
    }


def from_plain(kind: Any, plain: Any) -> Any:
    """The inverse of `to_plain` for the annotated type `kind`; ValueError if it does not fit."""
    return _reader(kind)(plain)


def _reader(kind: Any) -> Reader:
    """What reads that type: found out once, as resolving annotations is slow."""
    found = _READERS.get(kind)
    if found is None:
        found = _READERS[kind] = _make_reader(kind)
    return found


def _make_reader(kind: Any) -> Reader:
    if isinstance(kind, types.UnionType):
        return _union_reader(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return _tuple_reader(typing.get_args(kind)[0])
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_reader(kind)
    return _SCALARS.get(kind) or (lambda plain: kind(_read_text(plain)))


def _union_reader(kinds: tuple[Any, ...]) -> Reader:
    rest = [k for k in kinds if k is not types.NoneType]
    require(len(rest) == 1, "a union of several types cannot be read back")
    inner, optional = _reader(rest[0]), len(rest) < len(kinds)
    return lambda plain: None if plain is None and optional else inner(plain)


def _tuple_reader(kind: Any) -> Reader:
    inner = _reader(kind)

    def read(plain: Any) -> Any:
        require(isinstance(plain, list), "expected a list")
        return tuple([inner(item) for item in plain])

    return read


def _dataclass_reader(kind: type[Any]) -> Reader:
    hints = typing.get_type_hints(kind)
    readers = [(f.name, _reader(hints[f.name])) for f in fields(kind)]
    names = {name for name, _ in readers}

    def read(plain: Any) -> Any:
        require(isinstance(plain, dict) and plain.keys() == names, "fields do not match")
        return kind(*[reader(plain[name]) for name, reader in readers])

    return read


def _read_endpoint(plain: Any) -> Endpoint:
    """Checking an address takes long, and every Hello names all that its sender knows."""
    require(isinstance(plain, dict) and plain.keys() == {"host", "port"}, "fields do not match")
    place = _read_text(plain["host"]), _read_int(plain["port"])
    known = _ENDPOINTS.get(place)
    if known is None:
        if len(_ENDPOINTS) >= MAX_ENDPOINTS:
            _ENDPOINTS.clear()
        known = _ENDPOINTS[place] = Endpoint(*place)
    return known


def _read_bytes(plain: Any) -> bytes:
    require(isinstance(plain, str) and len(plain) <= MAX_BLOB * 4 // 3 + 4, "expected base64")
    return base64.b64decode(plain, validate=True)


def _read_float(plain: Any) -> float:
    require(type(plain) in (int, float) and abs(plain) < 2**53, "expected a number")
    return float(plain)


def _read_int(plain: Any) -> int:
    require(type(plain) is int and abs(plain) < 2**53, "expected an integer")
    return int(plain)


def _read_bool(plain: Any) -> bool:
    require(type(plain) is bool, "expected true or false")
    return bool(plain)


def _read_text(plain: Any) -> str:
    require(isinstance(plain, str) and len(plain) <= MAX_TEXT, "expected a short string")
    return str(plain)


_AS_THEY_ARE = frozenset({str, int, float, bool, types.NoneType})
_NAMES: dict[type[Any], tuple[str, ...]] = {}  # a dataclass's fields
_SCALARS: dict[Any, Reader] = {
    bytes: _read_bytes,
    float: _read_float,
    int: _read_int,
    bool: _read_bool,
    str: _read_text,
}
_ENDPOINTS: dict[tuple[str, int], Endpoint] = {}
_READERS: dict[Any, Reader] = {**_SCALARS, Endpoint: _read_endpoint}
