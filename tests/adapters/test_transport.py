"""The channel over loopback, with real handshakes: who gets in, who does not, what is told."""

from __future__ import annotations

import asyncio
import functools
import gc
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import pytest

from firstboot import pki
from firstboot.protocol import events, messages
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.model import Channel, Endpoint, Member, Profile
from firstboot.transport import SELECTORS, Limits, Transport
from firstboot.transport.strangers import Strangers
from firstboot.transport.tunnel import Tunnel, make_context

P = ParamSpec("P")
E = TypeVar("E")
PATIENCE = 20.0  # seconds until a test gives up; nothing waits for it when all is well
HASTE = Limits(handshake=0.3)
DAY = 86_400
BOOTSTRAP, CLUSTER = Channel.BOOTSTRAP, Channel.CLUSTER
IDENTIFY = {BOOTSTRAP: pki.node_id_of_certificate, CLUSTER: pki.cluster_node_id}
CLIENT, SERVER = ssl.PROTOCOL_TLS_CLIENT, ssl.PROTOCOL_TLS_SERVER
LONG_AGO = (datetime(1999, 1, 1, tzinfo=UTC), datetime(2000, 1, 1, tzinfo=UTC))
FAR_AHEAD = (datetime(2099, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC))

AUTHORITY = pki.make_authority("blue", 1)
FOREIGN = pki.make_authority("blue", 1)


def on_loop(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test, and see that it leaves no task behind."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def all_of_it() -> None:
            async with asyncio.timeout(PATIENCE * 3):
                await test(*args, **kwargs)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, left

        asyncio.run(all_of_it())

    return run


@pytest.fixture(autouse=True)
def everything_is_closed() -> Iterator[None]:
    yield
    gc.collect()  # so that a socket left open is this test's warning, not the next one's


def token_credentials(key: bytes, token: str = "t1", formation: str = "blue") -> pki.Credentials:
    return pki.derive(token, formation).credentials(key)


def cluster_credentials(
    key: bytes,
    profile: Profile = Profile.PEER,
    authority: pki.Authority = AUTHORITY,
    now: float | None = None,
) -> pki.Credentials:
    member = Member(pki.node_id(key), "node-1", "127.0.0.1")
    csr = pki.make_request(key, member.node_id)
    der = pki.sign(authority, csr, member, profile, "firstboot:node", now)
    return pki.Credentials(pki.to_pem(der), key, pki.to_pem(authority.certificate))


class Host:
    """A transport with its inbox, on a port of 127.0.0.1."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.key = pki.make_key()
        self.node_id = pki.node_id(self.key)
        self.inbox: asyncio.Queue[events.Event] = asyncio.Queue()
        self.transport = Transport(self.inbox.put_nowait, limits)
        self.endpoint = Endpoint("127.0.0.1", 1)

    def open(self, channel: Channel, credentials: pki.Credentials) -> None:
        self.transport.set_channel(channel, credentials, IDENTIFY[channel])

    def dial(self, other: Host | Endpoint, channel: Channel = BOOTSTRAP) -> None:
        endpoint = other if isinstance(other, Endpoint) else other.endpoint
        self.transport.connect(endpoint, channel)

    def send(self, other: Host, message: messages.Message, channel: Channel = BOOTSTRAP) -> None:
        self.transport.send(other.node_id, channel, message)

    async def next(self, kind: type[E]) -> E:
        """The next event, which must be of that kind."""
        event = await asyncio.wait_for(self.inbox.get(), PATIENCE)
        assert isinstance(event, kind), event
        return event

    async def until(self, kind: type[E]) -> E:
        """The next event of that kind, whatever comes before it."""
        while True:
            event = await asyncio.wait_for(self.inbox.get(), PATIENCE)
            if isinstance(event, kind):
                return event


@asynccontextmanager
async def hosts(
    number: int = 2, limits: Limits | None = None, channel: Channel | None = BOOTSTRAP
) -> AsyncIterator[list[Host]]:
    """That many listening hosts, on one bootstrap or cluster channel unless `channel` is None."""
    made = [Host(limits) for _ in range(number)]
    try:
        for host in made:
            port = await host.transport.start("127.0.0.1", 0)
            host.endpoint = Endpoint("127.0.0.1", port)
            if channel is BOOTSTRAP:
                host.open(channel, token_credentials(host.key))
            elif channel is CLUSTER:
                host.open(channel, cluster_credentials(host.key))
        yield made
    finally:
        for host in made:
            await host.transport.close()


@asynccontextmanager
async def plain(
    host: Host, source: str = "127.0.0.1"
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A stranger's plain TCP connection."""
    reader, writer = await asyncio.open_connection(
        host.endpoint.host, host.endpoint.port, local_addr=(source, 0)
    )
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def tunnel(
    host: Host, key: bytes, source: str = "127.0.0.1", first: bytes = b""
) -> AsyncIterator[Tunnel]:
    """A peer that is welcome, and then at the mercy of the test."""
    async with plain(host, source) as (reader, writer):
        made = Tunnel(reader, writer)
        context = make_context(CLIENT, BOOTSTRAP, token_credentials(key))
        await made.handshake(context, server_side=False, first=first or SELECTORS[BOOTSTRAP])
        assert await made.receive() == b""
        yield made


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the other side closes the connection, by either of TCP's ways."""
    with suppress(ConnectionError):
        await asyncio.wait_for(reader.read(), PATIENCE)
    return True


async def cut_off(peer: Tunnel) -> bool:
    """The same for a peer."""
    with suppress(EOFError, ConnectionError, ssl.SSLError):
        await asyncio.wait_for(peer.receive(), PATIENCE)
        return False
    return True


def confirmed(number: int) -> messages.Confirmed:
    return messages.Confirmed(number)


# ---------------------------------------------------------------- peers


@on_loop
async def test_holders_of_one_token_connect_and_talk() -> None:
    async with hosts() as (a, b):
        a.dial(b)
        assert await a.next(events.Connected) == events.Connected(
            b.node_id, BOOTSTRAP, b.endpoint, "127.0.0.1"
        )
        assert await b.next(events.Connected) == events.Connected(
            a.node_id, BOOTSTRAP, None, "127.0.0.1"
        )
        a.send(b, confirmed(1))
        assert await b.next(events.MessageReceived) == events.MessageReceived(
            a.node_id, BOOTSTRAP, confirmed(1)
        )
        b.send(a, confirmed(2))
        assert (await a.next(events.MessageReceived)).message == confirmed(2)
        a.transport.disconnect(b.node_id)
        assert await a.next(events.Disconnected) == events.Disconnected(b.node_id, BOOTSTRAP)
        assert await b.next(events.Disconnected) == events.Disconnected(a.node_id, BOOTSTRAP)


@on_loop
async def test_many_messages_of_any_size_arrive_whole_and_in_order() -> None:
    async with hosts() as (a, b):
        a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)
        blob = b"\xff" * messages.MAX_BLOB
        large = messages.Granted(1, "n", (messages.Certificate(Profile.PEER, blob),) * 4, blob)
        sent: list[messages.Message] = [confirmed(0)]
        for number in range(1, 9):
            sent += [large, confirmed(number)]
        for message in sent:
            a.send(b, message)
        assert [(await b.next(events.MessageReceived)).message for _ in sent] == sent


