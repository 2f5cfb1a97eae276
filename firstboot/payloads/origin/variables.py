"""What Origin's texts refer to beside the cluster's own names: it follows from them."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping

API_PORT = 8443
CONTROLLERS_PORT = 8444
IMAGES = "docker.io/openshift"
# What other hosts and people reach, as openshift-ansible opens it, and what firstboot itself needs.
MASTER_TCP, MASTER_UDP = ("8443", "8444", "8053", "2379", "2380", "7443"), ("8053",)
NODE_TCP = ("53", "80", "443", "1936", "9000:10000", "10250", "10256")
NODE_UDP = ("53", "4789")
POLICY_KEY = "  bootstrapPolicyFile: policy.json\n"  # ends with Origin 3.7
AGGREGATOR = """\
aggregatorConfig:
  proxyClientInfo:
    certFile: aggregator-front-proxy.crt
    keyFile: aggregator-front-proxy.key
authConfig:
  requestHeader:
    clientCA: front-proxy-ca.crt
    clientCommonNames:
    - aggregator-front-proxy
    extraHeaderPrefixes:
    - X-Remote-Extra-
    groupHeaders:
    - X-Remote-Group
    usernameHeaders:
    - X-Remote-User
"""  # begins with Origin 3.7
ASSETS = """\
assetConfig:
  logoutURL: ""
  masterPublicURL: "https://{at}"
  publicURL: "https://{at}/console/"
  servingInfo:
    bindAddress: "0.0.0.0:8443"
    bindNetwork: tcp4
    certFile: master.server.crt
    clientCA: ""
    keyFile: master.server.key
    maxRequestsInFlight: 0
    requestTimeoutSeconds: 0
"""  # the console, until Origin 3.7; later it is a pod
_RELEASE = re.compile(r"v?(3\.[0-9]+)\b")


def derive(known: Mapping[str, str]) -> dict[str, str]:
    """The variables; every one is a text, flags are ``true`` or ``false``."""
    release = _release(known["origin_version"])
    plugin = known["origin_network_plugin"]
    here = known["role"] == "node" or known["origin_masters_are_nodes"] == "true"
    old = release in ("3.6", "3.7")
    dns = known["origin_dns"] == "dnsmasq"
    single = release == "3.6" and known["master_count"] == "1"
    # Addresses in what the parts of a host say to each other: containers see no /etc/hosts.
    api_host = known["origin_cluster_hostname"] or known["url_host"]
    node_api_host = known["origin_cluster_hostname"] or known["founder_url_host"]
    public_host = known["origin_public_hostname"] or api_host
    networks = (known["origin_network_services_cidr"], known["origin_network_cluster_cidr"])
    services = ipaddress.ip_network(networks[0])
    founder, master = known["name"] == known["founder_name"], known["role"] == "master"
    return {
        "release": release,
        "image_version": known["origin_version"],
        "service_ip": str(services.network_address + 1),
        "node_here": _flag(here),
        "founder_elsewhere": _flag(not founder),
        "founder_here": _flag(founder),
        "router_here": _flag(founder and bool(known["origin_images_router"])),
        "registry_here": _flag(founder and bool(known["origin_images_registry"])),
        "infra_selector": known["origin_infra_selector"],
        "open_tcp": " ".join((*(MASTER_TCP if master else ()), *NODE_TCP)),
        "open_udp": " ".join((*(MASTER_UDP if master else ()), *NODE_UDP)),
        "node_labels_json": known["origin_labels"],
        "api_host": api_host,
        "public_host": public_host,
        "ansible_release": f"v{release.removeprefix('v')}",
        "ansible_network": "openshift_use_openshift_sdn=false\nos_sdn_network_plugin_name=cni"
        if plugin == "none"
        else f"os_sdn_network_plugin_name=redhat/openshift-{plugin}",
        "inventory_masters": known["master_names"].replace(",", "\n"),
        "dns_here": _flag(dns),
        "dns_node_here": _flag(dns and here),
        # Without a name server of the host's own, pods ask the API server's by its service.
        "dns_ip": known["address"] if dns else str(services.network_address + 1),
        "upstream_resolv": "/etc/origin/node/resolv.conf" if dns else "/etc/resolv.conf",
        "ovs_here": _flag(here and plugin != "none"),
        "single": _flag(single),
        "split": _flag(not single),
        "policy_file": _flag(old),
        "policy_split": _flag(old and not single),
        "policy_single": _flag(old and single),
        "aggregator": "" if release == "3.6" else AGGREGATOR,
        "assets": ASSETS.format(at=_netloc(public_host)) if old else "",
        "cluster_networks": "" if release == "3.6" else _cluster_networks(known),
        "policy_key": POLICY_KEY if old else "",
        "masters_group": "" if release == "3.6" else "system:masters",
        "plugin_name": "" if plugin == "none" else f"redhat/openshift-{plugin}",
        "loopback": _netloc(known["url_host"]),
        "loopback_nick": _nick(known["url_host"]),
        "api": _netloc(api_host),
        "api_nick": _nick(api_host),
        "public_same": _flag(public_host == api_host),
        "public_differs": _flag(public_host != api_host),
        "public_api": _netloc(public_host),
        "public_nick": _nick(public_host),
        "node_api": _netloc(node_api_host),
        "node_api_nick": _nick(node_api_host),
        "etcd_url_lines": _lines(known["client_urls"].split(","), 2),
        "kubelet_arguments": _arguments(known),
        "cors_lines": _lines(_origins(known, public_host), 0),
        "image_etcd": known["origin_images_etcd"],
        **{f"image_{part}": _image(known, part) for part in ("origin", "node", "openvswitch")},
    }


def _release(version: str) -> str:
    found = _RELEASE.match(version)
    return found[1] if found else version


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _netloc(host: str) -> str:
    return f"{host}:{API_PORT}"


def _nick(host: str) -> str:
    """How Origin's kubeconfigs call a server."""
    return f"{host.replace('.', '-')}:{API_PORT}"


