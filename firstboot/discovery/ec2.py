"""Peers among EC2's instances: DescribeInstances with the role of this instance.

Which instances: those with a tag, of one launch call, or of an Auto Scaling group. Only running
and pending ones of the same VPC count, each with one private address: of the interface with the
same device index as this host's, in this host's address family.

Requests are signed by botocore's signer and sent by `web`: botocore's own client would take three
times as long to import and four times the memory (ADR 16).
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit

from firstboot.discovery.cloud import Cloud, Sighting, Trouble, mapping, written
from firstboot.discovery.imds import Ec2Metadata
from firstboot.discovery.interface import Context
from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass
from firstboot.web import Answer, Unanswered, ask

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

VERSION = "2016-11-15"
PAGE, MAX_PAGES = 100, 50  # instances; a page of 100 is up to 1 MB
STATES = ("pending", "running")
GROUP_TAG = "aws:autoscaling:groupName"
EXPIRES_EARLY = 300.0  # seconds: new credentials are there five minutes before the old ones end
NO_ACCESS = ("UnauthorizedOperation", "AccessDenied", "AccessDeniedException")
THROTTLED = ("RequestLimitExceeded", "Throttling", "ThrottlingException", "ServiceUnavailable")
STALE = ("AuthFailure", "ExpiredToken", "InvalidClientTokenId", "SignatureDoesNotMatch")
GRANT = "Allow the action ec2:DescribeInstances on resource * in the policy of the role{role}."
NO_ROLE = "Attach an instance profile whose role allows the action ec2:DescribeInstances."
ROUTE = "Let this subnet reach {host} port 443: by a NAT gateway or a VPC endpoint for ec2."
LIBRARY = "Add botocore to the image (python3-botocore), or use another provider than ec2."


@dataclass(frozen=True, slots=True)
class Role:
    """Credentials of the instance's role; `until` is Unix time."""

    name: str
    access_key: str
    secret_key: str
    token: str
    until: float

    def __repr__(self) -> str:
        return f"Role({self.name!r})"


