"""Small or legal documents that stand for much: each ends in a sentence, soon and in little memory.

Time is this process's CPU time and the best of two, so that no load of the machine matters; the
bounds are many times what is needed, and a thousandth of what an unbounded reader would need.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstboot.protocol.errors import UserError
from firstboot.userdata import Document, parse
from firstboot.userdata.reading import MAX_BYTES
from firstboot.userdata.token import assemble
from tests.fuzz.mutations import NASTY_JSON, edited, edits, places, spliced

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
FAST = settings(
    max_examples=20_000 if LONG else 200,
    deadline=None,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.too_slow],
)
MAX_CPU = 5.0  # seconds; the slowest here takes about half of one
MAX_MEMORY = 128 * 1024 * 1024
TOKEN = assemble("9nhbjgrvxqtx0fsftmjtscpgx1ehjtsw")
GOOD = {"cluster": "demo", "token": TOKEN, "expect": 3, "masters": 3}
CONFIG = "/etc/firstboot/config.yaml"


def outcome(data: bytes) -> str:
    """The error; "" for a Document. Anything else is raised."""
    try:
        document = parse(data, "bomb")
    except UserError as error:
        assert error.message and "\n" not in str(error) and TOKEN not in str(error)
        assert len(str(error)) < 500
        return str(error)
    assert isinstance(document, Document)
    return ""


def packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data)).decode()


def laughs(levels: int, width: int = 9) -> str:
    """Ten lines that stand for width ** levels words."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    for n in range(1, levels):
        lines.append(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]")
    return "\n".join(lines)


def cloud(file: str, times: int) -> str:
    """A cloud-config that writes one file often, by an alias."""
    return f"#cloud-config\na: &a {file}\nwrite_files: [{', '.join(['*a'] * times)}]\n"


def ignition(path: str, data: bytes, times: int) -> str:
    contents = {"compression": "gzip", "source": f"data:;base64,{packed(data)}"}
    file = {"path": path, "contents": contents}
    return json.dumps({"ignition": {}, "storage": {"files": [file] * times}})


