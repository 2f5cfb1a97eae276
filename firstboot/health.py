"""Health gates: ask a URL until it answers 200, and say in plain words why it does not.

The objects that a role creates in an API go the same way.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from firstboot.protocol.errors import LocalError
from firstboot.protocol.plan import CreateObject, Probe

TRY_SECONDS = 5.0  # for each of: connecting, the handshake, every part of the answer
FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0  # seconds between tries, doubling
MAX_ANSWER = 1024 * 1024  # bytes of an answer that is looked through
MAX_BODY = 200  # characters of an error page, for the reason
# Reasons of OpenSSL that a person would not understand, or would take for something else.
_TLS_WORDS = {
    "WRONG_VERSION_NUMBER": "what listens there does not speak TLS",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it wants a client certificate",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not accept this host's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it does not accept this host's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it takes this host's certificate for expired",
}


class ProbeFailed(LocalError):
    """The gate did not open; the message is the last reason, `detail` whatever tells more."""

    detail = ""


def probe(step: Probe, root: Path, seconds: float = TRY_SECONDS) -> None:
    """Ask once; ProbeFailed unless the answer is 200 and holds what it must.

    Follows no redirect, knows no proxy. `seconds` is the limit for each wait on the network. The
    paths in `step` are under `root`.
    """
    most = MAX_ANSWER if step.contains else 4 * MAX_BODY
    code, text = _asked(step, root, seconds, "GET", most)
    if code != http.client.OK:
        raise _refusal(code, text)
    if step.contains not in text:
        raise ProbeFailed(step.lacks or f"its answer lacks {step.contains}")


def create(step: CreateObject, root: Path, content: bytes, seconds: float = TRY_SECONDS) -> None:
    """Have an API make the object, which is `content`; ProbeFailed unless it then has one.

    One of that name which is there already is left as it is (409, RFC 9110).
    """
    code, text = _asked(step, root, seconds, "POST", 4 * MAX_BODY, content)
    if code not in (http.client.OK, http.client.CREATED, http.client.CONFLICT):
        raise _refusal(code, text)


def _refusal(code: int, text: str) -> ProbeFailed:
    body = _printable(text[: 4 * MAX_BODY])
    return ProbeFailed(f"HTTP {code}: {body}" if body else f"HTTP {code}")


def _asked(
    step: Probe | CreateObject,
    root: Path,
    seconds: float,
    method: str,
    most: int,
    content: bytes | None = None,
) -> tuple[int, str]:
    """One request: the answer's code, and at most so many bytes of it; ProbeFailed without one."""
    connection, target = _connection(step, root, seconds)
    headers = {"Connection": "close"} | ({"Content-Type": "application/json"} if content else {})
    try:
        connection.request(method, target, content, headers)
        with connection.getresponse() as response:
            return response.status, response.read(most).decode(errors="replace")
    except ssl.SSLCertVerificationError as error:
        reason = f"its certificate is not accepted: {error.verify_message}"
        raise ProbeFailed(reason) from None
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, http.client.RemoteDisconnected):
        raise ProbeFailed("it closed the connection without an answer") from None
    except ssl.SSLError as error:
        reason = error.reason or str(error)
        raise ProbeFailed(_TLS_WORDS.get(reason, f"TLS failed: {reason}")) from None
    except ConnectionRefusedError:
        raise ProbeFailed("connection refused: nothing listens there yet") from None
    except TimeoutError:
        raise ProbeFailed(f"no answer within {seconds:.1f} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ProbeFailed(f"no sound answer: {error or type(error).__name__}") from None
    finally:
        connection.close()


def wait(
    step: Probe,
    root: Path,
    cancelled: threading.Event | None = None,
    tried: Callable[[str], None] | None = None,
) -> None:
    """Ask until the answer is 200; ProbeFailed with the last reason after `step.deadline` s.

    Blocks; setting `cancelled` ends it with ProbeFailed at the next pause. After each try in vain
    `tried` gets its reason; what it raises ends the waiting.
    """
    cancelled = cancelled or threading.Event()
    end, pause = time.monotonic() + step.deadline, FIRST_PAUSE
    while True:
        left = end - time.monotonic()
        try:
            return probe(step, root, min(TRY_SECONDS, max(left, 0.1)))
        except ProbeFailed as error:
            left = end - time.monotonic()
            if left <= 0:
                raise ProbeFailed(f"not healthy after {step.deadline:.0f} s: {error}") from None
            reason = str(error)
        if tried is not None:
            tried(reason)
        # The last pause ends at the deadline, so there is a try at that moment too.
        if cancelled.wait(min(pause, left)):
            raise ProbeFailed("waiting for it to be healthy was cancelled")
        pause = min(2 * pause, LAST_PAUSE)


def _connection(
    step: Probe | CreateObject, root: Path, seconds: float
) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, and what to ask for (RFC 9112, section 3.2.1)."""
    try:
        parts = urlsplit(step.url)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        if parts.scheme == "https":
            return http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=seconds, context=_tls(step, root)
            ), target
        if parts.scheme == "http":
            return http.client.HTTPConnection(
                parts.hostname or "", parts.port, timeout=seconds
            ), target
    except (ValueError, http.client.InvalidURL) as error:
        raise ProbeFailed(f"{step.url} is not a URL: {error}") from None
    raise ProbeFailed(f"{step.url} is neither http nor https")


def _tls(step: Probe | CreateObject, root: Path) -> ssl.SSLContext:
    def path(name: str) -> str:
        return str(root / name.lstrip("/"))

    try:
        context = ssl.create_default_context(
            cafile=path(step.authority) if step.authority else None
        )
        if step.certificate:
            context.load_cert_chain(path(step.certificate), path(step.key))
    except (OSError, ssl.SSLError) as error:
        raise ProbeFailed(f"the probe's certificates cannot be read: {error}") from None
    return context


def _printable(text: str) -> str:
    """One line without control characters: it goes to the status and the console."""
    clean = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(clean.split())[:MAX_BODY]
