"""Whatever the bytes are: a Message or RemoteError, in little time and memory.

``HYPOTHESIS_PROFILE=long`` tries many and new examples; by default they are always the same.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import ssl
import time
import tracemalloc
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firstboot.protocol import messages
from firstboot.protocol.errors import FirstbootError, RemoteError
from firstboot.protocol.messages import MAX_BYTES, Message, decode, encode, from_plain, to_plain
from firstboot.protocol.model import Stored
from firstboot.transport import tunnel
from tests.fuzz.mutations import NASTY_JSON, doubled, edited, edits, places, spliced, without
from tests.protocol.test_messages import EXAMPLES, anything, values

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
MANY = settings(
    max_examples=20_000 if LONG else 300,
    derandomize=not LONG,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
MAX_CPU = 1.0  # seconds for one frame of any content; the real figure is some milliseconds
MAX_MEMORY = 8 * 1024 * 1024  # bytes, for at most 64 KiB of input


def outcome(data: bytes) -> Message | None:
    """The invariant; None where it was refused."""
    try:
        message = decode(data)
    except RemoteError as error:
        assert error.__suppress_context__ or error.__context__ is None  # quotes no input
        assert str(error).isprintable()
        return None
    assert type(message) in messages.TYPES.values()
    again = encode(message)
    assert decode(again) == message
    assert encode(decode(again)) == again
    assert len(again) <= MAX_BYTES
    return message


TREES: dict[str, dict[str, Any]] = {kind: json.loads(encode(m)) for kind, m in EXAMPLES.items()}
spots = st.sampled_from([(kind, place) for kind, tree in TREES.items() for place in places(tree)])
junk = st.sampled_from(NASTY_JSON)


@MANY
@given(anything)
def test_a_message_survives_the_wire_and_its_bytes_are_always_the_same(message: Message) -> None:
    data = encode(message)
    assert decode(data) == message
    assert encode(decode(data)) == data


@MANY
@given(anything.map(encode) | st.sampled_from([encode(m) for m in EXAMPLES.values()]), edits)
def test_damaged_bytes(data: bytes, changes: list[tuple[int, int, bytes, int]]) -> None:
    outcome(edited(data, changes))


@MANY
@given(spots, junk | st.text(max_size=20).map(json.dumps) | st.integers().map(str))
def test_one_place_holds_something_else(spot: tuple[str, tuple[Any, ...]], text: str) -> None:
    kind, place = spot
    outcome(spliced(TREES[kind], place, text).encode("utf-8", "surrogatepass"))


@MANY
@given(spots, junk, st.booleans())
def test_a_key_said_twice(spot: tuple[str, tuple[Any, ...]], text: str, first: bool) -> None:
    """The last one counts (RFC 8259, section 4, leaves it open): never a mixture, nor a crash."""
    kind, place = spot
    told = outcome(doubled(TREES[kind], place, text, first=first).encode())
    if first and place and isinstance(place[-1], str) and told is not None:
        assert told == EXAMPLES[kind]


@MANY
@given(spots)
def test_a_missing_place(spot: tuple[str, tuple[Any, ...]]) -> None:
    """A list may lack an item; an object may not lack a field."""
    kind, place = spot
    told = outcome(json.dumps(without(TREES[kind], place)).encode())
    assert told is None or not place or isinstance(place[-1], int)


@MANY
@given(spots, spots)
def test_a_part_of_one_message_in_another(
    into: tuple[str, tuple[Any, ...]], source: tuple[str, tuple[Any, ...]]
) -> None:
    part = TREES[source[0]]
    for step in source[1]:
        part = part[step]
    outcome(spliced(TREES[into[0]], into[1], json.dumps(part)).encode())


@MANY
@given(values, st.integers(0, 100), junk)
def test_a_damaged_state_file_is_refused_too(value: Any, spot: int, text: str) -> None:
    """The same reader reads this host's own state: a ValueError or TypeError, nothing else."""
    tree = to_plain(Stored(decided=value, voters=("a" * 32,)))
    every = list(places(tree))
    place = every[spot % len(every)]
    try:
        plain = json.loads(spliced(tree, place, text))
    except (ValueError, RecursionError):
        return
    try:
        stored = from_plain(Stored, plain)
    except (ValueError, TypeError):
        return
    assert from_plain(Stored, to_plain(stored)) == stored


# ---------------------------------------------------------------- time and memory


