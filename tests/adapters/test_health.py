"""The health gate against real servers on loopback."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from firstboot import health, pki
from firstboot.health import ProbeFailed, create, probe, wait
from firstboot.protocol.model import Member, Profile
from firstboot.protocol.plan import CreateObject, Probe

NODE = "0123456789abcdef" * 2
GENEROUS = 60.0
Answer = Callable[[BaseHTTPRequestHandler], None]


def plain(status: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    return answer


class Server:
    """Answers each request with the next of `answers`, the last one again and again."""

    def __init__(
        self, *answers: Answer, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
    ) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                answers[min(len(outer.asked), len(answers)) - 1](self)

            do_POST = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        class Quiet(HTTPServer):
            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that goes away in the middle is what is tested

        self._server = Quiet((host, 0), Handler)
        if tls is not None:
            # The handshake happens at the first read, in the handler, where a failure harms nobody.
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(GENEROUS)
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    with ExitStack() as servers:

        def serve(
            *answers: Answer, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1"
        ) -> Server:
            server = Server(*answers, tls=tls, host=host)
            servers.callback(server.close)
            return server

        yield serve


def failure(step: Probe, root: Path = Path("/"), seconds: float = GENEROUS) -> str:
    with pytest.raises(ProbeFailed) as caught:
        probe(step, root, seconds)
    return str(caught.value)


# ---------------------------------------------------------------- plain HTTP


def test_200_opens_the_gate(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(plain(200, b"ok"))
    probe(Probe(f"http://127.0.0.1:{server.port}"), tmp_path)
    probe(Probe(f"http://127.0.0.1:{server.port}/healthz?verbose=1"), tmp_path)
    assert server.asked == ["/", "/healthz?verbose=1"]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (503, b"etcd has\r\n no \x1b[31mleader", "HTTP 503: etcd has no [31mleader"),
        (500, b"", "HTTP 500"),
        (204, b"", "HTTP 204"),
        (404, b"x" * 100_000, f"HTTP 404: {'x' * 200}"),
    ],
)
def test_any_other_answer_is_told(
    serve: Callable[..., Server], status: int, body: bytes, words: str
) -> None:
    server = serve(plain(status, body))
    assert failure(Probe(f"http://127.0.0.1:{server.port}/")) == words


def test_an_answer_must_hold_what_is_asked_for(serve: Callable[..., Server]) -> None:
    ready, other = b'{"type":"Ready","status":"True"}', b'{"type":"Ready","status":"False"}'
    server = serve(plain(200, b" " * 90_000 + ready), plain(200, other), plain(500, ready))
    url, wanted = f"http://127.0.0.1:{server.port}/", '"type":"Ready","status":"True"'
    probe(Probe(url, contains=wanted), Path("/"))
    assert failure(Probe(url, contains=wanted, lacks="not ready")) == "not ready"
    assert failure(Probe(url, contains=wanted)).startswith("HTTP 500")


def test_a_redirect_is_not_followed(serve: Callable[..., Server]) -> None:
    other = serve(plain(200))
    server = serve(plain(302, Location=f"http://127.0.0.1:{other.port}/"))
    assert failure(Probe(f"http://127.0.0.1:{server.port}/")) == "HTTP 302"
    assert other.asked == []


def test_a_proxy_is_not_asked(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy, server = serve(plain(200)), serve(plain(503))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    assert failure(Probe(f"http://127.0.0.1:{server.port}/")) == "HTTP 503"
    assert proxy.asked == []


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_nothing_listens() -> None:
    assert "connection refused" in failure(Probe(f"http://127.0.0.1:{unused_port()}/"))


@contextmanager
def raw_server(answer: bytes) -> Iterator[int]:
    """Accepts one connection, answers with these bytes; without any, holds it open."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = threading.Event()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)
                if not answer:
                    done.wait(GENEROUS)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            done.set()
            thread.join(GENEROUS)


def test_no_answer_in_time() -> None:
    with raw_server(b"") as port:
        reason = failure(Probe(f"http://127.0.0.1:{port}/"), seconds=0.1)
    assert reason == "no whole answer within 0.1 s"


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 xx\r\n\r\n", b"\0" * 70_000]
)
def test_an_answer_that_is_not_http(answer: bytes) -> None:
    with raw_server(answer) as port:
        reason = failure(Probe(f"http://127.0.0.1:{port}/"))
    assert "its answer is not HTTP" in reason
    assert len(reason) < 300


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:99999/", "ftp://x/", "http://a b/"]
)
def test_what_is_not_a_url(url: str) -> None:
    failure(Probe(url))


# ---------------------------------------------------------------- TLS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host's file system with a CA, two certificates and a stranger's CA."""
    authority = pki.make_authority("demo", 1)
    stranger = pki.make_authority("other", 1)
    member = Member(NODE, "node-a", "192.0.2.1")
    key = pki.make_key()
    request = pki.make_request(key, NODE)
    (tmp_path / "pki").mkdir()
    for profile in (Profile.SERVER, Profile.CLIENT):
        signed = pki.sign(authority, request, member, profile, "firstboot")
        (tmp_path / f"pki/{profile.value}.crt").write_bytes(pki.to_pem(signed))
    (tmp_path / "pki/host.key").write_bytes(key)
    (tmp_path / "pki/ca.crt").write_bytes(pki.to_pem(authority.certificate))
    (tmp_path / "pki/other.crt").write_bytes(pki.to_pem(stranger.certificate))
    return tmp_path


