"""Peers in the host's own IPv4 subnet, by trying its addresses one after the other.

One TCP connection to an address, closed at once, tells whether anybody listens there: it says
nothing about this formation, and a firstboot that is met that way keeps silent too. Whether it is a
peer shows when it is dialled, as with any other provider. A sweep is bounded in addresses, in rate
(each address without a host costs the link ARP requests) and in number: the pauses grow, and while
no host is missing there is none.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from firstboot.discovery.interface import Context, Found, ProviderReport, Stranger, opening
from firstboot.protocol.model import Endpoint

MAX_ADDRESSES = 1024  # a /22
RATE = 128  # addresses a second
SECONDS = 2.0  # for a host on the same link to answer; so some 256 sockets are open at a time
PAUSES = (5.0, 10.0, 20.0, 40.0, 80.0, 120.0)  # seconds between two sweeps; the last goes on
# Seconds that `auto` leaves the others, which ask nobody in vain; then more for each expected host,
# once one was met: hosts tell each other whom they know, and fifty together may take long.
PATIENCE, MORE_PATIENCE, EACH = 8.0, 30.0, 1.0
_UNREACHED = (errno.EHOSTUNREACH, errno.ETIMEDOUT, errno.EHOSTDOWN)


class Sweep:
    """Options ``cidr``, other addresses than the own subnet's, and ``automatic``: others first."""

    name = "sweep"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        self._context = context
        self._cidr = options.get("cidr") or context.subnet
        self._automatic = bool(options.get("automatic"))
        self._own: Endpoint | None = None
        self._found: Found | None = None
        self._addresses: list[str] = []
        self._off = ""
        self._next = self._later = 0.0  # monotonic seconds
        self._sweeps = 0
        self._named: set[Endpoint] = set()
        self._seen: Counter[str] = Counter()  # what came of the last sweep's tries

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Choose the addresses."""
        del stranger  # whoever answers is a stranger until it is dialled
        self._own, self._found = endpoint, found
        self._addresses, self._off = addresses(self._cidr, endpoint)
        now, expect = time.monotonic(), self._context.expect
        self._next = now + (PATIENCE if self._automatic else 0.0)
        self._later = now + (MORE_PATIENCE + EACH * expect if self._automatic else 0.0)

    async def announce(self) -> None:
        """Sweep, should a host be missing and the pause be over."""
        if self._off or time.monotonic() < self._next or not self._context.lacks():
            return
        if time.monotonic() < self._later and not self._context.alone():
            return
        pause = PAUSES[min(self._sweeps, len(PAUSES) - 1)]
        self._seen.clear()
        try:
            await self._sweep()
        finally:
            self._sweeps += 1
            self._next = time.monotonic() + pause

    async def stop(self) -> None:
        """Try no further address."""
        self._found = None

    def report(self) -> ProviderReport:
        """What came of the last sweep."""
        port = self._own.port if self._own else 0
        if self._off:
            remedy = "" if self._automatic else "Use dns, static addresses or a cloud's API."
            return ProviderReport(self.name, 0, f"off: {self._off}", "", remedy, -1.0)
        detail = f"{len(self._addresses)} addresses of {self._cidr} tried on TCP {port}"
        due = self._next if self._context.alone() else max(self._next, self._later)
        next_try = time.time() + max(0.0, due - time.monotonic())
        error = remedy = ""
        if self._sweeps and not self._named and self._seen:
            told = [f"{count} {what}" for what, count in sorted(self._seen.items())]
            error = f"no host listens ({', '.join(told)})"
            remedy = opening(self._context.platform, f"TCP {port}")
        return ProviderReport(self.name, len(self._named), error, detail, remedy, next_try)

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        begun, tries = loop.time(), set[asyncio.Task[None]]()
        try:
            for number, address in enumerate(self._addresses):
                # Many tries are begun at one time, as the loop may be late: no more than the rate.
                await asyncio.sleep(max(0.0, begun + number / RATE - loop.time()))
                if self._found is None or not self._context.lacks():
                    break
                task = loop.create_task(self._try(address))
                tries.add(task)
                task.add_done_callback(tries.discard)
            while tries:
                await asyncio.wait(tries)
        finally:
            for task in tries:
                task.cancel()

    async def _try(self, address: str) -> None:
        assert self._own is not None
        what = await _probe(address, self._own)
        if what:
            self._seen[what] += 1
        elif self._found is not None:
            endpoint = Endpoint(address, self._own.port)
            self._named.add(endpoint)
            self._found(endpoint)


def addresses(cidr: str, own: Endpoint) -> tuple[list[str], str]:
    """The addresses to try, nearest to the own one first, or why there is no sweep."""
    if not cidr:
        return [], "this host's subnet is not known"
    network = ipaddress.ip_network(cidr)
    if network.version != 4:
        return [], f"{cidr} is IPv6, which has too many addresses"
    if network.num_addresses > MAX_ADDRESSES:
        return [], f"{cidr} has more than {MAX_ADDRESSES} addresses"
    hosts = [address for address in network.hosts() if str(address) != own.host]
    if ":" not in own.host:
        # Hosts launched together are often neighbours.
        mine = int(ipaddress.IPv4Address(own.host))
        hosts.sort(key=lambda address: abs(int(address) - mine))
    return [str(address) for address in hosts], "" if hosts else f"{cidr} has no other address"


async def _probe(address: str, own: Endpoint) -> str:
    """Empty if somebody listens at that address, on the own port; else what happened."""
    loop = asyncio.get_running_loop()
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            if ":" not in own.host:
                with suppress(OSError):
                    probe.bind((own.host, 0))
            async with asyncio.timeout(SECONDS):
                await loop.sock_connect(probe, (address, own.port))
    except TimeoutError:
        return "silent"
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return "unreachable" if error.errno in _UNREACHED else (error.strerror or "failed")
    return ""
