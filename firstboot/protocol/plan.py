"""What a role runs: rows of a payload, filled in from the decided value.

A payload is data: for each role the certificates it needs and the ordered steps. Texts in it may
hold ``${variables}`` (see `variables`); an unknown one is a LocalError. A new payload needs rows
and templates, no new machinery.

A step whose `when` does not fill in to ``true`` is left out. A file's content, a block's and an
object's may hold ``@{NAME}`` and ``@{base64:NAME}``: a credential of this host, put in when it is
written, so that no plan holds a secret.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from string import Template
from typing import Any

from firstboot.protocol.credentials import Leaf, Signer
from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import Member, Profile, Role, Value
from firstboot.protocol.record import dataclass


@dataclass(frozen=True, slots=True)
class GetCertificates:
    """The payload's own certificates: keys are made here, the founding master signs."""

    when: str = "true"


@dataclass(frozen=True, slots=True)
class MakeDirectory:
    """A directory, with its parents; one that is there keeps what it holds.

    If others may not enter, one that is there is closed to them as well. With `claim`, what it
    holds must be of this cluster: an earlier cluster's data would be taken for its own.
    """

    path: str
    mode: int = 0o755
    claim: bool = False
    when: str = "true"


@dataclass(frozen=True, slots=True)
class WriteFile:
    """A file on the host: `content`, or a copy of `credential`.

    With `keep` a file that is there is left alone. If this changes the file, the unit `restarts`
    is restarted when its turn to start comes.
    """

    path: str
    content: str = ""
    credential: str = ""
    mode: int = 0o644
    keep: bool = False
    restarts: str = ""
    when: str = "true"


@dataclass(frozen=True, slots=True)
class WriteBlock:
    """Lines in a file that others write too, between two comments that name firstboot."""

    path: str
    content: str
    when: str = "true"


@dataclass(frozen=True, slots=True)
class MakeLink:
    """A symbolic link; a file of somebody else's in its place is left alone."""

    path: str
    target: str
    when: str = "true"


@dataclass(frozen=True, slots=True)
class SetKernel:
    """A kernel parameter, now; see sysctl(8)."""

    key: str
    value: str
    when: str = "true"


@dataclass(frozen=True, slots=True)
class UseResolver:
    """The host's /etc/resolv.conf names `address`, where a name server will listen.

    What it named before is kept in `saved`, as a resolv.conf(5), and in `servers`, as lines of
    dnsmasq(8); `restarts` as in `WriteFile`.
    """

    address: str
    search: str
    saved: str
    servers: str
    restarts: str = ""
    when: str = "true"


@dataclass(frozen=True, slots=True)
class InstallContainer:
    """A system container from an image: ``oci:/layout:tag`` or a registry reference."""

    name: str
    image: str
    values: tuple[tuple[str, str], ...] = ()
    when: str = "true"


@dataclass(frozen=True, slots=True)
class StartUnit:
    """Enable and start a systemd unit, and follow it until it is active, `deadline` seconds.

    `ports` are the TCP ports it will listen on, as ``ADDRESS:PORT``: if another program has one,
    that is said before. A unit that is not `lasting` does its work and ends; firstboot.target
    does not hold it.
    """

    unit: str
    ports: tuple[str, ...] = ()
    deadline: float = 120.0
    lasting: bool = True
    when: str = "true"


@dataclass(frozen=True, slots=True)
class Probe:
    """A health gate: GET `url` until it answers 200, for at most `deadline` seconds.

    `authority`, `certificate` and `key` are paths on the host, for https. With `contains`, the
    answer must hold that text; `lacks` says in words what it means if not. If the gate stays
    shut, what `unit` wrote last is told as well.
    """

    url: str
    authority: str = ""
    certificate: str = ""
    key: str = ""
    deadline: float = 60.0
    contains: str = ""
    lacks: str = ""
    unit: str = ""
    when: str = "true"


@dataclass(frozen=True, slots=True)
class CreateObject:
    """An object in the API of what runs here: POSTed to `url`; one that is there is left alone.

    `name` is its kind and name; `content` is JSON; the rest is as in `Probe`.
    """

    url: str
    name: str
    content: str
    authority: str
    certificate: str
    key: str
    when: str = "true"