@on_loop
async def test_a_frame_does_not_wait_until_the_one_before_is_acknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sockets: list[socket.socket] = []

    class Seen(Tunnel):
        def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            super().__init__(reader, writer)
            sockets.append(writer.get_extra_info("socket"))

    monkeypatch.setattr("firstboot.transport.connections.Tunnel", Seen)
    async with hosts() as (a, b):
        a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)
        on = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for s in sockets]
    assert on == [1, 1]  # the end that dialled, and the end that accepted


@on_loop
async def test_enrolled_hosts_connect_on_the_cluster_channel() -> None:
    async with hosts(channel=CLUSTER) as (a, b):
        a.dial(b, CLUSTER)
        assert (await a.next(events.Connected)).node_id == b.node_id
        assert (await b.next(events.Connected)).node_id == a.node_id
        a.send(b, confirmed(1), CLUSTER)
        assert (await b.next(events.MessageReceived)).channel is CLUSTER
        a.send(b, confirmed(2), BOOTSTRAP)  # no such connection: dropped
        a.send(b, confirmed(3), CLUSTER)
        assert (await b.next(events.MessageReceived)).message == confirmed(3)


@on_loop
async def test_a_dial_to_oneself_is_told_like_any_other() -> None:
    async with hosts(1) as (a,):
        a.dial(a)
        both = [await a.next(events.Connected), await a.next(events.Connected)]
        assert {c.node_id for c in both} == {a.node_id}
        assert {c.endpoint for c in both} == {None, a.endpoint}
        a.send(a, confirmed(1))
        assert (await a.next(events.MessageReceived)).node_id == a.node_id


