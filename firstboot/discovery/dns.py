"""Peers by names in the DNS: A and AAAA records, and SRV records (RFC 2782).

A and AAAA are asked for through the system's resolver, so that its files, caches and search domains
count. It does not know SRV: for these dnspython is used, if the image has it. It takes some
50 ms to import, so that is done in a thread, once the first question is asked.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from firstboot.discovery.aside import Question
from firstboot.discovery.interface import Context, Found, ProviderReport, Stranger, leads_to_a_peer
from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import Endpoint

SERVICE = "_firstboot._tcp"
SECONDS = 5.0  # for an answer
MAX_RECORDS = 256  # SRV records of one name
MAX_ADDRESSES = 1024  # addresses of one name
MAX_COUNTED = 4096  # addresses that are counted, whatever a server makes up
AT_ONCE = 16  # names looked up at a time
MAX_TTL = 60.0  # seconds after which SRV is asked again, whatever its records say
RETRY = 5.0  # seconds before SRV is asked again after a failure

Targets = tuple[float, tuple[tuple[str, int], ...]]  # seconds they are good for; name and port


class Name:
    """One name: the questions about it, what they yielded, and what is wrong."""

    def __init__(self, name: str, port: int, room: asyncio.Semaphore) -> None:
        self.name, self.error, self.without_srv = name, "", False
        self._room = room
        self.found: dict[Endpoint, None] = {}
        self._hosts = Question(lambda: _addresses(name, port))
        self._service = Question(lambda: _service(f"{SERVICE}.{name}"))
        self._ask_service_at = 0.0  # monotonic seconds
        self._targets: dict[tuple[str, int], Question[list[Endpoint]]] = {}

    async def ask(self) -> None:
        """Ask about the name's hosts and its service, at the same time."""
        (hosts, no_hosts), (services, no_service) = await asyncio.gather(
            self._of(self._hosts), self._of_service()
        )
        self.found = dict.fromkeys([*hosts, *services][:MAX_ADDRESSES])
        wrong = [] if hosts or services else [no_hosts, no_service and f"SRV: {no_service}"]
        self.error = ", ".join(dict.fromkeys(text for text in wrong if text))

    async def _of(self, question: Question[list[Endpoint]]) -> tuple[list[Endpoint], str]:
        try:
            async with self._room:
                return await question.ask(SECONDS), ""
        except TimeoutError:
            return [], "the DNS does not answer"
        except OSError as error:
            return [], (error.strerror or "no answer").lower()
        except UnicodeError:
            return [], "not a host name"

    async def _of_service(self) -> tuple[list[Endpoint], str]:
        wrong = ""
        if time.monotonic() >= self._ask_service_at and not self.without_srv:
            try:
                ttl, targets = await self._service.ask(SECONDS)
            except ImportError:
                self.without_srv = True
                return [], "not asked, as dnspython is not in this image"
            except TimeoutError:
                wrong = "the DNS does not answer"
            except LocalError as error:
                wrong = str(error)
            else:
                self._ask_service_at = time.monotonic() + ttl
                self._use(targets)
            if wrong:
                self._ask_service_at = time.monotonic() + RETRY
                self._use(())
        answers = await asyncio.gather(*(self._of(q) for q in self._targets.values()))
        return [e for found, _ in answers for e in found], wrong

    def _use(self, targets: tuple[tuple[str, int], ...]) -> None:
        known = self._targets
        self._targets = {
            key: known.get(key) or Question(partial(_addresses, *key)) for key in targets
        }


class Dns:
    """Option ``names``: what to ask for."""

    name = "dns"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        self._names, self._context = tuple(options.get("names", ())), context
        self._asked: list[Name] = []
        self._own: Endpoint | None = None
        self._found: Found | None = None
        self._named: set[Endpoint] = set()

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Remember whom to tell; nothing is asked yet."""
        del stranger  # nobody is heard here
        self._own, self._found = endpoint, found
        room = asyncio.Semaphore(AT_ONCE)
        self._asked = [Name(name, endpoint.port, room) for name in self._names]

    async def announce(self) -> None:
        """Ask for all names while hosts are missing, and name what they stand for."""
        if self._found is not None and self._context.lacks():
            await asyncio.gather(*(name.ask() for name in self._asked))
        for endpoint in [e for name in self._asked for e in name.found]:
            if self._found is not None and endpoint != self._own:
                if len(self._named) < MAX_COUNTED:
                    self._named.add(endpoint)
                self._found(endpoint)

    async def stop(self) -> None:
        """Name nothing any more. Questions under way end by themselves."""
        self._found = None

    def report(self) -> ProviderReport:
        """How many addresses were named, and which names have none."""
        errors = "; ".join(f"{name.name}: {name.error}" for name in self._asked if name.error)
        detail = f"asked for A and AAAA of {', '.join(self._names)}, and SRV of {SERVICE}.NAME"
        remedy = "Give the hosts A, AAAA or SRV records there; UDP and TCP 53 to the server open."
        if any(name.without_srv for name in self._asked):
            remedy += " For SRV: dnspython in the image."
        return ProviderReport(self.name, len(self._named), errors, detail, remedy)


def _addresses(name: str, port: int) -> list[Endpoint]:
    """The addresses of a name (getaddrinfo(3)), which blocks for as long as resolv.conf says."""
    rows = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    hosts = dict.fromkeys(str(row[4][0]) for row in rows[:MAX_ADDRESSES])
    return [Endpoint(host, port) for host in hosts if leads_to_a_peer(host)]


def _service(name: str) -> Targets:
    """The hosts and ports of a service; ImportError without dnspython, LocalError if none."""
    import dns.exception
    import dns.resolver

    try:
        answer = dns.resolver.resolve(name, "SRV", lifetime=SECONDS, search=True)
    except dns.resolver.NXDOMAIN:
        raise LocalError("no such name") from None
    except dns.resolver.NoAnswer:
        raise LocalError("no such record") from None
    except dns.exception.Timeout:
        raise LocalError("the DNS does not answer") from None
    except (dns.exception.DNSException, OSError, ValueError) as error:
        raise LocalError(str(error)[:200] or type(error).__name__) from None
    records = sorted(answer, key=lambda record: (record.priority, str(record.target)))
    targets = [(str(record.target).rstrip("."), int(record.port)) for record in records]
    sound = dict.fromkeys((name, port) for name, port in targets if name and 0 < port < 65536)
    ttl = float(answer.rrset.ttl) if answer.rrset is not None else 0.0
    return min(ttl, MAX_TTL), tuple(sound)[:MAX_RECORDS]
