"""The document: its defaults, its meaning, and one test for each kind of mistake."""

from __future__ import annotations

import json

import pytest

from firstboot.protocol.errors import UserError
from firstboot.protocol.model import Endpoint
from firstboot.userdata import parse
from firstboot.userdata.reading import MAX_BYTES
from firstboot.userdata.token import assemble

TOKEN = assemble("7q0hzk3n5x9wbfcyd2rt8gjm4v6sape1")
BASE = f"cluster: demo\ntoken: {TOKEN}\nexpect: 3\n"


def mistake(text: str | bytes) -> str:
    """The one line a document's mistake makes."""
    with pytest.raises(UserError) as caught:
        parse(text.encode() if isinstance(text, str) else text, "c.yaml")
    line = str(caught.value)
    assert "\n" not in line
    assert TOKEN not in line
    return line


# ---------------------------------------------------------------- a good document


def test_smallest_document_has_every_default() -> None:
    document = parse(BASE.encode(), "c.yaml")
    config = document.config
    assert (config.cluster, config.expect, config.masters) == ("demo", 3, 1)
    assert (config.payload, config.formation, config.strict) == ("etcd", "", False)
    assert (config.grace, config.join_extra, config.join_window) == (120.0, 0, 86400.0)
    assert [spec.name for spec in document.discovery] == ["auto"]
    assert (document.interface, document.cidr, document.port) == ("", "", 7443)
    assert (document.prefer, document.never) == ((), ())
    assert document.options == {"etcd_image": "oci:/usr/lib/firstboot/images/etcd:latest"}
    assert document.sources == ("c.yaml",)
    assert document.warnings == ()


def test_everything_said() -> None:
    text = BASE + (
        "masters: 3\npayload: etcd\netcd: {image: 'registry.example.org:5000/etcd:3.5'}\n"
        "election: {strict: true, grace: 1500ms,\n"
        "  prefer: [{launch_index: 0}, {mac: 52:54:00:AB:34:56, hostname: n1}],\n"
        "  never: [{address: 10.0.0.0/28}, {address: fd00::9}, {machine_id: " + "0a" * 16 + "}]}\n"
        "discovery: [auto, {static: [10.0.0.5, '10.0.0.6:99', fd00::5, '[fd00::6]:98']},\n"
        "  {static: [node-1, 'node-2.example.org:99']}, {dns: a.example.org}, {dns: [b, c]},\n"
        "  sweep, {ec2: {tag: {cluster: demo}}}, openstack, {http: {url: 'http://x:80/d/e'}}]\n"
        "network: {interface: eth1, cidr: 10.0.0.0/16, port: 7000}\n"
        "join: {extra: unlimited, window: 7d}\nformation: second\n"
    )
    document = parse(text.encode(), "c.yaml")
    config = document.config
    assert (config.masters, config.strict, config.grace) == (3, True, 1.5)
    assert (config.join_extra, config.join_window) == (None, 7 * 86400)
    assert document.options == {"etcd_image": "registry.example.org:5000/etcd:3.5"}
    assert document.prefer == ({"launch_index": 0}, {"mac": "52:54:00:ab:34:56", "hostname": "n1"})
    assert [next(iter(match)) for match in document.never] == ["address", "address", "machine_id"]
    options = {spec.name: spec.options for spec in document.discovery}
    names = ["auto", "static", "dns", "sweep", "ec2", "openstack", "http"]
    assert list(options) == names
    assert options["dns"] == {"names": ("a.example.org", "b", "c")}
    assert options["sweep"] == {"cidr": ""}
    assert options["ec2"]["tag"] == {"cluster": "demo"}
    assert options["ec2"]["reservation"] is False
    assert options["http"]["url"] == "http://x:80/d/e"
    assert options["static"]["addresses"] == (
        Endpoint("10.0.0.5", 7000),
        Endpoint("10.0.0.6", 99),
        Endpoint("fd00::5", 7000),
        Endpoint("fd00::6", 98),
        "node-1:7000",
        "node-2.example.org:99",
    )
    assert (document.interface, document.cidr, document.port) == ("eth1", "10.0.0.0/16", 7000)
    assert document.formation_id == "demo/second"


