"""Peers among Nova's servers, by an application credential.

Which servers: those with some metadata, of a server group, or of one launch call. Only those that
are up or being built count, each with one fixed address: of the network this host's is of, in
this host's address family.

Keystone and Nova speak plain JSON, so they are asked by `web`: keystoneauth1 would add more to a
host's start than all of this (ADR 16). The secret comes from a file in the form of clouds.yaml,
goes to Keystone, and nowhere else.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlencode, urlsplit

from firstboot.discovery.cloud import Cloud, Sighting, Trouble, mapping, written
from firstboot.discovery.imds import OpenstackMetadata
from firstboot.discovery.interface import Context
from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass
from firstboot.web import Answer, Unanswered, ask, split

PAGE, MAX_PAGES = 200, 50  # servers
STATUSES = ("ACTIVE", "BUILD")
EXPIRES_EARLY = 60.0  # seconds
CREDENTIALS = "/etc/openstack/clouds.yaml"
MICROVERSION = "compute 2.1"  # what is asked here has not changed since
NEEDS = ("auth_url", "application_credential_id", "application_credential_secret")
MAKE = (
    "Make one with `openstack application credential create --role reader`"
    " and write it as clouds.yaml to {path}, mode 0600."
)
POLICY = "Give the credential a role that may list servers, such as reader."
RULES = "Its access rules, if any, must allow GET of {path} of the service compute."
CHOOSE = "Choose by metadata: `openstack: {metadata: {NAME: VALUE}}`."


@dataclass(frozen=True, slots=True)
class Credential:
    """An application credential, and where it is good."""

    auth_url: str
    id: str
    secret: str
    region: str
    interface: str
    authority: str

    def __repr__(self) -> str:
        return f"Credential({self.auth_url!r}, {self.id!r})"


@dataclass(frozen=True, slots=True)
class Session:
    """A token, until when it is good (Unix time), and Nova's URL."""

    token: str
    until: float
    compute: str

    def __repr__(self) -> str:
        return f"Session({self.compute!r})"


