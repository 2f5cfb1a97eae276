"""The kernel's command line: what it may say, and getting what it names, in bounds."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from firstboot import named as loop
from firstboot import web
from firstboot.protocol.errors import LocalError, UserError
from firstboot.userdata import FETCHED, fetch
from firstboot.userdata.kernel import Source, named

DOCUMENT = b"cluster: demo\n"
DIGEST = hashlib.sha256(DOCUMENT).hexdigest()
KEY = f"firstboot.config.digest=sha256:{DIGEST}"


# ---------------------------------------------------------------- what it says


def line(root: Path, text: str) -> Path:
    (root / "proc/1").mkdir(parents=True, exist_ok=True)
    (root / "proc/cmdline").write_text(text)
    return root


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("ro quiet root=UUID=1 systemd.firstboot=no", None),
        ("firstboot.config=https://h/d.yaml ro", Source("https://h/d.yaml", "", "")),
        (f"firstboot.config=http://h:81/d?x=1 {KEY}", Source("http://h:81/d?x=1", "", DIGEST)),
        (f'"firstboot.config=http://[fd00::1]/d" {KEY}', Source("http://[fd00::1]/d", "", DIGEST)),
        (
            f"firstboot.config.digest=SHA256:{DIGEST.upper()} firstboot.config=/dev/sr0:/a/b",
            Source("/dev/sr0", "/a/b", DIGEST),
        ),
        ("firstboot.config=LABEL=SEED", Source("LABEL=SEED", "/firstboot.yaml", "")),
        ("firstboot.config=/dev/vdb firstboot.config=/dev/vdc:/x", Source("/dev/vdc", "/x", "")),
        ("a='unfinished firstboot.config=/dev/vdb", Source("/dev/vdb", "/firstboot.yaml", "")),
    ],
)
def test_what_it_names(tmp_path: Path, text: str, source: Source | None) -> None:
    assert named(line(tmp_path, f"{text}\n")) == source


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("firstboot.config=", "firstboot.config is empty"),
        ("firstboot.config", "unknown argument 'firstboot.config'; write firstboot.config=URL"),
        ("firstboot.confg=https://h/d", "unknown argument 'firstboot.confg'"),
        ("firstboot.config=ftp://h/d", "neither a URL nor a device; write http://"),
        ("firstboot.config=https:///d", "neither a URL nor a device"),
        ("firstboot.config=https://h:99999/d", "neither a URL nor a device"),
        ("firstboot.config=sda1", "neither a URL nor a device"),
        ("firstboot.config=https://u:hush@h/d", "has a password in it"),
        ("firstboot.config=http://h/d", "comes over http may be anybody's; use https, or add"),
        (f"firstboot.config=http://h/d {KEY[:-1]}", "is not a SHA-256 digest; write sha256:"),
        ("firstboot.config=/dev/vdb firstboot.config.digest=md5:1", "is not a SHA-256 digest"),
        (KEY, "firstboot.config.digest without firstboot.config"),
        ("firstboot.config=/dev/vdb:x", "must name a file from /"),
        (f"firstboot.config=https://h/{'x' * 2048}", "too long"),
        ("firstboot.config=https://h/\u00e4", "not plain ASCII"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        named(line(tmp_path, text))
    assert str(caught.value).startswith("the kernel's command line: ")
    assert told in str(caught.value)
    assert "hush" not in str(caught.value)


def test_in_a_container_it_is_that_of_its_first_process(tmp_path: Path) -> None:
    line(tmp_path, "firstboot.config=/dev/of-the-host")
    (tmp_path / "proc/1/cmdline").write_bytes(b"/sbin/init\0firstboot.config=/dev/mine\0")
    (tmp_path / "run/systemd").mkdir(parents=True)
    (tmp_path / "run/systemd/container").write_text("systemd-nspawn\n")
    assert named(tmp_path) == Source("/dev/mine", "/firstboot.yaml", "")
    assert named(tmp_path / "nothing here") is None


def test_people_do_not_see_what_may_be_secret() -> None:
    assert str(Source("https://h/d?signature=hush#x", "", "")) == "https://h/d"
    assert str(Source("LABEL=SEED", "/x", "")) == "LABEL=SEED:/x"


# ---------------------------------------------------------------- getting it


Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A server on loopback that answers each connection with the next of the given bytes."""
    with ExitStack() as stack:

        def start(*answers: bytes, pause: float = 0.0, secure: ssl.SSLContext | None = None) -> str:
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            stop = threading.Event()

            def run() -> None:
                for answer in answers:
                    try:
                        wire, _ = listener.accept()
                        wire = secure.wrap_socket(wire, server_side=True) if secure else wire
                    except OSError:
                        continue
                    with wire:
                        wire.settimeout(5)
                        try:
                            wire.recv(65536)
                            for piece in [answer] if not pause else [b"%c" % b for b in answer]:
                                wire.sendall(piece)
                                stop.wait(pause)
                        except OSError:
                            continue

            thread = threading.Thread(target=run)
            thread.start()
            stack.callback(thread.join)
            stack.callback(listener.close)
            stack.callback(lambda: listener.shutdown(socket.SHUT_RDWR))
            stack.callback(stop.set)
            return f"http{'s' if secure else ''}://127.0.0.1:{listener.getsockname()[1]}/d.yaml"

        yield start