def test_a_document_in_json_is_the_same() -> None:
    said = {"cluster": "demo", "token": TOKEN, "expect": 3}
    assert parse(json.dumps(said).encode(), "c.yaml") == parse(BASE.encode(), "c.yaml")


def test_a_byte_order_mark_is_harmless() -> None:
    assert parse(b"\xef\xbb\xbf" + BASE.encode(), "c.yaml").config.cluster == "demo"


def test_anchors_are_allowed_while_they_stay_small() -> None:
    text = BASE + "election: {prefer: [&first {launch_index: 0}], never: [*first]}\n"
    document = parse(text.encode(), "c.yaml")
    assert document.never == document.prefer == ({"launch_index": 0},)


def test_formation_id_without_a_formation_is_the_cluster() -> None:
    assert parse(BASE.encode(), "c.yaml").formation_id == "demo"


def test_payload_none_has_no_options() -> None:
    assert parse((BASE + "payload: none\n").encode(), "c.yaml").options == {}


# ---------------------------------------------------------------- mistakes in one added line

LINES = {
    "unknown-key": (
        "master: 3",
        "c.yaml:4:1: unknown key 'master'; did you mean masters?",
    ),
    "unknown-key-below": (
        "network: {interfce: eth1}",
        "c.yaml:4:11: unknown key 'interfce' in network; did you mean interface?",
    ),
    "unknown-key-in-match": (
        "election: {never: [{mac: '52:54:00:12:34:56'}, {sex: 1}]}",
        "c.yaml:4:49: unknown key 'sex' in election.never[1]; "
        "known here: launch_index, reservation, instance_id, zone, tag, mac, hostname, "
        "address, dmi, machine_id",
    ),
    "unknown-key-like-nothing": (
        "join: {zzz: 1}",
        "c.yaml:4:8: unknown key 'zzz' in join; known here: extra, window",
    ),
    "duplicate-key": (
        "expect: 5",
        "c.yaml:4:1: the key 'expect' is given twice; the first is at c.yaml:3:1",
    ),
    "duplicate-key-below": (
        "join: {extra: 1, extra: 2}",
        "c.yaml:4:18: the key 'extra' is given twice; the first is at c.yaml:4:8",
    ),
    "key-that-is-a-list": ("[a]: b", "c.yaml:4:1: a key must be a plain word"),
    "number-as-text": (
        "network: {port: '7443'}",
        "c.yaml:4:17: network.port must be a whole number from 1 to 65535, not '7443'; "
        "for example: port: 7443",
    ),
    "port-too-large": (
        "network: {port: 65536}",
        "c.yaml:4:17: network.port must be a whole number from 1 to 65535, not 65536; "
        "for example: port: 7443",
    ),
    "fraction": (
        "join: {extra: 2.0}",
        "c.yaml:4:15: join.extra must be a whole number from 0 to 10000, or unlimited, "
        "not '2.0'; for example: extra: 2",
    ),
    "negative": (
        "join: {extra: -1}",
        "c.yaml:4:15: join.extra must be a whole number from 0 to 10000, or unlimited, not -1; "
        "for example: extra: 2",
    ),
    "text-as-number": (
        "formation: 2",
        "c.yaml:4:12: formation must be at most 63 letters, digits, dots, hyphens and "
        "underscores, not 2; put it in quotes",
    ),
    "mapping-as-text": (
        "network: eth1",
        "c.yaml:4:10: network must be a mapping with interface, cidr or port, not 'eth1'; "
        "for example: network: {interface: eth1}",
    ),
    "nothing": (
        "network:",
        "c.yaml:4:9: network must be a mapping with interface, cidr or port, not nothing; "
        "for example: network: {interface: eth1}",
    ),
    "yes-is-a-text": (
        "election: {strict: yes}",
        "c.yaml:4:20: election.strict must be true or false, not 'yes'; for example: strict: true",
    ),
    "bare-duration": (
        "election: {grace: 120}",
        "c.yaml:4:19: election.grace must be a duration with its unit (ms, s, m, h or d), "
        "not 120; for example: grace: 120s",
    ),
    "duration-in-weeks": (
        "join: {window: 2w}",
        "c.yaml:4:16: join.window must be a duration with its unit (ms, s, m, h or d), "
        "not '2w'; for example: window: 24h",
    ),
    "two-masters": (
        "masters: 2",
        "c.yaml:4:10: masters must be 1, 3 or 5, not 2; for example: masters: 3",
    ),
    "true-masters": (
        "masters: true",
        "c.yaml:4:10: masters must be 1, 3 or 5, not true; for example: masters: 3",
    ),
    "more-masters-than-hosts": (
        "masters: 5",
        "c.yaml:4:10: masters (5) is more than expect (3); "
        "launch more hosts or choose fewer masters",
    ),
    "payload-of-a-later-release": (
        "payload: swarm",
        "c.yaml:4:10: payload must be etcd, origin or none, not 'swarm'; "
        "for example: payload: etcd",
    ),
    "image": (
        "etcd: {image: 'oci:here'}",
        "c.yaml:4:15: etcd.image must be an image: oci:/DIRECTORY:TAG or a registry reference, "
        "not 'oci:here'; for example: image: registry.example.org/etcd:3.5",
    ),
    "cidr-of-a-host": (
        "network: {cidr: 10.0.3.5/16}",
        "c.yaml:4:17: network.cidr names a host, not a network; write 10.0.0.0/16",
    ),
    "cidr-without-a-prefix": (
        "network: {cidr: 10.0.0.0}",
        "c.yaml:4:17: network.cidr must be a network in CIDR notation, not '10.0.0.0'; "
        "for example: cidr: 10.0.0.0/16",
    ),
    "cidr-that-is-none": (
        "network: {cidr: 10.0.0.0/33}",
        "c.yaml:4:17: network.cidr must be a network in CIDR notation, not '10.0.0.0/33'; "
        "for example: cidr: 10.0.0.0/16",
    ),
    "cidr-with-a-scope": (
        "network: {cidr: 'fe80::%eth0/64'}",
        "c.yaml:4:17: network.cidr must be a network in CIDR notation, not 'fe80::%eth0/64'; "
        "for example: cidr: 10.0.0.0/16",
    ),
    "static-address": (
        "discovery: [mdns, {static: [10.0.0.5, 10.0.0.256]}]",
        "c.yaml:4:39: discovery[1].static[1] must be an address or a host name, with or without a "
        "port, not '10.0.0.256'; for example: 10.0.0.5, [fd00::5]:7443 or node-1.example.org",
    ),
    "static-port": (
        "discovery: [{static: ['10.0.0.5:0']}]",
        "c.yaml:4:23: discovery[0].static[0] must be an address or a host name, with or without a "
        "port, not '10.0.0.5:0'; for example: 10.0.0.5, [fd00::5]:7443 or node-1.example.org",
    ),
    "static-without-a-list": (
        "discovery: [{static: 10.0.0.5}]",
        "c.yaml:4:22: discovery[0].static must be a list of addresses or host names, "
        "not '10.0.0.5'; for example: static: [10.0.0.5, \"[fd00::5]:7443\", node-1.example.org]",
    ),
    "provider-unknown": (
        "discovery: [mdsn]",
        "c.yaml:4:13: unknown discovery provider 'mdsn'; "
        "known: auto, mdns, sweep, ec2, openstack, static, dns, http",
    ),
    "provider-unknown-with-options": (
        "discovery: [{dsn: nodes.example.org}]",
        "c.yaml:4:13: unknown discovery provider 'dsn'; "
        "known: auto, mdns, sweep, ec2, openstack, static, dns, http",
    ),
    "provider-without-options": (
        "discovery: [dns]",
        "c.yaml:4:13: the discovery provider dns needs options; "
        "for example: dns: nodes.example.org",
    ),
    "two-providers-in-one": (
        "discovery: [{dns: a, ec2: {}}]",
        "c.yaml:4:13: discovery[0] must be one provider: auto, mdns, sweep, ec2, openstack, "
        "{static: …}, {dns: …} or {http: …}, not a mapping; "
        "for example: discovery: [auto, {dns: nodes.example.org}]",
    ),
    "provider-twice": (
        "discovery: [{http: {url: 'http://a/b'}}, {http: {url: 'http://a/c'}}]",
        "c.yaml:4:42: discovery names http twice; put it into one",
    ),
    "provider-option-unknown": (
        "discovery: [{ec2: {tags: {a: b}}}]",
        "c.yaml:4:20: unknown key 'tags' in discovery[0].ec2; did you mean tag?",
    ),
    "dns-name": (
        "discovery: [{dns: [a, 'b c']}]",
        "c.yaml:4:23: discovery[0].dns[1] must be a name in the DNS, not 'b c'; "
        "for example: dns: nodes.example.org",
    ),
    "sweep-too-large": (
        "discovery: [mdns, {sweep: {cidr: 10.0.0.0/16}}]",
        "c.yaml:4:34: discovery[1].sweep.cidr must be an IPv4 network in CIDR notation, /22 or "
        "smaller, not '10.0.0.0/16'; for example: cidr: 10.0.0.0/24",
    ),
    "sweep-ipv6": (
        "discovery: [{sweep: {cidr: 'fd00::/120'}}]",
        "c.yaml:4:28: discovery[0].sweep.cidr must be an IPv4 network in CIDR notation, /22 or "
        "smaller, not 'fd00::/120'; for example: cidr: 10.0.0.0/24",
    ),
    "http-password": (
        "discovery: [{http: {url: 'http://user:word@a/b'}}]",
        "c.yaml:4:26: discovery[0].http.url must be an http or https URL of a file, without user, "
        "password, query or fragment, not 'http://user:word@a/b'; "
        "for example: url: https://files.example.org/rendezvous/demo",
    ),
    "http-port": (
        "discovery: [{http: {url: 'http://a:70000/b'}}]",
        "c.yaml:4:26: discovery[0].http.url must be an http or https URL of a file, without user, "
        "password, query or fragment, not 'http://a:70000/b'; "
        "for example: url: https://files.example.org/rendezvous/demo",
    ),
    "http-address": (
        "discovery: [{http: {url: 'http://[fd00::/b'}}]",
        "c.yaml:4:26: discovery[0].http.url must be an http or https URL of a file, without user, "
        "password, query or fragment, not 'http://[fd00::/b'; "
        "for example: url: https://files.example.org/rendezvous/demo",
    ),
    "http-without-url": (
        "discovery: [{http: {}}]",
        "c.yaml:4:20: discovery[0].http must be a mapping with url, and perhaps ca_file or "
        "authorization_file, not an empty mapping; for example: "
        'http: {url: "https://files.example.org/rendezvous/demo"}',
    ),
    "discovery-empty": (
        "discovery: []",
        "c.yaml:4:12: discovery must be auto, or a list of providers: auto, mdns, sweep, ec2, "
        "openstack, {static: …}, {dns: …}, {http: …}, not an empty list; "
        "for example: discovery: [auto, {dns: nodes.example.org}]",
    ),
    "match-empty": (
        "election: {prefer: [{launch_index: 0}, {}]}",
        "c.yaml:4:40: election.prefer[1] must be a mapping with launch_index, reservation, "
        "instance_id, zone, tag, mac, hostname, "
        "address, dmi or machine_id, not an empty mapping; "
        "for example: prefer: [{launch_index: 0}]",
    ),
    "match-mac": (
        "election: {never: [{mac: 52:54}]}",
        "c.yaml:4:26: election.never[0].mac must be a MAC address in quotes, not '52:54'; "
        'for example: mac: "52:54:00:12:34:56"',
    ),
    "match-address": (
        "election: {never: [{address: node-1}]}",
        "c.yaml:4:30: election.never[0].address must be an IP address or a network in CIDR "
        "notation, not 'node-1'; for example: address: 10.0.0.5",
    ),
    "jinja": (
        "formation: CI_MISSING_JINJA_VAR/x",
        "c.yaml:4:12: cloud-init did not know a jinja variable used here; "
        "see which there are with: cloud-init query --list-keys",
    ),
    "yaml-tag": (
        "formation: !!binary aGk=",
        "c.yaml:4:12: YAML tags such as !!binary are not used here",
    ),
    "undefined-alias": (
        "formation: *x",
        "c.yaml:4:12: this is not valid YAML: found undefined alias",
    ),
    "unclosed": (
        "discovery: [",
        "c.yaml:5:1: this is not valid YAML: did not find expected node content",
    ),
    "tab": (
        "join:\n\textra: 1",
        "c.yaml:5:1: this is not valid YAML: found character that cannot start any token",
    ),
    "two-documents": (
        "---\na: b",
        "c.yaml:4:1: this is not valid YAML: but found another document",
    ),
    "control-character": (
        "formation: a\x1bb",
        "c.yaml:4:13: the document is not text: it holds a control character",
    ),
    "alias-to-itself": (
        "x: &a [*a]",
        "c.yaml:4:4: the document's aliases expand to too much",
    ),
}


