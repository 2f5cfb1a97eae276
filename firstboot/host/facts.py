"""The facts of this host that its peers and the operator's preferences refer to."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Any

from firstboot.host.address import Address, Network, choose, survey
from firstboot.host.machine import Machine, firmware, look, platform, read_fact
from firstboot.protocol.errors import LocalError, UserError
from firstboot.protocol.model import LABEL, Endpoint
from firstboot.protocol.record import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known about this host; ``address`` is None while it has none.

    ``platform`` is the cloud it is on: ``ec2``, ``openstack`` or empty.
    """

    machine: Machine
    hostname: str
    network: Network
    address: Address | None
    port: int
    dmi: Mapping[str, str] = field(default_factory=dict)
    platform: str = ""

    @property
    def endpoint(self) -> Endpoint | None:
        """Where peers reach this host. A zone is left out: it says nothing on another host."""
        return Endpoint(str(self.address.ip), self.port) if self.address else None

    @property
    def macs(self) -> tuple[str, ...]:
        """The MAC addresses of all interfaces, in lower case."""
        return tuple(i.mac for i in self.network.interfaces if i.mac)

    def matches(self, wanted: Mapping[str, Any]) -> bool:
        """Whether every key of a match in `election.prefer` or `election.never` fits this host.

        Keys: ``launch_index``, ``reservation``, ``instance_id``, ``zone``, ``tag`` (a mapping),
        ``mac``, ``hostname`` (whole or its first label), ``address`` (an IP address or a network),
        ``dmi`` (a mapping of facts) and ``machine_id``. A fact that is not known fits nothing.
        """
        return bool(wanted) and all(self._fits(key, value) for key, value in wanted.items())

    def _fits(self, key: str, value: Any) -> bool:
        if key == "launch_index":
            return self.machine.launch_index is not None and self.machine.launch_index == value
        if key in ("machine_id", "instance_id", "reservation", "zone"):
            fact = getattr(self.machine, key)
            return bool(fact) and fact == value
        if key == "tag":
            return all(self.machine.tags.get(name) == text for name, text in value.items())
        if key == "dmi":
            return all(self.dmi.get(k, "").lower() == v.lower() for k, v in value.items())
        if key == "mac":
            return str(value).lower() in self.macs
        if key == "hostname":
            mine, theirs = self.hostname.lower(), str(value).lower()
            return bool(mine) and theirs in (mine, mine.partition(".")[0])
        if key == "address":
            network = ipaddress.ip_network(value, strict=False)
            return any(a.ip in network for a in self.network.addresses if not a.ip.is_loopback)
        raise LocalError(f"hosts cannot be matched by {key!r}")


def facts(root: Path, interface: str = "", cidr: str = "", port: int = 7443) -> Facts:
    """Look at this host: files under `root`, and the network it is in (see `choose`).

    While only the operator could choose, it has no address.
    """
    network, dmi = survey(), firmware(root)
    return Facts(
        machine=look(root),
        hostname=read_fact(root / "proc/sys/kernel/hostname"),
        network=network,
        address=_address(network, interface, cidr),
        port=port,
        dmi=dmi,
        platform=platform(root, dmi),
    )


def _address(network: Network, interface: str, cidr: str) -> Address | None:
    try:
        return choose(network, interface, cidr)
    except UserError:
        return None  # a default route may come yet


def node_name(hostname: str, node_id: str) -> str:
    """A DNS label for this host: the first of its host name, else ``host-`` and six digits.

    Machines from one image often share a name that names nothing, such as ``localhost``.
    """
    label = hostname.lower().partition(".")[0]
    if label == "localhost" or not LABEL.match(label) or _is_address(hostname):
        return f"host-{node_id[:6]}"
    return label


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
