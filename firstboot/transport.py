"""The formation channel: protocol messages over mutually authenticated TLS 1.3.

One TCP port serves both channels. The client first sends eight plain bytes that choose the
channel; then both sides do a TLS handshake with certificates required of each. The server ends
it with an empty frame: in TLS 1.3 a client is done before the server has judged the client's
certificate (RFC 8446, section 4.4.4), so only that frame tells the client that it is welcome.
Then either side sends frames: a length (4 bytes, big-endian) and one encoded message.

TLS runs in memory buffers on a plain stream, not in asyncio's own TLS, because that one drops
the alert of a failed handshake: a host with another token would look like a broken network.

Everything that happens goes into one inbox as events. Nothing is logged, and whatever a stranger
can cause is bounded in size, time and number (see `Limits`).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from firstboot.protocol import events, messages
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.model import Channel, Endpoint

SELECTORS = {Channel.BOOTSTRAP: b"FB1-BOOT", Channel.CLUSTER: b"FB1-CLUS"}
_SELECTED = {selector: channel for channel, selector in SELECTORS.items()}
# X509_V_FLAG_NO_CHECK_TIME (openssl x509_vfy.h); Python's ssl has no name for it.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
# How OpenSSL words "your certificate is not from an authority I know", on either side: the error
# code X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY, and the alert that the other side then reads.
_UNKNOWN_ISSUER = 20
_UNKNOWN_ISSUER_ALERT = "TLSV1_ALERT_UNKNOWN_CA"
_CHUNK = 64 * 1024
_MAX_SOURCES = 1024  # addresses remembered for the limits per source
T = TypeVar("T")


class Credentials(Protocol):
    """What this host shows on a channel and whom it trusts there, all PEM."""

    @property
    def chain(self) -> bytes:
        """This host's certificate."""

    @property
    def key(self) -> bytes:
        """Its private key."""

    @property
    def authority(self) -> bytes:
        """The one CA that peers must be certified by."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of the channel. Times are seconds, sizes bytes, rates per second."""

    handshake: float = 5.0  # a dial, or a stranger's selector and handshake
    pending: int = 256  # handshakes of strangers at a time; beyond, the oldest gives way
    pending_per_source: int = 8  # the same for one IPv4 address or IPv6 /64
    accepts: float = 50.0  # connections per source,
    accepts_burst: int = 200  # after that many at once
    dials: int = 256
    connections: int = 3  # per peer and channel; beyond, the oldest is closed
    unsent: int = 1024 * 1024  # a peer that reads slower than that is cut off
    messages: float = 200.0  # per connection,
    messages_burst: int = 1000  # after that many at once
    reports: float = 10.0  # StrangerSeen events in all; per source and kind it is one a second
    silence: float = 15.0  # a peer whose kernel does not acknowledge for so long is gone


