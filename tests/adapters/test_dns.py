"""Names in the DNS. SRV is asked of a real dnsmasq; the system's resolver is a double here."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import dns.resolver
import pytest

from firstboot.discovery import dns as provider_module
from firstboot.discovery.dns import Dns, _service
from firstboot.discovery.interface import Context
from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import Endpoint

OWN = Endpoint("10.0.0.1", 7443)


def context(*, lacks: bool = True) -> Context:
    return Context("a" * 16, "demo", "b" * 16, lacks=lambda: lacks)


def no_stranger(kind: str, source: str) -> None:
    pytest.fail(f"nobody is heard here, yet {kind} from {source}")


class Resolver:
    """getaddrinfo(3) as far as it is used: names, and what is raised for the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: dict[str, list[str] | Exception | threading.Event] = {}
        self.asked: list[str] = []
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host: str, port: int, *, type: int) -> list[Any]:
        self.asked.append(host)
        known = self.names.get(host, socket.gaierror(-2, "Name or service not known"))
        if isinstance(known, threading.Event):
            known.wait(30)
            known = []
        if isinstance(known, Exception):
            raise known
        return [(0, type, 0, "", (address, port)) for address in known]


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    def none(name: str) -> Any:
        raise LocalError("no such name")

    monkeypatch.setattr(provider_module, "_service", none)
    return Resolver(monkeypatch)


def announced(provider: Dns, times: int = 1) -> list[Endpoint]:
    """What the provider names in its last announcement."""
    found: list[Endpoint] = []

    async def run() -> None:
        await provider.start(OWN, found.append, no_stranger)
        for _ in range(times):
            found.clear()
            await provider.announce()

    asyncio.run(run())
    return found


def test_every_address_of_a_name_but_those_that_lead_nowhere(resolver: Resolver) -> None:
    resolver.names["a"] = ["10.0.0.2", OWN.host, "127.0.1.1", "0.0.0.0", "224.0.0.1", "fd00::2"]
    resolver.names["b"] = ["10.0.0.3"]
    provider = Dns({"names": ("a", "b")}, context())
    assert announced(provider) == [
        Endpoint("10.0.0.2", 7443),
        Endpoint("fd00::2", 7443),
        Endpoint("10.0.0.3", 7443),
    ]
    assert (provider.report().found, provider.report().error) == (3, "")


def test_what_is_wrong_is_told_for_each_name(resolver: Resolver) -> None:
    resolver.names["bad"] = UnicodeError("label too long")
    report_of = Dns({"names": ("gone", "bad")}, context())
    assert announced(report_of) == []
    report = report_of.report()
    assert report.error == (
        "gone: name or service not known, SRV: no such name; "
        "bad: not a host name, SRV: no such name"
    )
    assert "A and AAAA of gone, bad" in report.detail
    assert "53" in report.remedy


def test_the_targets_of_srv_records_at_their_ports(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def service(name: str) -> Any:
        asked.append(name)
        return 30.0, (("n1", 9000), ("n2", 9001), ("gone", 9002))

    monkeypatch.setattr(provider_module, "_service", service)
    resolver.names |= {"n1": ["10.0.0.2"], "n2": ["10.0.0.3"]}
    provider = Dns({"names": ("nodes",)}, context())
    assert announced(provider, 3) == [Endpoint("10.0.0.2", 9000), Endpoint("10.0.0.3", 9001)]
    # Three announcements, yet the records are good for 30 s; addresses are asked for each time.
    assert asked == ["_firstboot._tcp.nodes"]
    assert resolver.asked.count("n1") == 3
    assert provider.report().error == ""


def test_without_dnspython_addresses_still_count(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    Resolver(monkeypatch).names["a"] = ["10.0.0.2"]
    monkeypatch.setitem(sys.modules, "dns", None)
    monkeypatch.setitem(sys.modules, "dns.exception", None)
    provider = Dns({"names": ("a", "gone")}, context())
    assert announced(provider) == [Endpoint("10.0.0.2", 7443)]
    assert "gone: name or service not known, SRV: not asked" in provider.report().error
    assert "dnspython" in provider.report().remedy


def test_a_resolver_that_hangs_is_told_and_asked_once_only(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "SECONDS", 0.05)
    hanging = threading.Event()
    resolver.names |= {"slow": hanging, "quick": ["10.0.0.2"]}
    provider = Dns({"names": ("slow", "quick")}, context())
    begun = time.monotonic()
    assert announced(provider, 3) == [Endpoint("10.0.0.2", 7443)]
    assert time.monotonic() - begun < 20
    assert resolver.asked.count("slow") == 1
    assert "slow: the DNS does not answer" in provider.report().error
    hanging.set()


def test_nothing_is_asked_while_nobody_is_missing(resolver: Resolver) -> None:
    assert announced(Dns({"names": ("a",)}, context(lacks=False))) == []
    assert resolver.asked == []


def test_answers_are_bounded(resolver: Resolver) -> None:
    resolver.names["many"] = [f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}" for n in range(2, 5000)]
    provider = Dns({"names": ("many",)}, context())
    assert len(announced(provider)) == 1024


# ---------------------------------------------------------------- SRV, of a real server


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, int]]:
    """dnsmasq on a port of its own."""
    if shutil.which("dnsmasq") is None:
        pytest.fail("dnsmasq is missing: make setup")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = ["dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--no-resolv"]
    argv += [f"--port={port}", "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file="]
    argv += ["--user=", "--local=/example.org/", "--local-ttl=7"]
    argv += ["--host-record=plain.example.org,10.0.0.2"]
    argv += [
        f"--srv-host=_firstboot._tcp.nodes.example.org,{n}.example.org,{9000 + i},{9 - i}"
        for i, n in enumerate(("n1", "n2"))
    ]
    many = [f"--srv-host=_s._tcp.many.example.org,n{n}.example.org,{n}" for n in range(1, 400)]
    process = subprocess.Popen([*argv, *many])
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield "127.0.0.1", port
    process.kill()
    process.wait()


@pytest.fixture
def asks(server: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> dns.resolver.Resolver:
    resolver = dns.resolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = [server[0]], server[1]
    monkeypatch.setattr(dns.resolver, "default_resolver", resolver)
    return resolver


def test_records_by_priority_with_their_time(asks: dns.resolver.Resolver) -> None:
    seconds, targets = _service("_firstboot._tcp.nodes.example.org")
    assert targets == (("n2.example.org", 9001), ("n1.example.org", 9000))
    assert 0 <= seconds <= provider_module.MAX_TTL


def test_records_are_bounded(asks: dns.resolver.Resolver) -> None:
    assert len(_service("_s._tcp.many.example.org")[1]) == provider_module.MAX_RECORDS


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("_firstboot._tcp.gone.example.org", "no such name"),
        ("plain.example.org", "no such record"),
        ("elsewhere.example.net", "REFUSED"),
        ("a..b", "empty"),
    ],
)
def test_what_the_server_does_not_have(asks: dns.resolver.Resolver, name: str, said: str) -> None:
    with pytest.raises(LocalError, match=said):
        _service(name)


def test_a_server_that_is_silent_or_talks_rubbish(
    asks: dns.resolver.Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider_module, "SECONDS", 0.5)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rubbish:
        rubbish.bind(("127.0.0.1", 0))
        rubbish.settimeout(10)
        asks.port = rubbish.getsockname()[1]

        def answer() -> None:
            data, client = rubbish.recvfrom(4096)
            rubbish.sendto(data[:2] + b"\xff" * 40, client)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(LocalError):
            _service("_firstboot._tcp.nodes.example.org")
        thread.join()