@on_loop
async def test_dialling_each_other_gives_two_connections_and_one_end() -> None:
    async with hosts() as (a, b):
        a.dial(b)
        b.dial(a)
        for host in (a, b):
            both = [await host.next(events.Connected), await host.next(events.Connected)]
            assert sum(c.endpoint is None for c in both) == 1
        a.send(b, confirmed(1))
        b.send(a, confirmed(2))
        assert (await b.next(events.MessageReceived)).message == confirmed(1)
        assert (await a.next(events.MessageReceived)).message == confirmed(2)
        a.transport.disconnect(b.node_id)
        await a.next(events.Disconnected)
        await b.next(events.Disconnected)
        b.dial(a)  # what comes next shows that nothing else was told
        await a.next(events.Connected)
        await b.next(events.Connected)


@on_loop
async def test_the_same_dial_is_not_made_twice_at_a_time() -> None:
    async with hosts() as (a, b):
        for _ in range(5):
            a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)
        a.send(b, confirmed(1))
        await b.next(events.MessageReceived)
        a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)


@on_loop
async def test_messages_go_out_on_the_newest_connection_and_come_in_on_all() -> None:
    async with hosts(1) as (a,):
        key = pki.make_key()
        peer = pki.node_id(key)
        async with tunnel(a, key) as older:
            await a.next(events.Connected)
            async with tunnel(a, key) as newer:
                await a.next(events.Connected)
                a.transport.send(peer, BOOTSTRAP, confirmed(1))
                assert messages.decode(await newer.receive()) == confirmed(1)
                for number, connection in enumerate((older, newer)):
                    connection.send(messages.encode(confirmed(number)))
                    assert (await a.next(events.MessageReceived)).message == confirmed(number)
                newer.send(b"the end")
                await a.next(events.PeerMisbehaved)
            a.transport.send(peer, BOOTSTRAP, confirmed(2))
            assert messages.decode(await older.receive()) == confirmed(2)
        await a.next(events.Disconnected)


@on_loop
async def test_a_fourth_connection_closes_the_oldest() -> None:
    async with hosts(1) as (a,):
        key = pki.make_key()
        async with tunnel(a, key) as first, tunnel(a, key), tunnel(a, key), tunnel(a, key) as last:
            for _ in range(4):
                await a.next(events.Connected)
            assert await cut_off(first)
            last.send(messages.encode(confirmed(1)))
            await a.next(events.MessageReceived)


@on_loop
async def test_a_dial_leaves_from_the_address_it_is_told_to() -> None:
    async with hosts() as (a, b):
        a.transport.connect(b.endpoint, BOOTSTRAP, "127.0.0.2")
        await a.next(events.Connected)
        assert (await b.next(events.Connected)).remote == "127.0.0.2"
        a.transport.connect(Endpoint("127.0.0.1", b.endpoint.port), BOOTSTRAP, "::1")
        await a.next(events.Connected)  # the wrong family is no address to leave from


@on_loop
async def test_a_host_listens_on_every_address() -> None:
    async with hosts() as (a, b):
        everywhere = Host()
        port = await everywhere.transport.start("", 0)
        everywhere.open(BOOTSTRAP, token_credentials(everywhere.key))
        a.dial(Endpoint("127.0.0.1", port))
        assert (await everywhere.next(events.Connected)).remote == "127.0.0.1"
        if socket.has_dualstack_ipv6():
            b.dial(Endpoint("::1", port))
            assert (await everywhere.next(events.Connected)).remote == "::1"
        await everywhere.transport.close()


@on_loop
async def test_a_taken_port_is_a_local_error() -> None:
    async with hosts(1) as (a,):
        with pytest.raises(LocalError, match="in use"):
            await Host().transport.start("127.0.0.1", a.endpoint.port)


# ---------------------------------------------------------------- another token


@pytest.mark.parametrize(("token", "formation"), [("t2", "blue"), ("t1", "red"), ("t2", "red")])
@on_loop
async def test_another_token_or_formation_is_told_on_both_sides(token: str, formation: str) -> None:
    async with hosts() as (a, b):
        b.open(BOOTSTRAP, token_credentials(b.key, token, formation))
        a.dial(b)
        assert await a.next(events.ConnectFailed) == events.ConnectFailed(
            b.endpoint, BOOTSTRAP, "token"
        )
        assert await b.next(events.StrangerSeen) == events.StrangerSeen("token", "127.0.0.1")


@on_loop
async def test_a_dialler_that_only_the_listener_rejects_is_told_too() -> None:
    """In TLS 1.3 the dialler's own handshake is over before its certificate is judged."""
    async with hosts() as (a, b):
        foreign = token_credentials(a.key, "t2")
        mixed = pki.Credentials(foreign.chain, a.key, token_credentials(a.key).authority)
        a.open(BOOTSTRAP, mixed)
        a.dial(b)
        assert (await a.next(events.ConnectFailed)).reason == "token"
        assert await b.next(events.StrangerSeen) == events.StrangerSeen("token", "127.0.0.1")


