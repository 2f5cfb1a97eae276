"""One test for each kind of mistake, with its exact sentence; then places, merging, carriers."""

from __future__ import annotations

import ast
import base64
import copy
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from firstboot import userdata
from firstboot.protocol.errors import LocalError, UserError
from firstboot.protocol.model import Endpoint
from firstboot.userdata import Document, Secret, check_token, explain, find, make_token, parse
from firstboot.userdata.reading import MAX_BYTES
from firstboot.userdata.token import ALPHABET, assemble

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
    assert [spec.name for spec in document.discovery] == ["mdns"]
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
        "discovery: [auto, {static: [10.0.0.5, '10.0.0.6:99', fd00::5, '[fd00::6]:98']}]\n"
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
    assert [spec.name for spec in document.discovery] == ["mdns", "static"]
    assert document.discovery[1].options["addresses"] == (
        Endpoint("10.0.0.5", 7000),
        Endpoint("10.0.0.6", 99),
        Endpoint("fd00::5", 7000),
        Endpoint("fd00::6", 98),
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
        "known here: launch_index, mac, hostname, address, machine_id",
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
        "payload: origin",
        "c.yaml:4:10: payload must be etcd or none, not 'origin'; for example: payload: etcd",
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
    "static-address": (
        "discovery: [mdns, {static: [10.0.0.5, node-1]}]",
        "c.yaml:4:39: discovery[1].static[1] must be an IP address, with or without a port, "
        "not 'node-1'; for example: 10.0.0.5 or [fd00::5]:7443",
    ),
    "static-port": (
        "discovery: [{static: ['10.0.0.5:0']}]",
        "c.yaml:4:23: discovery[0].static[0] must be an IP address, with or without a port, "
        "not '10.0.0.5:0'; for example: 10.0.0.5 or [fd00::5]:7443",
    ),
    "static-without-a-list": (
        "discovery: [{static: 10.0.0.5}]",
        "c.yaml:4:13: discovery[0] must be auto, mdns or {static: [ADDRESS, …]}, "
        "not a mapping; for example: discovery: [mdns, {static: [10.0.0.5, 10.0.0.6]}]",
    ),
    "provider-unknown": (
        "discovery: [mdsn]",
        "c.yaml:4:13: unknown discovery provider 'mdsn'; known: auto, mdns, static",
    ),
    "discovery-empty": (
        "discovery: []",
        "c.yaml:4:12: discovery must be auto, or a list of auto, mdns and "
        "{static: [ADDRESS, …]}, not an empty list; "
        "for example: discovery: [mdns, {static: [10.0.0.5, 10.0.0.6]}]",
    ),
    "match-empty": (
        "election: {prefer: [{launch_index: 0}, {}]}",
        "c.yaml:4:40: election.prefer[1] must be a mapping with launch_index, mac, hostname, "
        "address or machine_id, not an empty mapping; for example: prefer: [{launch_index: 0}]",
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


@pytest.mark.parametrize("name", ["dns", "ec2", "openstack", "sweep", "http"])
@pytest.mark.parametrize("form", ["[{}]", "[mdns, {{{}: x}}]"])
def test_provider_of_a_later_release(name: str, form: str) -> None:
    line = mistake(f"{BASE}discovery: {form.format(name)}\n")
    assert line.endswith(
        f"the discovery provider {name} is not in this release; use mdns or static"
    )


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


# ---------------------------------------------------------------- the token

HINT = "; make one with: firstboot token"


def test_made_tokens_are_accepted_and_differ() -> None:
    tokens = {make_token() for _ in range(100)}
    assert len(tokens) == 100
    for token in tokens:
        check_token(token)


def test_token_has_160_random_bits() -> None:
    assert len(set(ALPHABET)) == 32
    assert len(make_token().removeprefix("fb1-").replace("-", "")) == 32 + 4


@pytest.mark.parametrize(
    "token, complaint",
    [
        ("fb1-…", "is a placeholder"),
        ("fb1-...", "is a placeholder"),
        ("changeme", "is a placeholder"),
        ("TOKEN", "is a placeholder"),
        ("<your token>", "is a placeholder"),
        ("fb1-REPLACE-ME", "is a placeholder"),
        ("''", "is a placeholder"),
        ("hunter2", "does not start with fb1-"),
        (TOKEN.upper(), "does not start with fb1-"),
        ("fb1-7q0hzk", "is too short: it is weak or was cut off"),
        (TOKEN[:-1], "is too short: it is weak or was cut off"),
        (assemble("a" * 32), "is a repeated pattern"),
        (assemble("0123456789abcdef" * 2), "is a repeated pattern"),
        (assemble(("0123456789abc" * 3)[:32]), "is a repeated pattern"),
        (assemble("abcdefgabcdegfacbdefgabdcefgabcd"), "is a repeated pattern"),
        (TOKEN + "0", "was mistyped: its checksum does not fit"),
        (TOKEN.replace("-", ""), "does not start with fb1-"),
        (TOKEN[:10] + TOKEN[11:17] + "-" + TOKEN[17:], "was mistyped: its checksum does not fit"),
        (TOKEN[:-1] + "é", "was mistyped: its checksum does not fit"),
    ],
)
def test_bad_token(token: str, complaint: str) -> None:
    line = mistake(BASE.replace(TOKEN, token))
    assert line == f"c.yaml:2:8: the token {complaint}{HINT}"


@pytest.mark.parametrize("token", ["12345678901234567890", "5", "[a]", "{a: b}", "null", "true"])
def test_token_that_is_no_text(token: str) -> None:
    line = mistake(BASE.replace(TOKEN, token))
    if token == "12345678901234567890":  # too long for a number here, so a text
        assert line == f"c.yaml:2:8: the token does not start with fb1-{HINT}"
    else:
        assert line == f"c.yaml:2:8: the token is not a text{HINT}"


def test_every_single_typing_mistake_is_caught() -> None:
    for i in range(4, len(TOKEN)):
        for wrong in ALPHABET:
            if wrong != TOKEN[i]:
                with pytest.raises(UserError):
                    check_token(TOKEN[:i] + wrong + TOKEN[i + 1 :])


def test_swapped_neighbours_are_caught() -> None:
    for i in range(4, len(TOKEN) - 1):
        swapped = TOKEN[:i] + TOKEN[i + 1] + TOKEN[i] + TOKEN[i + 2 :]
        with pytest.raises(UserError):
            check_token(swapped)


def test_secret_shows_nothing() -> None:
    secret = Secret(TOKEN)
    for shown in (repr(secret), str(secret), f"{secret}", f"{secret:>5}", f"{secret!r}"):
        assert shown.strip() == "***"
    assert secret.reveal() == TOKEN
    assert secret == Secret(TOKEN) != Secret(TOKEN + "x")
    assert copy.deepcopy(secret) == secret
    assert TOKEN not in repr(parse(BASE.encode(), "c.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        f"cluster: {TOKEN}\nexpect: 3\n",
        f"cluster: demo\n{TOKEN}: yes\nexpect: 3\n",
        f"cluster: demo\ntokn: {TOKEN}\n",
        f"token {TOKEN}\n",
        f"token: {TOKEN}: x\n",
        f"token: *{TOKEN}\n",
        f"token: &{TOKEN} a\nb: &{TOKEN} c\n",
        f"token: !{TOKEN} a\n",
        f"token: '{TOKEN}\n",
        f"{TOKEN}: 1\n{TOKEN}: 2\n",
        f"{BASE}payload: {TOKEN}\n",
        f"{BASE}discovery: [{TOKEN}]\n",
        f"{BASE}discovery: [{{{TOKEN}: a}}]\n",
        f"{BASE}discovery: [{{static: [{TOKEN}]}}]\n",
        f"{BASE}network: {{cidr: {TOKEN}}}\n",
        f"{BASE}election: {{{TOKEN}: 1, never: [{{mac: {TOKEN}}}]}}\n",
    ],
)
def test_misplaced_token_is_not_shown(text: str) -> None:
    assert "fb1" not in mistake(text)


@pytest.mark.parametrize("name", ["cluster", "formation", "election.never[0].hostname"])
def test_token_as_a_name_would_be_published(name: str) -> None:
    other = make_token()
    said: dict[str, Any] = {"cluster": "demo", "token": TOKEN, "expect": 3}
    said |= {"election": {"never": [{"hostname": other}]}} if "." in name else {name: other}
    line = mistake(json.dumps(said))
    assert line.endswith(": a token stands here, where it would be shown")
    assert other not in line


# ---------------------------------------------------------------- what must agree


def agreed(extra: str = "", base: str = BASE) -> str:
    return parse(f"{base}{extra}".encode(), "c.yaml").config.agreed


@pytest.mark.parametrize(
    "extra",
    [
        "masters: 3",
        "payload: none",
        "etcd: {image: 'oci:/other:1'}",
        "election: {strict: true}",
        "election: {grace: 121s}",
        "join: {extra: 1}",
        "join: {extra: unlimited}",
        "join: {window: 1h}",
        "formation: second",
    ],
)
def test_shared_keys_change_the_hash(extra: str) -> None:
    assert agreed(extra) != agreed()


@pytest.mark.parametrize(
    "extra",
    [
        "masters: 1",
        "election: {grace: 2m, strict: false}",
        "join: {window: 1d, extra: 0}",
        "formation: ''",
        "network: {interface: eth1, port: 7000}",
        "discovery: [{static: [10.0.0.5]}]",
        "election: {prefer: [{launch_index: 0}], never: [{hostname: n1}]}",
    ],
)
def test_other_keys_and_spellings_do_not(extra: str) -> None:
    assert agreed(extra) == agreed()


def test_hash_is_not_of_the_token() -> None:
    assert agreed(base=BASE.replace(TOKEN, make_token())) == agreed()


def test_hash_is_the_same_in_every_release() -> None:
    """Hosts of two releases must be able to meet; change this only with the protocol's version."""
    assert agreed() == "5378e55582ccb2876e466b6d77eef18da0bc7c98a2a84fc93af92c4de7859816"


# ---------------------------------------------------------------- places on a host


def put(root: Path, name: str, text: str, mode: int = 0o600) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


CONFIG = "etc/firstboot/config.yaml"
COMBINED = "run/cloud-init/combined-cloud-config.json"
MERGED = "var/lib/cloud/instance/cloud-config.txt"


def found(root: Path) -> Document:
    document = find(root)
    assert document is not None
    return document


def test_nothing_at_all(tmp_path: Path) -> None:
    assert find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "# later\n", "---\n"])
