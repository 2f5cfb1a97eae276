"""What the configuration means: checked, complete, in the core's nouns."""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firstboot.protocol.errors import UserError
from firstboot.protocol.model import ClusterConfig, Endpoint
from firstboot.protocol.record import dataclass
from firstboot.userdata.origin import check_origin, only_ipv4, origin_warnings
from firstboot.userdata.reading import Place, Said, merged, texts
from firstboot.userdata.rules import check, check_network, filled, rule_for, wrong
from firstboot.userdata.token import (
    HIDDEN,
    REMEDY,
    TOKEN,
    Secret,
    check_token,
    is_one_time,
    is_removed,
)

UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
MAX_SWEPT = 1024  # addresses of a sweep: what a /22 has
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?\.?")
SHARED = ("cluster", "expect", "masters", "payload", "formation")


@dataclass(frozen=True, slots=True)
class ProviderSpec:
    """A way to find peers; `auto` stands for those that suit the host's platform.

    Options are the document's with the schema's defaults, but ``addresses`` of `static` (Endpoints,
    or texts ``name:port``) and ``names`` of `dns`.
    """

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Document:
    """What the configuration says. `token` is empty where it was removed after admission closed.

    `interface` and `cidr` are "" where not given. `prefer` and `never` hold match mappings: all
    keys of one must fit a host. `options` are the payload's own, as variables for its texts.
    `labels` are matches and what a host that fits is to be labelled with. `sources` are the files
    read, lowest precedence first.
    """

    config: ClusterConfig
    token: Secret
    discovery: tuple[ProviderSpec, ...]
    interface: str
    cidr: str
    port: int
    prefer: tuple[Mapping[str, Any], ...]
    never: tuple[Mapping[str, Any], ...]
    options: Mapping[str, str]
    labels: tuple[tuple[Mapping[str, Any], Mapping[str, str]], ...]
    sources: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def formation_id(self) -> str:
        """``cluster`` or ``cluster/formation``: one reading only, a DNS label has no slash."""
        name = self.config.cluster
        return f"{name}/{self.config.formation}" if self.config.formation else name

    @property
    def late(self) -> bool:
        """Whether the token is a one-time token: the cluster exists, and this host joins it."""
        return is_one_time(self.token.reveal())

    @property
    def matched_by(self) -> set[str]:
        """The keys by which this document matches hosts."""
        matches = (*self.prefer, *self.never, *(match for match, _ in self.labels))
        return {key for match in matches for key in match}

    def require_token(self) -> None:
        """UserError if the token was removed: without it nothing can be formed."""
        if not self.token.reveal():
            raise UserError(
                "the token was removed when admission closed, and this host has no cluster: its"
                " state is gone, or it is a copy",
                where=self.sources[-1],
                hint="put a token there again, or: `firstboot admit` on the cluster's master,"
                " `firstboot join` here",
            )

    def options_for(self, fits: Callable[[Mapping[str, Any]], bool]) -> dict[str, str]:
        """The payload's variables on one host, of which `fits` tells whether a match does."""
        labels: dict[str, str] = {}
        for match, wanted in self.labels:
            labels |= wanted if fits(match) else {}
        shown = {f"{self.config.payload}_labels": json.dumps(labels)} if self.labels else {}
        return {**self.options, **shown}


def make(layers: Sequence[Said], sources: Sequence[str], warnings: Sequence[str]) -> Document:
    """Merge the layers (lowest precedence first), check them, and make the Document.

    The token leaves the values before anything else looks at them, so no error can quote it.
    """
    said = merged(layers)
    token = said.data.get("token", "")
    if "token" in said.data:
        where = said.where(("token",))
        if not isinstance(token, str):
            raise UserError("the token is not a text", where=where, hint=REMEDY)
        if is_removed(token):
            token = ""
        else:
            check_token(token, where)
        said.data["token"] = HIDDEN
    for place, text in texts(said.data):
        if TOKEN.search(text):  # a token is a fine DNS label, and the cluster's name is published
            raise said.error(place, "a token stands here, where it would be shown")
    check(said)
    full = filled(said.data)
    if full["masters"] > full["expect"]:
        message = f"masters ({full['masters']}) is more than expect ({full['expect']})"
        raise said.error(("masters",), message, "launch more hosts or choose fewer masters")
    network, election, payload = full["network"], full["election"], full["payload"]
    cidr = network["cidr"]
    if cidr:
        check_network(said, ("network", "cidr"), cidr, prefix=True)
    own = full.get(payload, {})
    if payload == "origin":
        check_origin(said, own)
        cidr = only_ipv4(said, cidr)
        warnings = [*warnings, *origin_warnings(own, full["masters"])]
    options = _variables((payload,), own)
    labels = own.get("node_labels", [])
    return Document(
        config=_config(full, options),
        token=Secret(token),
        discovery=_discovery(said, full["discovery"], network["port"]),
        interface=network["interface"],
        cidr=cidr,
        port=network["port"],
        prefer=_matches(said, ("election", "prefer"), election["prefer"]),
        never=_matches(said, ("election", "never"), election["never"]),
        options=options,
        labels=tuple(
            zip(
                _matches(said, (payload, "node_labels"), [i["match"] for i in labels], ("match",)),
                (i["labels"] for i in labels),
                strict=True,
            )
        ),
        sources=tuple(sources),
        warnings=tuple(warnings),
    )