# ---------------------------------------------------------------- clocks


@pytest.mark.parametrize("valid", [LONG_AGO, FAR_AHEAD])
@on_loop
async def test_a_wrong_clock_does_not_matter_on_the_bootstrap_channel(
    valid: tuple[datetime, datetime],
) -> None:
    async with hosts() as (a, b):
        b.open(BOOTSTRAP, pki.derive("t1", "blue").credentials(b.key, valid))
        a.dial(b)
        b.dial(a)
        for host in (a, b):
            for _ in range(2):
                await host.next(events.Connected)


@pytest.mark.parametrize("dialler_is_wrong", [True, False])
@on_loop
async def test_an_expired_certificate_opens_no_cluster_channel(dialler_is_wrong: bool) -> None:
    now = time.time()
    authority = pki.make_authority("blue", 1, now - 2000 * DAY)  # itself valid for ten years
    async with hosts(channel=None) as (a, b):
        for host, wrong in ((a, dialler_is_wrong), (b, not dialler_is_wrong)):
            when = now - 2000 * DAY if wrong else now
            host.open(CLUSTER, cluster_credentials(host.key, authority=authority, now=when))
        a.dial(b, CLUSTER)
        assert (await a.next(events.ConnectFailed)).reason == "tls"
        assert (await b.next(events.StrangerSeen)).kind == "garbage"


@on_loop
async def test_a_certificate_signed_by_a_clock_that_is_ahead_opens_it() -> None:
    async with hosts(channel=None) as (a, b):
        authority = pki.make_authority("blue", 1)
        for host, ahead in ((a, 0), (b, 30 * DAY)):
            when = time.time() + ahead
            host.open(CLUSTER, cluster_credentials(host.key, authority=authority, now=when))
        a.dial(b, CLUSTER)
        for host in (a, b):
            await host.next(events.Connected)


# ---------------------------------------------------------------- the cluster's certificates


@pytest.mark.parametrize(
    ("dialler", "listener", "works"),
    [
        (Profile.PEER, Profile.PEER, True),
        (Profile.CLIENT, Profile.SERVER, True),
        (Profile.CLIENT, Profile.PEER, True),
        (Profile.PEER, Profile.SERVER, True),
        (Profile.PEER, Profile.CLIENT, False),
        (Profile.CLIENT, Profile.CLIENT, False),
        (Profile.SERVER, Profile.PEER, False),
        (Profile.SERVER, Profile.SERVER, False),
    ],
)
@on_loop
async def test_a_certificate_serves_its_profile_only(
    dialler: Profile, listener: Profile, works: bool
) -> None:
    async with hosts(channel=None) as (a, b):
        a.open(CLUSTER, cluster_credentials(a.key, dialler))
        b.open(CLUSTER, cluster_credentials(b.key, listener))
        a.dial(b, CLUSTER)
        if works:
            await a.next(events.Connected)
            await b.next(events.Connected)
        else:
            assert (await a.next(events.ConnectFailed)).reason == "tls"
            assert (await b.next(events.StrangerSeen)).kind == "garbage"


@on_loop
async def test_an_authority_of_the_same_name_is_still_a_foreign_one() -> None:
    async with hosts(channel=CLUSTER) as (a, b):
        b.open(CLUSTER, cluster_credentials(b.key, authority=FOREIGN))
        a.dial(b, CLUSTER)
        assert (await a.next(events.ConnectFailed)).reason == "tls"
        assert (await b.next(events.StrangerSeen)).kind == "garbage"


@on_loop
async def test_a_token_opens_the_bootstrap_channel_only() -> None:
    async with hosts(channel=CLUSTER) as (a, b):
        a.open(CLUSTER, token_credentials(a.key))
        a.dial(b, CLUSTER)
        assert (await a.next(events.ConnectFailed)).reason == "tls"
        await b.next(events.StrangerSeen)


@on_loop
async def test_a_cluster_certificate_that_names_no_host_is_dropped() -> None:
    """A bootstrap leaf under a CA that the cluster channel trusts, but without the URI."""
    async with hosts(channel=None) as (a, b):
        for host in (a, b):
            host.open(CLUSTER, token_credentials(host.key))
        a.dial(b, CLUSTER)
        assert (await a.next(events.ConnectFailed)).reason == "tls"
        await b.next(events.StrangerSeen)


# ---------------------------------------------------------------- dials that fail


