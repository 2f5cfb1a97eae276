"""Every provider there is, by its name in the configuration."""

from __future__ import annotations

from collections.abc import Callable

from firstboot.discovery import mdns
from firstboot.discovery.interface import Factory
from firstboot.discovery.static import Static

PROVIDERS: dict[str, Factory] = {
    "mdns": mdns.Mdns,
    "static": Static,
}

# What imports for a provider what takes long, so that it can be done while the disk is waited for.
LOADS: dict[str, Callable[[], None]] = {"mdns": mdns.load}
