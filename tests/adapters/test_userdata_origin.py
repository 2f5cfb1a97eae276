"""Origin's options in the document: what they become, and what is refused where."""

from __future__ import annotations

import json
from typing import Any

import pytest

from firstboot.host.facts import Facts
from firstboot.host.machine import Machine
from firstboot.payloads.rows import OPTIONS
from firstboot.protocol.errors import UserError
from firstboot.userdata import Document, make_token, parse
from firstboot.userdata.reading import read
from firstboot.userdata.rules import schema

BASE = f"cluster: demo\ntoken: {make_token()}\nexpect: 3\npayload: origin\n"


def document(text: str = "") -> Document:
    return parse(f"{BASE}{text}".encode(), "o.yaml")


def defaults(rule: dict[str, Any], name: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, part in rule["properties"].items():
        if "properties" in part:
            found |= defaults(part, f"{name}_{key}")
        else:
            value = part["default"]
            found[f"{name}_{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def test_defaults_are_those_of_the_rows() -> None:
    found = dict(document().options)
    assert found == defaults(schema()["properties"]["origin"], "origin")
    assert found | {"origin_labels": "{}"} == dict(OPTIONS["origin"])


def test_addresses_are_ipv4() -> None:
    assert document().cidr == "0.0.0.0/0"
    assert document("network: {cidr: 10.0.0.0/8}\n").cidr == "10.0.0.0/8"
    with pytest.raises(UserError, match="the payload origin is IPv4 only") as caught:
        document("network: {cidr: 'fd00::/8'}\n")
    assert caught.value.where == "o.yaml:5:17"


def test_options_become_variables() -> None:
    found = document(
        "origin:\n"
        "  version: v3.7.2\n"
        "  images: {node: 'oci:/images/node:latest'}\n"
        "  network: {plugin: none, host_subnet_length: 8}\n"
        "  public_hostname: openshift.example.org\n"
        "  masters_are_nodes: false\n"
        "  kubelet_arguments: {cgroup-driver: [cgroupfs], max-pods: ['50']}\n"
    ).options
    assert found["origin_version"] == "v3.7.2"
    assert found["origin_images_node"] == "oci:/images/node:latest"
    assert found["origin_network_plugin"] == "none"
    assert found["origin_network_host_subnet_length"] == "8"
    assert found["origin_masters_are_nodes"] == "false"
    arguments = {"cgroup-driver": ["cgroupfs"], "max-pods": ["50"]}
    assert json.loads(found["origin_kubelet_arguments"]) == arguments


LABELS = """\
origin:
  node_labels:
  - {match: {launch_index: 0}, labels: {region: infra, zone: a}}
  - {match: {mac: '52:54:00:AB:00:01'}, labels: {zone: b}}
  - {match: {dmi: {product_serial: s-7}}, labels: {example.org/rack: '7'}}
"""


def facts(index: int | None = None, serial: str = "") -> Facts:
    machine = Machine(launch_index=index)
    return Facts(machine, "h", None, None, 7443, {"product_serial": serial})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("matching", "labels"),
    [
        (["launch_index"], {"region": "infra", "zone": "a"}),
        (["launch_index", "mac"], {"region": "infra", "zone": "b"}),
        (["dmi"], {"example.org/rack": "7"}),
        ([], {}),
    ],
)
def test_labels_are_those_of_the_matches_that_fit(
    matching: list[str], labels: dict[str, str]
) -> None:
    found = document(LABELS).options_for(lambda match: next(iter(match)) in matching)
    assert json.loads(found["origin_labels"]) == labels


def test_labels_do_not_change_what_hosts_agree_on() -> None:
    one, other = document(LABELS), document()
    assert one.config.agreed != other.config.agreed  # the rules are shared
    assert one.options_for(lambda _: True) != one.options_for(lambda _: False)


def test_firmware_facts_match_without_regard_to_case() -> None:
    wanted = {"dmi": {"product_serial": "S-7"}}
    assert facts(serial="s-7").matches(wanted)
    assert not facts(serial="s-8").matches(wanted)
    assert not facts(serial="s-7").matches({"dmi": {"product_serial": "s-7", "sys_vendor": "x"}})


def test_firmware_facts_are_read(tmp_path: Any) -> None:
    from firstboot.host.machine import firmware

    assert firmware(tmp_path) == {}
    where = tmp_path / "sys/class/dmi/id"
    where.mkdir(parents=True)
    (where / "product_serial").write_text("VMware-42 1f\n")
    (where / "board_name").write_text("not asked for\n")
    assert firmware(tmp_path) == {"product_serial": "VMware-42 1f"}


MISTAKES = {
    "release": (
        "origin: {version: v3.10.0}",
        "o.yaml:5:19: origin.version must be a release of Origin 3.6, 3.7 or 3.9, such as v3.9.0,"
        " not 'v3.10.0'; for example: version: v3.9.0",
    ),
    "plugin": (
        "origin: {network: {plugin: flannel}}",
        "o.yaml:5:28: origin.network.plugin must be ovs-subnet, ovs-multitenant,"
        " ovs-networkpolicy or none, not 'flannel'; for example: plugin: ovs-multitenant",
    ),
    "cidr": (
        "origin: {network: {cluster_cidr: 10.128.0.1/14}}",
        "o.yaml:5:34: origin.network.cluster_cidr names a host, not a network; write 10.128.0.0/14",
    ),
    "IPv6": (
        "origin: {network: {services_cidr: 'fd00::/108'}}",
        "o.yaml:5:35: origin.network.services_cidr must be an IPv4 network in CIDR notation,"
        " not 'fd00::/108'; for example: services_cidr: 172.30.0.0/16",
    ),
    "overlap": (
        "origin: {network: {services_cidr: 10.129.0.0/16}}",
        "o.yaml:5:35: origin.network.services_cidr (10.129.0.0/16) lies within cluster_cidr"
        " (10.128.0.0/14); choose networks that share no address",
    ),
    "one host": (
        "origin: {network: {host_subnet_length: 18}}",
        "o.yaml:5:40: origin.network.host_subnet_length (18) leaves 10.128.0.0/14 to a single"
        " host; choose a smaller one, or a larger cluster_cidr",
    ),
    "label": (
        "origin: {node_labels: [{match: {launch_index: 0}, labels: {'a b': c}}]}",
        "o.yaml:5:59: origin.node_labels[0].labels must be a mapping of label names to texts",
    ),
    "label without a match": (
        "origin: {node_labels: [{labels: {a: b}}]}",
        "o.yaml:5:24: origin.node_labels[0] must be a mapping with match and labels",
    ),
    "match": (
        "origin: {node_labels: [{match: {serial: x}, labels: {a: b}}]}",
        "o.yaml:5:33: unknown key 'serial' in origin.node_labels[0].match",
    ),
    "argument": (
        "origin: {kubelet_arguments: {max-pods: 50}}",
        "origin.kubelet_arguments",
    ),
    "unknown": ("origin: {plugin: none}", "o.yaml:5:10: unknown key 'plugin' in origin"),
    "too much": (
        "origin: {kubelet_arguments: {feature-gates: [" + ", ".join(["'xxxxxxxxx'"] * 49) + "],"
        " max-pods: ['" + "5" * 1000 + "', '" + "5" * 1000 + "']}}",
        "longer than 2500 bytes as JSON",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_are_named_with_their_place(what: str) -> None:
    line, words = MISTAKES[what]
    with pytest.raises(UserError) as caught:
        document(f"{line}\n")
    assert words in str(caught.value)


def test_a_yaml_reader_takes_the_labels() -> None:
    assert read(LABELS, "x") is not None


def test_several_masters_without_a_load_balancer_are_warned_of() -> None:
    assert document("masters: 1\n").warnings == ()
    (warning,) = document("masters: 3\n").warnings
    assert warning.startswith("Nodes use the API of the founding master alone, though there are 3:")
    assert document("masters: 3\norigin: {cluster_hostname: api.example.org}\n").warnings == ()
