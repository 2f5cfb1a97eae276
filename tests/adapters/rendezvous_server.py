"""A web server that keeps files as RFC 9110 says, conditional writes included, and faults on call.

It is stricter than real ones: an unconditional PUT, a method or a header that has no business here
is an error of the client's, kept in `mistakes`.
"""

from __future__ import annotations

import itertools
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

Fault = Callable[["Handler"], bool]
KNOWN_HEADERS = {
    *("host", "accept-encoding", "user-agent", "connection", "content-length", "content-type"),
    *("if-match", "if-none-match", "authorization"),
}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    store: RendezvousServer

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", etag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if etag and self.store.with_etags:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(body)

    def date_time_string(self, timestamp: float | None = None) -> str:
        return self.store.date or super().date_time_string(timestamp)

    def do_GET(self) -> None:
        if not self._refused():
            body, etag = self.store.files.get(self.path, (b"", ""))
            self.answer(200 if etag else 404, body, etag)

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._refused():
            return
        with self.store.lock:
            _, etag = self.store.files.get(self.path, (b"", ""))
            match, none = self.headers["If-Match"], self.headers["If-None-Match"]
            if (match is None) == (none is None) or none not in (None, "*"):
                self.store.mistakes.append(f"PUT with If-Match {match}, If-None-Match {none}")
            fits = etag == "" if none else (match == etag and not etag.startswith("W/"))
            if not fits and self.store.with_conditions:
                self.store.conflicts += 1
                self.answer(412)
                return
            made = f'"{next(self.store.versions)}"'
            self.store.files[self.path] = body, made
            self.store.writes += 1
        self.answer(204 if etag else 201, etag=made)

    def _refused(self) -> bool:
        odd = {name.lower() for name in self.headers} - KNOWN_HEADERS
        if odd:
            self.store.mistakes.append(f"headers {odd}")
        if self.headers["Authorization"] != self.store.authorization:
            self.answer(401)
            return True
        fault = self.store.fault
        return fault is not None and fault(self)


class RendezvousServer:
    """Serves on 127.0.0.1; with `tls`, a server-side context, by HTTPS."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, tuple[bytes, str]] = {}
        self.mistakes: list[str] = []
        self.conflicts = self.writes = 0
        self.with_etags, self.with_conditions, self.date = True, True, ""
        self.authorization: str | None = None
        self.fault: Fault | None = None
        self.lock = threading.Lock()
        self.versions = itertools.count(1)
        handler = type("Bound", (Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        scheme = "https" if tls else "http"
        self.where = f"127.0.0.1:{self._server.server_port}"
        self.url = f"{scheme}://{self.where}/demo"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