class _Bucket:
    """A token bucket: `burst` at once, then `rate` per second."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate, self._burst = rate, burst
        self._level, self._at = burst, 0.0

    def take(self, now: float) -> bool:
        self._level = min(self._burst, self._level + (now - self._at) * self._rate)
        self._at = now
        if self._level < 1:
            return False
        self._level -= 1
        return True


class _Tunnel:
    """TLS over a plain asyncio stream, and the frames in it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls: ssl.SSLObject | None = None
        self._plain = bytearray()
        self._closed = False
        self.remote = _remote(writer)

    async def handshake(
        self, context: ssl.SSLContext, *, server_side: bool, first: bytes = b""
    ) -> bytes:
        """Do the handshake, after sending `first` in the clear; the peer's certificate (DER).

        Raises ssl.SSLError, or EOFError where the peer just closes.
        """
        self._outgoing.write(first)
        tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._tls = tls
        await self._complete(tls.do_handshake)
        if tls.selected_alpn_protocol() is None:
            raise RemoteError("the peer speaks another protocol")
        return tls.getpeercert(binary_form=True) or b""

    async def selector(self) -> bytes:
        """The eight plain bytes a client begins with. EOFError if it closes instead."""
        return await self._reader.readexactly(8)

    async def receive(self) -> bytes:
        """One frame's content; RemoteError if it is too long, EOFError at the end."""
        size = int.from_bytes(await self._exactly(4), "big")
        if size > messages.MAX_BYTES:
            raise RemoteError(f"a frame of {size} bytes")
        return await self._exactly(size)

    def send(self, content: bytes) -> None:
        """Queue one frame."""
        if self._tls is None or len(content) > messages.MAX_BYTES:
            raise LocalError(f"a frame of {len(content)} bytes cannot be sent")
        left = memoryview(len(content).to_bytes(4, "big") + content)
        while left:
            left = left[self._tls.write(left) :]
        self._flush()

    def watch(self, silence: float) -> None:
        """Notice within about `silence` seconds that the peer is gone (tcp(7))."""
        sock = self._writer.get_extra_info("socket")
        interval = max(1, int(silence / 3))
        with suppress(OSError):  # gone already; reading will tell
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence * 1000))

    @property
    def unsent(self) -> int:
        """Bytes that wait for the peer to read."""
        return self._writer.transport.get_write_buffer_size()

    def abort(self) -> None:
        """Close at once, whatever is unsent; reading ends, also of what had arrived before."""
        self._closed = True
        self._writer.transport.abort()

    async def close(self) -> None:
        """Close, with what the kernel took (an alert, say) still delivered."""
        if self.unsent:
            self.abort()
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _exactly(self, size: int) -> bytes:
        assert self._tls is not None
        while len(self._plain) < size:
            data = await self._complete(partial(self._tls.read, _CHUNK))
            if not data:
                raise EOFError
            self._plain += data
        if self._closed:
            raise EOFError
        data = bytes(self._plain[:size])
        del self._plain[:size]
        return data

    async def _complete(self, operation: Callable[[], T]) -> T:
        """Feed the operation from the network until it has what it needs."""
        while True:
            try:
                return operation()
            except ssl.SSLWantReadError:
                pass
            finally:
                self._flush()  # also the alert that tells the peer why its handshake failed
            data = await self._reader.read(_CHUNK)
            if not data:
                raise EOFError
            self._incoming.write(data)

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self._writer.is_closing():
            self._writer.write(data)


@dataclass(eq=False, slots=True)
class _Gate:
    """One open channel: its TLS contexts, and every tunnel that came through."""

    channel: Channel
    credentials: Credentials
    identify: Callable[[bytes], str]
    server: ssl.SSLContext
    client: ssl.SSLContext
    tunnels: set[_Tunnel] = field(default_factory=set)
    open: bool = True


@dataclass(eq=False, slots=True)
class _Source:
    """What one address is up to."""

    bucket: _Bucket
    pending: list[_Tunnel] = field(default_factory=list)


class _Strangers:
    """Bounds what addresses can do before they are peers, and how much is told about them."""

    def __init__(self, limits: Limits, tell: Callable[[events.Event], None]) -> None:
        self._limits, self._tell = limits, tell
        self._sources: dict[str, _Source] = {}  # the least recently seen first
        self._pending: dict[_Tunnel, _Source] = {}  # the oldest first
        self._told: dict[tuple[str, str], float] = {}
        self._reports: dict[str, _Bucket] = {}

    def admit(self, tunnel: _Tunnel, now: float) -> bool:
        """Whether this connection may try its handshake.

        When there is no room the oldest gives way, not the newest: an honest handshake takes
        milliseconds, so whoever holds a place for long is the one to lose it.
        """
        source = self._source(tunnel.remote)
        if not source.bucket.take(now):
            self.report("flood", tunnel.remote, now)
            return False
        source.pending.append(tunnel)
        self._pending[tunnel] = source
        victim: _Tunnel | None = None
        if len(source.pending) > self._limits.pending_per_source:
            victim = source.pending[0]
        elif len(self._pending) > self._limits.pending:
            victim = next(iter(self._pending))
        if victim is not None:
            self.leave(victim)
            victim.abort()
            self.report("flood", victim.remote, now)
        return True

    def leave(self, tunnel: _Tunnel) -> None:
        """That connection is no stranger's any more, or gone. Harmless when repeated."""
        source = self._pending.pop(tunnel, None)
        if source is not None:
            source.pending.remove(tunnel)

    def report(self, kind: str, remote: str, now: float) -> None:
        """Tell of a stranger, unless the same was told just now or too much is told already."""
        if now < self._told.get((kind, remote), 0.0) + 1:
            return
        if len(self._told) >= _MAX_SOURCES:
            self._told.clear()
        rate = self._limits.reports
        if self._reports.setdefault(kind, _Bucket(rate, rate)).take(now):
            self._told[kind, remote] = now
            self._tell(events.StrangerSeen(kind, remote))

    async def expel(self) -> None:
        """Close whatever is still pending."""
        for tunnel in list(self._pending):
            tunnel.abort()
            await tunnel.close()

    def _source(self, remote: str) -> _Source:
        source = self._sources.pop(remote, None)
        if source is None:
            source = _Source(_Bucket(self._limits.accepts, self._limits.accepts_burst))
        if len(self._sources) >= _MAX_SOURCES:
            idle = (name for name, known in self._sources.items() if not known.pending)
            self._sources.pop(next(idle, ""), None)
        self._sources[remote] = source
        return source


