"""Multicast DNS: what the records say, and real hosts in network namespaces on a bridge."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import firstboot
from firstboot.discovery.interface import Context
from firstboot.discovery.mdns import (
    MAX_REMEMBERED,
    MAX_STRANGERS,
    MAX_TOLD,
    Heard,
    Responder,
    Sieve,
    formation_text,
    parse_txt,
)
from firstboot.protocol.model import Endpoint

PROJECT = str(Path(firstboot.__file__).parents[1])
CONTEXT = Context(tag="a" * 16, formation_id="demo", boot="00" * 8)
OWN = Endpoint("10.0.0.1", 7443)
GENEROUS = 60.0  # a limit for things that take milliseconds, on a slow and busy machine
QUIET = 2.5

# ---------------------------------------------------------------- the records


class Told:
    """Collects what a sieve says."""

    def __init__(self, own: Endpoint = OWN) -> None:
        self.found: list[Endpoint] = []
        self.strangers: list[tuple[str, str]] = []
        self.sieve = Sieve(CONTEXT, own, self.found.append, self._stranger)

    def _stranger(self, kind: str, source: str) -> None:
        self.strangers.append((kind, source))


def txt(
    formation: str = "demo", tag: str = "a" * 16, version: str = "1", admits: str = ""
) -> bytes:
    strings = [f"v={version}".encode(), f"f={formation}".encode(), f"t={tag}".encode()]
    strings += [f"m={admits}".encode()] if admits else []
    return b"".join(bytes([len(s)]) + s for s in strings)


def heard(
    label: str = "peer", data: bytes | None = None, *addresses: bytes, port: int = 7443
) -> Heard:
    return Heard(label, txt() if data is None else data, port, addresses or (b"\x0a\0\0\x02",))


def test_a_peer_is_named_once_a_round() -> None:
    told = Told()
    for _ in range(3):
        told.sieve.take(heard())
    assert told.found == [Endpoint("10.0.0.2", 7443)]
    told.sieve.next_round()
    told.sieve.take(heard())
    assert told.found == [Endpoint("10.0.0.2", 7443)] * 2
    assert told.sieve.found_so_far() == 1


def test_another_token_is_a_stranger_and_another_formation_nobody() -> None:
    told = Told()
    told.sieve.take(heard("x", txt(tag="b" * 16)))
    told.sieve.take(heard("y", txt(tag="b" * 16)))
    told.sieve.take(heard("z", txt(formation="other")))
    told.sieve.take(heard("w", txt(version="2")))
    told.sieve.take(heard("v", b""))
    assert told.found == []
    assert told.strangers == [("token", "10.0.0.2")]


def test_a_master_that_admits_is_named_unless_its_name_is_foul() -> None:
    told = Told()
    told.sieve.take(heard("x", txt(tag="b" * 16, admits="host-1")))
    assert told.strangers == [("admits", "host-1 at 10.0.0.2")]
    for name in ("\x1b[2J", "a b", "UPPER", "x" * 64, "é"):
        told = Told()
        told.sieve.take(heard("x", txt(tag="b" * 16, admits=name)))
        assert told.strangers == [("token", "10.0.0.2")]
    told = Told()  # who holds its token is a peer
    told.sieve.take(heard("x", txt(admits="host-1")))
    assert (told.strangers, len(told.found)) == ([], 1)


def test_own_records_are_not_a_peer() -> None:
    told = Told()
    assert not told.sieve.hears_itself
    told.sieve.take(heard(CONTEXT.boot))
    told.sieve.take(heard("former-self", None, b"\x0a\0\0\x01"))  # before a restart
    assert told.found == []
    assert told.sieve.hears_itself


def test_records_that_come_apart_are_asked_for_and_put_together() -> None:
    told = Told()
    told.sieve.take(Heard("peer", None, None, ()))
    told.sieve.take(Heard("peer", txt(), 7443, ()))
    assert list(told.sieve.incomplete) == ["peer"]
    told.sieve.take(heard("peer"))
    assert not told.sieve.incomplete
    assert told.found == [Endpoint("10.0.0.2", 7443)]


@pytest.mark.parametrize(
    ("address", "port"),
    [
        (b"\x7f\0\0\x01", 7443),
        (b"\0\0\0\0", 7443),
        (b"\xe0\0\0\xfb", 7443),
        (bytes(15) + b"\x01", 7443),
        (b"\xff\x02" + bytes(14), 7443),
        (b"\x0a\0\0", 7443),
        (b"\x0a\0\0\x02", 0),
        (b"\x0a\0\0\x02", 65536),
    ],
)
def test_addresses_that_no_record_may_steer_us_to(address: bytes, port: int) -> None:
    told = Told()
    told.sieve.take(heard("peer", None, address, port=port))
    assert told.found == []


def test_a_link_local_address_is_on_this_hosts_link() -> None:
    told = Told(Endpoint("fe80::1", 7443))
    told.sieve.take(heard("peer", None, b"\xfe\x80" + bytes(13) + b"\x02"))
    assert told.found == [Endpoint("fe80::2", 7443)]


def test_a_flood_is_bounded_and_hides_nobody() -> None:
    told = Told()
    for i in range(2 * MAX_REMEMBERED):
        address = (0x0B000000 + i).to_bytes(4, "big")
        told.sieve.take(heard(f"flood{i}", None, address))
        told.sieve.take(heard(f"token{i}", txt(tag="b" * 16), address))
        told.sieve.take(Heard(f"half{i}", None, None, ()))
    assert len(told.found) == MAX_TOLD
    assert len(told.strangers) == MAX_STRANGERS
    assert len(told.sieve.peers) == len(told.sieve.incomplete) == MAX_REMEMBERED
    told.sieve.next_round()
    told.sieve.take(heard("real"))
    assert told.found[-1] == Endpoint("10.0.0.2", 7443)


def test_txt_of_any_kind() -> None:
    assert parse_txt(txt()) == {"v": "1", "f": "demo", "t": "a" * 16}
    assert parse_txt(b"\x03a=1\x03A=2\x01b\0") == {"a": "1", "b": "", "": ""}
    assert parse_txt(b"\xffa=1") == {"a": "1"}
    shake = random.Random(1)
    for _ in range(2000):
        found = parse_txt(shake.randbytes(shake.randrange(700)))
        assert sum(map(len, found)) <= 512


def test_a_long_formation_id_fits() -> None:
    assert formation_text("demo/blue") == "demo/blue"
    assert len(formation_text("d" * 300)) == 64
    assert formation_text("d" * 300) != formation_text("d" * 301)


def test_nothing_heavy_is_imported_before_the_start() -> None:
    program = "import sys, firstboot.discovery.providers as p; assert 'zeroconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PROJECT, timeout=GENEROUS)


# ---------------------------------------------------------------- real hosts

PEER = """
import asyncio, json, sys
from firstboot.discovery.interface import Context
from firstboot.discovery.mdns import Mdns
from firstboot.protocol.model import Endpoint