@pytest.mark.parametrize("line, expected", LINES.values(), ids=LINES.keys())
def test_mistake_in_a_line(line: str, expected: str) -> None:
    assert mistake(f"{BASE}{line}\n") == expected


# ---------------------------------------------------------------- mistakes in the whole document


@pytest.mark.parametrize(
    "key, expected",
    [
        (
            "cluster",
            "c.yaml:1:1: cluster is missing; add: cluster: demo "
            "(a DNS label (lower-case letters, digits and hyphens, at most 63))",
        ),
        ("token", "c.yaml:1:1: token is missing; make one with: firstboot token"),
        (
            "expect",
            "c.yaml:1:1: expect is missing; add: expect: 3 (a whole number from 1 to 10000)",
        ),
    ],
)
def test_missing_key(key: str, expected: str) -> None:
    kept = [line for line in BASE.splitlines() if not line.startswith(key)]
    assert mistake("\n".join(kept)) == expected


@pytest.mark.parametrize("cluster", ["Demo", "-demo", "demo-", "de_mo", "d.e"])
def test_cluster_is_a_dns_label(cluster: str) -> None:
    assert mistake(BASE.replace("demo", cluster)) == (
        "c.yaml:1:10: cluster must be a DNS label (lower-case letters, digits and hyphens, "
        f"at most 63), not '{cluster}'; for example: cluster: demo"
    )


