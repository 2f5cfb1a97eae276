"""Health gates: ask a URL until it answers 200, and say in plain words why it does not."""

from __future__ import annotations

import http.client
import ssl
import time
from pathlib import Path
from urllib.parse import urlsplit

from firstboot.protocol.errors import LocalError
from firstboot.protocol.plan import Probe

TRY_SECONDS = 5.0
FIRST_PAUSE, LAST_PAUSE = 0.05, 1.0  # seconds between tries, doubling
MAX_BODY = 200  # of an error page, for the reason


class ProbeFailed(LocalError):
    """The gate did not open; the message is the last reason."""


def probe(step: Probe, root: Path) -> None:
    """Ask once; ProbeFailed unless the answer is 200. Follows no redirect."""
    parts = urlsplit(step.url)
    where, port = parts.hostname or "", parts.port
    connection = (
        http.client.HTTPSConnection(where, port, timeout=TRY_SECONDS, context=_tls(step, root))
        if parts.scheme == "https"
        else http.client.HTTPConnection(where, port, timeout=TRY_SECONDS)
    )
    try:
        connection.request("GET", parts.path or "/", headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read(MAX_BODY).decode(errors="replace").strip()
    except ssl.SSLError as error:
        raise ProbeFailed(f"the certificate was not accepted: {error.reason}") from None
    except ConnectionRefusedError:
        raise ProbeFailed("connection refused: nothing listens there yet") from None
    except TimeoutError:
        raise ProbeFailed(f"no answer within {TRY_SECONDS:.0f} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ProbeFailed(str(error) or type(error).__name__) from None
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ProbeFailed(f"HTTP {response.status}: {body}" if body else f"HTTP {response.status}")


def wait(step: Probe, root: Path) -> None:
    """Ask until the answer is 200; ProbeFailed with the last reason after `step.deadline` s."""
    end, pause = time.monotonic() + step.deadline, FIRST_PAUSE
    while True:
        try:
            return probe(step, root)
        except ProbeFailed as error:
            if time.monotonic() + pause >= end:
                raise ProbeFailed(f"not healthy after {step.deadline:.0f} s: {error}") from None
        time.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)


def _tls(step: Probe, root: Path) -> ssl.SSLContext:
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
