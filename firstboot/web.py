"""One question by HTTP and its answer, bounded in size and time: whoever asks a server, asks here.

Follows no redirect and knows no proxy: a metadata service must be asked directly, and what is
signed or holds a secret goes nowhere else. Everything here blocks.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import field
from urllib.parse import SplitResult, urlsplit

from firstboot.protocol.errors import LocalError
from firstboot.protocol.record import dataclass

SECONDS = 10.0  # for a whole question, from the connection to the answer's last byte
SILENCE = 10.0  # seconds without a byte, where a whole question may take longer
MAX_ANSWER = 4 * 1024 * 1024  # bytes; a page of 100 EC2 instances has up to 1 MB
# Reasons of OpenSSL that a person would not understand, or would take for something else.
_TLS_WORDS = {
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a client certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept this host's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it takes this host's certificate for expired",
}


class Unanswered(LocalError):
    """No sound answer came; the message says why. `connected`: somebody took the connection."""

    def __init__(self, message: str, *, connected: bool = False) -> None:
        super().__init__(message)
        self.connected = connected


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of any status; the headers' names are in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""  # the server's words for the status


def ask(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    seconds: float = SECONDS,
    most: int = MAX_ANSWER,
    authority: str = "",
    certificate: str = "",
    key: str = "",
) -> Answer:
    """Ask once; Unanswered if that comes to nothing within `seconds`, or is above `most` bytes.

    `authority` is a file of certificates (PEM) the server's may be of, instead of the system's;
    `certificate` and `key` are files of this host's own, for servers that want to know it.
    """
    parts = split(url)
    secure = parts.scheme == "https"
    context = _tls(authority, certificate, key) if secure else None
    place = (parts.hostname or "", parts.port or (443 if secure else 80))
    live: list[socket.socket] = []
    end = time.monotonic() + seconds
    # The socket's own timeout starts anew with every byte; this ends a server that drips.
    watch = threading.Timer(seconds, _break, (live,))
    watch.daemon = True
    try:
        live.append(socket.create_connection(place, min(seconds, SILENCE)))
        watch.start()
        if context is not None:
            # At once in `live`, so that the handshake ends in time as well.
            live[0] = secured = context.wrap_socket(
                live[0], server_hostname=place[0], do_handshake_on_connect=False
            )
            secured.do_handshake()
        return _exchange(live[0], parts, method, headers, body, most)
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = f"no whole answer within {seconds:.3g} s"
        why = late if time.monotonic() >= end else _words(error)
        raise Unanswered(why, connected=bool(live)) from None
    finally:
        watch.cancel()
        for sock in live:
            sock.close()


def split(url: str) -> SplitResult:
    """The parts of a URL; Unanswered if nobody can be asked at it."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number, half an IPv6 address
        pass
    raise Unanswered("this is not an http or https URL")


def _tls(authority: str, certificate: str, key: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=authority or None)
        if certificate:
            context.load_cert_chain(certificate, key)
    except OSError as error:
        raise Unanswered(f"the certificates to ask it with cannot be read: {error}") from None
    return context


def _exchange(
    sock: socket.socket,
    parts: SplitResult,
    method: str,
    headers: Mapping[str, str],
    body: bytes | None,
    most: int,
) -> Answer:
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.sock = sock
    # RFC 9112, section 3.2.1
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    ours = {"Host": _host(parts), "User-Agent": "firstboot", "Connection": "close"}
    connection.request(method, target, body, ours | dict(headers))
    with connection.getresponse() as response:
        data = response.read(most + 1)
        if len(data) > most:
            raise Unanswered(f"its answer is larger than {most >> 20} MB", connected=True)
        if response.length:
            raise http.client.IncompleteRead(data, response.length)
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, data, found, response.reason)


def _host(parts: SplitResult) -> str:
    """The header Host: without the scheme's own port, as signatures have it."""
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    usual = 443 if parts.scheme == "https" else 80
    return name if parts.port in (None, usual) else f"{name}:{parts.port}"


def _words(error: Exception) -> str:
    """Why there is no answer, in words of ours: a server's own go nowhere unread."""
    match error:
        case ssl.SSLCertVerificationError():
            return f"its certificate is not accepted: {error.verify_message}"
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError() | http.client.RemoteDisconnected():
            return "it closed the connection without an answer"
        case ssl.SSLError():
            reason = error.reason or str(error)
            return _TLS_WORDS.get(reason, f"TLS failed: {reason}")
        case ConnectionRefusedError():
            return "connection refused: nothing listens there yet"
        case TimeoutError():
            return "it does not answer"
        case OSError():
            return error.strerror or type(error).__name__
        case http.client.IncompleteRead():
            return "the connection ended before its answer did"
        case UnicodeError():
            return "not a host name"
    return f"its answer is not HTTP, or not whole ({type(error).__name__})"


def _break(live: list[socket.socket]) -> None:
    """Have whoever waits for this socket wait no more, also inside TLS."""
    with suppress(OSError):
        socket.socket.shutdown(live[0], socket.SHUT_RDWR)
