"""The rendezvous on a web server: several hosts, faults of the server, and what it may learn."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from firstboot import pki
from firstboot.discovery import http
from firstboot.discovery.http import MAX_FILE, MAX_LINES, Http, valid_lines
from firstboot.discovery.interface import Context, ProviderReport
from firstboot.protocol.errors import RemoteError
from firstboot.protocol.model import Endpoint
from firstboot.userdata import make_token
from tests.adapters.rendezvous_server import Handler, RendezvousServer

TOKEN = make_token()


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    with RendezvousServer() as running:
        yield running
    assert running.mistakes == []


class One:
    """A host at a rendezvous."""

    def __init__(
        self, server: RendezvousServer, number: int, token: str = TOKEN, **options: Any
    ) -> None:
        self.endpoint = Endpoint(f"10.0.0.{number}", 7443)
        self.found: list[Endpoint] = []
        root = options.pop("root", Path("/"))
        seal = pki.Seal(token, "demo")
        context = Context(
            *("a" * 16, "demo", f"{number:016x}"), root=root, seal=seal.seal, unseal=seal.unseal
        )
        options = {"url": server.url, **options}
        self.provider = Http(options, context)

    async def look(self) -> set[str]:
        """Announce, at once; whom it names."""
        self.found.clear()
        await self.provider.start(self.endpoint, self.found.append, lambda *_: None)
        self.provider._next = 0.0
        await self.provider.announce()
        return {e.host.removeprefix("10.0.0.") for e in self.found}


def look(*hosts: One) -> list[set[str]]:
    """Each host looks, one after the other."""

    async def run() -> list[set[str]]:
        return [await host.look() for host in hosts]

    return asyncio.run(run())


def report(host: One) -> ProviderReport:
    look(host)
    return host.provider.report()


def test_hosts_find_those_that_came_before_them(server: RendezvousServer) -> None:
    hosts = [One(server, n) for n in (1, 2, 3)]
    assert look(*hosts, *hosts) == [set(), {"1"}, {"1", "2"}, {"2", "3"}, {"1", "3"}, {"1", "2"}]
    assert server.writes == 3  # nobody writes what is there already
    assert [h.provider.report().found for h in hosts] == [2, 2, 2]
    assert {h.provider.report().error for h in hosts} == {""}


def test_many_at_once_lose_no_line(server: RendezvousServer) -> None:
    hosts = [One(server, n) for n in range(1, 9)]

    async def run() -> None:
        for _ in range(20):
            await asyncio.gather(*(host.look() for host in hosts))
            if all(len(host.found) == 7 for host in hosts):
                return
        pytest.fail("somebody is missing")

    asyncio.run(run())
    assert server.conflicts > 0
    assert len(server.files["/demo"][0].splitlines()) == 8


def test_lines_lost_by_a_server_that_ignores_conditions_are_written_again(
    server: RendezvousServer,
) -> None:
    server.with_conditions = False
    hosts = [One(server, n) for n in range(1, 5)]

    async def run() -> None:
        for _ in range(50):
            await asyncio.gather(*(host.look() for host in hosts))
            if all(len(host.provider._named) == 3 for host in hosts):
                return
        pytest.fail("somebody is missing")

    asyncio.run(run())


def test_the_server_learns_nothing(server: RendezvousServer) -> None:
    look(One(server, 1), One(server, 2))
    body, _ = server.files["/demo"]
    for secret in (b"10.0.0", b"7443", TOKEN.encode(), b"demo"):
        assert secret not in body


def test_another_token_is_not_read_and_not_removed(server: RendezvousServer) -> None:
    ours, other = One(server, 1), One(server, 2, make_token())
    assert look(ours, other, ours, other) == [set(), set(), set(), set()]
    assert len(server.files["/demo"][0].splitlines()) == 2
    assert server.writes == 2


def test_lines_expire_by_the_servers_clock(server: RendezvousServer) -> None:
    """Hosts' clocks may be unset: only the server's counts, which is the same for all."""
    server.date = formatdate(1_000_000_000, usegmt=True)
    first, second = One(server, 1), One(server, 2)
    assert look(first, second) == [set(), {"1"}]
    server.date = formatdate(1_000_000_000 + http.LIFETIME - 1, usegmt=True)
    assert look(second) == [{"1"}]
    assert server.writes == 3  # it renewed its own line
    server.date = formatdate(1_000_000_000 + http.LIFETIME + 1, usegmt=True)
    assert look(second) == [set()]
    assert look(first) == [{"2"}]


def test_a_line_of_an_earlier_process_here_is_replaced(server: RendezvousServer) -> None:
    before, now = One(server, 1), One(server, 1)
    now.provider._context = Context(
        *("a" * 16, "demo", "f" * 16),
        seal=before.provider._context.seal,
        unseal=before.provider._context.unseal,
    )
    assert look(before, now) == [set(), set()]
    assert len(server.files["/demo"][0].splitlines()) == 1


def test_a_sealed_line_that_is_moved_or_changed_is_nobodys() -> None:
    seal = pki.Seal(TOKEN, "demo")
    sealed = seal.seal(b"text", b"100")
    assert seal.unseal(sealed, b"100") == b"text"
    for changed, about in (
        (sealed, b"200"),
        (sealed[:-1] + bytes([sealed[-1] ^ 1]), b"100"),
        (sealed[:5], b"100"),
        (b"", b"100"),
    ):
        with pytest.raises(RemoteError):
            seal.unseal(changed, about)
    with pytest.raises(RemoteError):
        pki.Seal(TOKEN, "demo/second").unseal(sealed, b"100")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n" * 1000,
        b"<html>no such thing</html>",
        os.urandom(20_000),
        b"99999999999999999999 AAAA\n",
        b"1 AAAA\n",
        b"-5 AAAA\n",
        b"1000000100 " + b"A" * 600,
        b"2000000000 AAAA\n",  # for ever
    ],
)
def test_rubbish_is_dropped(body: bytes) -> None:
    assert valid_lines(body, 1_000_000_000) == []


def test_a_flood_of_lines_is_bounded(server: RendezvousServer) -> None:
    now = int(time.time())
    flood = b"".join(b"%d %s\n" % (now + 100, b"QUFB" * n) for n in range(1, 100) for _ in range(3))
    server.files["/demo"] = flood, '"flood"'
    look(One(server, 1))
    assert len(server.files["/demo"][0].splitlines()) == 2 * MAX_LINES
    assert look(One(server, 2)) == [{"1"}]


def test_a_large_formation_leaves_enough_and_no_more(server: RendezvousServer) -> None:
    hosts = [One(server, n) for n in range(1, MAX_LINES + 20)]
    look(*hosts)
    assert len(server.files["/demo"][0].splitlines()) == MAX_LINES
    assert len(look(hosts[-1])[0]) == MAX_LINES


def test_authorization_comes_from_a_file(server: RendezvousServer, tmp_path: Path) -> None:
    server.authorization = "Basic c2VjcmV0OndvcmQ="
    assert report(One(server, 1)).error == "GET was answered with 401"
    with_file = One(server, 1, root=tmp_path, authorization_file="/etc/a")
    assert report(with_file).error == "/etc/a cannot be read"
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/a").write_text("Basic wrong\nX-More: header\n")
    assert report(with_file).error == "/etc/a must be one line of text"
    (tmp_path / "etc/a").write_text(f"{server.authorization}\n")
    assert report(with_file).error == ""
    told = json.dumps([report(with_file).detail, report(with_file).remedy])
    assert "c2VjcmV0" not in told
    assert server.writes == 1


def status(code: int, method: str = "GET") -> Any:
    def fault(handler: Handler) -> bool:
        if handler.command == method:
            handler.answer(code)
        return handler.command == method

    return fault


@pytest.mark.parametrize(
    ("method", "code", "remedy"),
    [
        ("GET", 403, "GET and PUT"),
        ("GET", 500, "log"),
        ("GET", 301, "log"),
        ("PUT", 404, "directory"),
        ("PUT", 405, "WebDAV"),
        ("PUT", 507, "log"),
    ],
)
def test_what_the_server_refuses(
    server: RendezvousServer, method: str, code: int, remedy: str
) -> None:
    server.fault = status(code, method)
    told = report(One(server, 1))
    assert told.error == f"{method} was answered with {code}"
    assert remedy in told.remedy
    assert told.detail == f"GET and PUT {server.url}"


def test_a_server_without_conditional_writes_is_told(server: RendezvousServer) -> None:
    first = One(server, 1)
    look(first)
    server.with_etags = False
    told = report(first)
    assert told.error == "the server gives no ETag"
    assert "WebDAV" in told.remedy


def test_a_weak_etag_is_waited_for(server: RendezvousServer) -> None:
    """Apache's ETag is weak in the second in which the file was written."""
    look(One(server, 1))
    body, etag = server.files["/demo"]
    server.files["/demo"] = body, f"W/{etag}"

    def fault(handler: Handler) -> bool:
        server.files["/demo"] = body, etag  # from now on
        server.fault = None
        handler.answer(200, body, f"W/{etag}")
        return True

    server.fault = fault
    assert look(One(server, 2)) == [{"1"}]
    assert server.writes == 2