@on_loop
async def test_a_dial_to_nobody_is_refused() -> None:
    async with hosts() as (a, b):
        await b.transport.close()
        a.dial(b)
        assert (await a.next(events.ConnectFailed)).reason == "refused"


@on_loop
async def test_a_dial_that_cannot_leave_is_unreachable() -> None:
    async with hosts() as (a, b):
        a.transport.connect(b.endpoint, BOOTSTRAP, "203.0.113.1")  # RFC 5737: not ours
        assert (await a.next(events.ConnectFailed)).reason == "unreachable"


@on_loop
async def test_an_address_is_never_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    look_up = socket.getaddrinfo

    def record(*args: Any, **kwargs: Any) -> Any:
        asked.append(args[5] if len(args) > 5 else kwargs.get("flags", 0))
        return look_up(*args, **kwargs)

    async with hosts(1) as (a,):
        monkeypatch.setattr(socket, "getaddrinfo", record)
        a.dial(Endpoint("fe80::1%example.org", 1))
        assert (await a.next(events.ConnectFailed)).reason == "unreachable"
    assert asked
    assert all(flags & socket.AI_NUMERICHOST for flags in asked)


@asynccontextmanager
async def impostor(answer: bytes | None) -> AsyncIterator[Endpoint]:
    """Something else on the port: it says `answer`, or nothing at all."""
    open_ones: list[asyncio.StreamWriter] = []

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        if answer is not None:
            writer.write(answer)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        for writer in open_ones:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@on_loop
async def test_a_dial_that_is_never_answered_times_out() -> None:
    async with hosts(1, HASTE) as (a,), impostor(None) as endpoint:
        a.dial(endpoint)
        assert await a.next(events.ConnectFailed) == events.ConnectFailed(
            endpoint, BOOTSTRAP, "timeout"
        )


@on_loop
async def test_a_dial_to_another_service_fails() -> None:
    async with hosts(1) as (a,), impostor(b"SSH-2.0-OpenSSH_9.2p1\r\n") as endpoint:
        a.dial(endpoint)
        assert (await a.next(events.ConnectFailed)).reason == "tls"


@on_loop
async def test_too_many_dials_are_answered_at_once() -> None:
    limits = Limits(handshake=0.3, dials=1)
    async with hosts(1, limits) as (a,), impostor(None) as one, impostor(None) as two:
        a.dial(one)
        a.dial(two)
        assert await a.next(events.ConnectFailed) == events.ConnectFailed(two, BOOTSTRAP, "busy")
        assert await a.next(events.ConnectFailed) == events.ConnectFailed(one, BOOTSTRAP, "timeout")


# ---------------------------------------------------------------- strangers


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",  # TLS without a selector
        b"FB1-XXXX",
        SELECTORS[BOOTSTRAP] + b"\x00" * 64,
        SELECTORS[BOOTSTRAP] + b"GET / HTTP/1.0\r\n\r\n",
        SELECTORS[BOOTSTRAP] + b"\x16\x03\x01\xff\xff" + b"\xff" * 100,
    ],
)
@on_loop
async def test_garbage_is_dropped_and_told(said: bytes) -> None:
    async with hosts() as (a, b):
        async with plain(a, "127.0.0.9") as (reader, writer):
            writer.write(said)
            assert await ended(reader)
        assert await a.next(events.StrangerSeen) == events.StrangerSeen("garbage", "127.0.0.9")
        b.dial(a)
        await a.next(events.Connected)


@on_loop
async def test_half_a_selector_is_garbage_but_hanging_up_is_not() -> None:
    async with hosts(1) as (a,):
        async with plain(a, "127.0.0.8"):
            pass  # a health check, a port scan, a peer that restarts
        async with plain(a, "127.0.0.9") as (_, writer):
            writer.write(b"FB1")
        assert await a.next(events.StrangerSeen) == events.StrangerSeen("garbage", "127.0.0.9")


@pytest.mark.parametrize("said", [b"", b"FB1", SELECTORS[BOOTSTRAP]])
@on_loop
async def test_a_half_open_connection_is_dropped_in_time(said: bytes) -> None:
    async with hosts(1, HASTE) as (a,), plain(a) as (reader, writer):
        writer.write(said)
        assert (await a.next(events.StrangerSeen)).kind == "garbage"
        assert await ended(reader)


def without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["firstboot-bootstrap/1"])
    return context


def older_tls() -> ssl.SSLContext:
    context = make_context(CLIENT, BOOTSTRAP, token_credentials(pki.make_key()))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


