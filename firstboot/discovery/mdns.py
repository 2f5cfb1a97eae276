"""Peers on the same link, by multicast DNS (RFC 6762) and DNS-SD (RFC 6763).

Each host announces one service with a random instance name. The records are public: they tell
formations apart by name and by a tag that follows from the token, and reveal nothing. Anyone on
the link can forge them, so all they yield is addresses to try.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from firstboot.discovery.interface import Context, Found, ProviderReport, Stranger
from firstboot.protocol.errors import LocalError
from firstboot.protocol.model import LABEL, Endpoint
from firstboot.protocol.record import dataclass

if TYPE_CHECKING:  # 30 ms to import, so only once there is something to announce
    from zeroconf import RecordUpdate, ServiceInfo, Zeroconf

TYPE = "_firstboot._tcp.local."
VERSION = "1"
MAX_REMEMBERED = 4096  # instances, the oldest forgotten first: a flood must not hide real hosts
MAX_TOLD = 1024  # addresses named between two announcements
MAX_STRANGERS = 64  # likewise
MAX_TXT = 512
MAX_FORMATION = 200
MAX_ASKED = 32  # instances whose records are asked for at one announcement
MAX_KNOWN_ANSWERS = 256
MAX_CACHE_NAMES = 16_384  # in zeroconf's own cache, which old versions do not bound
QUIET_ROUNDS = 3  # announcements that nobody answers, until that is told
SECONDS = 10.0
_PTR, _TXT, _SRV, _A, _AAAA, _IN = 12, 16, 33, 1, 28, 1  # RFC 1035 and RFC 2782, section 3.2.2


@dataclass(frozen=True, slots=True)
class Heard:
    """The records of one instance, as far as they have come."""

    label: str
    txt: bytes | None
    port: int | None
    addresses: tuple[bytes, ...]


class Sieve:
    """Decides which records name a peer. Pure, bounded, and indifferent to what it is fed."""

    def __init__(self, context: Context, own: Endpoint, found: Found, stranger: Stranger) -> None:
        self._context, self._own = context, own
        self._formation = formation_text(context.formation_id)
        self._found, self._stranger = found, stranger
        self._lock = threading.Lock()  # zeroconf's thread takes, the program's asks
        self._told: set[Endpoint] = set()
        self._strangers: set[str] = set()
        self.peers: OrderedDict[str, Endpoint] = OrderedDict()
        self.incomplete: OrderedDict[str, None] = OrderedDict()
        self.hears_itself = False

    def next_round(self) -> None:
        """From now on, whoever is heard again is named again."""
        with self._lock:
            self._told.clear()
            self._strangers.clear()

    def found_so_far(self) -> int:
        """How many different addresses were heard of."""
        with self._lock:
            return len(set(self.peers.values()))

    def take(self, heard: Heard) -> None:
        """Look at an instance whose records have changed or were repeated."""
        with self._lock:
            self._take(heard)

    def _take(self, heard: Heard) -> None:
        label = heard.label
        if label == self._context.boot:
            self.hears_itself = True
            return
        if heard.txt is None or heard.port is None or not heard.addresses:
            _remember(self.incomplete, label, None)
            return
        self.incomplete.pop(label, None)
        text = parse_txt(heard.txt)
        if text.get("v") != VERSION or text.get("f") != self._formation:
            return
        endpoints = [e for raw in heard.addresses[:4] if (e := self._endpoint(raw, heard.port))]
        for endpoint in endpoints:
            if text.get("t") == self._context.tag:
                self._tell(label, endpoint)
            elif endpoint.host not in self._strangers and len(self._strangers) < MAX_STRANGERS:
                self._strangers.add(endpoint.host)
                master = text.get("m", "")
                if LABEL.match(master):
                    self._stranger("admits", f"{master} at {endpoint.host}")
                else:
                    self._stranger("token", endpoint.host)

    def _tell(self, label: str, endpoint: Endpoint) -> None:
        _remember(self.peers, label, endpoint)
        if endpoint not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(endpoint)
            self._found(endpoint)

    def _endpoint(self, raw: bytes, port: int) -> Endpoint | None:
        try:
            address = ipaddress.ip_address(raw)
            # Without a zone, a link-local one is on this host's own link.
            endpoint = Endpoint(str(address), port)
        except ValueError:
            return None
        # Never let a record steer connections at this host itself or at a group of hosts.
        foul = address.is_loopback or address.is_multicast or address.is_unspecified
        return None if foul or endpoint == self._own else endpoint


def _remember(memory: OrderedDict[str, Any], key: str, item: Any) -> None:
    memory[key] = item
    memory.move_to_end(key)
    if len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)


def formation_text(formation_id: str) -> str:
    """How a formation is named in TXT, where a string has at most 255 bytes (RFC 1035, 3.3)."""
    if len(formation_id.encode()) <= MAX_FORMATION:
        return formation_id
    return hashlib.sha256(formation_id.encode()).hexdigest()


def parse_txt(data: bytes) -> dict[str, str]:
    """The key=value pairs of TXT data (RFC 6763, section 6.4): the first of a key counts."""
    found: dict[str, str] = {}
    at = 0
    data = data[:MAX_TXT]
    while at < len(data):
        string = data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
        key, _, value = string.decode(errors="replace").partition("=")
        found.setdefault(key.lower(), value)
    return found


class Mdns:
    """Announces this host and hears others on the link of its address. No options."""

    name = "mdns"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        del options
        self._context = context
        self._responder: Responder | None = None
        self._sieve: Sieve | None = None
        self._own: Endpoint | None = None
        self._error = ""
        self._rounds = 0
        self._stopped = False

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Open the sockets and announce; takes milliseconds, as no probing is needed."""
        loop = asyncio.get_running_loop()

        # zeroconf has a thread and loop of its own: whatever a datagram makes it do wrong ends
        # there, and a flood of them cannot keep this host's loop busy.
        def to_loop(call: Callable[..., None]) -> Callable[..., None]:
            def deliver(*arguments: Any) -> None:
                if not self._stopped:
                    call(*arguments)

            def hand_over(*arguments: Any) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(deliver, *arguments)

            return hand_over

        self._own = endpoint
        self._sieve = Sieve(self._context, endpoint, to_loop(found), to_loop(stranger))
        if not ipaddress.ip_address(endpoint.host.partition("%")[0]).is_loopback:
            await self._open()

    async def announce(self) -> None:
        """Send this host's records again, and ask who else is there.

        zeroconf alone stops asking after some 14 s, so hosts whose first multicasts were lost
        would never meet.
        """
        if self._sieve is None or self._own is None or self._stopped:
            return
        if self._responder is not None and self._responder.overgrown:
            await self._close()
        if self._responder is None:
            await self._open()
            return
        self._rounds += 1
        await self._do(self._responder.speak)

    async def stop(self) -> None:
        """Be silent. No goodbye is said: it would hide this host from those that are slow."""
        self._stopped = True
        await self._close()

    def report(self) -> ProviderReport:
        """How many hosts were found, and whether multicast works at all on this one."""
        found = self._sieve.found_so_far() if self._sieve else 0
        host = self._own.host if self._own else ""
        group = "ff02::fb" if ":" in host else "224.0.0.251"
        error, remedy = self._error, ""
        if not error and self._rounds > 1 and self._sieve and not self._sieve.hears_itself:
            error = "this host does not hear its own multicast; does a firewall block UDP 5353?"
            remedy = f"Open UDP 5353 to {group} in this host's firewall."
        elif not error and not found and self._rounds >= QUIET_ROUNDS and self._context.lacks():
            error = "nobody answers"
            remedy = (
                f"Open UDP 5353 to {group} between the hosts, on one link; most clouds carry no"
                " multicast: list another provider there."
            )
        return ProviderReport(self.name, found, error, f"asked {group} from {host}", remedy)

    async def _open(self) -> None:
        assert self._sieve is not None and self._own is not None
        try:
            self._responder = await asyncio.to_thread(
                Responder, self._context, self._own, self._sieve
            )
        except LocalError as error:
            self._error = str(error)
            return
        self._error = ""
        if self._stopped:  # while the sockets were being opened
            await self._close()
            return
        await self._do(self._responder.begin)

    async def _close(self) -> None:
        responder, self._responder = self._responder, None
        if responder is not None:
            await asyncio.to_thread(responder.close)

    async def _do(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        assert self._responder is not None
        try:
            await asyncio.wait_for(self._responder.run(work), SECONDS)
        except (TimeoutError, LocalError) as error:
            self._error = str(error) or "multicast DNS does not answer"


class Responder:
    """zeroconf, bound to the interface of one address, in a thread of its own."""

    def __init__(self, context: Context, own: Endpoint, sieve: Sieve) -> None:
        """Open the sockets; blocks for some 20 ms. LocalError if that fails."""
        load()
        import zeroconf

        # Whatever strangers send, zeroconf must not fill this host's journal with it.
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
        self._sieve = sieve
        self._info = _service(context, own)
        self._announcing: asyncio.Future[Any] | None = None
        try:
            self._zeroconf: Zeroconf = zeroconf.Zeroconf(interfaces=[own.host.partition("%")[0]])
        except (OSError, RuntimeError, zeroconf.Error) as error:
            raise LocalError(f"multicast DNS cannot use {own.host}: {error}") from None
        assert self._zeroconf.loop is not None
        self._loop = self._zeroconf.loop
        self._loop.call_soon_threadsafe(self._loop.set_exception_handler, _ignore)
        self._errors = zeroconf.Error

    @property
    def overgrown(self) -> bool:
        """Whether strangers have filled the cache."""
        return len(self._zeroconf.cache.cache) > MAX_CACHE_NAMES

    async def run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Do `work` on zeroconf's loop; called on the program's."""
        try:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work(), self._loop))
        except (OSError, RuntimeError, self._errors) as error:
            raise LocalError(f"multicast DNS failed: {error}") from None

    async def begin(self) -> None:
        """Register the service, which announces it at once, and ask for others."""
        self._zeroconf.async_add_listener(_listener(self._take), None)
        # The instance name is random, so there is nothing to probe for (RFC 6762, section 8.1).
        self._announcing = asyncio.ensure_future(
            await self._zeroconf.async_register_service(self._info, cooperating_responders=True)
        )
        self._ask()

    async def speak(self) -> None:
        """Announce again and ask again."""
        self._sieve.next_round()
        self._zeroconf.async_send(self._zeroconf.generate_service_broadcast(self._info, None))
        self._ask()

    def close(self) -> None:
        """Close the sockets and end the thread, without a goodbye; called on another thread."""
        done = threading.Event()

        def forget() -> None:
            try:
                if self._announcing is not None:
                    self._announcing.cancel()  # or close() waits for its repetitions, 0.3 s
                self._zeroconf.registry.async_remove(self._info)  # or close() says goodbye
            finally:
                done.set()

        self._loop.call_soon_threadsafe(forget)
        done.wait(SECONDS)
        self._zeroconf.close()

    def _ask(self) -> None:
        # At the top level in every version, though none lists them in __all__.
        from zeroconf import DNSOutgoing, DNSPointer, DNSQuestion  # type: ignore[attr-defined]

        out = DNSOutgoing(0)  # a query
        out.add_question(DNSQuestion(TYPE, _PTR, _IN))
        for label in list(self._sieve.incomplete)[-MAX_ASKED:]:
            for kind in (_SRV, _TXT):
                out.add_question(DNSQuestion(f"{label}.{TYPE}", kind, _IN))
            for kind in (_A, _AAAA):
                out.add_question(DNSQuestion(f"{label}.local.", kind, _IN))
        # Known answers need not be sent again by everybody (RFC 6762, section 7.1).
        for label in list(self._sieve.peers)[-MAX_KNOWN_ANSWERS:]:
            known = self._zeroconf.cache.current_entry_with_name_and_alias(TYPE, f"{label}.{TYPE}")
            if isinstance(known, DNSPointer):
                out.add_answer_at_time(known, 0)
        self._zeroconf.async_send(out)

    def _take(self, labels: Iterable[str]) -> None:
        cache = self._zeroconf.cache
        for label in labels:
            txt: bytes | None = None
            port: int | None = None
            for record in cache.entries_with_name(f"{label}.{TYPE}"):
                txt = getattr(record, "text", txt)
                port = getattr(record, "port", port)
            addresses = (
                getattr(record, "address", None)
                for record in cache.entries_with_name(f"{label}.local.")
            )
            self._sieve.take(Heard(label, txt, port, tuple(a for a in addresses if a)))


def load() -> None:
    """Import zeroconf, which takes some 10 ms; ahead of its use if there is a moment."""
    with _no_search_for_libc():
        import zeroconf  # noqa: F401


@contextmanager
def _no_search_for_libc() -> Iterator[None]:
    """On import, ifaddr starts ldconfig to find libc, which is this very process: 4 ms."""
    import ctypes.util

    before = ctypes.util.find_library
    ctypes.util.find_library = lambda name: None if name == "c" else before(name)
    try:
        yield
    finally:
        ctypes.util.find_library = before


def _service(context: Context, own: Endpoint) -> ServiceInfo:
    from zeroconf import ServiceInfo

    address = ipaddress.ip_address(own.host.partition("%")[0])
    said = {"v": VERSION, "f": formation_text(context.formation_id), "t": context.tag}
    if context.admits:
        said["m"] = context.admits  # whom to ask for a one-time token; a hint, like all of this
    return ServiceInfo(
        TYPE,
        f"{context.boot}.{TYPE}",
        addresses=[address.packed],
        port=own.port,
        properties=said,
        server=f"{context.boot}.local.",
    )


def _listener(take: Callable[[Iterable[str]], None]) -> Any:
    """A zeroconf listener that tells which of our instances' records were in a datagram."""
    from zeroconf import RecordUpdateListener

    class Listener(RecordUpdateListener):
        def __init__(self) -> None:
            self._touched: set[str] = set()

        def async_update_records(
            self, zc: Zeroconf, now: float, records: list[RecordUpdate]
        ) -> None:
            del zc, now
            for update in records:
                self._touched.add(_label(update.new))

        def async_update_records_complete(self) -> None:
            # Only now are they in the cache, where records of earlier datagrams are as well.
            touched, self._touched = self._touched, set()
            take(touched - {""})

    return Listener()


def _label(record: Any) -> str:
    """The label of the instance that a record belongs to, or an empty string.

    An instance and its host have the same label: ``x._firstboot._tcp.local.`` is on ``x.local.``.
    """
    name = str(record.alias if record.type == _PTR else record.name).lower()
    suffix = "local." if record.type in (_A, _AAAA) else TYPE
    label, dot, rest = name.partition(".")
    return label if dot and rest == suffix and len(label) <= 63 else ""


def _ignore(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a stranger's datagram broke in zeroconf is dropped like the datagram."""
    del loop, context