@dataclass(frozen=True, slots=True)
class ReachTarget:
    """The last step: firstboot.target holds these units, now and at every later boot."""

    units: tuple[str, ...]
    when: str = "true"


Step = (
    GetCertificates
    | MakeDirectory
    | WriteFile
    | WriteBlock
    | MakeLink
    | SetKernel
    | UseResolver
    | InstallContainer
    | StartUnit
    | Probe
    | CreateObject
    | ReachTarget
)


@dataclass(frozen=True, slots=True)
class RolePlan:
    """The certificates a role needs and its steps, in order.

    `profiles` are from the cluster CA, `leaves` from the payload's own signers.
    """

    profiles: tuple[Profile, ...]
    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...] = ()


@dataclass(frozen=True, slots=True)
class Payload:
    """What the two roles mean.

    `signers` are authorities of its own and `pairs` names of key pairs that all masters share.
    `derive` adds variables that follow from the others; it is pure.
    """

    name: str
    master: RolePlan
    node: RolePlan
    signers: tuple[Signer, ...] = ()
    pairs: tuple[str, ...] = ()
    derive: Callable[[Mapping[str, str]], Mapping[str, str]] | None = None

    def for_role(self, role: Role) -> RolePlan:
        """The rows of one role."""
        return self.master if role is Role.MASTER else self.node

    def signer(self, name: str) -> Signer:
        """The signer of that name."""
        return next(s for s in self.signers if s.name == name)


def variables(value: Value, me: Member, cluster: str) -> dict[str, str]:
    """What a payload's texts may refer to."""
    masters = value.masters
    return {
        "cluster": cluster,
        "cluster_id": value.cluster_id,
        "name": me.name,
        "role": value.role_of(me.node_id).value,
        "address": me.host,
        "url_host": _url_host(me.host),
        "founder_name": value.founder.name,
        "founder_address": value.founder.host,
        "founder_url_host": _url_host(value.founder.host),
        "master_count": str(len(masters)),
        "master_names": ",".join(m.name for m in masters),
        "master_addresses": ",".join(m.host for m in masters),
        "client_urls": ",".join(f"https://{_url_host(m.host)}:2379" for m in masters),
        "peer_urls": ",".join(f"{m.name}=https://{_url_host(m.host)}:2380" for m in masters),
    }


def make_plan(
    payload: Payload, value: Value, me: Member, cluster: str, options: Mapping[str, str]
) -> tuple[Step, ...]:
    """The ordered steps that turn this host into its role; the same for the same input."""
    known = _known(payload, value, me, cluster, options)
    rows = payload.for_role(value.role_of(me.node_id))
    filled = (_fill(step, known) for step in rows.steps)
    steps = tuple(step for step in filled if step.when == "true")
    units = (s.unit for s in steps if isinstance(s, StartUnit) and s.lasting)
    return (*steps, ReachTarget(tuple(dict.fromkeys(units))))


def make_leaves(
    payload: Payload, value: Value, member: Member, cluster: str, options: Mapping[str, str]
) -> tuple[Leaf, ...]:
    """The certificates of the payload's own that `member` gets; the same on it and its master."""
    known = _known(payload, value, member, cluster, options)
    rows = payload.for_role(value.role_of(member.node_id)).leaves
    filled = (row.filled(lambda raw: _text(raw, known)) for row in rows)
    return tuple(row for row in filled if row.when == "true")


def _known(
    payload: Payload, value: Value, me: Member, cluster: str, options: Mapping[str, str]
) -> Mapping[str, str]:
    known = {**options, **variables(value, me, cluster)}
    return known if payload.derive is None else {**known, **payload.derive(known)}


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _text(raw: str, known: Mapping[str, str]) -> str:
    try:
        return Template(raw).substitute(known)
    except (KeyError, ValueError) as error:
        raise LocalError(f"payload text {raw[:200]!r} cannot be filled in: {error}") from None


def _fill(step: Step, known: Mapping[str, str]) -> Step:
    changes: dict[str, Any] = {}
    for name in step.__slots__:
        old = getattr(step, name)
        if isinstance(old, str):
            changes[name] = _text(old, known)
        elif isinstance(old, tuple):
            changes[name] = tuple(
                _text(item, known) if isinstance(item, str) else (item[0], _text(item[1], known))
                for item in old
            )
    return replace(step, **changes)