class Transport:
    """Listens, dials, sends and receives; what happens it tells to `inbox`.

    All methods are called on the loop, and `inbox` is, too: it must not block.
    """

    def __init__(self, inbox: Callable[[events.Event], None], limits: Limits | None = None) -> None:
        self._inbox = inbox
        self._limits = limits or Limits()
        self._server: asyncio.Server | None = None
        self._gates: dict[Channel, _Gate] = {}
        self._connections: dict[tuple[str, Channel], list[_Tunnel]] = {}  # the newest last
        self._dials: set[tuple[Endpoint, Channel]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = _Strangers(self._limits, self._tell)
        self._closing = False

    async def start(self, host: str, port: int) -> int:
        """Listen there ("" for every address, 0 for any port); the port. LocalError if taken."""
        dual = host in ("", "::") and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            raise LocalError(f"cannot listen on port {port}: {error.strerror}") from None
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, limit=_CHUNK, backlog=256
        )
        bound: int = listener.getsockname()[1]
        return bound

    def set_channel(
        self,
        channel: Channel,
        credentials: Credentials | None,
        identify: Callable[[bytes], str] | None = None,
    ) -> None:
        """Open a channel, or close it with None. Other credentials close what the old ones made.

        `identify` tells a peer's node id from its certificate (DER), or raises RemoteError.
        LocalError if the credentials do not work.
        """
        old = self._gates.get(channel)
        if old is not None and old.credentials == credentials:
            return
        if old is not None:
            del self._gates[channel]
            old.open = False
            for key in [k for k in self._connections if k[1] is channel]:
                self._drop_all(key)
            for tunnel in old.tunnels:
                tunnel.abort()
        if credentials is not None and identify is not None:
            self._gates[channel] = _Gate(
                channel,
                credentials,
                identify,
                server=_context(ssl.PROTOCOL_TLS_SERVER, channel, credentials),
                client=_context(ssl.PROTOCOL_TLS_CLIENT, channel, credentials),
            )

    def connect(self, endpoint: Endpoint, channel: Channel, source_host: str | None = None) -> None:
        """Dial, from `source_host` if given; Connected or ConnectFailed follows.

        Nothing happens if the same dial is under way. The reasons of ConnectFailed: ``refused``,
        ``unreachable``, ``timeout``, ``token`` (another token, or another formation),
        ``closed`` (either side's channel is closed), ``tls`` (no peer of this protocol, or a
        certificate that is not good for it), ``busy`` (too many dials at a time).
        """
        if self._closing or (endpoint, channel) in self._dials:
            return
        gate = self._gates.get(channel)
        if gate is None or len(self._dials) >= self._limits.dials:
            reason = "closed" if gate is None else "busy"
            self._tell(events.ConnectFailed(endpoint, channel, reason))
            return
        self._dials.add((endpoint, channel))
        self._spawn(self._dial(gate, endpoint, source_host))

    def send(self, node_id: str, channel: Channel, message: messages.Message) -> None:
        """Send on the newest connection; without one, or if the peer does not read, drop it."""
        key = (node_id, channel)
        tunnel = next(reversed(self._connections.get(key, [])), None)
        if tunnel is None:
            return
        try:
            tunnel.send(messages.encode(message))
        except ssl.SSLError:  # the peer has ended TLS, and reading is about to tell
            self._drop(key, tunnel)
        if tunnel.unsent > self._limits.unsent:
            self._drop(key, tunnel)

    def disconnect(self, node_id: str) -> None:
        """Close every connection to that host."""
        for channel in Channel:
            self._drop_all((node_id, channel))

    async def close(self) -> None:
        """Stop everything; no event follows."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._strangers.expel()  # a task cancelled before its first step closes nothing

    # ------------------------------------------------------------ connections

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tunnel = _Tunnel(reader, writer)
        if self._closing or not self._strangers.admit(tunnel, _now()):
            tunnel.abort()
            return
        self._spawn(self._welcome(tunnel))

    async def _welcome(self, tunnel: _Tunnel) -> None:
        """An accepted connection, from its first byte to its end."""
        gate: _Gate | None = None
        try:
            async with asyncio.timeout(self._limits.handshake):
                gate = self._gates.get(_channel(await tunnel.selector()))
                if gate is not None:
                    node_id = await self._enter(gate, tunnel, server_side=True)
        except (OSError, EOFError, RemoteError) as error:
            kind = _stranger(error, gate)
            if kind:
                self._strangers.report(kind, tunnel.remote, _now())
        else:
            self._strangers.leave(tunnel)
            if gate is not None:
                await self._converse(gate, tunnel, node_id, None)
        finally:
            self._strangers.leave(tunnel)
            await self._leave(gate, tunnel)

    async def _dial(self, gate: _Gate, endpoint: Endpoint, source_host: str | None) -> None:
        """A dialled connection, from the first packet to its end."""
        tunnel: _Tunnel | None = None
        try:
            async with asyncio.timeout(self._limits.handshake):
                tunnel = await _reach(endpoint, source_host)
                node_id = await self._enter(gate, tunnel, server_side=False)
        except (OSError, EOFError, RemoteError) as error:
            self._dials.discard((endpoint, gate.channel))
            reason = _failure(error, gate, reached=tunnel is not None)
            self._tell(events.ConnectFailed(endpoint, gate.channel, reason))
        else:
            self._dials.discard((endpoint, gate.channel))
            await self._converse(gate, tunnel, node_id, endpoint)
        finally:
            if tunnel is not None:
                await self._leave(gate, tunnel)

    async def _enter(self, gate: _Gate, tunnel: _Tunnel, *, server_side: bool) -> str:
        """Pass a gate; the peer's node id."""
        if not gate.open:
            raise EOFError
        gate.tunnels.add(tunnel)
        tunnel.watch(self._limits.silence)
        if server_side:
            certificate = await tunnel.handshake(gate.server, server_side=True)
            node_id = gate.identify(certificate)
            tunnel.send(b"")
        else:
            first = SELECTORS[gate.channel]
            certificate = await tunnel.handshake(gate.client, server_side=False, first=first)
            node_id = gate.identify(certificate)
            if await tunnel.receive():
                raise RemoteError("the peer did not begin with an empty frame")
        if not gate.open:
            raise EOFError
        return node_id

    async def _leave(self, gate: _Gate | None, tunnel: _Tunnel) -> None:
        if gate is not None:
            gate.tunnels.discard(tunnel)
        await tunnel.close()

    async def _converse(
        self, gate: _Gate, tunnel: _Tunnel, node_id: str, endpoint: Endpoint | None
    ) -> None:
        """Be connected to a peer until either side ends it."""
        key = (node_id, gate.channel)
        connections = self._connections.setdefault(key, [])
        connections.append(tunnel)
        if len(connections) > self._limits.connections:
            self._drop(key, connections[0])
        self._tell(events.Connected(node_id, gate.channel, endpoint, tunnel.remote))
        try:
            await self._receive(*key, tunnel)
        except RemoteError as error:
            self._tell(events.PeerMisbehaved(node_id, str(error)))
        except (OSError, EOFError):
            pass  # gone
        finally:
            self._drop(key, tunnel)

    async def _receive(self, node_id: str, channel: Channel, tunnel: _Tunnel) -> None:
        bucket = _Bucket(self._limits.messages, self._limits.messages_burst)
        while True:
            content = await tunnel.receive()
            if not bucket.take(_now()):
                raise RemoteError("too many messages")
            message = messages.decode(content)
            self._tell(events.MessageReceived(node_id, channel, message))

    def _drop(self, key: tuple[str, Channel], tunnel: _Tunnel) -> None:
        """Close one connection; Disconnected if it was the last. Harmless when repeated."""
        tunnel.abort()
        connections = self._connections.get(key, [])
        if tunnel in connections:
            connections.remove(tunnel)
            if not connections:
                del self._connections[key]
                self._tell(events.Disconnected(*key))

    def _drop_all(self, key: tuple[str, Channel]) -> None:
        for tunnel in list(self._connections.get(key, [])):
            self._drop(key, tunnel)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, event: events.Event) -> None:
        if not self._closing:
            self._inbox(event)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _channel(selector: bytes) -> Channel:
    if selector not in _SELECTED:
        raise RemoteError("no channel of this protocol")
    return _SELECTED[selector]