def say(**what):
    print(json.dumps(what), flush=True)

async def main(host, tag, formation, boot):
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: say(broken=str(context)))
    provider = Mdns({}, Context(tag, formation, boot))
    await provider.start(
        Endpoint(host, 7443),
        lambda endpoint: say(found=endpoint.host),
        lambda kind, source: say(stranger=[kind, source]),
    )
    say(started=True)
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while command := (await reader.readline()).decode().strip():
        if command == "announce":
            await provider.announce()
        report = provider.report()
        say(done=command, found_so_far=report.found, error=report.error)
    await provider.stop()
    await provider.stop()
    say(stopped=True)

asyncio.run(main(*sys.argv[1:]))
"""

GARBAGE = """
import random, socket, struct, sys
shake = random.Random(7)
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(sys.argv[1]))
name = b"\\x04evil\\x0a_firstboot\\x04_tcp\\x05local\\0"
type_ = b"\\x0a_firstboot\\x04_tcp\\x05local\\0"
def record(owner, kind, data):
    return owner + struct.pack("!HHIH", kind, 1, 120, len(data)) + data
whole = struct.pack("!6H", 0, 0x8400, 0, 4, 0, 0) + b"".join([
    record(type_, 12, name),
    record(name, 33, struct.pack("!HHH", 0, 0, 7443) + b"\\x04evil\\x05local\\0"),
    record(name, 16, b"\\x03v=1\\x06f=demo\\xfft=" + b"\\xfe" * 9),
    record(b"\\x04evil\\x05local\\0", 1, b"\\x0a\\x63\\0\\x63"),
])
pointers = struct.pack("!6H", 0, 0x8400, 0, 1, 0, 0) + b"\\xc0\\x0c" * 200
for i in range(400):
    data = bytearray(whole if i % 4 else pointers)
    for _ in range(shake.randrange(1, 9)):
        data[shake.randrange(len(data))] = shake.randrange(256)
    data = bytes(data[: shake.randrange(1, len(data) + 1)]) if i % 3 else bytes(data)
    sock.sendto(shake.randbytes(shake.randrange(1, 1400)) if i % 5 == 0 else data,
                ("224.0.0.251", 5353))
