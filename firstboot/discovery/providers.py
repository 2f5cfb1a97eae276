"""Every provider there is, by its name in the configuration."""

from __future__ import annotations

from firstboot.discovery.interface import Factory
from firstboot.discovery.mdns import Mdns
from firstboot.discovery.static import Static

PROVIDERS: dict[str, Factory] = {
    "mdns": Mdns,
    "static": Static,
}
