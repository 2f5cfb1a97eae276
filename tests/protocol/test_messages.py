"""The codec: every message survives the wire; other bytes raise RemoteError and nothing else."""

from __future__ import annotations

import base64
import dataclasses
import json
import string
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firstboot.protocol import messages
from firstboot.protocol.errors import RemoteError
from firstboot.protocol.messages import Message, decode, encode
from firstboot.protocol.model import Ballot, Endpoint, Member, Profile, Stage, Value

BOUNDED = settings(max_examples=200, deadline=None)
ID, ID2 = "0123456789abcdef" * 2, "fedcba9876543210" * 2
FOUNDER = Member(ID, "node-0", "10.0.0.5")
VALUE = Value(1, "ab" * 32, (FOUNDER,), active=True, members=3)
BALLOT = Ballot(7, ID)
HELLO = messages.Hello(
    version=messages.VERSION,
    boot="b00t",
    expect=3,
    agreed="cd" * 32,
    name="node-0",
    endpoint=Endpoint("10.0.0.5", 7443),
    rank=1000,
    eligible=True,
    voter=True,
    stage=Stage.DECIDING,
    decided=VALUE,
    peers=(messages.Known(ID2, Endpoint("fd00::5", 7443)),),
)
EXAMPLES: dict[str, Message] = {
    "hello": HELLO,
    "prepare": messages.Prepare(BALLOT, replacing=1),
    "promise": messages.Promise(BALLOT, Ballot(), None),
    "accept": messages.Accept(BALLOT, VALUE),
    "accepted": messages.Accepted(BALLOT),
    "refused": messages.Refused(BALLOT, Ballot(9, ID2), master_alive=True),
    "enrol": messages.Enrol(1, b"\x30\x00", "ef" * 32, "node-0", "10.0.0.5"),
    "granted": messages.Granted(
        1, "node-0", (messages.Certificate(Profile.PEER, b"\x30\x01"),), b"\x30\x02"
    ),
    "denied": messages.Denied(1, "admission is closed"),
    "activated": messages.Activated(VALUE),
    "confirmed": messages.Confirmed(1),
    "noted": messages.Noted(1),
    "apply": messages.Apply(1, (messages.Item("node.client", b"\x30\x00"),)),
    "supplies": messages.Supplies(
        1,
        (messages.Item("node.client", b"\x30\x01"),),
        (messages.Item("ca", b"\x30\x02"),),
        (messages.Item("ca.key", b"\x00"),),
        (messages.Place("node-0", "10.0.0.5"),),
    ),
}


# ---------------------------------------------------------------- strategies

