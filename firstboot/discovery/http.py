"""Peers by a file on a web server: a rendezvous that every host reads and adds itself to.

Whoever runs the server learns how many hosts there are and when, but neither their addresses nor
the token: each line is sealed with a key that follows from the token. It can drop lines or bring
old ones back until they expire, and so hinder; what it shows only yields addresses to dial. Writes
are conditional (RFC 9110, section 13.1), so no host's line is lost when two write at a time.

What suits as a server is told in docs/configuration.md.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from firstboot.discovery.aside import Question
from firstboot.discovery.cloud import Trouble
from firstboot.discovery.interface import Context, Found, ProviderReport, Stranger, leads_to_a_peer
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.model import Endpoint
from firstboot.protocol.record import dataclass

if TYPE_CHECKING:
    from firstboot.web import Answer

LIFETIME = 180  # seconds a line is good for; a host renews its own when half of that is over
MAX_LINE = 512  # bytes
MAX_LINES = 64  # a large formation needs no more: hosts tell each other whom they know
MAX_FILE = MAX_LINE * MAX_LINES * 4  # more than that is no rendezvous
MAX_SECRET = 4096
ALL_SECONDS = 60.0  # for a look; a question of it ends after ten
CONFLICTS = 6  # writes that others were faster with, before the next announcement
PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0)  # seconds between two looks; the last goes on
FRESH = 4  # looks that answers name nobody, until that is told as an error
CONDITIONAL = "Use a server with ETags and conditional PUT, such as Apache's WebDAV."
LOOK = "Look into the web server's log."
REMEDIES = {
    401: "Put what the server wants in its Authorization header into authorization_file.",
    403: "Allow GET and PUT of that file on the server.",
    404: "Make the directory on the server, and allow PUT there.",
    405: "Allow PUT of that file on the server (WebDAV).",
    409: "Make the directory on the server, and allow PUT there.",
}


@dataclass(frozen=True, slots=True)
class File:
    """What the server keeps; `etag` is empty if nothing. `now` is its time, Unix seconds."""

    etag: str
    body: bytes
    now: float


class Http:
    """Options ``url``, ``ca_file`` and ``authorization_file``, as the schema has them."""

    name = "http"

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        self._context = context
        self._server = Server(options, context.root)
        self._question = Question(self._exchange)
        self._own: Endpoint | None = None
        self._found: Found | None = None
        self._others: dict[Endpoint, None] = {}
        self._named: set[Endpoint] = set()
        self._error = self._remedy = ""
        self._looks, self._next = 0, 0.0

    async def start(self, endpoint: Endpoint, found: Found, stranger: Stranger) -> None:
        """Remember whom to tell; the server is asked when hosts are announced."""
        del stranger  # nobody is heard here
        self._own, self._found = endpoint, found

    async def announce(self) -> None:
        """Read the file, add this host if it is not in it, and name the others."""
        if self._found is None:
            return
        if time.monotonic() >= self._next:
            await self._look()
        for endpoint in self._others:
            if self._found is not None:
                self._named.add(endpoint)
                self._found(endpoint)

    async def stop(self) -> None:
        """Leave the file alone. This host's line expires by itself."""
        self._found = None

    def report(self) -> ProviderReport:
        """What the server said last."""
        error, remedy = self._error, self._remedy
        if not error and not self._named and self._looks > FRESH:
            error = "no other host is in that file"
            remedy = "Give all hosts the same URL and token."
        next_try = time.time() + max(0.0, self._next - time.monotonic())
        detail = f"GET and PUT {self._server.url}"
        return ProviderReport(self.name, len(self._named), error, detail, remedy, next_try)

    async def _look(self) -> None:
        error = remedy = ""
        try:
            self._others = dict.fromkeys(await self._question.ask(ALL_SECONDS))
        except TimeoutError:
            error, remedy = "no answer in time", self._way()
        except Trouble as refused:
            error, remedy = str(refused), refused.remedy
        except LocalError as unanswered:
            error, remedy = str(unanswered), self._way()
        self._error, self._remedy = error, remedy
        lacks = self._context.lacks()
        pause = PAUSES[min(self._looks, len(PAUSES) - 1)] if lacks else PAUSES[-1]
        self._looks += 1
        self._next = time.monotonic() + pause

    def _way(self) -> str:
        return f"Let this host reach {self._server.where} over TCP."

    # ------------------------------------------------------------ in a thread

    def _exchange(self) -> list[Endpoint]:
        """One look, with this host's line written if that is due: the others' addresses."""
        for turn in range(CONFLICTS):
            if turn:
                # Whoever lost to another waits a random while, or they all meet again.
                time.sleep(random.uniform(0.05, 0.4 * turn))  # noqa: S311
            file = self._server.get()
            own, others, kept = self._read(valid_lines(file.body, file.now))
            if own > file.now + LIFETIME / 2 or len(others) >= MAX_LINES:
                return others
            mine = self._line(int(file.now) + LIFETIME)
            body = b"".join(line + b"\n" for line in [*kept[1 - MAX_LINES * 2 :], mine])
            if self._server.put(body, file.etag):
                return others
        raise Trouble("other hosts wrote first, each time", "Nothing to do: it is tried again.")

    def _read(self, lines: list[bytes]) -> tuple[float, list[Endpoint], list[bytes]]:
        """When this host's own line expires (0: there is none), whom the others name, and all
        lines that stay if this host writes: also those it cannot read, another formation's.
        """
        own, others, kept = 0.0, dict[Endpoint, None](), list[bytes]()
        for line in lines:
            expiry, _, sealed = line.partition(b" ")
            try:
                said = json.loads(self._context.unseal(base64.b64decode(sealed), expiry))
                boot, endpoint = str(said["boot"]), Endpoint(str(said["host"]), int(said["port"]))
            except (RemoteError, ValueError, LookupError, TypeError, OverflowError):
                kept.append(line)
                continue
            if boot == self._context.boot and endpoint == self._own:
                own = max(own, float(expiry))
                continue
            if endpoint == self._own:
                continue  # of an earlier process here
            kept.append(line)
            if leads_to_a_peer(endpoint.host) and len(others) < MAX_LINES:
                others[endpoint] = None
        return own, list(others), kept

    def _line(self, expiry: int) -> bytes:
        assert self._own is not None
        said = {"boot": self._context.boot, "host": self._own.host, "port": self._own.port}
        about = str(expiry).encode()
        return about + b" " + base64.b64encode(self._context.seal(json.dumps(said).encode(), about))


