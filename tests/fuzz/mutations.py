"""Damage to valid inputs: to their bytes, and to the tree that they stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

LONG = "9" * 3600  # digits; under the interpreter's limit of 4,300 for one number
# Ready-made JSON texts that a parser may stumble over; some are not JSON at all.
NASTY_JSON = [
    *("NaN", "Infinity", "-Infinity", "1e999", "-0", "-0.0", "1.0", "1E1", "00", "0x1", LONG),
    *("9" * 5000, f"-{LONG}", f"1e{LONG}", str(2**53), str(2**63), "true", "null", "[]", "{}"),
    *(
        '""',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"\\u202e"',
        '"٣"',
        '"²"',
        '"\uff110.0.0.5"',
    ),
    *('"10.0.0.5\\n"', '"::ffff:10.0.0.5%0"', '"fe80::1%eth0"', '"010.0.0.5"', '"AB=="', '"A"'),
    *(f'"{"x" * 2000}"', f'"{"😀" * 1024}"', f'"{"A" * 12_000}"', "'a'", '"', "\\", "//"),
    *("[" * 500, '{"a":' * 500, f"{'[' * 500}{']' * 500}", f"[{'0,' * 5000}0]"),
    *('{"t":"hello"}', '{"t":{"t":"hello"}}', '[{"node_id":null}]'),
]
SPLICES = [b"", b"\x00", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\xff", b"\xef\xbb\xbf"]
SPLICES += [b"\xed\xa0\x80", b"\\ud800", b"\r\n", b"\x1b[2J", b"1e9", b"-", b"true", b"\xc2\xa0"]

_edits = st.tuples(
    st.integers(0, 1 << 16),  # where, modulo the length
    st.integers(0, 8),  # bytes taken away
    st.sampled_from(SPLICES) | st.binary(max_size=4),  # bytes put there
    st.integers(0, 3),  # how often
)
edits = st.lists(_edits, min_size=1, max_size=6)


def edited(data: bytes, changes: list[tuple[int, int, bytes, int]]) -> bytes:
    """Cut and splice."""
    for where, gone, new, times in changes:
        at = where % (len(data) + 1)
        data = data[:at] + new * times + data[at + gone :]
    return data


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree of dicts and lists, the root included."""
    yield place
    if isinstance(tree, dict | list):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(item, (*place, key))


def spliced(tree: Any, place: tuple[Any, ...], text: str) -> str:
    """The tree's JSON with `text` as it is at one place."""
    if not place:
        return text
    tree, marker = copy.deepcopy(tree), "\x01HOLE\x01"
    at = tree
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = marker
    return json.dumps(tree).replace(json.dumps(marker), text)


def doubled(tree: Any, place: tuple[Any, ...], text: str, *, first: bool) -> str:
    """The object around a place says its key twice, once with `text`."""
    if not place or not isinstance(place[-1], str):
        return spliced(tree, place, text)
    at = tree
    for step in place:
        at = at[step]
    pair = [text, json.dumps(at)] if first else [json.dumps(at), text]
    return spliced(tree, place, f"{pair[0]}, {json.dumps(place[-1])}: {pair[1]}")


def without(tree: Any, place: tuple[Any, ...]) -> Any:
    """A copy that lacks one place."""
    tree = at = copy.deepcopy(tree)
    for step in place[:-1]:
        at = at[step]
    if place:
        del at[place[-1]]
    return tree
