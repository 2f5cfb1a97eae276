"""The list of addresses."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from firstboot.discovery import static
from firstboot.discovery.interface import Context
from firstboot.discovery.static import Static, parse
from firstboot.protocol.errors import UserError
from firstboot.protocol.model import Endpoint

CONTEXT = Context(tag="a" * 16, formation_id="demo", boot="b" * 16)
OWN = Endpoint("10.0.0.1", 7443)


def no_stranger(kind: str, source: str) -> None:
    pytest.fail(f"nobody is heard here, yet {kind} from {source}")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("10.0.0.5", Endpoint("10.0.0.5", 7443)),
        ("10.0.0.5:8000", Endpoint("10.0.0.5", 8000)),
        ("fd00::5", Endpoint("fd00::5", 7443)),
        ("[fd00::5]:8000", Endpoint("fd00::5", 8000)),
        ("node-1", ("node-1", 7443)),
        ("node-1.example.org:8000", ("node-1.example.org", 8000)),
    ],
)
def test_what_may_be_listed(text: str, parsed: object) -> None:
    assert parse(text) == parsed


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0.256", "10.0.0.5:0", "10.0.0.5:99999", "a b", "[node]:1", "x:y", "-a", ":80"],
)
def test_what_may_not(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Static({"addresses": [text]}, CONTEXT)
    assert "fd00::5" in caught.value.hint


def test_every_announcement_names_all_but_this_host() -> None:
    found: list[Endpoint] = []
    other, third = Endpoint("10.0.0.2", 7443), Endpoint("10.0.0.3", 8000)

    async def run() -> None:
        provider = Static({"addresses": (OWN, other, "10.0.0.3:8000")}, CONTEXT)
        await provider.start(OWN, found.append, no_stranger)
        assert found == [other, third]
        await provider.announce()
        assert found == [other, third] * 2
        assert provider.report().found == 2
        assert provider.report().error == ""
        await provider.stop()
        await provider.announce()
        assert len(found) == 4

    asyncio.run(run())


def test_names_are_resolved_at_each_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, Any] = {
        "up": ["10.0.0.2", "fd00::2"],
        "down": socket.gaierror(-2, "unknown"),
    }

    def getaddrinfo(host: str, port: int, *, type: int) -> list[Any]:
        if isinstance(answers[host], Exception):
            raise answers[host]
        return [(0, type, 0, "", (address, port)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def run() -> None:
        found: list[Endpoint] = []
        provider = Static({"addresses": ["up:8000", "down:8000"]}, CONTEXT)
        await provider.start(OWN, found.append, no_stranger)
        assert found == []
        await provider.announce()
        assert found == [Endpoint("10.0.0.2", 8000), Endpoint("fd00::2", 8000)]
        assert provider.report().error == "down: unknown"
        answers["down"] = ["10.0.0.3"]
        await provider.announce()
        assert found[-1] == Endpoint("10.0.0.3", 8000)
        assert provider.report().error == ""

    asyncio.run(run())


def test_a_dns_that_never_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, forever = [], threading.Event()

    def getaddrinfo(host: str, port: int, *, type: int) -> list[Any]:
        asked.append(host)
        forever.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(static, "RESOLVE_SECONDS", 0.01)

    async def run() -> None:
        provider = Static({"addresses": ["slow", "10.0.0.2"]}, CONTEXT)
        found: list[Endpoint] = []
        await provider.start(OWN, found.append, no_stranger)
        await provider.announce()
        assert found == [Endpoint("10.0.0.2", 7443)] * 2
        assert provider.report().remedy
        assert provider.report().error == "slow: the DNS does not answer"
        await provider.announce()

    asyncio.run(run())
    assert asked == ["slow"]  # not again while the first question is under way
    forever.set()
