"""What every way of finding peers offers. Nothing a provider says is trusted."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass

Found = Callable[[Endpoint], None]
# kind and source of a StrangerSeen event, see protocol.events
Stranger = Callable[[str, str], None]


def _always() -> bool:
    return True


def _no_key(data: bytes, about: bytes) -> bytes:
    raise LocalError(f"no key to seal {len(data)} bytes with, about {about!r}")


def _no_settings(path: str) -> Any:
    del path


@dataclass(frozen=True, slots=True)
class Context:
    """What a provider may know of this host and its formation; nothing here is a secret.

    `tag` follows from the token without revealing it, `formation_id` names the formation, `boot`
    is this process's nonce in hex. `admits` is this host's name while it is the master of an active
    cluster and lets hosts in with a one-time token, else empty. `root` is where the host's files
    are, `platform` the cloud this host is on (``ec2``, ``openstack`` or empty), `subnet` the
    network of its address (``10.0.0.0/24``) or empty. `lacks` tells whether hosts are missing,
    `alone` whether none was met yet.
    `reservation` is the cloud's id of the launch call that made it, empty if unknown. `settings`
    reads a YAML file on the host, by its whole path, as plain data: None if it is not there,
    LocalError if it cannot be read.
    `seal` encrypts a text and binds it to another, public one; only holders of the token can
    `unseal` it, which raises RemoteError if it cannot be.
    """

    tag: str
    formation_id: str
    boot: str
    admits: str = ""
    root: Path = Path("/")
    platform: str = ""
    subnet: str = ""
    expect: int = 1
    lacks: Callable[[], bool] = _always
    alone: Callable[[], bool] = _always
    reservation: str = ""
    settings: Callable[[str], Any] = _no_settings
    seal: Callable[[bytes, bytes], bytes] = _no_key
    unseal: Callable[[bytes, bytes], bytes] = _no_key


@dataclass(frozen=True, slots=True)
class ProviderReport:
    """How a provider fares, for people: one line of the status, and one more with the remedy.

    `found` counts the addresses named so far, `error` is what is wrong, `detail` what it tried,
    and `remedy` what to open or to grant: a port, a rule, a permission. `next_try` is Unix time;
    0 stands for the next announcement. All are short texts without secrets; whatever came from
    the network in them is made printable before it is shown.
    """

    name: str
    found: int
    error: str = ""
    detail: str = ""
    remedy: str = ""
    next_try: float = 0.0


def opening(platform: str, what: str) -> str:
    """A remedy: what is to be opened between the hosts, where that is done on this platform."""
    if platform in ("ec2", "openstack"):
        return f"Open {what} between the hosts: an inbound rule of the security group from itself."
    return f"Open {what} between the hosts, in their firewalls and on the way."


def leads_to_a_peer(address: str) -> bool:
    """Whether a peer may be there: not on this host itself, and not a group of hosts."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    return not (ip.is_loopback or ip.is_multicast or ip.is_unspecified)


class Provider(Protocol):
    """A way to find peers.

    All methods are called on the event loop; `found` and `stranger` are called there too. No
    method raises because of the network: what is wrong is in the report, and the next `announce`
    tries again. That comes after 1 to 5 seconds for as long as admission is open, but never while
    the last one still runs. A provider whose questions cost something asks less often, and not at
    all unless `Context.lacks`.
    """

    @property
    def name(self) -> str:
        """The name in the configuration."""

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Publish `endpoint`, this host's own, and begin to look for others.

        Returns within milliseconds: whatever waits for the network or imports much is left to
        `announce`, which follows at once.
        """

    async def announce(self) -> None:
        """Publish and ask again, now. Addresses that still answer are named again."""

    async def stop(self) -> None:
        """Neither publish nor look any more; may be called twice, or without a start."""

    def report(self) -> ProviderReport:
        """How it fares."""


Factory = Callable[[Mapping[str, Any], Context], Provider]
