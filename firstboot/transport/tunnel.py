"""TLS 1.3 over a plain asyncio stream, and the frames in it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Protocol, TypeVar

from firstboot.protocol import messages
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.model import Channel

CHUNK = 64 * 1024  # bytes read at a time, and buffered unread
# X509_V_FLAG_NO_CHECK_TIME (openssl x509_vfy.h); Python's ssl has no name for it.
_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)
# How OpenSSL words "your certificate is not from an authority I know": on the side that judges, a
# code (X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT and its kin, openssl x509_vfy.h; which one depends
# on what the peer sent along); on the side that is judged, the alert for all of them.
_UNKNOWN_ISSUER = frozenset({2, 18, 19, 20, 21})
_UNKNOWN_ISSUER_ALERT = "TLSV1_ALERT_UNKNOWN_CA"
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


class Tunnel:
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
            data = await self._complete(partial(self._tls.read, CHUNK))
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
            data = await self._reader.read(CHUNK)
            if not data:
                raise EOFError
            self._incoming.write(data)

    def _flush(self) -> None:
        data = self._outgoing.read()
        if data and not self._writer.is_closing():
            self._writer.write(data)


def make_context(protocol: int, channel: Channel, credentials: Credentials) -> ssl.SSLContext:
    """How one side of a channel does TLS; `protocol` is ssl.PROTOCOL_TLS_SERVER or …_CLIENT.

    LocalError if the credentials are no PEM, or the key is not the certificate's.
    """
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


def unknown_issuer(error: ssl.SSLError) -> bool:
    """Whether a handshake failed because one side's CA is not the other's."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_code in _UNKNOWN_ISSUER
    return error.reason == _UNKNOWN_ISSUER_ALERT


def _remote(writer: asyncio.StreamWriter) -> str:
    """The peer's IP address; one that IPv6 maps is written as the IPv4 address it is."""
    peer = writer.get_extra_info("peername")
    host = peer[0] if peer else ""  # None once the peer has hung up
    with suppress(ValueError):
        mapped = ipaddress.IPv6Address(host).ipv4_mapped
        host = str(mapped) if mapped else host
    return str(host)