def other_channel() -> ssl.SSLContext:
    """Good credentials, meant for the other channel: somebody rewrote the selector."""
    return make_context(CLIENT, CLUSTER, token_credentials(pki.make_key()))


@pytest.mark.parametrize("make", [without_certificate, older_tls, other_channel])
@on_loop
async def test_a_handshake_that_lacks_something_gets_nowhere(
    make: Callable[[], ssl.SSLContext],
) -> None:
    async with hosts(1) as (a,), plain(a) as streams:
        stranger = Tunnel(*streams)
        with pytest.raises((OSError, EOFError, RemoteError)):
            await stranger.handshake(make(), server_side=False, first=SELECTORS[BOOTSTRAP])
            await stranger.receive()
        assert (await a.next(events.StrangerSeen)).kind == "garbage"


@on_loop
async def test_whoever_holds_a_place_for_long_loses_it_first() -> None:
    """Half-open connections neither add up nor keep anybody out, from their address or others."""
    async with hosts() as (a, b):
        held = [plain(a, "127.0.0.1") for _ in range(10)]
        opened = [await h.__aenter__() for h in held]
        for reader, _ in opened[:2]:
            assert await ended(reader)
        assert await a.next(events.StrangerSeen) == events.StrangerSeen("flood", "127.0.0.1")
        b.dial(a)
        await b.next(events.Connected)
        await a.next(events.Connected)
        async with tunnel(a, pki.make_key(), "127.0.0.3"):
            await a.next(events.Connected)
        for h in held:
            await h.__aexit__(None, None, None)


@on_loop
async def test_peers_do_not_count_as_pending() -> None:
    async with hosts(1, Limits(pending=2, pending_per_source=2)) as (a,):
        keys = [pki.make_key() for _ in range(3)]
        async with tunnel(a, keys[0]) as first, tunnel(a, keys[1]), tunnel(a, keys[2]):
            for _ in keys:
                await a.next(events.Connected)
            first.send(messages.encode(confirmed(1)))
            assert (await a.next(events.MessageReceived)).node_id == pki.node_id(keys[0])


@on_loop
async def test_pending_handshakes_are_bounded_in_all() -> None:
    async with hosts(1, Limits(pending=4)) as (a,):
        held = [plain(a, f"127.0.1.{n}") for n in range(1, 7)]
        opened = [await h.__aenter__() for h in held]
        for reader, _ in opened[:2]:
            assert await ended(reader)
        flooded = [await a.next(events.StrangerSeen) for _ in range(2)]
        assert flooded == [events.StrangerSeen("flood", f"127.0.1.{n}") for n in (1, 2)]
        for h in held:
            await h.__aexit__(None, None, None)


@on_loop
async def test_connections_of_one_address_are_bounded_in_rate() -> None:
    async with hosts(1, Limits(accepts=0.001, accepts_burst=3)) as (a,):
        key = pki.make_key()
        for _ in range(3):
            async with tunnel(a, key):
                await a.until(events.Connected)
        async with plain(a) as (reader, _):
            assert await ended(reader)
        assert (await a.until(events.StrangerSeen)).kind == "flood"
        async with tunnel(a, key, "127.0.0.2"):
            await a.until(events.Connected)


def test_strangers_cannot_fill_the_inbox() -> None:
    told: list[events.Event] = []
    strangers = Strangers(Limits(reports=4), told.append)
    for _ in range(1000):
        strangers.report("garbage", "10.0.0.1", 100.0)
    assert told == [events.StrangerSeen("garbage", "10.0.0.1")]
    strangers.report("garbage", "10.0.0.1", 101.0)
    assert len(told) == 2
    for number in range(1000):
        strangers.report("flood", f"10.0.{number // 250}.{number % 250}", 101.0)
    assert len(told) == 6
    strangers.report("token", "10.0.0.1", 101.0)  # a flood does not hide the useful hint
    assert told[-1] == events.StrangerSeen("token", "10.0.0.1")
    for number in range(100_000):
        strangers.report("flood", str(number), 200.0 + number / 1000)
    assert len(told) < 7 + 4 * 102


# ---------------------------------------------------------------- peers that misbehave


@pytest.mark.parametrize("frame", [b"", b"nonsense", b"{}", b'{"t":"noted","epoch":"1"}'])
@on_loop
async def test_a_frame_that_is_no_message_ends_the_connection(frame: bytes) -> None:
    async with hosts(1) as (a,):
        key = pki.make_key()
        async with tunnel(a, key) as peer:
            await a.next(events.Connected)
            peer.send(frame)
            assert (await a.next(events.PeerMisbehaved)).node_id == pki.node_id(key)
            assert (await a.next(events.Disconnected)).node_id == pki.node_id(key)
            assert await cut_off(peer)


