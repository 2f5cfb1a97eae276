"""The messages hosts exchange, and their wire codec.

A message is one JSON object, at most ``MAX_BYTES`` long, with its type under ``"t"``. The codec
is strict: unknown or missing fields, wrong types and values out of bounds raise RemoteError,
and nothing else is ever raised, whatever the bytes are.
"""

from __future__ import annotations

import base64
import json
import types
import typing
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

from firstboot.protocol.errors import RemoteError
from firstboot.protocol.model import (
    FINGERPRINT,
    LABEL,
    Ballot,
    Endpoint,
    Profile,
    Stage,
    Value,
    check_address,
    require,
)

VERSION = 1
MAX_BYTES = 64 * 1024
MAX_TEXT = 1024
MAX_BLOB = 8 * 1024
MAX_PEERS = 64
_HINTS: dict[type[Any], dict[str, Any]] = {}  # resolving annotations is slow, so once a type


@dataclass(frozen=True, slots=True)
class Known:
    """A peer's whereabouts, handed on so that partial discovery heals."""

    node_id: str
    endpoint: Endpoint


@dataclass(frozen=True, slots=True)
class Hello:
    """Who I am and where I stand; sent on connecting, on every change, and as heartbeat."""

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

    def __post_init__(self) -> None:
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


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]


def to_plain(thing: Any) -> Any:
    """Dataclasses to JSON's types: bytes become base64, tuples lists, enums their values."""
    if isinstance(thing, StrEnum):
        return thing.value
    if isinstance(thing, bytes):
        return base64.b64encode(thing).decode()
    if isinstance(thing, tuple):
        return [to_plain(x) for x in thing]
    if is_dataclass(thing):
        return {f.name: to_plain(getattr(thing, f.name)) for f in fields(thing)}
    return thing


def from_plain(kind: Any, plain: Any) -> Any:
    """The inverse of `to_plain` for the annotated type `kind`; ValueError if it does not fit."""
    if isinstance(kind, types.UnionType):
        rest = [k for k in typing.get_args(kind) if k is not types.NoneType]
        if plain is None and len(rest) < len(typing.get_args(kind)):
            return None
        require(len(rest) == 1, "a union of several types cannot be read back")
        return from_plain(rest[0], plain)
    if typing.get_origin(kind) is tuple:
        require(isinstance(plain, list), "expected a list")
        return tuple(from_plain(typing.get_args(kind)[0], x) for x in plain)
    if is_dataclass(kind) and isinstance(kind, type):
        return _dataclass_from(kind, plain)
    return _scalar_from(kind, plain)


def _dataclass_from(kind: type[Any], plain: Any) -> Any:
    require(isinstance(plain, dict), "expected an object")
    hints = _hints(kind)
    require(plain.keys() == {f.name for f in fields(kind)}, "fields do not match")
    return kind(**{name: from_plain(hints[name], item) for name, item in plain.items()})


def _scalar_from(kind: Any, plain: Any) -> Any:
    if kind is bytes:
        require(isinstance(plain, str) and len(plain) <= MAX_BLOB * 4 // 3 + 4, "expected base64")
        return base64.b64decode(plain, validate=True)
    if kind is float:
        require(type(plain) in (int, float) and abs(plain) < 2**53, "expected a number")
        return float(plain)
    if kind is int:
        require(type(plain) is int and abs(plain) < 2**53, "expected an integer")
        return plain
    if kind is bool:
        require(type(plain) is bool, "expected true or false")
        return plain
    require(isinstance(plain, str) and len(plain) <= MAX_TEXT, "expected a short string")
    return kind(plain) if kind is not str else plain
