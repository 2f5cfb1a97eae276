"""What providers that ask a cloud share: when to ask, what to name again, how to report."""

from __future__ import annotations

import ipaddress
import json
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from firstboot.discovery.aside import aside
from firstboot.discovery.interface import (
    Context,
    Found,
    ProviderReport,
    Stranger,
    leads_to_a_peer,
    opening,
)
from firstboot.protocol.errors import FirstbootError, LocalError
from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass

FIRST_PAUSE, LAST_PAUSE = 5.0, 60.0  # seconds between questions, doubling
THROTTLED_PAUSE = 300.0  # at most, doubling from `LAST_PAUSE`, when the cloud says: less often
STILL_MISSING = 3  # questions after which addresses that were found should have been reached
MAX_NAMED = 2000  # addresses; whom a large formation needs first are few


class Trouble(LocalError):
    """Why a cloud told nothing, the remedy, and whether it wants to be asked less often."""

    def __init__(self, message: str, remedy: str = "", *, throttled: bool = False) -> None:
        super().__init__(message)
        self.remedy = remedy
        self.throttled = throttled


@dataclass(frozen=True, slots=True)
class Sighting:
    """What a cloud told: other hosts' addresses, what was asked, and what is odd about it."""

    hosts: Sequence[str]
    asked: str
    notice: str = ""
    remedy: str = ""


class Cloud:
    """The base: `_look`, which a provider supplies, runs in a thread and may raise Trouble."""

    name = ""
    tries = ""  # in words, for when it comes to nothing

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        self._options, self._context = options, context
        self._hosts: Sequence[str] = ()
        self._named: set[str] = set()
        self._own: Endpoint | None = None
        self._found: Found | None = None
        self._report = ProviderReport(self.name, 0)
        self._pause = 0.0
        self._due = 0.0  # monotonic seconds
        self._looked = 0

    def _look(self, own: Endpoint) -> Sighting:
        """Ask the cloud; blocks."""
        raise NotImplementedError

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Nothing is published; the first `announce` asks."""
        del stranger  # nobody is heard here
        self._own, self._found = endpoint, found

    async def announce(self) -> None:
        """Name again who was found, and ask the cloud if hosts are missing and it is time."""
        self._name()
        own = self._own
        if own is None or time.monotonic() < self._due or not self._context.lacks():
            return
        self._due = float("inf")  # until this question is answered
        try:
            sighting = await aside(lambda: self._look(own))
        except Trouble as trouble:
            self._wait(throttled=trouble.throttled)
            self._tell(str(trouble), trouble.remedy)
        except FirstbootError as error:
            self._wait()
            self._tell(str(error))
        else:
            self._wait()
            self._hosts = [h for h in sighting.hosts if leads_to_a_peer(h)][:MAX_NAMED]
            self._name()
            self._looked += 1
            self._judge(sighting, own.port)

    async def stop(self) -> None:
        """Name nothing any more."""
        self._found = None

    def report(self) -> ProviderReport:
        """How it fares."""
        return self._report

    def _name(self) -> None:
        for host in self._hosts:
            if self._found is not None and self._own is not None:
                self._named.add(host)
                self._found(Endpoint(host, self._own.port))

    def _wait(self, *, throttled: bool = False) -> None:
        """Set when to ask next; hosts that boot together do not go on in step."""
        last = THROTTLED_PAUSE if throttled else LAST_PAUSE
        least = LAST_PAUSE if throttled else FIRST_PAUSE
        self._pause = min(max(2 * self._pause, least), last)
        pause = self._pause * random.uniform(0.8, 1.2)  # noqa: S311  nothing rests on it
        self._due = time.monotonic() + pause

    def _judge(self, sighting: Sighting, port: int) -> None:
        notice, remedy = sighting.notice, sighting.remedy
        if not notice and self._looked >= STILL_MISSING and self._context.lacks():
            notice = "hosts are missing all the same"
            remedy = opening(self.name, f"TCP {port}")
        self._tell(notice, remedy, sighting.asked)

    def _tell(self, error: str, remedy: str = "", asked: str = "") -> None:
        at = time.time() + max(0.0, self._due - time.monotonic())
        self._report = ProviderReport(
            self.name, len(self._named), error, asked or self.tries, remedy, at
        )


def written(address: object) -> str:
    """An IP address as this host would write it; empty for anything else."""
    try:
        return str(ipaddress.ip_address(address)) if isinstance(address, str) else ""
    except ValueError:
        return ""


def mapping(body: bytes | str, who: str) -> dict[str, Any]:
    """A JSON object; Trouble, naming `who` said it, if it is anything else."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Trouble(f"{who} answers what is not a JSON object")
    return data