def test_an_empty_file_says_nothing(tmp_path: Path, text: str) -> None:
    put(tmp_path, CONFIG, text)
    assert find(tmp_path) is None


def test_image_defaults_alone_configure_nothing(tmp_path: Path) -> None:
    put(tmp_path, "usr/lib/firstboot/config.d/00-defaults.yaml", "this: [is not even YAML")
    assert find(tmp_path) is None


def test_later_places_win_and_mappings_merge(tmp_path: Path) -> None:
    put(
        tmp_path,
        "usr/lib/firstboot/config.d/00.yaml",
        "masters: 3\nnetwork: {port: 1, interface: a, cidr: 10.0.0.0/8}\n"
        "election: {prefer: [{launch_index: 0}, {launch_index: 1}], grace: 1s}\n",
    )
    put(tmp_path, "usr/lib/firstboot/config.d/10.yaml", "network: {port: 2}\n")
    put(tmp_path, COMBINED, json.dumps({"firstboot": {"network": {"port": 3}, "formation": "x"}}))
    put(tmp_path, CONFIG, BASE + "network: {port: 4}\n")
    put(tmp_path, "etc/firstboot/config.d/20.yaml", "election: {prefer: [{launch_index: 2}]}\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "network: {port: 5, interface: b}\n")
    put(tmp_path, "etc/firstboot/config.d/.30.yaml", "network: {port: 6}\n")
    put(tmp_path, "etc/firstboot/config.d/30.yaml~", "network: {port: 7}\n")
    put(tmp_path, "run/firstboot/config.d/00.yaml", "network: {interface: c}\n")
    document = found(tmp_path)
    assert (document.port, document.interface, document.cidr) == (5, "c", "10.0.0.0/8")
    assert document.prefer == ({"launch_index": 2},)
    assert (document.config.masters, document.config.grace) == (3, 1.0)
    assert document.formation_id == "demo/x"
    assert document.sources == (
        "/usr/lib/firstboot/config.d/00.yaml",
        "/usr/lib/firstboot/config.d/10.yaml",
        "/run/cloud-init/combined-cloud-config.json",
        "/etc/firstboot/config.yaml",
        "/etc/firstboot/config.d/10.yaml",
        "/etc/firstboot/config.d/20.yaml",
        "/run/firstboot/config.d/00.yaml",
    )
    assert document.warnings == ()


def refused(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        find(root)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_position_is_that_of_the_file_that_said_it(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, BASE + "network:\n  port: 7000\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "network:\n  cidr: 10.0.0.1/8\n")
    put(tmp_path, "run/firstboot/config.d/10.yaml", "network:\n  interface: eth1\n")
    expected = (
        "/etc/firstboot/config.d/10.yaml:2:9: network.cidr names a host, not a network; "
        "write 10.0.0.0/8"
    )
    assert refused(tmp_path) == expected


def test_overridden_mistake_is_no_mistake(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, BASE + "masters: 2\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n")
    assert found(tmp_path).config.masters == 3


def test_missing_key_of_merged_documents(tmp_path: Path) -> None:
    put(tmp_path, CONFIG, "cluster: demo\nexpect: 3\n")
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n")
    assert refused(tmp_path) == f"/etc/firstboot/config.d/10.yaml:1:1: token is missing{HINT}"


@pytest.mark.parametrize("mode, warned", [(0o600, False), (0o640, True), (0o644, True)])
def test_readable_token_is_warned_about(tmp_path: Path, mode: int, warned: bool) -> None:
    put(tmp_path, CONFIG, BASE, mode)
    put(tmp_path, "etc/firstboot/config.d/10.yaml", "masters: 3\n", 0o644)
    expected = (
        "/etc/firstboot/config.yaml holds the token and others can read it: "
        "chmod 0600 /etc/firstboot/config.yaml",
    )
    assert found(tmp_path).warnings == (expected if warned else ())


def test_oversized_file_is_refused(tmp_path: Path) -> None:
    path = put(tmp_path, CONFIG, "")
    os.truncate(path, 1 << 40)  # sparse: reading it all would take for ever
    assert refused(tmp_path) == "/etc/firstboot/config.yaml: the document is larger than 1 MB"


def test_fifo_is_refused_and_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "etc/firstboot").mkdir(parents=True)
    os.mkfifo(tmp_path / CONFIG)
    assert refused(tmp_path) == "/etc/firstboot/config.yaml: this is not a regular file"


def test_unreadable_place_is_a_local_error(tmp_path: Path) -> None:
    (tmp_path / "etc/firstboot").mkdir(parents=True)
    (tmp_path / CONFIG).symlink_to("config.yaml")
    with pytest.raises(LocalError, match=r"cannot read /etc/firstboot/config\.yaml: Too many"):
        find(tmp_path)


# ---------------------------------------------------------------- cloud-init's merged result

SAID = {"cluster": "demo", "token": TOKEN, "expect": 3}


def test_combined_file_is_read(tmp_path: Path) -> None:
    put(tmp_path, COMBINED, json.dumps({"users": [], "firstboot": SAID}))
    document = found(tmp_path)
    assert document.config.cluster == "demo"
    assert document.sources == ("/run/cloud-init/combined-cloud-config.json",)


@pytest.mark.parametrize("whole", [{}, {"firstboot": None}, {"firstboot": {}}])
def test_combined_file_without_the_key(tmp_path: Path, whole: dict[str, Any]) -> None:
    put(tmp_path, COMBINED, json.dumps(whole))
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, MERGED, "#cloud-config\nfirstboot: {cluster: stale}\n")
    assert find(tmp_path) is None


def test_mistake_in_the_combined_file_names_the_key(tmp_path: Path) -> None:
    put(tmp_path, COMBINED, json.dumps({"firstboot": {**SAID, "network": {"port": 7443.0}}}))
    assert refused(tmp_path) == (
        "/run/cloud-init/combined-cloud-config.json, key firstboot: network.port must be a whole "
        "number from 1 to 65535, not '7443.0'; for example: port: 7443"
    )


@pytest.mark.parametrize("key", ['"\\ud800"', "[" * 40 + "]" * 40, '"a\\u0000"', '"word"'])
def test_strange_combined_key_is_a_mistake(tmp_path: Path, key: str) -> None:
    put(tmp_path, COMBINED, '{"firstboot": ' + key + "}")
    assert refused(tmp_path).startswith("/run/cloud-init/combined-cloud-config.json, key firstboot")


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "[" * 100_000])
def test_combined_file_that_is_none(tmp_path: Path, text: str) -> None:
    put(tmp_path, COMBINED, text)
    with pytest.raises(
        LocalError, match=r"combined-cloud-config\.json is not what cloud-init writes"
    ):
        find(tmp_path)