def test_others_that_always_write_first(
    server: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    server.fault = status(412, "PUT")
    assert report(One(server, 1)).error == "other hosts wrote first, each time"


def test_an_endless_body_is_cut(server: RendezvousServer) -> None:
    def fault(handler: Handler) -> bool:
        handler.answer(200, b"x" * (MAX_FILE + 100_000), '"x"')
        return True

    server.fault = fault
    assert "larger than" in report(One(server, 1)).error


def test_a_server_that_drips_is_left(
    server: RendezvousServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()

    def fault(handler: Handler) -> bool:
        handler.send_response(200)
        handler.flush_headers()
        while not done.wait(0.02):
            handler.wfile.write(b"X-A: b\r\n")
        return True

    server.fault = fault
    host = One(server, 1)
    monkeypatch.setattr(http, "ALL_SECONDS", 0.3)  # a question alone would take ten
    told = report(host)
    assert (told.error, told.remedy) == (
        "no answer in time",
        f"Let this host reach {server.where} over TCP.",
    )
    done.set()


def test_nobody_there_and_no_web_server(server: RendezvousServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    gone = One(server, 1, url=f"http://127.0.0.1:{port}/demo")
    assert report(gone).error == "connection refused: nothing listens there yet"
    with socket.create_server(("127.0.0.1", 0)) as other:

        def talk() -> None:
            visitor, _ = other.accept()
            visitor.recv(100)
            visitor.sendall(b"220 mail.example.org\r\n")
            visitor.close()

        thread = threading.Thread(target=talk)
        thread.start()
        mail = One(server, 1, url=f"http://127.0.0.1:{other.getsockname()[1]}/demo")
        assert report(mail).error == "its answer is not HTTP, or not whole (BadStatusLine)"
        thread.join()


def test_an_empty_rendezvous_is_told_after_a_while(server: RendezvousServer) -> None:
    host = One(server, 1)
    look(host, host)
    assert host.provider.report().error == ""
    look(host, host, host)
    assert host.provider.report().error == "no other host is in that file"


def test_looks_come_less_and_less_often(server: RendezvousServer) -> None:
    host, pauses = One(server, 1), []
    for _ in range(6):
        look(host)
        pauses.append(round(host.provider.report().next_try - time.time()))
    assert pauses == [1, 2, 5, 10, 20, 20]


def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    make += ["-nodes", "-subj", "/CN=rendezvous", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*make, "-keyout", tmp_path / "key", "-out", tmp_path / "ca.pem"],
        check=True,
        capture_output=True,
    )
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "ca.pem", tmp_path / "key")
    with RendezvousServer(tls) as server:
        assert "certificate is not accepted" in report(One(server, 1)).error
        good = One(server, 1, root=tmp_path, ca_file="/ca.pem")
        assert report(good).error == ""
        assert server.writes == 1
        missing = One(server, 1, root=tmp_path, ca_file="/gone.pem")
        assert report(missing).error == "/gone.pem cannot be read"