def answer(body: bytes, status: str = "200 OK", length: int = -1) -> bytes:
    size = len(body) if length < 0 else length
    head = f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def get(url: str, directory: Path, digest: str = DIGEST) -> bytes:
    return fetch.fetch(Source(url, "", digest), directory)


def test_a_document_comes_over_http(serve: Serve, tmp_path: Path) -> None:
    assert get(serve(answer(DOCUMENT)), tmp_path) == DOCUMENT


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (answer(b"cluster: evil\n"), "which is not what firstboot.config.digest says"),
        (answer(b"", "404 Not Found"), "the server answers 404 Not Found"),
        (answer(b"", "302 Found\r\nLocation: http://127.0.0.1/x"), "the server answers 302 Found"),
        (answer(DOCUMENT, length=5000), "the connection ended before its answer did"),
        (answer(b"x" * (1 << 20) + b"x"), "its answer is larger than 1 MB"),
        (answer(b"", length=1 << 40) + b"x" * (2 << 20), "its answer is larger than 1 MB"),
        (b"SSH-2.0-OpenSSH\r\n", "is not HTTP, or not whole"),
        (b"", "it closed the connection without an answer"),
        (answer(b"", "500 \x1b[31m"), "the server answers 500 [31m"),
        (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200, "is not HTTP, or not whole"),
    ],
)
def test_what_is_not_the_document_is_told(
    serve: Serve, tmp_path: Path, said: bytes, told: str
) -> None:
    with pytest.raises(LocalError) as caught:
        get(serve(said), tmp_path)
    assert told in str(caught.value)


def test_a_server_that_dawdles_is_left(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", 0.3)
    with pytest.raises(LocalError, match=r"within 0\.3 s"):
        get(serve(answer(DOCUMENT * 1000), pause=0.05), tmp_path)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(LocalError, match=r"within 0\.3 s"),
    ):
        get(f"https://127.0.0.1:{silent.getsockname()[1]}/", tmp_path)


def test_silence_and_refusal_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "SILENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        with pytest.raises(LocalError, match="it does not answer"):
            get(url, tmp_path)
    with pytest.raises(LocalError, match="connection refused"):
        get(url, tmp_path)


def certificate(directory: Path) -> ssl.SSLContext:
    """A server on 127.0.0.1 with a certificate of its own, which is `directory`/ca.pem."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(made.public_bytes(pem))
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "ca.pem", directory / "key.pem")
    return context


def test_https_needs_no_digest_but_trust(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = serve(answer(DOCUMENT), answer(DOCUMENT), secure=certificate(tmp_path))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    assert get(url, tmp_path, digest="") == DOCUMENT
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    with pytest.raises(LocalError, match="certificate is not accepted: self"):
        get(url, tmp_path, digest="")


def test_a_device_that_is_not_there_is_told_and_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"mount: .*no-such-device"):
        fetch.fetch(Source("/dev/no-such-device", "/x", ""), tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- until it is there


class Told:
    """Stands in for the Publisher: keeps what it was told."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def waiting_for_document(self, source: str, reason: str) -> None:
        self.sentences.append(f"{source}: {reason}")


def obtain(root: Path, told: Any) -> None:
    loop.obtain(root, told)


def test_it_is_tried_until_it_is_there_and_then_kept(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    evil = answer(b"cluster: evil\n")
    url = serve(answer(b"", "503 Soon"), evil, answer(DOCUMENT))
    line(tmp_path, f"firstboot.config={url}?key=hush {KEY}")
    told = Told()
    obtain(tmp_path, told)
    kept = tmp_path / FETCHED
    assert kept.read_bytes() == DOCUMENT
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert told.sentences[0] == f"{url}: the server answers 503 Soon"
    assert "which is not what" in told.sentences[1]
    assert "hush" not in str(told.sentences)
    assert pauses == [1.0, 2.0]
    obtain(tmp_path, told)  # the server is gone: this asks nobody
    assert len(told.sentences) == 2
    loop.forget(tmp_path)
    assert not kept.exists()


def test_without_the_argument_nothing_happens(tmp_path: Path) -> None:
    obtain(line(tmp_path, "ro quiet"), Told())
    assert not (tmp_path / "run").exists()
    loop.forget(tmp_path)