def _cluster_networks(known: Mapping[str, str]) -> str:
    """Since 3.7; the two older keys must say the same."""
    cidr, length = known["origin_network_cluster_cidr"], known["origin_network_host_subnet_length"]
    return f'  clusterNetworks:\n  - cidr: "{cidr}"\n    hostSubnetLength: {length}\n'


def _image(known: Mapping[str, str], part: str) -> str:
    return known[f"origin_images_{part}"] or f"{IMAGES}/{part}:{known['origin_version']}"


def _lines(items: Iterable[str], indent: int) -> str:
    """A YAML list, a line each; every text in quotes, since Origin's parser wants them."""
    return "\n".join(f"{' ' * indent}- {json.dumps(item)}" for item in items)


def _origins(known: Mapping[str, str], public_host: str) -> list[str]:
    """The browsers' origins that may use the API: expressions, as Origin takes them."""
    hosts = ("127.0.0.1", "localhost", known["name"], known["address"], public_host)
    return [f"(?i)//{re.escape(host)}(:|\\z)" for host in dict.fromkeys(hosts)]


def _arguments(known: Mapping[str, str]) -> str:
    """`kubeletArguments`, as YAML below that key; what the document says comes last and wins."""
    labels = json.loads(known["origin_labels"])
    arguments: dict[str, list[str]] = {}
    if labels:
        arguments["node-labels"] = [f"{key}={value}" for key, value in sorted(labels.items())]
    if known["role"] == "master" and known["origin_schedulable_masters"] != "true":
        arguments["register-schedulable"] = ["false"]
    arguments |= json.loads(known["origin_kubelet_arguments"])
    if not arguments:
        return " {}"
    named = (f"\n  {json.dumps(key)}:\n{_lines(arguments[key], 2)}" for key in sorted(arguments))
    return "".join(named)
