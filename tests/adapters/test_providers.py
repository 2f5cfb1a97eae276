"""The providers by name, and which of them `auto` stands for."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from firstboot.discovery import providers
from firstboot.discovery.interface import Context, Provider
from firstboot.discovery.providers import choose, make
from firstboot.protocol.model import Endpoint
from firstboot.userdata.rules import NAMED, rule_for

CONTEXT = Context(tag="a" * 16, formation_id="demo", boot="b" * 16)


def test_the_document_and_the_program_know_the_same_providers() -> None:
    with_options = set(rule_for(("discovery", "0"))["properties"])
    assert with_options | set(NAMED) == {"auto", *providers.PROVIDERS}


@pytest.mark.parametrize("name", ["mdns", "static"])
def test_a_provider_by_name(name: str) -> None:
    provider: Provider = make(name, {}, CONTEXT)
    assert provider.name == name
    assert provider.report().found == 0


@pytest.mark.parametrize(
    ("listed", "platform", "chosen"),
    [
        (["auto"], "", ["mdns", "sweep"]),
        (["auto"], "ec2", ["mdns", "ec2", "sweep"]),
        (["auto"], "openstack", ["mdns", "openstack", "sweep"]),
        (["auto", "dns"], "", ["mdns", "sweep", "dns"]),
        (["mdns"], "ec2", ["mdns"]),
        (["static", "dns"], "openstack", ["static", "dns"]),
    ],
)
def test_what_auto_stands_for(listed: list[str], platform: str, chosen: list[str]) -> None:
    assert [name for name, _ in choose([(name, {}) for name in listed], platform)] == chosen


def test_auto_leaves_options_as_they_are_listed() -> None:
    tagged: dict[str, Any] = {"tag": {"cluster": "demo"}}
    assert ("ec2", tagged) in choose([("auto", {}), ("ec2", tagged)], "ec2")
    assert ("ec2", tagged) in choose([("ec2", tagged), ("auto", {})], "")
    assert dict(choose([("auto", {})], ""))["sweep"] == {"automatic": True}


def test_a_library_that_is_missing_is_told_and_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(providers.PROVIDERS, "ec2", ("no_such_module", "Ec2"))
    provider = make("ec2", {}, CONTEXT)

    async def run() -> None:
        await provider.start(Endpoint("10.0.0.1", 7443), lambda _: None, lambda *_: None)
        await provider.announce()
        await provider.stop()

    asyncio.run(run())
    report = provider.report()
    assert (
        report.error == "the Python module firstboot.discovery.no_such_module is not in this image"
    )
    assert report.remedy


def test_what_is_not_used_is_not_imported() -> None:
    import subprocess

    program = (
        "import sys, firstboot.discovery.providers as p\n"
        "for name in p.PROVIDERS: assert f'firstboot.discovery.{name}' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