def test_a_long_text_is_not_quoted() -> None:
    assert mistake(BASE.replace("demo", "d" * 64)) == (
        "c.yaml:1:10: cluster must be a DNS label (lower-case letters, digits and hyphens, "
        "at most 63), not this text; for example: cluster: demo"
    )


@pytest.mark.parametrize("expect", ["0", "10001"])
def test_expect_is_bounded(expect: str) -> None:
    assert mistake(BASE.replace("expect: 3", f"expect: {expect}")) == (
        f"c.yaml:3:9: expect must be a whole number from 1 to 10000, not {expect}; "
        "for example: expect: 3"
    )


EMPTY = "c.yaml: the document is empty; write lines such as: cluster: demo"
NO_MAPPING = "the document is not a mapping of keys to values; write lines such as: cluster: demo"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "null\n", "{}"])
def test_empty_document(text: str) -> None:
    assert mistake(text) == EMPTY


@pytest.mark.parametrize("text", ["hello\n", "- a\n", "5\n", "[]\n"])
def test_not_a_mapping(text: str) -> None:
    assert mistake(text) == f"c.yaml:1:1: {NO_MAPPING}"


def test_not_utf8() -> None:
    data = b"cluster: demo\nformation: caf\xe9\n"
    expected = "c.yaml:2:15: the document is not text: it holds a byte that is not UTF-8"
    assert mistake(data) == expected


def test_binary_garbage() -> None:
    expected = "c.yaml:1:1: the document is not text: it holds a control character"
    assert mistake(b"\x7fELF\x00\x00\xff") == expected


def test_too_large() -> None:
    assert mistake(b"#" * (MAX_BYTES + 1)) == "c.yaml: the document is larger than 1 MB"


def test_largest_document_is_read() -> None:
    filler = b"#" * (MAX_BYTES - len(BASE))
    assert parse(BASE.encode() + filler, "c.yaml").config.cluster == "demo"


@pytest.mark.parametrize("opening", ["[", "{a: "])
def test_deep_nesting(opening: str) -> None:
    line = mistake("a: " + opening * 50_000)
    assert line.endswith(": the document is too deeply nested")


def test_too_many_values() -> None:
    assert mistake("a: [" + "1," * 200_000 + "]").endswith(": the document is too long")


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    assert mistake("\n".join(lines)).endswith(": the document's aliases expand to too much")