@on_loop
async def test_a_frame_too_long_is_not_waited_for() -> None:
    async with hosts(1) as (a,), tunnel(a, pki.make_key()) as peer:
        await a.next(events.Connected)
        assert peer._tls is not None
        with pytest.raises(LocalError):
            peer.send(b"x" * (messages.MAX_BYTES + 1))
        peer._tls.write(b"\xff\xff\xff\xff")
        peer._flush()
        assert "4294967295 bytes" in (await a.next(events.PeerMisbehaved)).reason
        await a.next(events.Disconnected)


@on_loop
async def test_a_flood_of_messages_ends_the_connection() -> None:
    limits = Limits(messages=0.001, messages_burst=5)
    async with hosts(1, limits) as (a,), tunnel(a, pki.make_key()) as peer:
        await a.next(events.Connected)
        for number in range(9):
            peer.send(messages.encode(confirmed(number)))
        for number in range(5):
            assert (await a.next(events.MessageReceived)).message == confirmed(number)
        assert "too many" in (await a.next(events.PeerMisbehaved)).reason
        await a.next(events.Disconnected)


@on_loop
async def test_half_a_frame_and_an_end_is_no_misbehaviour() -> None:
    async with hosts(1) as (a,):
        async with tunnel(a, pki.make_key()) as peer:
            await a.next(events.Connected)
            assert peer._tls is not None
            peer._tls.write((100).to_bytes(4, "big") + b'{"t":')
            peer._flush()
        await a.next(events.Disconnected)


@on_loop
async def test_a_peer_that_does_not_read_is_cut_off() -> None:
    async with hosts(1, Limits(unsent=100_000, silence=600)) as (a,):
        key = pki.make_key()
        async with tunnel(a, key):
            await a.next(events.Connected)
            blob = b"\xff" * messages.MAX_BLOB
            large = messages.Granted(1, "n", (messages.Certificate(Profile.PEER, blob),) * 4, blob)
            for _ in range(2000):
                a.transport.send(pki.node_id(key), BOOTSTRAP, large)
                if not a.inbox.empty():
                    break
            await a.next(events.Disconnected)


@on_loop
async def test_a_message_to_nobody_is_dropped() -> None:
    async with hosts() as (a, b):
        a.send(b, confirmed(1))
        a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)
        a.send(b, confirmed(2))
        assert (await b.next(events.MessageReceived)).message == confirmed(2)


# ---------------------------------------------------------------- opening and closing channels


@on_loop
async def test_closing_a_channel_ends_it_for_good() -> None:
    async with hosts() as (a, b):
        for host in (a, b):
            host.open(CLUSTER, cluster_credentials(host.key))
        a.dial(b)
        a.dial(b, CLUSTER)
        for host in (a, b):
            for _ in range(2):
                await host.next(events.Connected)
        b.transport.set_channel(BOOTSTRAP, None)
        assert await b.next(events.Disconnected) == events.Disconnected(a.node_id, BOOTSTRAP)
        assert await a.next(events.Disconnected) == events.Disconnected(b.node_id, BOOTSTRAP)
        a.dial(b)
        assert (await a.next(events.ConnectFailed)).reason == "closed"
        b.dial(a)
        assert (await b.next(events.ConnectFailed)).reason == "closed"
        a.send(b, confirmed(1), CLUSTER)  # the other channel stands
        assert (await b.next(events.MessageReceived)).channel is CLUSTER


@on_loop
async def test_closing_a_channel_ends_handshakes_in_the_middle() -> None:
    async with hosts(limits=Limits(handshake=600)) as (a, b):
        async with plain(b) as (reader, writer):
            writer.write(SELECTORS[BOOTSTRAP])
            a.dial(b)  # once this is through, the selector above was read, too
            await b.next(events.Connected)
            b.transport.set_channel(BOOTSTRAP, None)
            assert await ended(reader)
        await b.next(events.Disconnected)


@on_loop
async def test_a_dial_under_way_fails_when_its_channel_closes() -> None:
    async with hosts(1) as (a,), impostor(None) as endpoint:
        a.dial(endpoint)
        await asyncio.sleep(0)  # let the dial begin
        a.transport.set_channel(BOOTSTRAP, None)
        assert (await a.next(events.ConnectFailed)).reason == "closed"


