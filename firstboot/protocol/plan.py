"""What a role runs: rows of a payload, filled in from the decided value.

A payload is data: for each role the certificates it needs and the ordered steps. Texts in it may
hold ``${variables}`` (see `variables`); an unknown one is a LocalError. A new payload needs rows
and templates, no new machinery.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from string import Template
from typing import Any

from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import Member, Profile, Role, Value


@dataclass(frozen=True, slots=True)
class WriteFile:
    """A file on the host: `content`, or a copy of `credential` (see `pki.CREDENTIALS`)."""

    path: str
    content: str = ""
    credential: str = ""
    mode: int = 0o644


@dataclass(frozen=True, slots=True)
class InstallContainer:
    """A system container from an image: ``oci:/layout:tag`` or a registry reference."""

    name: str
    image: str
    values: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class StartUnit:
    """Enable and start a systemd unit, and follow it until it is active."""

    unit: str


@dataclass(frozen=True, slots=True)
class Probe:
    """A health gate: GET `url` until it answers 200, for at most `deadline` seconds.

    `authority`, `certificate` and `key` are paths on the host, for https.
    """

    url: str
    authority: str = ""
    certificate: str = ""
    key: str = ""
    deadline: float = 60.0


@dataclass(frozen=True, slots=True)
class ReachTarget:
    """The last step: firstboot.target holds these units, now and at every later boot."""

    units: tuple[str, ...]


Step = WriteFile | InstallContainer | StartUnit | Probe | ReachTarget


@dataclass(frozen=True, slots=True)
class RolePlan:
    """The certificates a role needs and its steps, in order."""

    profiles: tuple[Profile, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Payload:
    """What the two roles mean."""

    name: str
    master: RolePlan
    node: RolePlan

    def for_role(self, role: Role) -> RolePlan:
        """The rows of one role."""
        return self.master if role is Role.MASTER else self.node


def variables(value: Value, me: Member, cluster: str) -> dict[str, str]:
    """What a payload's texts may refer to."""
    masters = value.masters
    return {
        "cluster": cluster,
        "cluster_id": value.cluster_id,
        "name": me.name,
        "address": me.host,
        "url_host": _url_host(me.host),
        "master_names": ",".join(m.name for m in masters),
        "master_addresses": ",".join(m.host for m in masters),
        "client_urls": ",".join(f"https://{_url_host(m.host)}:2379" for m in masters),
        "peer_urls": ",".join(f"{m.name}=https://{_url_host(m.host)}:2380" for m in masters),
    }


def make_plan(
    payload: Payload, value: Value, me: Member, cluster: str, options: Mapping[str, str]
) -> tuple[Step, ...]:
    """The ordered steps that turn this host into its role; the same for the same input."""
    known = {**options, **variables(value, me, cluster)}
    rows = payload.for_role(value.role_of(me.node_id))
    steps = tuple(_fill(step, known) for step in rows.steps)
    return (*steps, ReachTarget(tuple(s.unit for s in steps if isinstance(s, StartUnit))))


def _url_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _fill(step: Step, known: Mapping[str, str]) -> Step:
    def text(raw: str) -> str:
        try:
            return Template(raw).substitute(known)
        except (KeyError, ValueError) as error:
            raise LocalError(f"payload text {raw!r} cannot be filled in: {error}") from None

    changes: dict[str, Any] = {}
    for name in step.__slots__:
        old = getattr(step, name)
        if isinstance(old, str):
            changes[name] = text(old)
        elif isinstance(old, tuple):
            changes[name] = tuple((key, text(item)) for key, item in old)
    return replace(step, **changes)
