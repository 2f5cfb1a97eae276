"""The sweep: real sockets on the loopback network, bounded in every direction."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

import pytest

from firstboot.discovery import sweep
from firstboot.discovery.interface import Context
from firstboot.discovery.sweep import Sweep, addresses
from firstboot.protocol.model import Endpoint


def context(subnet: str = "", *, lacks: bool = True, platform: str = "") -> Context:
    return Context(
        "a" * 16, "demo", "b" * 16, subnet=subnet, lacks=lambda: lacks, platform=platform
    )


def no_stranger(kind: str, source: str) -> None:
    pytest.fail(f"nobody is heard here, yet {kind} from {source}")


def nobody(endpoint: Endpoint) -> None:
    pytest.fail(f"nobody is there, yet {endpoint}")


@pytest.fixture
def listeners() -> Iterator[list[socket.socket]]:
    """Three hosts of 127.7.0.0/28 that listen on one port."""
    port = 0
    open_ones = []
    for n in (3, 5, 12):
        listener = socket.create_server((f"127.7.0.{n}", port))
        port = listener.getsockname()[1]
        open_ones.append(listener)
    yield open_ones
    for listener in open_ones:
        listener.close()


def test_those_who_listen_are_named_and_told_nothing(listeners: list[socket.socket]) -> None:
    port = listeners[0].getsockname()[1]
    found: list[Endpoint] = []

    async def run() -> Sweep:
        provider = Sweep({}, context("127.7.0.0/28"))
        await provider.start(Endpoint("127.7.0.5", port), found.append, no_stranger)
        assert found == []
        await provider.announce()
        await provider.stop()
        return provider

    report = asyncio.run(run()).report()
    assert sorted(e.host for e in found) == ["127.7.0.12", "127.7.0.3"]
    assert {e.port for e in found} == {port}
    assert (report.found, report.error) == (2, "")
    for listener in (listeners[0], listeners[2]):
        listener.settimeout(5)
        visitor, (host, _) = listener.accept()
        visitor.settimeout(5)
        assert (host, visitor.recv(1)) == ("127.7.0.5", b"")
        visitor.close()


def test_nobody_listening_is_told_with_what_to_open() -> None:
    async def run(platform: str) -> Sweep:
        provider = Sweep({}, context("127.7.0.0/29", platform=platform))
        await provider.start(Endpoint("127.7.0.1", 1), lambda _: None, no_stranger)
        await provider.announce()
        return provider

    report = asyncio.run(run("")).report()
    assert report.error == "no host listens (5 refused)"
    assert report.detail == "5 addresses of 127.7.0.0/29 tried on TCP 1"
    assert report.remedy == "Open TCP 1 between the hosts, in their firewalls and on the way."
    assert 3 < report.next_try - time.time() < 6
    assert "security group" in asyncio.run(run("ec2")).report().remedy


@pytest.mark.parametrize(
    ("cidr", "count", "reason"),
    [
        ("10.0.0.0/24", 253, ""),
        ("10.0.0.0/22", 1021, ""),
        ("10.0.0.0/21", 0, "10.0.0.0/21 has more than 1024 addresses"),
        ("fd00::/120", 0, "fd00::/120 is IPv6, which has too many addresses"),
        ("10.0.0.5/32", 0, "10.0.0.5/32 has no other address"),
        ("10.0.0.4/31", 1, ""),
        ("10.9.0.0/30", 2, ""),
        ("", 0, "this host's subnet is not known"),
    ],
)
def test_which_addresses(cidr: str, count: int, reason: str) -> None:
    found, off = addresses(cidr, Endpoint("10.0.0.5", 7443))
    assert (len(found), off) == (count, reason)
    assert "10.0.0.5" not in found
    assert len(set(found)) == len(found)


def test_neighbours_come_first() -> None:
    found, _ = addresses("10.0.0.0/24", Endpoint("10.0.0.100", 7443))
    assert set(found[:4]) == {"10.0.0.98", "10.0.0.99", "10.0.0.101", "10.0.0.102"}


def test_a_sweep_that_is_off_says_so_and_tries_nothing() -> None:
    async def run() -> Sweep:
        provider = Sweep({}, context("10.0.0.0/16"))
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        await provider.announce()
        return provider

    report = asyncio.run(run()).report()
    assert report.error == "off: 10.0.0.0/16 has more than 1024 addresses"
    assert report.next_try < 0
    assert report.remedy


def tries_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """From now on nothing is dialled; when each address was tried."""
    tries: list[float] = []

    async def probe(address: str, own: Endpoint) -> str:
        tries.append(time.monotonic())
        return "silent"

    monkeypatch.setattr(sweep, "_probe", probe)
    return tries


def test_no_sweep_while_nobody_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tries_of(monkeypatch)

    async def run() -> None:
        provider = Sweep({}, context("10.0.0.0/28", lacks=False))
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        await provider.announce()

    asyncio.run(run())
    assert tries == []


def test_auto_leaves_the_others_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tries_of(monkeypatch)

    async def run() -> None:
        provider = Sweep({"automatic": True}, context("10.0.0.0/28"))
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        await provider.announce()
        assert tries == []
        monkeypatch.setattr(provider, "_next", 0.0)
        await provider.announce()

    asyncio.run(run())
    assert len(tries) == 13


def test_auto_waits_longer_once_somebody_was_met(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tries_of(monkeypatch)
    alone = [False]
    known = Context("a" * 16, "demo", "b" * 16, subnet="10.0.0.0/28", alone=lambda: alone[0])

    async def run(automatic: bool) -> int:
        tries.clear()
        provider = Sweep({"automatic": automatic}, known)
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        monkeypatch.setattr(provider, "_next", 0.0)  # the first patience is over
        await provider.announce()
        return len(tries)

    assert asyncio.run(run(automatic=True)) == 0
    assert asyncio.run(run(automatic=False)) == 13
    alone[0] = True
    assert asyncio.run(run(automatic=True)) == 13


def test_pauses_grow_and_the_rate_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tries, pauses = tries_of(monkeypatch), []

    async def run() -> None:
        provider = Sweep({}, context("10.0.0.0/25"))
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        for _ in range(3):
            begun = len(tries)
            await provider.announce()
            await provider.announce()  # too early: nothing happens
            assert len(tries) - begun == 125
            pauses.append(round(provider.report().next_try - time.time()))
            monkeypatch.setattr(provider, "_next", 0.0)

    asyncio.run(run())
    assert pauses == [5, 10, 20]
    # A late loop may catch up, yet never is ahead of the rate.
    for round_ in range(3):
        first, *rest = tries[round_ * 125 : round_ * 125 + 125]
        assert all(t - first >= (n / sweep.RATE) - 0.02 for n, t in enumerate(rest, 1))


def test_stop_ends_a_sweep_that_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = tries_of(monkeypatch)

    async def run() -> None:
        provider = Sweep({}, context("10.0.0.0/22"))
        await provider.start(Endpoint("10.0.0.1", 7443), nobody, no_stranger)
        sweeping = asyncio.ensure_future(provider.announce())
        while len(tries) < 3:
            await asyncio.sleep(0.005)
        await provider.stop()
        await asyncio.wait_for(sweeping, 30)

    asyncio.run(run())
    assert len(tries) < 1000