def _remote(writer: asyncio.StreamWriter) -> str:
    """The peer's IP address; one that IPv6 maps is written as the IPv4 address it is."""
    peer = writer.get_extra_info("peername")
    host = peer[0] if peer else ""  # None once the peer has hung up
    with suppress(ValueError):
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
        host = str(mapped) if mapped else host
    return str(host)


async def _reach(endpoint: Endpoint, source_host: str | None) -> _Tunnel:
    same_family = source_host is not None and (":" in source_host) == (":" in endpoint.host)
    reader, writer = await asyncio.open_connection(
        endpoint.host,
        endpoint.port,
        local_addr=(source_host, 0) if same_family else None,
        flags=socket.AI_NUMERICHOST,  # what a stranger announced must not become a DNS query
        limit=_CHUNK,
    )
    return _Tunnel(reader, writer)


def _context(protocol: int, channel: Channel, credentials: Credentials) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # a peer is its node id, wherever it is
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # every connection proves its key anew
    context.set_alpn_protocols([f"firstboot-{channel}/1"])
    if channel is Channel.BOOTSTRAP:
        context.verify_flags |= _NO_CHECK_TIME  # clocks may be unset
    try:
        context.load_verify_locations(cadata=credentials.authority.decode())
        with _in_memory(credentials.chain + b"\n" + credentials.key) as path:
            context.load_cert_chain(path)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "not PEM"
        raise LocalError(f"the {channel} credentials do not work: {reason}") from None
    return context


@contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """A path to read `content` from, once: ssl takes paths only, and keys stay off the disk."""
    number = os.memfd_create("firstboot")
    try:
        os.write(number, content)
        yield f"/proc/self/fd/{number}"
    finally:
        os.close(number)


def _unknown_issuer(error: ssl.SSLError) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_code == _UNKNOWN_ISSUER
    return error.reason == _UNKNOWN_ISSUER_ALERT


def _failure(error: Exception, gate: _Gate, *, reached: bool) -> str:
    """Why a dial failed, as `Transport.connect` lists it."""
    if isinstance(error, ssl.SSLError):
        other = gate.channel is Channel.BOOTSTRAP and _unknown_issuer(error)
        return "token" if other else "tls"
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, RemoteError):
        return "tls"
    if reached:
        return "closed"
    return "refused" if isinstance(error, ConnectionRefusedError) else "unreachable"


def _stranger(error: Exception, gate: _Gate | None) -> str:
    """What kind of stranger an accepted connection's end shows, or nothing."""
    if isinstance(error, ssl.SSLError):
        bootstrap = gate is not None and gate.channel is Channel.BOOTSTRAP
        return "token" if bootstrap and _unknown_issuer(error) else "garbage"
    if isinstance(error, TimeoutError | RemoteError):
        return "garbage"
    # Who hangs up in the middle may be a peer that restarts; who wrote half a word is not.
    return "garbage" if isinstance(error, asyncio.IncompleteReadError) and error.partial else ""