def _config(full: Mapping[str, Any], options: Mapping[str, str]) -> ClusterConfig:
    """The core's part. `agreed` hashes the meaning, so 120s and 2m are the same."""
    extra = None if full["join"]["extra"] == "unlimited" else full["join"]["extra"]
    grace = _milliseconds(full["election"]["grace"])
    window = _milliseconds(full["join"]["window"])
    agreed = {key: full[key] for key in SHARED} | {
        "options": dict(options),
        "election": {"strict": full["election"]["strict"], "grace": grace},
        "join": {"extra": extra, "window": window},
    }
    canonical = json.dumps(agreed, sort_keys=True, separators=(",", ":")).encode()
    return ClusterConfig(
        cluster=full["cluster"],
        expect=full["expect"],
        masters=full["masters"],
        strict=full["election"]["strict"],
        grace=grace / 1000,
        payload=full["payload"],
        formation=full["formation"],
        join_extra=extra,
        join_window=window / 1000,
        agreed=hashlib.sha256(canonical).hexdigest(),
    )


def seconds(text: str) -> float:
    """A duration as the document has them, such as ``90m``; ValueError if it is none."""
    if not re.fullmatch(rule_for(("join", "window"))["pattern"], text):
        raise ValueError("not a duration")
    return _milliseconds(text) / 1000


def _milliseconds(text: str) -> int:
    number, unit = re.findall(r"[0-9]+|[a-z]+", text)
    return int(number) * UNITS[unit]


def _variables(place: Place, given: Mapping[str, Any]) -> dict[str, str]:
    """Options as variables: below a mapping of named keys a name each, all else as one text."""
    found: dict[str, str] = {}
    for key, item in given.items():
        below = (*place, key)
        if rule_for(below).get("properties"):
            found |= _variables(below, item)
        else:
            text = item if isinstance(item, str) else json.dumps(item, sort_keys=True)
            found["_".join(below)] = text
    return found


def _matches(
    said: Said, where: Place, listed: Sequence[Any], below: Place = ()
) -> tuple[Mapping[str, Any], ...]:
    for i, match in enumerate(listed):
        if "address" in match:
            place = (*where, str(i), *below, "address")
            check_network(said, place, match["address"], prefix=False)
    return tuple({**m, "mac": m["mac"].lower()} if "mac" in m else dict(m) for m in listed)


def _discovery(said: Said, listed: Any, port: int) -> tuple[ProviderSpec, ...]:
    """The providers, each once; all static addresses in one, and all names."""
    found: dict[str, Mapping[str, Any]] = {}
    for i, item in enumerate(["auto"] if listed == "auto" else listed):
        name = item if isinstance(item, str) else next(iter(item))
        place = ("discovery", str(i), name)
        given = {} if isinstance(item, str) else item[name]
        before = found.get(name, {})
        if name == "static":
            more = [_address(said, (*place, str(j)), text, port) for j, text in enumerate(given)]
            found[name] = {"addresses": (*before.get("addresses", ()), *more)}
        elif name == "dns":
            names = [given] if isinstance(given, str) else given
            found[name] = {"names": (*before.get("names", ()), *names)}
        elif name in found:
            raise said.error(place[:2], f"discovery names {name} twice", "put it into one")
        else:
            found[name] = _options(place, given)
            if found[name].get("cidr"):
                _check_sweep(said, (*place, "cidr"), found[name]["cidr"])
            for key in ("url", "endpoint"):
                if found[name].get(key):
                    _check_url(said, (*place, key), found[name][key])
    return tuple(ProviderSpec(name, options) for name, options in found.items())


def _options(place: Place, given: Mapping[str, Any]) -> Mapping[str, Any]:
    rule = rule_for(place)
    return filled(given, rule) if place[-1] in rule_for(place[:-1])["properties"] else {}


def _check_sweep(said: Said, place: Place, text: str) -> None:
    check_network(said, place, text, prefix=True)
    network = ipaddress.ip_network(text)
    if network.version != 4 or network.num_addresses > MAX_SWEPT:
        raise wrong(said, place)


def _check_url(said: Said, place: Place, text: str) -> None:
    from urllib.parse import urlsplit

    try:
        parts = urlsplit(text)  # which refuses a broken IPv6 address, and `port` a broken port
        sound = bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise wrong(said, place)


def _address(said: Said, place: Place, text: str, port: int) -> Endpoint | str:
    """A listed address, or ``name:port``."""
    split = re.fullmatch(
        r"\[(?P<v6>[^]]+)\](:(?P<p6>[0-9]{1,5}))?|(?P<other>[^:]+):(?P<p>[0-9]{1,5})", text
    )
    host = (split["v6"] or split["other"]) if split else text
    given = (split["p6"] or split["p"]) if split else ""
    number = int(given) if given else port
    try:
        return Endpoint(str(ipaddress.ip_address(host)), number)
    except ValueError:
        mistyped = set(host) <= set("0123456789.")  # an address, not a name to look up
        if 0 < number < 65536 and _HOST_NAME.fullmatch(host) and not mistyped and "[" not in text:
            return f"{host}:{number}"
    hint = "for example: 10.0.0.5, [fd00::5]:7443 or node-1.example.org"
    raise wrong(said, place, hint=hint)