def test_merged_file_counts_only_while_cloud_init_is_enabled(tmp_path: Path) -> None:
    inner = "".join(f"  {line}\n" for line in BASE.splitlines())
    put(tmp_path, MERGED, f"#cloud-config\n\nusers: [&a x, *a]\nfirstboot:\n{inner}  masters: 2\n")
    assert find(tmp_path) is None
    put(tmp_path, "run/cloud-init/enabled", "")
    assert refused(tmp_path) == (
        "/var/lib/cloud/instance/cloud-config.txt:8:12: masters must be 1, 3 or 5, not 2; "
        "for example: masters: 3"
    )


def test_raw_user_data_is_never_read(tmp_path: Path) -> None:
    put(tmp_path, "run/cloud-init/enabled", "")
    put(tmp_path, "var/lib/cloud/instance/user-data.txt", "#cloud-config\nfirstboot: {a: b}\n")
    put(tmp_path, MERGED, "#cloud-config\n{}\n")
    assert find(tmp_path) is None


@pytest.mark.parametrize(
    "files, reason",
    [
        ({}, "cloud-init is absent and there is no /etc/firstboot/config.yaml"),
        (
            {"run/cloud-init/disabled": ""},
            "cloud-init is disabled and there is no /etc/firstboot/config.yaml",
        ),
        (
            {"run/cloud-init/enabled": ""},
            "cloud-init is enabled but has not stored any user-data",
        ),
        (
            {
                "run/cloud-init/enabled": "",
                "var/lib/cloud/instance/user-data.txt": "#cloud-confg\na: b\n",
                MERGED: "#cloud-config\n# from 1 files\n",
            },
            "cloud-init ran but found no cloud-config in the user-data; "
            "its first line must be #cloud-config and the rest valid YAML",
        ),
        (
            {
                "run/cloud-init/enabled": "",
                "var/lib/cloud/instance/user-data.txt": "#cloud-config\nusers: []\n",
                MERGED: "#cloud-config\nusers: []\n",
                COMBINED: '{"users": []}',
            },
            "cloud-init ran but its user-data neither writes /etc/firstboot/config.yaml "
            "nor has a firstboot key",
        ),
        (
            {"run/cloud-init/enabled": "", COMBINED: "{}"},
            "cloud-init ran but its user-data neither writes /etc/firstboot/config.yaml "
            "nor has a firstboot key",
        ),
    ],
    ids=["absent", "disabled", "not-yet", "unusable", "no-key", "no-user-data"],
)
def test_why_not_configured(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, text in files.items():
        put(tmp_path, name, text)
    assert find(tmp_path) is None
    assert explain(tmp_path) == f"not configured: {reason}"


# ---------------------------------------------------------------- carried by another document


def cloud(*entries: dict[str, Any], **keys: Any) -> bytes:
    return b"#cloud-config\n" + json.dumps({"write_files": entries, **keys}).encode()


def entry(content: str, path: str = "/etc/firstboot/config.yaml", **keys: Any) -> dict[str, Any]:
    return {"path": path, "permissions": "0600", "content": content, **keys}


def test_cloud_config_with_write_files() -> None:
    other = entry("x: [", "/etc/other")
    assert parse(cloud(other, entry(BASE)), "u").config.cluster == "demo"


def test_cloud_config_positions_are_of_the_inner_document() -> None:
    with pytest.raises(UserError) as caught:
        parse(cloud(entry(BASE + "masters: 2\n")), "u.yaml")
    assert str(caught.value) == (
        "u.yaml, /etc/firstboot/config.yaml in it:4:10: masters must be 1, 3 or 5, not 2; "
        "for example: masters: 3"
    )


def test_cloud_config_key_has_positions_of_the_file() -> None:
    inner = "".join(f"  {line}\n" for line in BASE.splitlines())
    with pytest.raises(UserError) as caught:
        parse(f"#cloud-config\nfirstboot:\n{inner}  masters: 2\n".encode(), "u.yaml")
    assert caught.value.where == "u.yaml:6:12"


def test_cloud_config_files_merge_as_on_a_host() -> None:
    drop_in = "/etc/firstboot/config.d/10.yaml"
    late = entry("network: {port: 3}", "/run/firstboot/config.d/00.yaml")
    files = [late, entry("network: {port: 2}", drop_in), entry(BASE + "network: {port: 1}")]
    document = parse(cloud(*files, firstboot={"formation": "x", "network": {"port": 9}}), "u")
    assert (document.port, document.formation_id) == (3, "demo/x")


@pytest.mark.parametrize(
    "encoding", ["b64", "base64", "gz", "gzip", "gz+b64", "gzip+base64", "text/plain"]
)
def test_cloud_config_encodings(encoding: str) -> None:
    data = BASE.encode()
    data = gzip.compress(data) if "gz" in encoding else data
    if "64" in encoding or "gz" in encoding:
        if "64" not in encoding:  # raw gzip bytes come as a YAML binary
            text = base64.b64encode(data).decode()
            document = (
                "#cloud-config\nwrite_files:\n- path: /etc/firstboot/config.yaml\n"
                f"  permissions: '0600'\n  encoding: {encoding}\n  content: !!binary {text}\n"
            )
            assert parse(document.encode(), "u").config.cluster == "demo"
            return
        data = base64.b64encode(data)
    assert parse(cloud(entry(data.decode(), encoding=encoding)), "u").config.cluster == "demo"


@pytest.mark.parametrize(
    "broken",
    [
        entry("x", encoding="gz+b64"),
        entry(base64.b64encode(gzip.compress(BASE.encode())[:-12]).decode(), encoding="gz+b64"),
        {"path": "/etc/firstboot/config.yaml", "source": {"uri": "https://example.org/"}},
    ],
    ids=["not-base64", "cut-off", "elsewhere"],
)
def test_cloud_config_contents_that_are_not_there(broken: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        parse(cloud(broken), "u.yaml")
    assert str(caught.value) == (
        "u.yaml, /etc/firstboot/config.yaml in it: "
        "the contents are not in this file or cannot be decoded"
    )


def test_decompression_bomb_is_refused() -> None:
    bomb = base64.b64encode(gzip.compress(b"#" * 50_000_000)).decode()
    with pytest.raises(UserError, match="larger than 1 MB"):
        parse(cloud(entry(bomb, encoding="gz+b64")), "u.yaml")


def test_cloud_config_warnings() -> None:
    plain = {"path": "/etc/firstboot/config.yaml", "content": BASE, "defer": True}
    inner = "u, /etc/firstboot/config.yaml in it"
    assert parse(cloud(plain), "u").warnings == (
        f"{inner} will be readable by others: give it the mode 0600",
        f"{inner} will be written after firstboot looks: remove defer",
    )


NOTHING = "this holds no firstboot configuration; have it write /etc/firstboot/config.yaml"


@pytest.mark.parametrize(
    "data",
    [
        b"#cloud-config\nusers: []\n",
        b"#cloud-config\n",
        b"#cloud-config\nfirstboot:\n",
        b"write_files: 5\n",
        b"write_files: [5, {path: [a]}]\n",
        b"write_files: [{path: /etc/firstboot/config.d/x.yml, content: a}]\n",
        b'{"ignition": {"version": "3.4.0"}}',
        b'{"ignition": 1, "storage": {"files": [1, {"path": 5}, {"contents": []}]}}',
        b"variant: fcos\nstorage: {files: [{path: /etc/x}]}\n",
    ],
)
def test_carrier_without_the_document(data: bytes) -> None:
    with pytest.raises(UserError) as caught:
        parse(data, "u")
    assert str(caught.value) == f"u: {NOTHING}"


def ignition(source: str, **contents: Any) -> bytes:
    file = {"path": "/etc/firstboot/config.yaml", "contents": {"source": source, **contents}}
    return json.dumps({"ignition": {}, "storage": {"files": [{**file, "mode": 0o600}]}}).encode()


@pytest.mark.parametrize("media", ["", "text/plain;charset=utf-8"])
def test_ignition_with_compressed_contents(media: str) -> None:
    packed = base64.b64encode(gzip.compress(BASE.encode())).decode()
    data = ignition(f"data:{media};base64,{packed}", compression="gzip")
    document = parse(data, "u.ign")
    assert document.config.cluster == "demo"
    assert document.warnings == ()


def test_ignition_mistake_has_the_inner_position() -> None:
    with pytest.raises(UserError) as caught:
        parse(ignition("data:,cluster%3A%20demo%0Aexpcet%3A%203%0A"), "u.ign")
    assert str(caught.value) == (
        "u.ign, /etc/firstboot/config.yaml in it:2:1: unknown key 'expcet'; did you mean expect?"
    )


@pytest.mark.parametrize("source", ["https://example.org/x", "data:nocomma", "data:;base64,x"])
def test_ignition_contents_that_are_not_there(source: str) -> None:
    with pytest.raises(UserError, match="the contents are not in this file or cannot be decoded"):
        parse(ignition(source), "u.ign")


def test_ignition_default_mode_is_warned_about() -> None:
    data = ignition("data:;base64," + base64.b64encode(BASE.encode()).decode())
    warned = json.loads(data)
    del warned["storage"]["files"][0]["mode"]
    assert parse(data, "u").warnings == ()
    assert len(parse(json.dumps(warned).encode(), "u").warnings) == 1


# ---------------------------------------------------------------- start-up


def test_importing_loads_neither_yaml_nor_fastjsonschema() -> None:
    """Both cost more to load than the rest of a short command; only functions import them."""
    eager, late = set(), set()
    for path in Path(userdata.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                (eager if node in tree.body else late).update(names)
    assert not eager & {"yaml", "fastjsonschema", "urllib", "secrets"}
    assert late >= {"yaml", "fastjsonschema", "secrets"}
