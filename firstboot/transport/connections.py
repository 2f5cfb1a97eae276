"""Listening, dialling, and the connections that stand."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

from firstboot.protocol import events, messages
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.model import Channel, Endpoint
from firstboot.transport.strangers import Bucket, Limits, Strangers
from firstboot.transport.tunnel import CHUNK, Credentials, Tunnel, make_context, unknown_issuer

SELECTORS = {Channel.BOOTSTRAP: b"FB1-BOOT", Channel.CLUSTER: b"FB1-CLUS"}
_SELECTED = {selector: channel for channel, selector in SELECTORS.items()}


@dataclass(eq=False, slots=True)
class _Gate:
    """One open channel: its TLS contexts, and every tunnel that came through."""

    channel: Channel
    credentials: Credentials
    identify: Callable[[bytes], str]
    server: ssl.SSLContext
    client: ssl.SSLContext
    tunnels: set[Tunnel] = field(default_factory=set)
    open: bool = True


class Transport:
    """Listens, dials, sends and receives; what happens it tells to `inbox`.

    All methods are called on the loop, and `inbox` is, too: it must not block.
    """

    def __init__(self, inbox: Callable[[events.Event], None], limits: Limits | None = None) -> None:
        self._inbox = inbox
        self._limits = limits or Limits()
        self._server: asyncio.Server | None = None
        self._gates: dict[Channel, _Gate] = {}
        self._connections: dict[tuple[str, Channel], list[Tunnel]] = {}  # the newest last
        self._dials: set[tuple[Endpoint, Channel]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = Strangers(self._limits, self._tell)
        self._closing = False
        self._encoded: tuple[messages.Message | None, bytes] = None, b""
        self.zone = ""  # the interface on which link-local addresses without one are (RFC 4007)

    async def start(self, host: str, port: int) -> int:
        """Listen there ("" for every address, 0 for any port); the port. LocalError if taken."""
        dual = host in ("", "::") and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
        try:
            listener = socket.create_server((host, port), family=family, dualstack_ipv6=dual)
        except OSError as error:
            raise LocalError(f"cannot listen on port {port}: {error.strerror}") from None
        # What is accepted inherits it; asyncio sets it on connections that it dials, and no others.
        # A second small frame would wait for the peer's delayed ACK, 40 ms (RFC 1122, 4.2.3.2, .4).
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, limit=CHUNK, backlog=256
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
                server=make_context(ssl.PROTOCOL_TLS_SERVER, channel, credentials),
                client=make_context(ssl.PROTOCOL_TLS_CLIENT, channel, credentials),
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
            if message is not self._encoded[0]:  # a Hello goes to everybody
                self._encoded = message, messages.encode(message)
            tunnel.send(self._encoded[1])
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
        tunnel = Tunnel(reader, writer)
        if self._closing or not self._strangers.admit(tunnel, _now()):
            tunnel.abort()
            return
        self._spawn(self._welcome(tunnel))

    async def _welcome(self, tunnel: Tunnel) -> None:
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
        tunnel: Tunnel | None = None
        try:
            async with asyncio.timeout(self._limits.handshake):
                tunnel = await _reach(endpoint, source_host, self.zone)
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

    async def _enter(self, gate: _Gate, tunnel: Tunnel, *, server_side: bool) -> str:
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

    async def _leave(self, gate: _Gate | None, tunnel: Tunnel) -> None:
        if gate is not None:
            gate.tunnels.discard(tunnel)
        await tunnel.close()

    async def _converse(
        self, gate: _Gate, tunnel: Tunnel, node_id: str, endpoint: Endpoint | None
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

    async def _receive(self, node_id: str, channel: Channel, tunnel: Tunnel) -> None:
        bucket = Bucket(self._limits.messages, self._limits.messages_burst)
        while True:
            content = await tunnel.receive()
            if not bucket.take(_now()):
                raise RemoteError("too many messages")
            message = messages.decode(content)
            self._tell(events.MessageReceived(node_id, channel, message))

    def _drop(self, key: tuple[str, Channel], tunnel: Tunnel) -> None:
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


async def _reach(endpoint: Endpoint, source_host: str | None, zone: str) -> Tunnel:
    same_family = source_host is not None and (":" in source_host) == (":" in endpoint.host)
    reader, writer = await asyncio.open_connection(
        _scoped(endpoint.host, zone),
        endpoint.port,
        local_addr=(_scoped(source_host, zone), 0) if source_host and same_family else None,
        flags=socket.AI_NUMERICHOST,  # what a stranger announced must not become a DNS query
        limit=CHUNK,
    )
    return Tunnel(reader, writer)


def _scoped(host: str, zone: str) -> str:
    bare = zone and "%" not in host and ":" in host
    return f"{host}%{zone}" if bare and ipaddress.ip_address(host).is_link_local else host


def _failure(error: Exception, gate: _Gate, *, reached: bool) -> str:
    """Why a dial failed, as `Transport.connect` lists it."""
    if isinstance(error, ssl.SSLError):
        other = gate.channel is Channel.BOOTSTRAP and unknown_issuer(error)
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
        return "token" if bootstrap and unknown_issuer(error) else "garbage"
    if isinstance(error, TimeoutError | RemoteError):
        return "garbage"
    # Who hangs up in the middle may be a peer that restarts; who wrote half a word is not.
    return "garbage" if isinstance(error, asyncio.IncompleteReadError) and error.partial else ""
