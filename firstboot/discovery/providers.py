"""Every provider there is, by its name in the configuration, and which of them `auto` means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from firstboot.discovery.interface import (
    Context,
    Factory,
    Found,
    Provider,
    ProviderReport,
    Stranger,
)
from firstboot.protocol.model import Endpoint

# Module and class, imported when used: a host that finds its peers by mDNS needs no other.
PROVIDERS = {
    "mdns": ("mdns", "Mdns"),
    "static": ("static", "Static"),
    "dns": ("dns", "Dns"),
    "sweep": ("sweep", "Sweep"),
    "ec2": ("ec2", "Ec2"),
    "openstack": ("openstack", "Openstack"),
    "http": ("http", "Http"),
}
CLOUDS = ("ec2", "openstack")
Options = Mapping[str, Any]


def choose(listed: Iterable[tuple[str, Options]], platform: str) -> list[tuple[str, Options]]:
    """The providers to use, `auto` replaced by those that suit the platform (see ADR 15).

    One that is listed as well keeps the options it has there.
    """
    given = dict(listed)
    if "auto" not in given:
        return list(given.items())
    automatic: dict[str, Options] = {"mdns": {}}
    if platform in CLOUDS:
        automatic[platform] = {}
    automatic["sweep"] = {"automatic": True}
    return list({**automatic, **{k: v for k, v in given.items() if k != "auto"}}.items())


def load(names: Iterable[str]) -> None:
    """Import what takes long, while the disk is waited for."""
    if "mdns" in names:
        from firstboot.discovery import mdns

        mdns.load()


def make(name: str, options: Options, context: Context) -> Provider:
    """A provider; one whose library is missing only says so in its report."""
    module, kind = PROVIDERS[name]
    try:
        factory: Factory = getattr(import_module(f"firstboot.discovery.{module}"), kind)
    except ImportError as error:
        return Unavailable(name, error.name or str(error))
    return factory(options, context)


class Unavailable:
    """A provider that cannot be used here, because a library is missing."""

    def __init__(self, name: str, missing: str) -> None:
        self.name = name
        self._report = ProviderReport(
            name,
            0,
            f"the Python module {missing} is not in this image",
            remedy=f"Add it to the image, or use another provider than {name}.",
            next_try=-1.0,
        )

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Nothing to do."""

    async def announce(self) -> None:
        """Nothing to do."""

    async def stop(self) -> None:
        """Nothing to do."""

    def report(self) -> ProviderReport:
        """What is missing."""
        return self._report