@dataclass(frozen=True, slots=True)
class Place:
    """This instance's id and VPC, and the region to ask; `abroad` if that is not its own.

    `domain` is that of the region's services.
    """

    id: str
    region: str
    abroad: bool
    vpc: str
    domain: str


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface: its device index, its addresses, the primary one first."""

    index: int
    v4: tuple[str, ...]
    v6: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instance:
    """An instance, as far as discovery is concerned."""

    id: str
    reservation: str
    tags: Mapping[str, str]
    interfaces: tuple[Interface, ...]

    def address(self, index: int, version: int) -> str:
        """Its address on that interface, else on another; empty if it has none."""
        ordered = sorted(self.interfaces, key=lambda i: (i.index != index, i.index))
        found = [a for i in ordered for a in (i.v6 if version == 6 else i.v4)]
        return found[0] if found else ""


class Ec2(Cloud):
    """Options: ``tag``, ``reservation``, ``autoscaling_group``, ``region``, ``endpoint``.

    Without the first three: the Auto Scaling group this instance is in, else its launch call.
    """

    name = "ec2"
    tries = "DescribeInstances with this instance's role"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        super().__init__(options, context)
        self._metadata = Ec2Metadata(options.get("metadata_url", ""))  # for tests
        self._role: Role | None = None
        self._self: Place | None = None

    def _look(self, own: Endpoint) -> Sighting:
        me = self._identity()
        filters = self._filters(me)
        words = ", ".join(f"{name.removeprefix('tag:')} {value}" for name, value in filters)
        everywhere = [("vpc-id", me.vpc)] if me.vpc and not me.abroad else []
        found = list(self._describe([*filters, *everywhere]))
        mine = next((i for i in found if i.id == me.id), None)
        index = _index_of(mine, own.host)
        version = 6 if ":" in own.host else 4
        others = (i.address(index, version) for i in found if i is not mine)
        hosts = [a for a in dict.fromkeys(others) if a and a != own.host]
        asked = f"instances by {words} in {me.region}"
        if mine is None and not me.abroad:
            remedy = "Give this instance the tag, or correct discovery's ec2 in the document."
            return Sighting(hosts, asked, "this instance itself is not among them", remedy)
        if not hosts:
            remedy = "Boot the others, or choose by a tag: `ec2: {tag: {NAME: VALUE}}`."
            what = "there are none" if me.abroad else "it is the only one"
            return Sighting(hosts, asked, what, remedy)
        return Sighting(hosts, asked)

    # -- who this is, and which others --

    def _identity(self) -> Place:
        """Where this instance is."""
        if self._self is None:
            get = self._metadata.get
            text = get("dynamic/instance-identity/document") or "{}"
            document = mapping(text, "the metadata service")
            me = str(document.get("instanceId", ""))
            region = str(self._options.get("region") or document.get("region"))
            if not all(re.fullmatch(r"[a-z0-9-]{1,64}", text) for text in (me, region)):
                raise Trouble(
                    "the metadata service does not tell which instance this is, and where"
                )
            mac = get("meta-data/mac") or ""
            vpc = get(f"meta-data/network/interfaces/macs/{mac}/vpc-id") if _is_mac(mac) else ""
            domain = get("meta-data/services/domain") or ""
            known = re.fullmatch(r"[a-z0-9.-]{1,100}", domain)
            self._self = Place(
                id=me,
                region=region,
                abroad=region != document.get("region"),
                vpc=vpc or "",
                domain=domain if known else "amazonaws.com",
            )
        return self._self

    def _filters(self, me: Place) -> list[tuple[str, str]]:
        options = self._options
        wanted = [(f"tag:{key}", value) for key, value in options.get("tag", {}).items()]
        group, launch = options.get("autoscaling_group"), options.get("reservation")
        if isinstance(group, str) and group:
            wanted.append((f"tag:{GROUP_TAG}", group))
        if group is True or not (wanted or launch):
            mine = next(self._describe((), me.id), None)
            own = mine.tags.get(GROUP_TAG, "") if mine else ""
            if own:
                wanted.append((f"tag:{GROUP_TAG}", own))
            elif group is True:
                remedy = "Launch it from the group, or set ec2.tag instead."
                raise Trouble("this instance is in no Auto Scaling group", remedy)
            else:
                launch = True
        if launch:
            reservation = self._metadata.get("meta-data/reservation-id") or ""
            wanted.append(("reservation-id", reservation))
        return wanted

    # -- the API --

    def _describe(
        self, filters: Sequence[tuple[str, str]], instance: str = ""
    ) -> Iterator[Instance]:
        """The instances that are up or starting and fit all filters, page by page."""
        ask_for: dict[str, str] = {"Action": "DescribeInstances", "Version": VERSION}
        ask_for |= {"InstanceId.1": instance} if instance else {"MaxResults": str(PAGE)}
        for number, (name, value) in enumerate(filters, 1):
            ask_for |= {f"Filter.{number}.Name": name, f"Filter.{number}.Value.1": value}
        number = len(filters) + 1
        ask_for[f"Filter.{number}.Name"] = "instance-state-name"
        ask_for |= {f"Filter.{number}.Value.{i}": state for i, state in enumerate(STATES, 1)}
        for _ in range(MAX_PAGES):
            root = self._call(ask_for)
            yield from _instances(root)
            token = root.findtext("{*}nextToken")
            if not token:
                return
            ask_for["NextToken"] = token[:4096]

    def _call(self, parameters: Mapping[str, str]) -> Element:
        me, role = self._identity(), self._credentials()
        host = f"ec2.{me.region}.{me.domain}"
        url = self._options.get("endpoint") or f"https://{host}/"
        body = urlencode(parameters).encode()
        try:
            answer = ask("POST", url, _signed(url, body, me.region, role), body)
        except Unanswered as error:
            what = f"the EC2 API at {urlsplit(url).netloc}: {error}"
            raise Trouble(what, ROUTE.format(host=host)) from None
        root = _xml(answer)
        if answer.status != 200:
            raise self._refused(answer.status, root)
        if root is None or _local(root.tag) != "DescribeInstancesResponse":
            raise Trouble("the EC2 API answers what is not its XML")
        return root

    def _refused(self, status: int, root: Element | None) -> Trouble:
        """What EC2's error means here."""
        every = root.iter() if root is not None else ()
        texts = [e.text or "" for e in every if _local(e.tag) == "Code"]
        code = texts[0] if texts and re.fullmatch(r"[A-Za-z.]{1,64}", texts[0]) else str(status)
        role = f" {self._role.name}" if self._role else ""
        if code in NO_ACCESS:
            what = f"the role{role} may not ec2:DescribeInstances ({code})"
            return Trouble(what, GRANT.format(role=role))
        if code in THROTTLED or status in (429, 503):
            return Trouble(f"EC2 asks for fewer questions ({code})", throttled=True)
        if code in STALE:
            self._role = None
            what = f"EC2 does not accept the credentials of the role{role} ({code})"
            return Trouble(what, "The role may be new or was removed; check its instance profile.")
        if code == "RequestExpired":
            return Trouble("EC2 takes the request for an old one", "Correct this host's clock.")
        return Trouble(f"the EC2 API answers {status}" + f" {code}" * (code != str(status)))

    def _credentials(self) -> Role:
        """The role's credentials, new ones shortly before the old ones end."""
        if self._role is None or time.time() > self._role.until - EXPIRES_EARLY:
            self._role = None
            path = "meta-data/iam/security-credentials/"
            names = (self._metadata.get(path) or "").split()
            if not names:
                raise Trouble("this instance has no role", NO_ROLE)
            data = mapping(self._metadata.get(path + names[0]) or "{}", "the metadata service")
            self._role = _role(names[0], data)
        return self._role