def server_tls(root: Path, *, clients: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(root / "pki/server.crt", root / "pki/host.key")
    if clients:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(root / "pki/ca.crt")
    return context


def step(port: int, authority: str = "/pki/ca.crt", *, client: bool = True) -> Probe:
    url = f"https://127.0.0.1:{port}/health"
    if not client:
        return Probe(url, authority)
    return Probe(url, authority, "/pki/client.crt", "/pki/host.key")


def test_mutual_tls_with_paths_under_the_root(serve: Callable[..., Server], root: Path) -> None:
    server = serve(plain(200), tls=server_tls(root, clients=True))
    probe(step(server.port), root)
    assert server.asked == ["/health"]


def test_a_server_of_another_authority(serve: Callable[..., Server], root: Path) -> None:
    server = serve(plain(200), tls=server_tls(root, clients=True))
    assert "its certificate is not accepted" in failure(step(server.port, "/pki/other.crt"), root)
    # without an authority the system's are meant, which do not know this one either
    assert "its certificate is not accepted" in failure(step(server.port, ""), root)
    assert server.asked == []


def test_a_server_of_another_name(serve: Callable[..., Server], root: Path) -> None:
    server = serve(plain(200), tls=server_tls(root, clients=False), host="127.0.0.2")
    url = f"https://127.0.0.2:{server.port}/"  # its certificate is good for 127.0.0.1 only
    reason = failure(Probe(url, "/pki/ca.crt"), root)
    assert reason.startswith("its certificate is not accepted: ")
    assert "127.0.0.2" in reason
    assert server.asked == []


@contextmanager
def refusing_server(context: ssl.SSLContext) -> Iterator[int]:
    """Refuses one handshake, and lingers until the client has read why: else a reset may win."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection.dup() as lingering:
                with pytest.raises(ssl.SSLError):
                    context.wrap_socket(connection, server_side=True)
                lingering.shutdown(socket.SHUT_WR)
                while lingering.recv(65536):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            thread.join(GENEROUS)


def test_a_client_certificate_that_is_missing(root: Path) -> None:
    with refusing_server(server_tls(root, clients=True)) as port:
        reason = failure(step(port, client=False), root)
    assert reason == "it wants a client certificate"


def test_a_client_certificate_that_is_not_accepted(root: Path) -> None:
    context = server_tls(root, clients=False)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(root / "pki/other.crt")
    with refusing_server(context) as port:
        reason = failure(step(port), root)
    assert reason == "it does not accept this host's certificate"


def test_plain_http_where_tls_is_expected(root: Path) -> None:
    with raw_server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        reason = failure(step(port), root)
    assert reason == "what listens there does not speak TLS"


def test_a_connection_closed_without_an_answer(root: Path) -> None:
    with raw_server(b"\x15") as port:  # the first byte of a TLS alert
        reason = failure(step(port), root)
    assert reason == "it closed the connection without an answer"


def test_certificates_that_are_not_there_yet(root: Path) -> None:
    (root / "pki/client.crt").unlink()
    assert "cannot be read" in failure(step(unused_port()), root)


# ---------------------------------------------------------------- waiting


def test_waiting_until_it_is_healthy(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(plain(503), plain(500), plain(200))
    wait(Probe(f"http://127.0.0.1:{server.port}/", deadline=GENEROUS), tmp_path)
    assert len(server.asked) == 3


def test_the_last_reason_at_the_deadline(serve: Callable[..., Server], tmp_path: Path) -> None:
    server = serve(plain(503, b"starting"), plain(503, b"no leader"))
    with pytest.raises(ProbeFailed) as caught:
        wait(Probe(f"http://127.0.0.1:{server.port}/", deadline=0.3), tmp_path)
    assert str(caught.value) == "not healthy after 0 s: HTTP 503: no leader"
    assert len(server.asked) >= 3  # at 0, 0.05, 0.15 and at the deadline


def test_a_server_that_hangs_cannot_hold_the_gate_beyond_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []

    def hanging(step: Probe, root: Path, seconds: float) -> None:
        limits.append(seconds)
        threading.Event().wait(seconds)
        raise ProbeFailed("no answer")

    monkeypatch.setattr(health, "probe", hanging)
    with pytest.raises(ProbeFailed, match="no answer"):
        wait(Probe("http://127.0.0.1:1/", deadline=0.2), tmp_path)
    assert max(limits) <= 0.2


def test_waiting_can_be_cancelled(tmp_path: Path) -> None:
    cancelled = threading.Event()
    caught: list[str] = []

    def run() -> None:
        try:
            wait(Probe(f"http://127.0.0.1:{unused_port()}/", deadline=1e6), tmp_path, cancelled)
        except ProbeFailed as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    started = time.monotonic()
    thread.start()
    cancelled.set()
    thread.join(GENEROUS)
    assert time.monotonic() - started < GENEROUS
    assert caught == ["waiting for it to be healthy was cancelled"]


# ---------------------------------------------------------------- objects


def an_object(port: int) -> CreateObject:
    return CreateObject(f"http://127.0.0.1:{port}/api/v1/things", "Thing x", "{}", "", "", "")


@pytest.mark.parametrize("code", [200, 201, 409])
def test_an_object_is_made_or_there_already(
    serve: Callable[..., Server], tmp_path: Path, code: int
) -> None:
    server = serve(plain(code, b"{}"))
    create(an_object(server.port), tmp_path, b'{"kind":"Thing"}')
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 500])
def test_an_object_that_is_refused(serve: Callable[..., Server], tmp_path: Path, code: int) -> None:
    server = serve(plain(code, b'{"message":"why not"}'))
    with pytest.raises(ProbeFailed, match=rf"HTTP {code}: .*why not"):
        create(an_object(server.port), tmp_path, b"{}")