def valid_lines(body: bytes, now: float) -> list[bytes]:
    """The lines of a file that have not expired and may have been written by firstboot."""
    lines = []
    for line in body.split(b"\n"):
        expiry, _, sealed = line.partition(b" ")
        if len(line) > MAX_LINE or not sealed or not (expiry.isdigit() and len(expiry) <= 12):
            continue
        # One that lasts too long is a lie, and would stay for ever.
        if now < int(expiry) <= now + 2 * LIFETIME:
            lines.append(line)
    return lines


class Server:
    """The web server that keeps the file. Its methods block."""

    def __init__(self, options: Mapping[str, Any], root: Path) -> None:
        self.url = str(options.get("url", ""))
        self.where = urlsplit(self.url).netloc
        self._root = root
        self._authority = str(options.get("ca_file", ""))
        self._authorization = str(options.get("authorization_file", ""))

    def get(self) -> File:
        """The file as it is, empty if there is none. Trouble or Unanswered if it cannot be had."""
        answer = self._ask("GET", None, {})
        now = _date(answer)
        if answer.status == 404:
            return File("", b"", now)
        if answer.status != 200:
            raise _refusal("GET", answer.status)
        etag = answer.headers.get("etag", "")[:256]
        if not etag:
            raise Trouble("the server gives no ETag", CONDITIONAL)
        if len(answer.body) > MAX_FILE:
            what = f"the file is larger than {MAX_FILE // 1024} KiB"
            raise Trouble(what, "Give the rendezvous a URL of its own.")
        return File(etag, answer.body, now)

    def put(self, body: bytes, etag: str) -> bool:
        """Replace what has that ETag (empty: nothing); whether nobody was faster."""
        if etag.startswith("W/"):
            return False  # RFC 9110, 13.1.1: weak ones never match; soon it will be strong
        condition = {"If-Match": etag} if etag else {"If-None-Match": "*"}
        answer = self._ask("PUT", body, {"Content-Type": "text/plain", **condition})
        if answer.status not in (200, 201, 204, 412):
            raise _refusal("PUT", answer.status)
        return answer.status != 412

    def _ask(self, method: str, body: bytes | None, headers: Mapping[str, str]) -> Answer:
        from firstboot.web import ask

        sent = dict(headers)
        if self._authorization:
            sent["Authorization"] = self._secret()
        authority = self._root / self._authority.lstrip("/") if self._authority else None
        if authority is not None and not authority.is_file():
            raise Trouble(f"{self._authority} cannot be read", "Write the certificates there.")
        return ask(method, self.url, sent, body, authority=str(authority or ""))

    def _secret(self) -> str:
        path = self._root / self._authorization.lstrip("/")
        try:
            text = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeError):
            raise Trouble(f"{self._authorization} cannot be read", REMEDIES[401]) from None
        if not text.isprintable() or len(text) > MAX_SECRET:
            raise Trouble(f"{self._authorization} must be one line of text", REMEDIES[401])
        return text


def _refusal(method: str, status: int) -> Trouble:
    return Trouble(f"{method} was answered with {status}", REMEDIES.get(status, LOOK))


def _date(answer: Answer) -> float:
    """The server's time: clocks of hosts that boot for the first time may be unset."""
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(answer.headers.get("date", "")).timestamp()
    except (TypeError, ValueError, OverflowError):
        return time.time()
