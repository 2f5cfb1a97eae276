"""What every way of finding peers offers. Nothing a provider says is trusted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass

Found = Callable[[Endpoint], None]
# kind and source of a StrangerSeen event, see protocol.events
Stranger = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Context:
    """What providers publish: nothing secret.

    `tag` follows from the token without revealing it, `formation_id` names the formation, `boot`
    is this process's nonce in hex. `admits` is this host's name while it is the master of an active
    cluster and lets hosts in with a one-time token, else empty.
    """

    tag: str
    formation_id: str
    boot: str
    admits: str = ""


@dataclass(frozen=True, slots=True)
class ProviderReport:
    """How a provider fares: addresses named so far, what is wrong, and what it does; for people."""

    name: str
    found: int
    error: str = ""
    detail: str = ""


class Provider(Protocol):
    """A way to find peers.

    All methods are called on the event loop; `found` and `stranger` are called there too. No
    method raises because of the network: what is wrong is in the report, and the next `announce`
    tries again.
    """

    @property
    def name(self) -> str:
        """The name in the configuration."""

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Publish `endpoint`, this host's own, and begin to look for others."""

    async def announce(self) -> None:
        """Publish and ask again, now. Addresses that still answer are named again."""

    async def stop(self) -> None:
        """Neither publish nor look any more; may be called twice, or without a start."""

    def report(self) -> ProviderReport:
        """How it fares."""


Factory = Callable[[Mapping[str, Any], Context], Provider]