def many(unit: str, *, head: str = "", tail: str = "") -> str:
    """As many units as a document may hold."""
    room = MAX_BYTES - len(head.encode()) - len(tail.encode())
    return head + unit * (room // len(unit.encode())) + tail


ZEROS, COMMENT = bytes(MAX_BYTES - 1), b"#" * (MAX_BYTES - 10)
WIDE = "{" + ", ".join(f"k{i}: v" for i in range(10_000)) + "}"
EXPANDS = "aliases expand to too much"
BOMBS: dict[str, tuple[Callable[[], str], str]] = {
    "billion laughs": (lambda: laughs(9), EXPANDS),
    "a long text repeated": (
        lambda: f"a: &a {'x' * 900_000}\nb: [{'*a,' * 40_000}]",
        EXPANDS,
    ),
    "a list in itself": (lambda: "a: &a [*a]", EXPANDS),
    "a mapping in itself": (lambda: "a: &a {b: *a}", EXPANDS),
    "a mapping as its own key": (lambda: "&a {*a : 1}", "a key must be a plain word"),
    "the whole document in itself": (lambda: "&a {cluster: *a}", EXPANDS),
    "merge keys": (lambda: "a: &a {cluster: demo}\n<<: *a\n", "unknown key"),
    "merge keys to themselves": (lambda: "&a\n<<: *a\n", EXPANDS),
    "binary": (lambda: "cluster: !!binary ZGVtbw==\n", "YAML tags such as !!binary"),
    "python": (lambda: "cluster: !!python/object/apply:os.system [id]\n", "YAML tags"),
    "anchors": (lambda: "\n".join(f"k{i}: &a{i} 1" for i in range(8_000)), "unknown key"),
    "undefined alias": (lambda: "a: *b", "not valid YAML"),
    "flow depth": (lambda: "{" * MAX_BYTES, "too deeply nested"),
    "JSON depth": (lambda: '{"ignition":' + "[" * 1_000_000, "too deeply nested"),
    "block depth": (lambda: "- " * (MAX_BYTES // 2), "too deeply nested"),
    "indentation": (lambda: "\n".join(" " * i + "a:" for i in range(1400)), "too deeply nested"),
    "complex keys": (lambda: "? " * (MAX_BYTES // 2), "too deeply nested"),
    "many documents": (lambda: many("---\n"), "too long"),
    "many keys": (lambda: "\n".join(f"k{i}: 1" for i in range(12_000)), "unknown key"),
    "many lists": (lambda: f"[{'[],' * 33_000}]", "not a mapping"),
    "many numbers": (lambda: f"discovery: [{'9999999999,' * 48_000}]", "is missing"),
    "a huge number": (lambda: "expect: " + "9" * 900_000, "is missing"),
    "a huge float": (lambda: "expect: 1e" + "9" * 900_000, "is missing"),
    "a text": (lambda: many("x", head="a: "), "unknown key"),
    "escapes": (lambda: many("\\x41", head='a: "', tail='"'), "unknown key"),
    "folded lines": (lambda: many("x\n  ", head="a: "), "unknown key"),
    "comments": (lambda: many("#\n"), "empty"),
    "NULs": (lambda: many("\x00"), "a control character"),
    "tags": (lambda: many("!a "), "not valid YAML"),
    "percent signs": (lambda: many("%"), "not valid YAML"),
    "cloud-config: one wide entry, often": (lambda: cloud(WIDE, 20_000), "holds no firstboot"),
    "cloud-config: gzip elsewhere": (
        lambda: cloud(f"{{path: /x, encoding: gz+b64, content: {packed(ZEROS)}}}", 400),
        "holds no firstboot",
    ),
    "cloud-config: ours, often": (lambda: cloud(f"{{path: {CONFIG}}}", 40_000), "more than 64"),
    "cloud-config: ours, large": (
        lambda: cloud(f"{{path: {CONFIG}, encoding: gz+b64, content: {packed(COMMENT)}}}", 60),
        "together larger than 1 MB",
    ),
    "cloud-config: a wide document": (
        lambda: f"#cloud-config\na: &a {WIDE}\nfirstboot: [{'*a, ' * 20_000}]\n",
        EXPANDS,
    ),
    "Ignition: gzip elsewhere": (lambda: ignition("/x", ZEROS, 500), "holds no firstboot"),
    "Ignition: ours, often": (lambda: ignition(CONFIG, ZEROS, 500), "more than 64"),
    "Ignition: ours, large": (lambda: ignition(CONFIG, COMMENT, 60), "together larger than 1 MB"),
    "Ignition: ours, too large": (lambda: ignition(CONFIG, ZEROS * 9, 1), "larger than 1 MB"),
    "Ignition: percent": (
        lambda: many(
            "%41",
            head=f'{{"ignition":{{}},"storage":{{"files":[{{"path":"{CONFIG}",'
            '"contents":{"source":"data:,',
            tail='"}}]}}',
        ),
        "not a mapping",
    ),
    "Butane: one wide entry, often": (
        lambda: (
            f"variant: fcos\na: &a {WIDE}\n"
            f"storage: {{files: [{'{path: /x, contents: *a}, ' * 8_000}]}}\n"
        ),
        "holds no firstboot",
    ),
}


@cache
def bomb(kind: str) -> bytes:
    data = BOMBS[kind][0]().encode()
    assert len(data) <= MAX_BYTES, len(data)
    return data


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_ends_in_a_sentence_soon_and_in_little_memory(kind: str) -> None:
    data = bomb(kind)
    outcome(b"cluster: demo")  # yaml and the schema are loaded
    spent = []
    for _ in range(2):
        started = time.process_time()
        said = outcome(data)
        spent.append(time.process_time() - started)
        assert BOMBS[kind][1] in said
        if spent[-1] < MAX_CPU / 10:
            break
    assert min(spent) < MAX_CPU
    tracemalloc.start()
    try:
        outcome(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_MEMORY


def test_aliases_may_be_used_with_sense() -> None:
    text = f"cluster: &name demo\nformation: *name\ntoken: {TOKEN}\nexpect: 3\n"
    assert outcome(text.encode()) == ""
    document = parse(text.encode(), "aliases")
    assert document.config.formation == "demo"


# ---------------------------------------------------------------- damage to what is carried


def carried() -> dict[str, dict[str, Any]]:
    """The same document on its own and in each carrier, as JSON, which YAML is as well."""
    inner = json.dumps(GOOD)
    source = "data:;base64," + base64.b64encode(inner.encode()).decode()
    contents = {"compression": "gzip", "source": f"data:;base64,{packed(inner.encode())}"}
    file = {"path": CONFIG, "permissions": "0600", "content": inner}
    zipped = {"path": CONFIG, "encoding": "gz+b64", "content": packed(inner.encode())}
    return {
        "document": GOOD,
        "cloud-config": {"firstboot": GOOD, "write_files": [{"path": "/x", "content": "a"}]},
        "cloud-config file": {"write_files": [file]},
        "cloud-config gzip": {"write_files": [zipped]},
        "Ignition": {
            "ignition": {"version": "3.4.0"},
            "storage": {"files": [{"path": CONFIG, "mode": 384, "contents": {"source": source}}]},
        },
        "Ignition gzip": {
            "ignition": {"version": "3.4.0"},
            "storage": {"files": [{"path": CONFIG, "contents": contents}]},
        },
        "Butane": {
            "variant": "fcos",
            "storage": {"files": [{"path": CONFIG, "contents": {"inline": inner}}]},
        },
    }


TREES = carried()


def written(kind: str, text: str) -> bytes:
    head = "#cloud-config\n" if kind.startswith("cloud") else ""
    return (head + text).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("kind", TREES)
def test_each_carrier_yields_the_document(kind: str) -> None:
    assert outcome(written(kind, json.dumps(TREES[kind]))) == ""


spots = st.sampled_from([(kind, place) for kind, tree in TREES.items() for place in places(tree)])
YAML_TEXTS = [
    *("*a", "&a a", "&a [*a]", "!!binary AA==", "!!float 1", "!!int '1'", "! a", "<<", "{<<: {}}"),
    *("? a", "|", ">-\n  a", "- a", "'", ".inf", ".nan", "0x1f", "0o17", "1_000", "12:30:45"),
    *("1999-01-01", "yes", "off", "~", "=", "%YAML 1.2", "---", "...", "\t", "\u2028", "\ufeff"),
]


@FAST
@given(spots, st.sampled_from(NASTY_JSON + YAML_TEXTS))
def test_one_place_of_a_carrier_holds_something_else(
    spot: tuple[str, tuple[Any, ...]], text: str
) -> None:
    kind, place = spot
    outcome(written(kind, spliced(TREES[kind], place, text)))


@FAST
@given(st.sampled_from(sorted(TREES)), edits)
def test_damaged_bytes_of_a_carrier(kind: str, changes: list[tuple[int, int, bytes, int]]) -> None:
    outcome(edited(written(kind, json.dumps(TREES[kind])), changes))


def test_any_depth_inside_any_carrier() -> None:
    """Depths around the interpreter's limit, where reading passes and writing might not."""
    for depth in [*range(1, 1100, 9), *range(960, 1000)]:
        for kind in ("Ignition", "cloud-config file"):
            tree = TREES[kind]
            deep = "[" * depth + "]" * depth
            for place in places(tree):
                if place and place[-1] in ("path", "source", "content"):
                    assert outcome(written(kind, spliced(tree, place, deep)))
