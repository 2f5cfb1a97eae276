"""Whatever the bytes are: a Document or a UserError, and never the token in the error."""

from __future__ import annotations

import json
import traceback
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstboot.protocol.errors import UserError
from firstboot.userdata import Document, parse
from firstboot.userdata.rules import schema
from firstboot.userdata.token import assemble

FAST = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TOKEN = assemble("9nhbjgrvxqtx0fsftmjtscpgx1ehjtsw")
GOOD: dict[str, Any] = {
    "cluster": "demo",
    "token": TOKEN,
    "expect": 3,
    "masters": 3,
    "payload": "etcd",
    "etcd": {"image": "oci:/images/etcd:1"},
    "election": {"strict": True, "grace": "5s", "prefer": [{"launch_index": 0}], "never": []},
    "discovery": ["mdns", {"static": ["10.0.0.5", "[fd00::5]:7443"]}],
    "network": {"interface": "eth1", "cidr": "10.0.0.0/16", "port": 7443},
    "join": {"extra": 1, "window": "1h"},
    "formation": "x",
}


def outcome(data: bytes) -> str:
    """The error's whole text, with its traceback; "" for a Document."""
    try:
        document = parse(data, "fuzz")
    except UserError as error:
        assert error.message and "\n" not in str(error)
        return str(error) + "".join(traceback.format_exception(error)) + repr(error)
    assert isinstance(document, Document)
    assert "fb1-" not in repr(document)
    return ""


@FAST
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    outcome(data)


# Pieces of YAML and of this configuration, so that the parts behind the YAML parser are reached.
WORDS = [
    *schema()["properties"],
    *("firstboot", "write_files", "ignition", "storage", "files", "path", "content", "contents"),
    *("/etc/firstboot/config.yaml", "data:,a", "static", "mdns", "10.0.0.5", "3", "120s", "true"),
    *(": ", ":\n  ", "\n", "- ", "[", "]", "{", "}", ", ", "&a ", "*a", "!!str ", "'", '"', "|\n "),
    *("#cloud-config\n", "---\n", "\t", "\\ud800", "\ufffe", "é", "²", "<<", "? ", "%", "0x1f"),
]


@FAST
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=40).map("".join))
def test_any_text(text: str) -> None:
    outcome(text.encode("utf-8", "surrogatepass"))


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "auto", "10.0.0.5/8", "::1%x", "1h", "fd00::/8", "9" * 400])
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner),
    max_leaves=8,
)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict | list):
        return [place]
    below = value.items() if isinstance(value, dict) else enumerate(value)
    return [place, *(found for key, item in below for found in places(item, (*place, key)))]


def put(value: Any, place: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `place`."""
    if not place:
        return new
    if isinstance(value, dict):
        return {**value, place[0]: put(value.get(place[0]), place[1:], new)}
    return [put(x, place[1:], new) if i == place[0] else x for i, x in enumerate(value)]


@FAST
@given(st.sampled_from(places(GOOD)[1:]), values)
def test_one_value_replaced(place: tuple[Any, ...], new: Any) -> None:
    text = outcome(json.dumps(put(GOOD, place, new)).encode())
    assert TOKEN not in text


@FAST
@given(values)
def test_any_value_in_every_carrier(value: Any) -> None:
    inner = json.dumps(value)
    file: dict[str, Any] = {"path": "/etc/firstboot/config.yaml", "content": inner}
    outcome(b"#cloud-config\n" + json.dumps({"firstboot": value, "write_files": value}).encode())
    outcome(b"#cloud-config\n" + json.dumps({"write_files": [file]}).encode())
    outcome(json.dumps({"ignition": value, "storage": value}).encode())
    file = {"path": "/etc/firstboot/config.yaml", "contents": {"source": f"data:,{inner}"}}
    outcome(json.dumps({"ignition": {}, "storage": {"files": [file, value]}}).encode())


@FAST
@given(
    st.sampled_from([place for place in places(GOOD)[1:] if place != ("token",)]),
    st.sampled_from(
        ["{}", "x{}", "{}x", "[{}]", "*{}", "&{} a", "!{} a", "'{}", "{{{}: 1}}", "{}:"]
    ),
    st.sampled_from(["", "\n", ": ", "\t", "\x00", "]", "}", "'", '"', "- a", "&a ", "%"]),
    st.integers(0, 2000),
)
def test_token_is_in_no_error(place: tuple[Any, ...], form: str, noise: str, at: int) -> None:
    """A real token in the wrong place, and a syntax error somewhere around it."""
    text = json.dumps(put(GOOD, place, "HERE"), indent=2).replace('"HERE"', form.format(TOKEN))
    at %= len(text)
    if TOKEN not in text[:at] + noise + text[at:]:
        at = 0  # do not cut the token itself: what is left of it is no secret worth the name
    assert TOKEN not in outcome((text[:at] + noise + text[at:]).encode())


@FAST
@given(st.sampled_from(places(GOOD)[1:]), st.integers(0, 3))
def test_token_is_in_no_error_about_keys(place: tuple[Any, ...], depth: int) -> None:
    """A real token as a key, at any depth."""
    text = outcome(json.dumps(put(GOOD, place[:depth], {**GOOD, TOKEN: TOKEN})).encode())
    assert TOKEN not in text