"""


class Link:
    """Hosts on one bridge, each a network namespace; nothing of this machine's network is used."""

    def __init__(self, hosts: int) -> None:
        self._prefix = f"fbm{os.getpid()}"
        self._names = [f"{self._prefix}-sw", *(f"{self._prefix}-{n}" for n in range(1, hosts + 1))]
        self._peers: list[Peer] = []
        switch = self._names[0]
        self._ip("netns", "add", switch)
        self._ip("-n", switch, "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        self._ip("-n", switch, "link", "set", "br0", "up")
        for n, name in enumerate(self._names[1:], 1):
            self._add(n, name, switch)

    def _add(self, n: int, name: str, switch: str) -> None:
        self._ip("netns", "add", name)
        peer = ("peer", "name", f"p{n}", "netns", switch)
        self._ip("-n", name, "link", "add", "eth0", "type", "veth", *peer)
        self._ip("-n", switch, "link", "set", f"p{n}", "master", "br0", "up")
        for device in ("lo", "eth0"):
            self._ip("-n", name, "link", "set", device, "up")
        self._ip("-n", name, "addr", "add", f"10.99.0.{n}/24", "dev", "eth0")
        self._ip("-n", name, "addr", "add", f"fd99::{n}/64", "dev", "eth0", "nodad")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, timeout=GENEROUS)

    def command(self, n: int, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self._names[n], *arguments]

    def run(self, n: int, *arguments: str) -> str:
        command = self.command(n, *arguments)
        done = subprocess.run(command, check=True, timeout=GENEROUS, capture_output=True, text=True)
        return done.stdout

    def peer(self, n: int, tag: str = "a" * 16, formation: str = "demo", host: str = "") -> Peer:
        arguments = (host or f"10.99.0.{n}", tag, formation, f"{n:016x}")
        peer = Peer(self.command(n, sys.executable, "-c", PEER, *arguments))
        self._peers.append(peer)
        return peer

    def close(self) -> None:
        for peer in self._peers:
            peer.kill()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, timeout=GENEROUS)


class Peer:
    """A process that runs the provider, and what it said."""

    def __init__(self, command: list[str]) -> None:
        paths = [PROJECT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": ":".join(reversed(paths))},
        )
        self.said: list[dict[str, Any]] = []
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def until(self, **wanted: Any) -> dict[str, Any]:
        """Read what it says until it has said that."""
        deadline = time.monotonic() + GENEROUS
        while True:
            line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            assert line, f"it ended before it said {wanted}; it said {self.said}"
            self.said.append(json.loads(line))
            if wanted.items() <= self.said[-1].items():
                return self.said[-1]

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self.until(done=command)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self.until(stopped=True)
        assert self._process.wait(GENEROUS) == 0
        assert not any("broken" in what for what in self.said)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(GENEROUS)
        self._reader.join(GENEROUS)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link(3)
    try:
        yield link
    finally:
        link.close()


@pytest.mark.network
def test_hosts_find_each_other(link: Link) -> None:
    peers = [link.peer(n) for n in (1, 2, 3)]
    for peer in peers:
        peer.until(started=True)
    for peer in peers:  # as bootstrap does again and again: a loaded machine loses datagrams
        assert peer.ask("announce")["error"] == ""
    for n, peer in enumerate(peers, 1):
        for other in {1, 2, 3} - {n}:
            wanted = {"found": f"10.99.0.{other}"}
            if wanted not in peer.said:
                peer.until(**wanted)
    assert peers[0].ask("report")["found_so_far"] == 2
    for peer in peers:
        peer.stop()
        assert not any("stranger" in what for what in peer.said)


@pytest.mark.network
def test_hosts_find_each_other_over_ipv6(link: Link) -> None:
    peers = [link.peer(n, host=f"fd99::{n}") for n in (1, 2)]
    peers[0].until(found="fd99::2")
    peers[1].until(found="fd99::1")
    for peer in peers:
        peer.stop()