def filled(head: str, unit: str, tail: str) -> bytes:
    """As many units as one frame holds."""
    room = MAX_BYTES - len(head.encode()) - len(tail.encode())
    return (head + unit * (room // len(unit.encode())) + tail).encode()


@cache
def largest() -> dict[str, bytes]:
    """The worst contents of one frame anybody thought of."""
    hello = json.dumps(TREES["hello"])
    peer = json.dumps(TREES["hello"]["peers"][0]) + ","
    peers = hello.index('"peers": [') + len('"peers": [')
    certificate = '{"profile":"peer","der":""},'
    granted = '{"t":"granted","epoch":1,"name":"a","authority":"","certificates":['
    last = '{"profile":"peer","der":""}]}'
    master = json.dumps(TREES["accept"]["value"]["masters"][0]) + ","
    accept = json.dumps(TREES["accept"])
    masters = accept.index('"masters": [') + len('"masters": [')
    return {
        "zeros": b"\x00" * MAX_BYTES,
        "blanks": filled("", " ", encode(EXAMPLES["noted"]).decode()),
        "brackets": filled("", "[", ""),
        "objects": filled("", '{"a":', ""),
        "a list": filled('{"t":[', "0,", "0]}"),
        "empty lists": filled('{"t":"noted","epoch":[', "[],", "[]]}"),
        "keys": filled("{", '"":0,', '"t":"noted"}'),
        "distinct keys": ("{" + ",".join(f'"{n:x}":0' for n in range(7000)) + "}").encode(),
        "one key": filled('{"t":"noted","epoch":{"', "x", '":0}}'),
        "digits": filled('{"t":"noted","epoch":', "9", "}"),
        "numbers": filled('{"t":"noted","epoch":[', "9" * 4000 + ",", "0]}"),
        "exponents": filled('{"t":"noted","epoch":[', "1e308,", "0]}"),
        "escapes": filled('{"t":"denied","epoch":1,"reason":"', "\\ud83d\\ude00", '"}'),
        "lone surrogates": filled('{"t":"denied","epoch":1,"reason":"', "\\ud800", '"}'),
        "a text": filled('{"t":"denied","epoch":1,"reason":"', "x", '"}'),
        "a blob": filled(
            '{"t":"enrol","epoch":1,"key":"","name":"a","host":"::","csr":"', "A", '"}'
        ),
        "a type": filled('{"t":"', "x", '"}'),
        "peers": filled(hello[:peers], peer, hello[peers:]),
        "masters": filled(accept[:masters], master, accept[masters:]),
        "certificates": filled(granted, certificate, last),
        "an address": filled(
            '{"t":"enrol","epoch":1,"key":"","name":"a","csr":"","host":"', ":", '"}'
        ),
        "a name": filled(
            '{"t":"granted","epoch":1,"authority":"","certificates":[],"name":"', "a-", '"}'
        ),
    }


@pytest.mark.parametrize("kind", largest())
def test_the_largest_frames_cost_little(kind: str) -> None:
    """CPU time of this process alone, and the best of three: no load of the machine matters."""
    data = largest()[kind]
    assert MAX_BYTES - 10_000 < len(data) <= MAX_BYTES
    outcome(data)
    spent = []
    for _ in range(3):
        started = time.process_time()
        outcome(data)
        spent.append(time.process_time() - started)
    assert min(spent) < MAX_CPU
    tracemalloc.start()
    try:
        outcome(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MAX_MEMORY


def test_the_bound_of_memory_can_be_missed() -> None:
    """Positive control: what the bound would notice."""
    tracemalloc.start()
    try:
        kept = [bytearray(1024) for _ in range(20_000)]
        assert tracemalloc.get_traced_memory()[1] > MAX_MEMORY
    finally:
        tracemalloc.stop()
    del kept


# ---------------------------------------------------------------- frames


class Plain:
    """Stands for TLS: bytes go through as they are."""

    def __init__(self, incoming: ssl.MemoryBIO) -> None:
        self._incoming = incoming

    def read(self, size: int) -> bytes:
        if not self._incoming.pending:
            raise ssl.SSLWantReadError
        return self._incoming.read(size)


class Nowhere:
    """A writer whose other end is gone."""

    def get_extra_info(self, _name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return True


async def frames_in(chunks: list[bytes]) -> list[bytes]:
    """What the real reader makes of these chunks, until it refuses or they end."""
    reader = asyncio.StreamReader()
    under_test = tunnel.Tunnel(reader, Nowhere())  # type: ignore[arg-type]
    under_test._tls = Plain(under_test._incoming)  # type: ignore[assignment]
    for chunk in chunks:
        if chunk:
            reader.feed_data(chunk)
    reader.feed_eof()
    got: list[bytes] = []
    try:
        while True:
            got.append(await under_test.receive())
            assert len(under_test._plain) <= MAX_BYTES + tunnel.CHUNK
    except EOFError:
        return got


def framed(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


@MANY
@given(st.lists(st.binary(max_size=300), max_size=6), st.lists(st.integers(0, 400), max_size=12))
def test_frames_arrive_whole_however_they_are_cut(contents: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(framed, contents))
    edges = sorted({min(c, len(stream)) for c in cuts} | {0, len(stream)})
    chunks = [stream[a:b] for a, b in itertools.pairwise(edges)]
    assert asyncio.run(frames_in(chunks)) == contents


@MANY
@given(st.binary(max_size=400), edits)
def test_damaged_frames_are_refused_or_read(
    noise: bytes, changes: list[tuple[int, int, bytes, int]]
) -> None:
    stream = edited(b"".join(framed(encode(m)) for m in EXAMPLES.values()), changes) + noise
    try:
        got = asyncio.run(frames_in([stream]))
    except RemoteError:
        return
    except FirstbootError as error:
        raise AssertionError("a peer's mistake is not this host's") from error
    for content in got:
        outcome(content)


@pytest.mark.parametrize("size", [MAX_BYTES + 1, 2**31, 2**32 - 1])
def test_a_frame_too_long_is_refused_before_it_is_read(size: int) -> None:
    with pytest.raises(RemoteError, match=f"a frame of {size} bytes"):
        asyncio.run(frames_in([size.to_bytes(4, "big")]))


def test_the_longest_frame_is_read() -> None:
    content = b"x" * MAX_BYTES
    assert asyncio.run(frames_in([framed(content), framed(b"")])) == [content, b""]