@pytest.mark.parametrize("closer", ["dialler", "listener"])
@on_loop
async def test_a_handshake_that_outlives_its_channel_is_void(closer: str) -> None:
    """The channel closes when all that a handshake needs has already arrived."""
    async with hosts() as (a, b):
        host = a if closer == "dialler" else b

        def close_and_identify(der: bytes) -> str:
            host.transport.set_channel(BOOTSTRAP, None)
            return pki.node_id_of_certificate(der)

        host.transport.set_channel(BOOTSTRAP, None)
        credentials = token_credentials(host.key)
        host.transport.set_channel(BOOTSTRAP, credentials, close_and_identify)
        a.dial(b)
        assert (await a.next(events.ConnectFailed)).reason == "closed"
        assert host.inbox.empty()


@on_loop
async def test_nothing_is_received_once_a_channel_is_closed() -> None:
    """Not even what had arrived: the inbox closes the channel at the first message."""
    async with hosts(1) as (a,), tunnel(a, pki.make_key()) as peer:
        await a.next(events.Connected)
        told: list[events.Event] = []

        def close_at_once(event: events.Event) -> None:
            told.append(event)
            if isinstance(event, events.MessageReceived):
                a.transport.set_channel(BOOTSTRAP, None)

        a.transport._inbox = close_at_once
        for number in range(50):
            peer.send(messages.encode(confirmed(number)))
        assert await cut_off(peer)
        assert [type(event) for event in told] == [events.MessageReceived, events.Disconnected]


@on_loop
async def test_the_same_credentials_change_nothing_and_others_start_afresh() -> None:
    async with hosts(channel=None) as (a, b):
        first = {host: cluster_credentials(host.key) for host in (a, b)}
        for host in (a, b):
            host.open(CLUSTER, first[host])
        a.dial(b, CLUSTER)
        await a.next(events.Connected)
        await b.next(events.Connected)
        b.open(CLUSTER, first[b])
        a.send(b, confirmed(1), CLUSTER)
        await b.next(events.MessageReceived)
        for host in (a, b):  # a new epoch: what the old authority vouched for must go
            host.open(CLUSTER, cluster_credentials(host.key, authority=FOREIGN))
            await host.next(events.Disconnected)
        a.dial(b, CLUSTER)
        await a.next(events.Connected)
        await b.next(events.Connected)


@pytest.mark.parametrize("broken", ["chain", "key", "authority"])
@on_loop
async def test_credentials_that_do_not_work_are_a_local_error(broken: str) -> None:
    async with hosts(1, channel=None) as (a,):
        good = token_credentials(a.key)
        fields = {"chain": good.chain, "key": good.key, "authority": good.authority}
        for content in (b"", b"\xff\xfe", b"nonsense", good.key if broken != "key" else b"x"):
            with pytest.raises(LocalError, match="do not work") as caught:
                a.open(BOOTSTRAP, pki.Credentials(**{**fields, broken: content}))
            assert "PRIVATE" not in str(caught.value)
        other = pki.Credentials(good.chain, pki.make_key(), good.authority)
        with pytest.raises(LocalError, match="do not work"):
            a.open(BOOTSTRAP, other)


def test_a_context_demands_what_the_design_says() -> None:
    credentials = token_credentials(pki.make_key())
    for channel in Channel:
        for protocol in (CLIENT, SERVER):
            context = make_context(protocol, channel, credentials)
            assert context.minimum_version is ssl.TLSVersion.TLSv1_3
            assert context.verify_mode is ssl.CERT_REQUIRED
            assert not context.check_hostname
            assert context.options & ssl.OP_NO_TICKET
            assert bool(context.verify_flags & 0x200000) is (channel is BOOTSTRAP)
        assert make_context(SERVER, channel, credentials).num_tickets == 0


def test_keys_leave_no_descriptor_open() -> None:
    before = sorted(Path("/proc/self/fd").iterdir())
    make_context(SERVER, BOOTSTRAP, token_credentials(pki.make_key()))
    assert sorted(Path("/proc/self/fd").iterdir()) == before


# ---------------------------------------------------------------- the end


@on_loop
async def test_close_ends_everything_and_tells_nothing() -> None:
    async with hosts() as (a, b), impostor(None) as endpoint, plain(a):
        a.dial(b)
        await a.next(events.Connected)
        await b.next(events.Connected)
        a.dial(endpoint)
        async with plain(a) as (_, writer):
            writer.write(SELECTORS[BOOTSTRAP])
            await a.transport.close()
            await b.next(events.Disconnected)
            a.dial(b)
            a.send(b, confirmed(1))
            a.transport.set_channel(BOOTSTRAP, None)
            await a.transport.close()
            assert a.inbox.empty()
        b.dial(a)
        assert (await b.next(events.ConnectFailed)).reason == "refused"