@pytest.mark.network
def test_multicast_that_is_lost_at_first(link: Link) -> None:
    """zeroconf's own announcements are all lost; the next announce() of one side suffices."""
    rule = "add rule bridge t c udp dport 5353 counter drop"
    table = "add table bridge t; add chain bridge t c { type filter hook forward priority 0; }"
    link.run(0, "nft", f"{table}; {rule}")
    first, second = link.peer(1), link.peer(2)
    first.until(started=True)
    second.until(started=True)
    # Until zeroconf has no more to say of its own accord: it repeats an announcement within half
    # a second and delays an answer by at most 1.5 s (RFC 6762, section 6, and its aggregation).
    dropped, since = -1, time.monotonic()
    while time.monotonic() - since < QUIET:
        listed = link.run(0, "nft", "list", "table", "bridge", "t")
        counted = re.search(r"counter packets (\d+)", listed)
        assert counted is not None
        if int(counted[1]) != dropped:
            dropped, since = int(counted[1]), time.monotonic()
        threading.Event().wait(0.1)
    assert dropped > 0
    link.run(0, "nft", "flush table bridge t")
    assert first.ask("report")["found_so_far"] == 0
    first.ask("announce")
    second.until(found="10.99.0.1")
    first.until(found="10.99.0.2")
    first.stop()
    second.stop()


@pytest.mark.network
def test_two_tokens_and_two_formations_on_one_link(link: Link) -> None:
    other = link.peer(3, formation="other")
    other.until(started=True)
    first, second = link.peer(1), link.peer(2, tag="b" * 16)
    first.until(stranger=["token", "10.99.0.2"])
    second.until(stranger=["token", "10.99.0.1"])
    other.ask("announce")
    for peer in (first, second, other):
        peer.stop()
        assert not any("found" in what for what in peer.said)
    assert not any("stranger" in what for what in other.said)


@pytest.mark.network
def test_a_host_that_left_without_a_goodbye_can_be_found_again(link: Link) -> None:
    first, second = link.peer(1), link.peer(2)
    first.until(found="10.99.0.2")
    second.until(found="10.99.0.1")
    second.stop()
    first.ask("announce")
    assert first.ask("report")["found_so_far"] == 1  # whether it is alive, others must tell
    again = link.peer(2)
    first.until(found="10.99.0.2")
    again.until(found="10.99.0.1")


@pytest.mark.network
def test_an_address_that_comes_late(link: Link) -> None:
    first = link.peer(1, host="10.99.0.77")
    first.until(started=True)
    assert "10.99.0.77" in first.ask("announce")["error"]
    second = link.peer(2)
    second.until(started=True)
    link.run(1, "ip", "addr", "add", "10.99.0.77/24", "dev", "eth0")
    assert first.ask("announce")["error"] == ""
    second.until(found="10.99.0.77")
    first.stop()
    second.stop()


@pytest.mark.network
def test_a_firewall_on_this_host_is_named(link: Link) -> None:
    table = "add table ip t; add chain ip t c { type filter hook input priority 0; }"
    link.run(1, "nft", f"{table}; add rule ip t c udp dport 5353 drop")
    first = link.peer(1)
    first.until(started=True)
    first.ask("announce")
    assert "UDP 5353" in first.ask("announce")["error"]
    first.stop()


@pytest.mark.network
def test_garbage_breaks_nothing(link: Link) -> None:
    first = link.peer(1)
    first.until(started=True)
    link.run(3, sys.executable, "-c", GARBAGE, "10.99.0.3")
    first.ask("announce")
    link.run(3, sys.executable, "-c", GARBAGE, "10.99.0.3")
    second = link.peer(2)
    first.until(found="10.99.0.2")
    second.until(found="10.99.0.1")
    first.stop()
    second.stop()


def test_libc_is_not_searched_for_and_nothing_else_changes() -> None:
    text = """
import ctypes.util, subprocess
from firstboot.discovery import mdns
before, popen, started = ctypes.util.find_library, subprocess.Popen, []
subprocess.Popen = lambda *given, **_: started.append(given) or popen(["true"])
with mdns._no_search_for_libc():
    import zeroconf, ifaddr
assert started == [] and ctypes.util.find_library is before
assert any(ip.ip == "127.0.0.1" for a in ifaddr.get_adapters() for ip in a.ips), "it works"
"""
    subprocess.run([sys.executable, "-c", text], check=True, timeout=60)


def test_closing_waits_for_no_repetition_of_what_was_announced() -> None:
    own = Endpoint("127.0.0.1", 7443)
    responder = Responder(CONTEXT, own, Told(own).sieve)
    asyncio.run(responder.run(responder.begin))
    announcing = responder._announcing
    assert announcing is not None and not announcing.done(), "it is repeated later"
    responder.close()
    assert announcing.cancelled()
