"""HTTP for providers that ask a cloud: one question, one answer, bounded in size and time.

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
MAX_ANSWER = 4 * 1024 * 1024  # bytes; a page of 100 EC2 instances has up to 1 MB


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


def ask(
    method: str,
    url: str,
    headers: Mapping[str, str],
    body: bytes | None = None,
    *,
    seconds: float = SECONDS,
    authority: str = "",
) -> Answer:
    """Ask once; Unanswered if that comes to nothing within `seconds`.

    `authority` is a file of certificates (PEM) the server's may be of, instead of the system's.
    """
    parts = split(url)
    secure = parts.scheme == "https"
    end = time.monotonic() + seconds
    sock = _connect(parts.hostname or "", parts.port or (443 if secure else 80), seconds)
    live = [sock]
    # The socket's own timeout starts anew with every byte; this ends a server that drips.
    watch = threading.Timer(seconds, lambda: _break(live[0]))
    watch.daemon = True
    watch.start()
    try:
        if secure:
            context = ssl.create_default_context(cafile=authority or None)
            name = parts.hostname
            live[0] = sock = context.wrap_socket(
                sock, server_hostname=name, do_handshake_on_connect=False
            )
            sock.do_handshake()
        return _exchange(sock, parts, method, headers, body)
    except ssl.SSLCertVerificationError as error:
        raise Unanswered(f"its certificate is not accepted: {error.verify_message}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = isinstance(error, TimeoutError) or time.monotonic() >= end
        why = f"it answers nothing sound ({type(error).__name__})"
        why = f"no whole answer within {seconds:.0f} s" if late else why
        raise Unanswered(why, connected=True) from None
    finally:
        watch.cancel()
        live[0].close()


def split(url: str) -> SplitResult:
    """The parts of a URL; Unanswered if nobody can be asked at it."""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:  # a port that is no number, half an IPv6 address
        pass
    raise Unanswered("this is not an http or https URL")


def _connect(host: str, port: int, seconds: float) -> socket.socket:
    try:
        return socket.create_connection((host, port), seconds)
    except TimeoutError:
        raise Unanswered(f"{host} port {port} does not answer") from None
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", "") or "not a host name"
        raise Unanswered(f"{host} port {port}: {reason}") from None


def _exchange(
    sock: socket.socket,
    parts: SplitResult,
    method: str,
    headers: Mapping[str, str],
    body: bytes | None,
) -> Answer:
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port)
    connection.sock = sock
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection.request(method, target, body, {"Host": _host(parts), **headers})
    with connection.getresponse() as response:
        data = response.read(MAX_ANSWER + 1)
        if len(data) > MAX_ANSWER:
            raise ValueError("oversized")
        wanted = response.getheader("Content-Length", "")
        if wanted.isdecimal() and method != "HEAD" and len(data) < int(wanted):
            raise ValueError("cut off")
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, data, found)


def _host(parts: SplitResult) -> str:
    """The header Host: without the scheme's own port, as signatures have it."""
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    usual = 443 if parts.scheme == "https" else 80
    return name if parts.port in (None, usual) else f"{name}:{parts.port}"


def _break(sock: socket.socket) -> None:
    """Have whoever waits for this socket wait no more, also inside TLS."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
