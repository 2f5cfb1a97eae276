"""Peers at addresses that the configuration lists: works everywhere, and finds nobody new."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from firstboot.discovery.aside import Question
from firstboot.discovery.interface import Context, Found, ProviderReport, Stranger
from firstboot.protocol.errors import UserError
from firstboot.protocol.model import Endpoint

DEFAULT_PORT = 7443
RESOLVE_SECONDS = 5.0
MAX_PER_NAME = 16
_WITH_PORT = re.compile(r"(?:\[(?P<six>[^\]]+)\]|(?P<other>[^:]+)):(?P<port>[0-9]{1,5})\Z")
_HOST_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9])?\.?\Z")


class Static:
    """Option ``addresses``: Endpoints, or texts ``10.0.0.5``, ``[fd00::5]:7443``, ``name:7443``.

    Names are resolved anew at every announcement, all at once: the DNS may come up later than
    this host, or change. UserError if a text is neither an address nor a name.
    """

    name = "static"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        del context  # nothing is published
        listed: Sequence[Endpoint | str] = options.get("addresses", ())
        entries = [a if isinstance(a, Endpoint) else parse(a) for a in listed]
        self._addresses = [a for a in entries if isinstance(a, Endpoint)]
        self._names = [a for a in entries if not isinstance(a, Endpoint)]
        self._questions = {name: Question(partial(_resolve, *name)) for name in self._names}
        self._named: set[Endpoint] = set()
        self._errors: dict[str, str] = {}
        self._own: Endpoint | None = None
        self._found: Found | None = None

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Name every address once."""
        del stranger  # nobody is heard here
        self._own, self._found = endpoint, found
        self._name(self._addresses)

    async def announce(self) -> None:
        """Name every address again, and resolve the names."""
        self._name(self._addresses)
        await asyncio.gather(*(self._resolve(host, port) for host, port in self._names))

    async def stop(self) -> None:
        """Name nothing any more."""
        self._found = None

    def report(self) -> ProviderReport:
        """How many addresses were named, and which names did not resolve."""
        listed = len(self._addresses) + len(self._names)
        errors = "; ".join(self._errors.values())
        remedy = "Correct the name, or let this host reach its DNS server: UDP and TCP 53."
        detail = f"{listed} listed"
        return ProviderReport(self.name, len(self._named), errors, detail, remedy if errors else "")

    def _name(self, endpoints: Sequence[Endpoint]) -> None:
        for endpoint in endpoints:
            if self._found is not None and endpoint != self._own:
                self._named.add(endpoint)
                self._found(endpoint)

    async def _resolve(self, host: str, port: int) -> None:
        try:
            rows = await self._questions[host, port].ask(RESOLVE_SECONDS)
        except TimeoutError:
            self._errors[host] = f"{host}: the DNS does not answer"
            return
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a host name"
            self._errors[host] = f"{host}: {reason}"
            return
        self._errors.pop(host, None)
        self._name([Endpoint(found, port) for found in rows])


def _resolve(host: str, port: int) -> list[str]:
    """The addresses of a name (getaddrinfo(3)), which blocks for as long as resolv.conf says."""
    rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in rows))[:MAX_PER_NAME]


def parse(text: str) -> Endpoint | tuple[str, int]:
    """An Endpoint, or a host name and a port; UserError if it is neither."""
    match = _WITH_PORT.match(text)
    host = (match["six"] or match["other"]) if match else text
    port = int(match["port"]) if match else DEFAULT_PORT
    try:
        return Endpoint(str(ipaddress.ip_address(host)), port)
    except ValueError:
        dotted = set(host) <= set("0123456789.")  # a mistyped address, not a name to look up
        if 0 < port < 65536 and _HOST_NAME.match(host) and not dotted and "[" not in text:
            return host, port
    raise UserError(
        f"{text[:80]!r} is neither an address nor a host name",
        where="discovery.static",
        hint="for example 10.0.0.5, [fd00::5]:7443 or node-1.example.org",
    )
