"""HTTP servers of the doubles, and the faults they show on demand.

Faults: ``silent`` answers nothing, ``slow`` one byte a second, ``garbage`` what is neither XML nor
JSON, ``oversized`` 64 MiB of spaces, ``closed`` hangs up, ``throttled`` what the cloud says when
asked too often, ``disabled`` 403, ``broken`` 500.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

OVERSIZED = 64 * 1024 * 1024


class Server(ThreadingHTTPServer):
    """A server in a thread of its own; `calls` counts what it was asked."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, where: str, handler: type[Handler], tls: ssl.SSLContext | None) -> None:
        host, _, port = where.rpartition(":")
        self.calls: Counter[str] = Counter()
        super().__init__((host, int(port)), handler)
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self.scheme = "https" if tls else "http"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.server_address[:2]
        return f"{self.scheme}://{host!s}:{port}"


class Handler(BaseHTTPRequestHandler):
    """What the handlers share: bounded bodies, answers, faults."""

    protocol_version = "HTTP/1.1"
    timeout = 60
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: requests are counted."""

    def body(self) -> bytes:
        """What was sent along."""
        return self.rfile.read(min(int(self.headers.get("Content-Length") or 0), 1 << 20))

    def answer(self, status: int, body: bytes | str = b"", **headers: str) -> None:
        """Answer, and keep the connection; ``_`` in a header's name stands for ``-``."""
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def json(self, status: int, data: Any, **headers: str) -> None:
        """Answer with JSON."""
        self.answer(status, json.dumps(data), Content_Type="application/json", **headers)

    def fails(self, fault: str) -> bool:
        """Show that fault, should it be one; False if there is none."""
        if not fault:
            return False
        self.close_connection = True
        if fault == "silent":
            time.sleep(60)
        elif fault == "slow":
            self._slowly()
        elif fault == "garbage":
            self.answer(200, b"\x00\xff<not>{xml nor json\x1b[31m" * 20)
        elif fault == "oversized":
            self._endlessly()
        elif fault == "disabled":
            self.answer(403, "Forbidden")
        elif fault == "broken":
            self.answer(500, "Internal Server Error")
        elif fault != "closed":
            raise ValueError(f"unknown fault {fault}")
        return True

    def _slowly(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _ in range(60):
            try:
                self.wfile.write(b" ")
            except OSError:
                return
            time.sleep(1)

    def _endlessly(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(OVERSIZED))
        self.end_headers()
        try:
            for _ in range(OVERSIZED // 65536):
                self.wfile.write(b" " * 65536)
        except OSError:
            return


def tls(directory: str, names: Sequence[str]) -> ssl.SSLContext | None:
    """A certificate for those names and addresses; its authority is ``ca.pem`` in `directory`."""
    if not directory:
        return None
    place = Path(directory)
    place.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]

    def certificate(subject: str, number: int, *extensions: Any) -> x509.Certificate:
        builder = x509.CertificateBuilder(
            subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]),
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "cloud")]),
            public_key=keys[number].public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(days=1),
            not_valid_after=now + datetime.timedelta(days=7),
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        return builder.sign(keys[0], hashes.SHA256())

    authority = certificate("cloud", 0, (x509.BasicConstraints(True, 0), True))
    alternatives = x509.SubjectAlternativeName([_name(text) for text in names])
    own = certificate("service", 1, (alternatives, False))
    key = keys[1].private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    pem = serialization.Encoding.PEM
    (place / "ca.pem").write_bytes(authority.public_bytes(pem))
    (place / "service.pem").write_bytes(own.public_bytes(pem) + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(place / "service.pem")
    return context


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)
