"""What Origin's options must be beside what the schema says."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Mapping
from typing import Any

from firstboot.userdata.reading import Place, Said
from firstboot.userdata.rules import check_network, wrong

MAX_TEXT = 2500  # the history keeps all options in one blob
NETWORK: Place = ("origin", "network")


def check_origin(said: Said, given: Mapping[str, Any]) -> None:
    """Raise UserError unless pods' and services' networks are IPv4, apart and large enough."""
    _check_size(said, given)
    network, length = given["network"], given["network"]["host_subnet_length"]
    pods = _ipv4(said, "cluster_cidr", network["cluster_cidr"])
    services = _ipv4(said, "services_cidr", network["services_cidr"])
    if pods.overlaps(services):
        message = f"origin.network.services_cidr ({services}) lies within cluster_cidr ({pods})"
        hint = "choose networks that share no address"
        raise said.error((*NETWORK, "services_cidr"), message, hint)
    if length >= pods.max_prefixlen - pods.prefixlen:
        message = f"origin.network.host_subnet_length ({length}) leaves {pods} to a single host"
        hint = "choose a smaller one, or a larger cluster_cidr"
        raise said.error((*NETWORK, "host_subnet_length"), message, hint)


def only_ipv4(said: Said, cidr: str) -> str:
    """The network that hosts' addresses must be in; UserError if it is an IPv6 one."""
    if ":" in cidr:
        message = "network.cidr is IPv6, and the payload origin is IPv4 only"
        raise said.error(("network", "cidr"), message, "name an IPv4 network")
    return cidr or "0.0.0.0/0"


def origin_warnings(given: Mapping[str, Any], masters: int) -> list[str]:
    """What is allowed, and not what most people would want."""
    if masters == 1 or given["cluster_hostname"]:
        return []
    return [
        f"Nodes use the API of the founding master alone, though there are {masters}: name a load"
        " balancer before them as origin.cluster_hostname"
    ]


def _check_size(said: Said, given: Mapping[str, Any]) -> None:
    for key in ("kubelet_arguments", "node_labels", "infra_selector"):
        if len(json.dumps(given[key])) > MAX_TEXT:
            message = f"origin.{key} is longer than {MAX_TEXT} bytes as JSON"
            raise said.error(("origin", key), message, "say less")


def _ipv4(said: Said, key: str, text: str) -> ipaddress.IPv4Network:
    place = (*NETWORK, key)
    check_network(said, place, text, prefix=True)
    found = ipaddress.ip_network(text)
    if not isinstance(found, ipaddress.IPv4Network):
        raise wrong(said, place)
    return found