def _role(name: str, data: Mapping[str, Any]) -> Role:
    parts = [data.get(k) for k in ("AccessKeyId", "SecretAccessKey", "Token", "Expiration")]
    sound = all(isinstance(p, str) and p.isascii() and p.isprintable() and p for p in parts)
    if data.get("Code") != "Success" or not sound:
        raise Trouble(f"the metadata service has no credentials of the role {name}", NO_ROLE)
    key, secret, token, end = map(str, parts)
    try:
        until = datetime.fromisoformat(end).timestamp()
    except (ValueError, OverflowError):
        until = time.time() + 2 * EXPIRES_EARLY
    return Role(name, key, secret, token, until)


def _signed(url: str, body: bytes, region: str, role: Role) -> dict[str, str]:
    """The headers of a signed POST of a form."""
    try:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials
    except ImportError as error:
        raise Trouble(f"the Python module {error.name} is not in this image", LIBRARY) from None
    kind = "application/x-www-form-urlencoded; charset=utf-8"
    request = AWSRequest("POST", url, {"Content-Type": kind}, body)
    SigV4Auth(Credentials(role.access_key, role.secret_key, role.token), "ec2", region).add_auth(
        request
    )
    return dict(request.headers.items())


def _xml(answer: Answer) -> Element | None:
    """The answer's root; None if it is not XML. Entities are refused: EC2 has none."""
    from xml.etree import ElementTree

    if b"<!" in answer.body:
        return None
    try:
        return ElementTree.fromstring(answer.body)  # noqa: S314  see above
    except (ElementTree.ParseError, ValueError):
        return None


def _instances(root: Element) -> Iterator[Instance]:
    for reservation in root.iterfind("{*}reservationSet/{*}item"):
        launch = reservation.findtext("{*}reservationId") or ""
        for item in reservation.iterfind("{*}instancesSet/{*}item"):
            tags = {
                tag.findtext("{*}key") or "": tag.findtext("{*}value") or ""
                for tag in item.iterfind("{*}tagSet/{*}item")
            }
            nics = tuple(map(_interface, item.iterfind("{*}networkInterfaceSet/{*}item")))
            yield Instance(item.findtext("{*}instanceId") or "", launch, tags, nics)


def _interface(item: Element) -> Interface:
    index = item.findtext("{*}attachment/{*}deviceIndex") or ""
    v4 = [item.findtext("{*}privateIpAddress")]
    v6 = [e.text for e in item.iterfind("{*}ipv6AddressesSet/{*}item/{*}ipv6Address")]
    return Interface(
        int(index) if re.fullmatch(r"[0-9]{1,3}", index) else 0,
        tuple(filter(None, map(written, v4))),
        tuple(filter(None, map(written, v6))),
    )


def _index_of(mine: Instance | None, host: str) -> int:
    """The device index of the interface that has this host's address; 0 if that is unknown."""
    interfaces = mine.interfaces if mine else ()
    return next((i.index for i in interfaces if host in (*i.v4, *i.v6)), 0)


def _is_mac(text: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", text) is not None


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]