hexes = st.text("0123456789abcdef", min_size=32, max_size=32)
fingerprints = st.text("0123456789abcdef", min_size=64, max_size=64)
labels = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True)
hosts = st.ip_addresses().map(str)
texts = st.text(string.ascii_letters + string.digits + " :-_äß€", max_size=200)
epochs = st.integers(1, 2**31 - 1)
blobs = st.binary(max_size=messages.MAX_BLOB // 4)
endpoints = st.builds(Endpoint, hosts, st.integers(1, 65535))
ballots = st.builds(Ballot, st.integers(0, 2**53 - 1), hexes)
members = st.builds(Member, hexes, labels, hosts)
masters = st.sampled_from([1, 3, 5]).flatmap(
    lambda n: st.lists(members, min_size=n, max_size=n, unique_by=lambda m: m.node_id)
)
values = st.builds(
    Value,
    epoch=epochs,
    fingerprint=fingerprints,
    masters=masters.map(tuple),
    active=st.booleans(),
    members=st.integers(0, 20_000),
)
known = st.builds(messages.Known, hexes, endpoints)
certificates = st.builds(messages.Certificate, st.sampled_from(Profile), blobs)
hellos = st.builds(
    messages.Hello,
    version=st.integers(0, 99),
    boot=hexes,
    expect=st.integers(1, 10_000),
    agreed=fingerprints,
    name=labels,
    endpoint=endpoints,
    rank=st.integers(-(10**6), 10**6),
    eligible=st.booleans(),
    voter=st.booleans(),
    stage=st.sampled_from(Stage),
    decided=st.none() | values,
    peers=st.lists(known, max_size=4).map(tuple),
)
items = st.lists(st.builds(messages.Item, labels, blobs), max_size=4).map(tuple)
by_type: dict[str, st.SearchStrategy[Message]] = {
    "hello": hellos,
    "prepare": st.builds(messages.Prepare, ballots, st.integers(0, 2**31)),
    "promise": st.builds(messages.Promise, ballots, ballots, st.none() | values),
    "accept": st.builds(messages.Accept, ballots, values),
    "accepted": st.builds(messages.Accepted, ballots),
    "refused": st.builds(messages.Refused, ballots, ballots, st.booleans()),
    "enrol": st.builds(messages.Enrol, epochs, blobs, fingerprints, labels, hosts),
    "granted": st.builds(
        messages.Granted, epochs, labels, st.lists(certificates, max_size=3).map(tuple), blobs
    ),
    "denied": st.builds(messages.Denied, epochs, texts),
    "activated": st.builds(messages.Activated, values),
    "confirmed": st.builds(messages.Confirmed, epochs),
    "noted": st.builds(messages.Noted, epochs),
    "apply": st.builds(messages.Apply, epochs, items),
    "supplies": st.builds(
        messages.Supplies,
        epochs,
        items,
        items,
        items,
        st.lists(st.builds(messages.Place, labels, hosts), max_size=4).map(tuple),
    ),
}
anything = st.one_of(*by_type.values())
trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from([*EXAMPLES, ID, "10.0.0.5", "AAAA", "peer", "deciding"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)


def read_or_refused(data: bytes) -> Message | None:
    """The invariant: a Message, which then survives the wire itself, or RemoteError."""
    try:
        message = decode(data)
    except RemoteError:
        return None
    assert type(message) in messages.TYPES.values()
    assert decode(encode(message)) == message
    return message


# ---------------------------------------------------------------- the wire


def test_the_examples_cover_every_type() -> None:
    assert EXAMPLES.keys() == by_type.keys() == messages.TYPES.keys()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_message_survives_the_wire(kind: str) -> None:
    message = EXAMPLES[kind]
    data = encode(message)
    assert json.loads(data)["t"] == kind
    assert decode(data) == message
    assert type(decode(data)) is messages.TYPES[kind]


@BOUNDED
@given(anything)
def test_every_message_survives_the_wire(message: Message) -> None:
    assert decode(encode(message)) == message


def test_the_largest_honest_messages_fit() -> None:
    host = "fd00:1111:2222:3333:4444:5555:6666:7777"
    peers = tuple(
        messages.Known(f"{n:032x}", Endpoint(host, 65535)) for n in range(messages.MAX_PEERS)
    )
    five = tuple(Member(f"{n:032x}", f"{n}" + "n" * 62, host) for n in range(5))
    hello = dataclasses.replace(
        HELLO, peers=peers, decided=Value(2**31 - 1, "ab" * 32, five, members=20_000)
    )
    blob = b"\xff" * 4096
    granted = messages.Granted(
        1, "n" * 63, tuple(messages.Certificate(p, blob) for p in Profile), blob
    )
    for message in (hello, granted):
        assert len(encode(message)) <= messages.MAX_BYTES
        assert decode(encode(message)) == message


# ---------------------------------------------------------------- hostile bytes


@BOUNDED
@given(st.binary(max_size=512))
def test_noise_is_refused(noise: bytes) -> None:
    read_or_refused(noise)


@BOUNDED
@given(trees)
def test_any_json_is_read_or_refused(tree: Any) -> None:
    read_or_refused(json.dumps(tree).encode())


@BOUNDED
@given(anything, st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), max_size=4))
def test_mutated_messages_are_read_or_refused(
    message: Message, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(message))
    for place, value in changes:
        data[place % len(data)] = value
    read_or_refused(bytes(data))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON tree."""
    inner: Iterable[tuple[Any, Any]] = ()
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    found = []
    for key, item in inner:
        found += [(*path, key), *places(item, (*path, key))]
    return found


@BOUNDED
@given(st.data())
def test_a_message_with_any_field_replaced_is_read_or_refused(data: st.DataObject) -> None:
    tree = json.loads(encode(data.draw(st.sampled_from(list(EXAMPLES.values())))))
    path = data.draw(st.sampled_from(places(tree)))
    target = tree
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = data.draw(trees)
    read_or_refused(json.dumps(tree).encode())


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_missing_or_unknown_field_is_refused_at_every_level(kind: str) -> None:
    plain = json.loads(encode(EXAMPLES[kind]))
    levels = [path for path in places(plain) if isinstance(at(plain, path), dict)]
    for path in [(), *levels]:
        for name in at(plain, path):
            if name != "t":
                tree = json.loads(json.dumps(plain))
                del at(tree, path)[name]
                refused(tree)
        tree = json.loads(json.dumps(plain))
        at(tree, path)["surplus"] = 1
        refused(tree)


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def refused(tree: Any) -> None:
    with pytest.raises(RemoteError):
        decode(json.dumps(tree).encode())


HUGE = "9" * 5000
DEEP = "[" * 30_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'"hello"',
        b'{"t":null}',
        b'{"t":"message"}',
        b'{"t":["confirmed"],"epoch":1}',
        b'{"t":"confirmed"}',
        b'{"t":"confirmed","epoch":1.0}',
        b'{"t":"confirmed","epoch":true}',
        b'{"t":"confirmed","epoch":"1"}',
        b'{"t":"confirmed","epoch":null}',
        b'{"t":"confirmed","epoch":NaN}',
        b'{"t":"confirmed","epoch":-Infinity}',
        b'{"t":"confirmed","epoch":1e999}',
        b'{"t":"confirmed","epoch":9007199254740992}',
        f'{{"t":"confirmed","epoch":{HUGE}}}'.encode(),
        b'{"t":"confirmed","epoch":1} trailing',
        b'\xff\xfe{"t"',
        b'{"t":"\xff"}',
        b"\x00" * 64,
        DEEP.encode(),
        f'{{"t":{DEEP}'.encode(),
        f'{{"t":{DEEP}{"]" * 30_000}}}'.encode(),
        f'{{"t":"confirmed","epoch":{DEEP}'.encode(),
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteError):
        decode(data)


def test_nesting_of_any_depth_is_refused() -> None:
    """Depths around the interpreter's limits are the ones that could slip through."""
    for depth in [*range(1, 2000, 3), 5_000, 9_990, 10_000, 10_010, 30_000]:
        with pytest.raises(RemoteError):
            decode(b'{"t":' + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(RemoteError):
            decode(b'{"t":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}")


def test_an_oversized_message_is_refused_unread() -> None:
    with pytest.raises(RemoteError, match="at most"):
        decode(encode(EXAMPLES["noted"]) + b" " * messages.MAX_BYTES)


def changed(kind: str, path: tuple[Any, ...], value: Any) -> bytes:
    tree = json.loads(encode(EXAMPLES[kind]))
    at(tree, path[:-1])[path[-1]] = value
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("hello", ("name",), "n" * (messages.MAX_TEXT + 1)),
        ("hello", ("stage",), "sleeping"),
        ("hello", ("endpoint", "port"), 0),
        ("hello", ("endpoint", "port"), 65536),
        ("hello", ("endpoint", "host"), "example.org"),
        ("hello", ("endpoint", "host"), ""),
        ("hello", ("decided", "masters"), []),
        ("hello", ("decided", "masters"), {}),
        ("hello", ("decided", "fingerprint"), "AB" * 32),
        ("hello", ("decided", "fingerprint"), "ab" * 32 + "\n"),
        ("hello", ("decided", "epoch"), 0),
        ("hello", ("decided", "members"), -1),
        ("hello", ("decided", "masters", 0, "name"), "Node"),
        ("hello", ("decided", "masters", 0, "name"), "node\n"),
        ("hello", ("decided", "masters", 0, "node_id"), ""),
        ("hello", ("decided", "masters", 0, "host"), "10.0.0.256"),
        ("hello", ("peers",), [{"node_id": ID, "endpoint": None}]),
        ("hello", ("peers",), None),
        ("prepare", ("ballot",), None),
        ("prepare", ("ballot", "number"), -1),
        ("prepare", ("ballot", "node_id"), "someone"),
        ("accept", ("value",), None),
        ("activated", ("value",), None),
        ("refused", ("master_alive",), 1),
        ("enrol", ("csr",), "not base64!"),
        ("enrol", ("csr",), "AAA"),
        ("enrol", ("csr",), "ÄÄÄÄ"),
        ("enrol", ("csr",), base64.b64encode(b"x" * (messages.MAX_BLOB + 4)).decode()),
        ("granted", ("certificates", 0, "profile"), "root"),
        ("granted", ("certificates",), "x"),
        ("denied", ("reason",), None),
    ],
)
def test_a_value_out_of_bounds_is_refused(kind: str, path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(RemoteError):
        decode(changed(kind, path, value))


def test_more_peers_than_allowed_are_refused() -> None:
    peer = {"node_id": ID, "endpoint": {"host": "10.0.0.5", "port": 1}, "rank": 0, "able": True}
    decode(changed("hello", ("peers",), [peer] * messages.MAX_PEERS))
    with pytest.raises(RemoteError):
        decode(changed("hello", ("peers",), [peer] * (messages.MAX_PEERS + 1)))


def test_a_refusal_repeats_nothing_of_what_was_sent() -> None:
    """The reason reaches status and log, so a peer must not be able to write into it."""
    with pytest.raises(RemoteError) as caught:
        decode(changed("hello", ("endpoint", "host"), "EVIL\x1b[2J"))
    assert "EVIL" not in str(caught.value)


@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "\udc80", "\x00"])
def test_text_that_would_disturb_a_terminal_is_refused(text: str) -> None:
    with pytest.raises(RemoteError):
        decode(json.dumps({"t": "denied", "epoch": 1, "reason": text}).encode())


@pytest.mark.parametrize("host", ["10.0.0.1%eth0", "fe80::1%\x1b[31m", "fe80::1%", "example.org"])
def test_an_address_is_an_address_and_nothing_more(host: str) -> None:
    enrol = {"t": "enrol", "epoch": 1, "csr": "", "key": "0" * 64, "name": "a", "host": host}
    with pytest.raises(RemoteError):
        decode(json.dumps(enrol).encode())


def test_endpoints_are_remembered_within_a_bound_and_only_sound_ones() -> None:
    for number in range(messages.MAX_ENDPOINTS + 100):
        host, port = f"10.1.{number % 250}.{number // 250}", 1 + number
        read = messages.from_plain(Endpoint, {"host": host, "port": port})
        assert read == Endpoint(host, port)
        assert len(messages._ENDPOINTS) <= messages.MAX_ENDPOINTS
    for foul in ({"host": "10.0.0.999", "port": 1}, {"host": "10.0.0.1", "port": 0}):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"."):
                messages.from_plain(Endpoint, foul)