class Openstack(Cloud):
    """Options: ``metadata``, ``server_group``, ``credentials``.

    Without the first two: the server group this host is in, else its launch call.
    """

    name = "openstack"
    tries = "Nova's list of servers, by an application credential"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        super().__init__(options, context)
        self._metadata = OpenstackMetadata(options.get("metadata_url", ""))  # for tests
        self._path = str(options.get("credentials") or CREDENTIALS)
        self._session: Session | None = None
        self._credential: Credential | None = None

    def _look(self, own: Endpoint) -> Sighting:
        self._credential = self._read()
        try:
            words, servers = self._chosen(own)
        except _Unauthorized:
            self._session = None  # the token may have been revoked: once more with a new one
            words, servers = self._chosen(own)
        mine = next((s for s in servers if own.host in _addresses(s)), None)
        network = next((n for a, n in _addresses(mine or {}).items() if a == own.host), "")
        version = 6 if ":" in own.host else 4
        others = (_address(s, network, version) for s in servers if s is not mine)
        hosts = [a for a in dict.fromkeys(others) if a and a != own.host]
        asked = f"servers by {words}"
        if mine is None:
            remedy = "Give this server that metadata, or correct openstack in the document."
            return Sighting(hosts, asked, "this server itself is not among them", remedy)
        if not hosts:
            return Sighting(hosts, asked, "it is the only one", f"Boot the others. {CHOOSE}")
        return Sighting(hosts, asked)

    # -- which servers --

    def _chosen(self, own: Endpoint) -> tuple[str, list[Mapping[str, Any]]]:
        """In words, and the servers that count."""
        wanted, group = self._options.get("metadata", {}), self._options.get("server_group")
        if wanted or group:
            words = [f"metadata {key} {value}" for key, value in wanted.items()]
            servers = [s for s in self._servers({}) if _has(s, wanted)]
            if group:
                name, members = self._group(group, servers, own)
                words.append(f"server group {name}")
                servers = [s for s in servers if s.get("id") in members]
            return ", ".join(words), servers
        name, members = self._own_group(own)
        if members:
            listed = self._servers({})
            return f"server group {name}", [s for s in listed if s.get("id") in members]
        launch = self._reservation()
        return f"launch call {launch}", list(self._servers({"reservation_id": launch}))

    def _group(
        self, wanted: str | bool, servers: Sequence[Mapping[str, Any]], own: Endpoint
    ) -> tuple[str, Sequence[str]]:
        """A server group's name and its members' ids: by name or id, or the one of this host."""
        mine = next((str(s.get("id")) for s in servers if own.host in _addresses(s)), "")
        for name, group, members in self._groups():
            if wanted in (name, group) or (wanted is True and mine in members):
                return name, members
        what = "this server is in no server group" if wanted is True else f"no group {wanted!r}"
        raise Trouble(what, CHOOSE)

    def _own_group(self, own: Endpoint) -> tuple[str, Sequence[str]]:
        """The server group this host is in; ("", ()) if none, or if that may not be asked."""
        try:
            groups = list(self._groups())
        except Trouble as trouble:
            if trouble.throttled or isinstance(trouble, _Unreachable):
                raise
            return "", ()  # access rules may allow the servers' list only
        if not groups:
            return "", ()
        servers = self._servers({})
        mine = next((str(s.get("id")) for s in servers if own.host in _addresses(s)), "")
        return next(((name, m) for name, _, m in groups if mine in m), ("", ()))

    def _reservation(self) -> str:
        text = self._context.reservation
        if not text:
            raw = self._metadata.get("latest/meta-data/reservation-id") or b""
            text = raw[:256].decode(errors="replace").strip()
        if not re.fullmatch(r"[A-Za-z0-9-]{1,64}", text):
            raise Trouble("the metadata service does not tell the launch call", CHOOSE)
        return text

    # -- Nova --

    def _servers(self, query: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
        """The servers that are up or being built, page by page."""
        compute = self._begin().compute
        asked = f"{compute}/servers/detail?{urlencode({'limit': PAGE, **query})}"
        for _ in range(MAX_PAGES):
            data = self._get(asked, "servers/detail")
            rows = [s for s in _list(data.get("servers")) if isinstance(s, dict)]
            yield from (s for s in rows if s.get("status") in STATUSES)
            last = str(rows[-1].get("id")) if rows else ""
            if not re.fullmatch(r"[0-9A-Za-z-]{1,64}", last) or not data.get("servers_links"):
                return
            # Nova's own link names it by the address it knows itself by, which may be another.
            more = urlencode({"limit": PAGE, "marker": last, **query})
            asked = f"{compute}/servers/detail?{more}"

    def _groups(self) -> Iterator[tuple[str, str, Sequence[str]]]:
        """Name, id and members of each server group."""
        data = self._get(f"{self._begin().compute}/os-server-groups", "os-server-groups")
        for group in _list(data.get("server_groups")):
            if isinstance(group, dict):
                members = [m for m in _list(group.get("members")) if isinstance(m, str)]
                yield str(group.get("name", "")), str(group.get("id", "")), members

    def _get(self, url: str, what: str) -> dict[str, Any]:
        session = self._begin()
        headers = {
            "X-Auth-Token": session.token,
            "OpenStack-API-Version": MICROVERSION,
            "Accept": "application/json",
        }
        answer = self._ask("GET", url, headers, None, "Nova")
        if answer.status == 200:
            return mapping(answer.body, "Nova")
        path = f"{urlsplit(session.compute).path}/{what}"
        if answer.status == 401:
            raise _Unauthorized("Nova does not accept the token (401)", RULES.format(path=path))
        if answer.status == 403:
            raise Trouble(f"the credential may not list {what} (403)", POLICY)
        raise _refused("Nova", answer)

    def _ask(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, who: str
    ) -> Answer:
        credential = self._credential
        assert credential is not None
        try:
            return ask(method, url, headers, body, authority=credential.authority)
        except Unanswered as error:
            place = urlsplit(url).netloc
            remedy = (
                f"Let this server reach {place}; the URL is from {self._path} or the catalogue."
            )
            raise _Unreachable(f"{who} at {place}: {error}", remedy) from None

    # -- Keystone --

    def _begin(self) -> Session:
        """A token, a new one shortly before the old one ends."""
        if self._session is None or time.time() > self._session.until - EXPIRES_EARLY:
            self._session = None
            credential = self._credential
            assert credential is not None
            method = {"id": credential.id, "secret": credential.secret}
            identity = {"methods": ["application_credential"], "application_credential": method}
            body = json.dumps({"auth": {"identity": identity}}).encode()
            url = f"{credential.auth_url.rstrip('/')}/auth/tokens"
            headers = {"Content-Type": "application/json", "Accept": "application/json"}
            answer = self._ask("POST", url, headers, body, "Keystone")
            if answer.status in (401, 403):
                what = f"Keystone does not accept the application credential ({answer.status})"
                remedy = f"Is it still there, and not expired? {MAKE.format(path=self._path)}"
                raise Trouble(what, remedy)
            if answer.status == 404:
                raise Trouble(f"no Keystone v3 at {url} (404)", "auth_url mostly ends in /v3.")
            if answer.status not in (200, 201):
                raise _refused("Keystone", answer)
            self._session = _session(answer, credential)
        return self._session

    def _read(self) -> Credential:
        """The credential in the file, read anew each time: cloud-init may still write it."""
        data = self._context.settings(self._path)
        make = MAKE.format(path=self._path)
        if data is None:
            raise Trouble(f"there is no application credential in {self._path}", make)
        clouds = data.get("clouds") if isinstance(data, dict) else None
        entries = clouds if isinstance(clouds, dict) else {}
        entry = entries.get("openstack") or (
            next(iter(entries.values())) if len(entries) == 1 else 0
        )
        if not isinstance(entry, dict) or not isinstance(entry.get("auth"), dict):
            raise Trouble(f"{self._path} must hold one cloud, or one named openstack", make)
        auth = entry["auth"]
        lacks = [key for key in NEEDS if not isinstance(auth.get(key), str) or not auth[key]]
        if lacks:
            raise Trouble(f"{self._path} lacks auth.{lacks[0]}", make)
        if not _asks(auth["auth_url"]):
            raise Trouble(f"auth_url in {self._path} is not an http or https URL", make)
        rest = [entry.get(k) for k in ("region_name", "interface", "cacert")]
        region, interface, authority = (r if isinstance(r, str) else "" for r in rest)
        if authority:
            authority = str(self._context.root / authority.lstrip("/"))
        url, identity, secret = (str(auth[key]) for key in NEEDS)
        return Credential(url, identity, secret, region, interface or "public", authority)


class _Unauthorized(Trouble):
    """Nova did not accept the token."""


class _Unreachable(Trouble):
    """A service did not answer."""


def _session(answer: Answer, credential: Credential) -> Session:
    token = answer.headers.get("x-subject-token", "")
    data = mapping(answer.body, "Keystone").get("token")
    if not isinstance(data, dict) or not 0 < len(token) <= 8192 or not token.isascii():
        raise Trouble("Keystone answers without a token")
    found = []
    for service in _list(data.get("catalog")):
        if isinstance(service, dict) and service.get("type") == "compute":
            rows = [e for e in _list(service.get("endpoints")) if isinstance(e, dict)]
            found += [e for e in rows if e.get("interface") == credential.interface]
    if credential.region:
        found = [e for e in found if credential.region in (e.get("region"), e.get("region_id"))]
    urls = [str(e.get("url", "")).rstrip("/") for e in found]
    if not urls or not _asks(urls[0]):
        where = f" in the region {credential.region}" if credential.region else ""
        what = f"Keystone's catalogue has no {credential.interface} endpoint of compute{where}"
        raise Trouble(what, "Check region_name and interface in clouds.yaml.")
    if len(set(urls)) > 1:
        regions = ", ".join(sorted({str(e.get("region"))[:64] for e in found})[:8])
        raise Trouble(f"Nova is in several regions: {regions}", "Set region_name in clouds.yaml.")
    try:
        until = datetime.fromisoformat(str(data.get("expires_at"))).timestamp()
    except (ValueError, OverflowError):
        until = time.time() + 2 * EXPIRES_EARLY
    # Few catalogues leave the version to be found out; what is asked here is of that one.
    versioned = re.search(r"/v2(\.[0-9]+)?(/|\Z)", urls[0])
    return Session(token, until, urls[0] if versioned else f"{urls[0]}/v2.1")


def _asks(url: str) -> bool:
    """Whether that is a URL one can ask."""
    try:
        return url.isascii() and url.isprintable() and bool(split(url))
    except Unanswered:
        return False


def _refused(who: str, answer: Answer) -> Trouble:
    if answer.status in (429, 413) or (answer.status == 503 and "retry-after" in answer.headers):
        return Trouble(f"{who} asks for fewer questions ({answer.status})", throttled=True)
    return Trouble(f"{who} answers {answer.status}")


def _has(server: Mapping[str, Any], wanted: Mapping[str, str]) -> bool:
    metadata = server.get("metadata")
    return isinstance(metadata, dict) and all(metadata.get(k) == v for k, v in wanted.items())


def _addresses(server: Mapping[str, Any]) -> dict[str, str]:
    """A server's fixed addresses, and the network each is in."""
    networks = server.get("addresses")
    found: dict[str, str] = {}
    for name, rows in (networks if isinstance(networks, dict) else {}).items():
        for row in _list(rows):
            if isinstance(row, dict) and row.get("OS-EXT-IPS:type", "fixed") == "fixed":
                address = written(row.get("addr"))
                if address:
                    found[address] = name
    return found


def _address(server: Mapping[str, Any], network: str, version: int) -> str:
    """The server's address on that network, else on another; empty if it has none."""
    fixed = _addresses(server)
    ordered = sorted(fixed, key=lambda a: fixed[a] != network)
    return next((a for a in ordered if (":" in a) == (version == 6)), "")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
