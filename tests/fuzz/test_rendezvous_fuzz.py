"""What lies in the rendezvous file may be anything, also if a holder of the token wrote it."""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from firstboot import pki
from firstboot.discovery.http import MAX_LINE, MAX_LINES, Http, valid_lines
from firstboot.discovery.interface import Context
from firstboot.protocol.model import Endpoint
from firstboot.userdata import make_token

NOW = 1_000_000_000.0
SEAL = pki.Seal(make_token(), "demo")
OWN = Endpoint("10.0.0.1", 7443)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries({"boot": JSON, "host": JSON, "port": JSON}) | JSON
LINE = st.binary(max_size=60) | st.builds(
    lambda expiry, text: b"%d %s" % (expiry, text),
    st.integers(-(10**20), 10**20) | st.integers(int(NOW), int(NOW) + 300),
    st.binary(max_size=2 * MAX_LINE),
)


def provider() -> Http:
    context = Context(*("a" * 16, "demo", "b" * 16), seal=SEAL.seal, unseal=SEAL.unseal)
    made = Http({"url": "http://x/y"}, context)
    made._own = OWN
    return made


def read(lines: list[bytes]) -> tuple[float, list[Endpoint], list[bytes]]:
    return provider()._read(valid_lines(b"\n".join(lines), NOW))


@given(st.lists(LINE, max_size=30))
def test_any_bytes_are_read_or_dropped(lines: list[bytes]) -> None:
    own, others, kept = read(lines)
    assert (own, others) == (0.0, [])
    assert all(len(line) <= MAX_LINE for line in kept)


@given(ENTRY)
def test_any_sealed_text_is_an_address_or_nothing(said: Any) -> None:
    about = str(int(NOW) + 100).encode()
    sealed = base64.b64encode(SEAL.seal(json.dumps(said).encode(), about))
    _, others, _ = read([about + b" " + sealed])
    assert len(others) <= 1


def test_an_address_is_read_and_many_are_bounded() -> None:
    about = str(int(NOW) + 100).encode()

    def line(number: int) -> bytes:
        said = {"boot": str(number), "host": f"10.1.0.{number}", "port": 7443}
        return about + b" " + base64.b64encode(SEAL.seal(json.dumps(said).encode(), about))

    assert read([line(5)])[1] == [Endpoint("10.1.0.5", 7443)]
    assert len(read([line(n) for n in range(1, 200)])[1]) == MAX_LINES
