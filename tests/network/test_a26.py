"""A26: a host that comes 90 days late, with real processes: told what it needs, and let in."""

from __future__ import annotations

import calendar
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firstboot import userdata
from firstboot.host import StateDirectory
from firstboot.pki import AUTHORITY_LIFETIME, LIFETIME, RELEASED
from firstboot.protocol.model import Register, Stored
from tests.machines.document import document
from tests.network.hosts import PROJECT, QUICK, Host, Hosts
from tests.network.run import wait_until

pytestmark = [pytest.mark.network, pytest.mark.scenario("A26")]

DAYS = 90
TOKEN = re.compile(r"fb1j(-[0-9a-z]{6}){6}")
BUSY = 90.0  # seconds that a busy machine may take, and a node that its master never heard
LATE = 4  # hosts 1 to 3 are the cluster


class Admit:
    """A running ``firstboot admit`` on one host, and what it has said."""

    def __init__(self, host: Host, *options: str) -> None:
        number = len(list(host.root.glob("admit-*.log")))
        self.path = host.root / f"admit-{number}.log"
        argv = (sys.executable, "-m", "firstboot", "admit", "--root", str(host.root), *options)
        with self.path.open("w") as log:
            self.process = host.network.popen(
                host.number, *argv, stdout=log, stderr=subprocess.STDOUT, cwd=PROJECT
            )
        wait_until(
            lambda: TOKEN.search(self.said) or self.process.poll() is not None, BUSY, "token"
        )

    @property
    def said(self) -> str:
        return self.path.read_text()

    @property
    def token(self) -> str:
        found = TOKEN.search(self.said)
        assert found is not None, self.said
        return found[0]

    def end(self, timeout: float = BUSY) -> int:
        """Its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            error.add_note(self.said)
            raise


def firstboot(host: Host, *words: str, said: str = "") -> tuple[int, str]:
    """Run a verb on a host to its end: exit code, and what it printed."""
    argv = (
        sys.executable,
        "-m",
        "firstboot",
        *words,
        *(() if "replay" in words else ("--root", str(host.root))),
    )
    done = host.network.run(host.number, *argv, check=False, input=said, cwd=PROJECT)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    """Three hosts that became a cluster 90 days ago, all processes ended; two more to come."""
    with Hosts(5, tmp_path, document(3, payload="none", election=QUICK)) as made:
        past = tmp_path / "past"
        past.mkdir()
        # Everything that tells wall-clock time there tells that of 90 days ago.
        text = f"import time\nreal = time.time\ntime.time = lambda: real() - {DAYS * 86_400}\n"
        (past / "sitecustomize.py").write_text(text)
        for host in made.all[:3]:
            host.environment["PYTHONPATH"] = str(past)
        made.start(1, 2, 3)
        made.wait_running(1, 2, 3, timeout=120)
        for host in made.all[:3]:
            assert host.process is not None
            assert host.process.wait(BUSY) == 0
            assert host.status["since"] < time.time() - (DAYS - 1) * 86_400
        yield made


def master_of(hosts: Hosts) -> Host:
    return next(h for h in hosts.all[:3] if h.status["role"] == "master")


def codes(host: Host) -> set[str]:
    return {p["code"] for p in host.status.get("problems", ())}


def restart(host: Host) -> None:
    """What `join` has systemd do."""
    assert host.process is not None
    host.process.terminate()
    host.process.wait(BUSY)
    host.start()


def closed(host: Host) -> bool:
    """Whether nothing listens there, and its disk says closed."""
    state = StateDirectory(host.root).load()
    probe = f"import socket; socket.create_connection(('{host.address}', 7443), 2)"
    done = host.network.run(5, sys.executable, "-c", probe, check=False)
    return getattr(state, "closed", False) and "ConnectionRefusedError" in done.stderr


def files_with(host: Host, token: str) -> list[str]:
    found = (p for p in host.root.rglob("*") if p.is_file() and not p.name.startswith("admit-"))
    return [str(p.relative_to(host.root)) for p in found if token.encode() in p.read_bytes()]


def test_a26_a_late_host_joins_by_a_one_time_token(hosts: Hosts) -> None:
    master, late, fifth = master_of(hosts), hosts[LATE], hosts[5]
    cluster = master.status["cluster_id"]
    # With the old document it meets nobody, and says what to do.
    late.start()
    wait_until(lambda: late.state == "waiting", BUSY, "the late host waits")
    code, page = firstboot(late, "status")
    assert code == 2
    assert "1 of 3 hosts are present" in page
    assert "`firstboot admit` on its master, then `firstboot join` here" in page
    # Only the master admits.
    node = next(h for h in hosts.all[:3] if h is not master)
    code, said = firstboot(node, "admit")
    assert code == 64
    assert said.count("\n") == 1
    assert f"at {master.address}" in said and master.status["name"] in said
    code, said = firstboot(late, "admit")
    assert (code, said.count("\n")) == (64, 1)
    assert "no active cluster" in said

    admit = Admit(master)
    wait_until(lambda: codes(late) == {"JOIN_NEEDS_TOKEN"}, BUSY, "the late host says so")
    problem = late.status["problems"][0]
    assert f"{master.status['name']} at {master.address}" in problem["text"]
    assert late.status["state"] == "degraded"
    wait_until(lambda: f"{late.address} holds another token" in admit.said, BUSY, "admit says so")
    code, said = firstboot(master, "admit")
    assert (code, said) == (1, "firstboot: firstboot admit is running on this host already\n")

    # What is no one-time token is refused in one line, and nothing is kept.
    for wrong in ("", "hunter2", admit.token[:-1], userdata.make_token(), "fb1j-\x1b[2J" * 500):
        code, said = firstboot(late, "join", said=f"{wrong}\n")
        assert (code, said.count("\n")) == (64, 1), said
        assert not (late.root / userdata.JOIN).exists()
        assert not wrong or wrong not in said
    # Another cluster's one-time token is well formed, and opens nothing.
    other = userdata.make_token(userdata.ONE_TIME)
    assert firstboot(late, "join", said=other)[0] == 0
    restart(late)
    told = "one-time token is not the one"
    wait_until(lambda: told in str(late.status["problems"]), BUSY, "the late host says so")
    assert codes(late) == {"JOIN_NEEDS_TOKEN"}
    assert late.status["cluster_id"] is None

    started = time.monotonic()
    code, said = firstboot(late, "join", said=f"  {admit.token}\n")
    assert code == 0
    assert admit.token not in said
    assert (late.root / userdata.JOIN).stat().st_mode & 0o777 == 0o600
    restart(late)
    hosts.wait_running(LATE, timeout=BUSY)
    assert time.monotonic() - started < 15
    assert admit.end() == 0
    assert "1 of 1 host joined. Admission is closed again" in admit.said

    # One cluster, one CA, one master; the disk says closed, and nothing listens.
    assert late.process is not None
    assert late.process.wait(BUSY) == 0
    assert {h.status["cluster_id"] for h in hosts.all[:4]} == {cluster}
    assert hosts.masters(1, 2, 3, 4) == 1
    assert late.status["role"] == "node"
    assert chains(late, master)
    assert closed(master)
    assert master.status["members"] == 4
    assert master.status["state"] == "running"
    # The token is nowhere any more.
    for host in hosts.all:
        assert files_with(host, admit.token) == []
    assert firstboot(late, "join", said=admit.token)[0] == 64

    # And it opens nothing, not even while others are admitted.
    again = Admit(master, "--window", "8s")
    assert again.token != admit.token
    assert firstboot(fifth, "join", said=admit.token)[0] == 0
    fifth.start()
    wait_until(lambda: codes(fifth) == {"JOIN_NEEDS_TOKEN"}, BUSY, "the fifth host is told")
    assert again.end() == 2
    assert "0 of 1 host joined" in again.said
    assert fifth.status["cluster_id"] is None
    assert closed(master)
    assert master.status["members"] == 4


@pytest.mark.parametrize("moment", ["shown", "issued", "enrolled", *range(2)])
def test_a26_admit_may_be_killed_at_any_moment(hosts: Hosts, moment: str | int) -> None:
    master, late = master_of(hosts), hosts[LATE]
    cluster, authority = master.status["cluster_id"], authorities(master)
    issued = StateDirectory(master.root).issued
    admit = Admit(master)
    if moment != "shown":
        assert firstboot(late, "join", said=admit.token)[0] == 0
        late.start()
    if moment == "issued":
        wait_until(lambda: len(issued()) == 4, BUSY, "the certificate is on disk")
    elif moment == "enrolled":
        wait_until(lambda: "is enrolled" in admit.said, BUSY, "the certificate is sent")
    elif isinstance(moment, int):
        time.sleep(random.uniform(0.3, 1.2))
    admit.process.kill()
    admit.process.wait()
    assert closed(master)

    # Again, with another token; the late host may have what it needs already.
    again = Admit(master)
    if late.process is None or late.state != "running":
        code, said = firstboot(late, "join", said=again.token)
        assert code == 0 or "already" in said
        late.kill()
        late.start()
    hosts.wait_running(LATE, timeout=BUSY)
    if "has joined" not in admit.said:  # else it is a member, and nobody is waited for
        assert again.end() == 0
    again.process.terminate()
    assert again.end() in (0, 2)
    assert {h.status["cluster_id"] for h in hosts.all[:4]} == {cluster}
    assert hosts.masters(1, 2, 3, 4) == 1
    assert authorities(master) == authority
    assert not any(authorities(h) for h in hosts.all if h is not master)
    assert len(issued()) == 4
    assert closed(master)


def test_a26_the_disk_says_closed_while_admission_is_open(hosts: Hosts) -> None:
    master, late, fifth = master_of(hosts), hosts[LATE], hosts[5]
    admit = Admit(master, "--hosts", "2")
    assert firstboot(late, "join", said=admit.token)[0] == 0
    late.start()
    wait_until(lambda: "has joined" in admit.said, BUSY, "the first of two is in")
    assert admit.process.poll() is None
    # By now it has written its state: who has joined is in it.
    state = StateDirectory(master.root, working=False).load()
    assert isinstance(state, Stored)
    assert len(state.confirmed) == 3
    assert state.closed
    assert state.finished
    hosts.wait_running(LATE)
    admit.process.kill()
    admit.process.wait()
    assert closed(master)
    # The next one lets in whoever is still missing, and tells who is there already.
    again = Admit(master)
    assert "has 4 hosts" in again.said
    assert firstboot(fifth, "join", said=again.token)[0] == 0
    fifth.start()
    hosts.wait_running()
    assert again.end() == 0
    assert len(hosts.clusters()) == 1
    # Ctrl-C closes it, too.
    last = Admit(master)
    last.process.send_signal(signal.SIGINT)
    assert last.end() == 2
    assert "Stopped: 0 of 1 host joined. Admission is closed again" in last.said
    assert closed(master)
    assert master.status["members"] == 5
    page = firstboot(master, "replay", str(master.root / "var/lib/firstboot/history.jsonl"))
    assert page[0] == 0


def test_a26_the_one_that_was_missing_joins_without_multicast(tmp_path: Path) -> None:
    """Two of three formed the cluster, and the join window ended before the third came."""
    listed = "[{static: [10.77.0.11, 10.77.0.12, 10.77.0.13]}]"
    text = document(
        3, payload="none", discovery=listed, election="{grace: 1s}", join="{window: 2s}"
    )
    with Hosts(3, tmp_path, text) as hosts:
        hosts.network.no_multicast()
        hosts.start(1, 2)
        for host in hosts.all[:2]:
            assert host.process is not None
            assert host.process.wait(60) == 0
        master, late = (h for h in hosts.all if h.number == 3 or h.status["role"] == "master")
        assert codes(master) == {"INCOMPLETE"}
        assert "firstboot admit" in master.status["problems"][0]["hint"]
        late.start()
        wait_until(lambda: late.state == "waiting", BUSY, "the late host waits")
        admit = Admit(master)
        # Here only the handshake tells that the token is another one.
        wait_until(lambda: codes(late) == {"TOKEN_MISMATCH"}, BUSY, "the late host says so")
        assert "firstboot join" in late.status["problems"][0]["hint"]
        assert firstboot(late, "join", said=admit.token)[0] == 0
        restart(late)
        hosts.wait_running(3)
        assert admit.end() == 0
        assert len(hosts.clusters()) == 1
        for shown in (master.status, master_kept(master)):
            assert (shown["state"], shown["members"], shown["problems"]) == ("running", 3, [])
        assert firstboot(master, "status")[0] == 0


def master_kept(master: Host) -> dict[str, Any]:
    """The status that a power cycle brings back."""
    kept: dict[str, Any] = json.loads((master.root / "var/lib/firstboot/status.json").read_text())
    return kept


def authorities(host: Host) -> dict[str, bytes]:
    made = (host.root / "var/lib/firstboot/secrets/authority").glob("*")
    return {p.name: p.read_bytes() for p in made}


def test_a26_no_more_than_were_asked_for(tmp_path: Path) -> None:
    """Three masters; two hosts come with one token for one."""
    with Hosts(5, tmp_path, document(3, payload="none", masters="3", election=QUICK)) as hosts:
        hosts.start(1, 2, 3)
        hosts.wait_running(1, 2, 3)
        for host in hosts.all[:3]:
            assert host.process is not None
            assert host.process.wait(BUSY) == 0
        founder = next(h for h in hosts.all[:3] if authorities(h))
        other = next(h for h in hosts.all[:3] if h is not founder)
        assert other.status["role"] == "master"
        code, said = firstboot(other, "admit")
        assert code == 64
        assert f"at {founder.address}" in said
        admit = Admit(founder)
        admit.process.send_signal(signal.SIGSTOP)
        for late in hosts.all[3:]:
            assert firstboot(late, "join", said=admit.token)[0] == 0
            late.start()
        wait_until(lambda: all(h.state == "waiting" for h in hosts.all[3:]), BUSY, "both wait")
        admit.process.send_signal(signal.SIGCONT)
        assert admit.end() == 0
        wait_until(lambda: any(h.state == "running" for h in hosts.all[3:]), BUSY, "one is in")
        first, second = sorted(hosts.all[3:], key=lambda h: h.state != "running")
        assert first.status["role"] == "node"
        assert second.status["stage"] in ("discovering", "enrolling")
        assert not (second.root / "var/lib/firstboot/secrets/certificates.json").exists()
        assert len(StateDirectory(founder.root).issued()) == 4
        # The other one gets the next token.
        admit = Admit(founder)
        assert firstboot(second, "join", said=admit.token)[0] == 0
        restart(second)
        hosts.wait_running(timeout=BUSY)
        assert admit.end() == 0
        assert len(hosts.clusters()) == 1


def test_a26_late_hosts_alone_form_nothing(tmp_path: Path) -> None:
    """A majority, and no master: with a one-time token they must not start a second cluster."""
    token = userdata.make_token(userdata.ONE_TIME)
    with Hosts(3, tmp_path, document(3, token, payload="none", election="{grace: 1s}")) as hosts:
        hosts.start()
        wait_until(
            lambda: all(
                sum(p["state"] == "present" for p in h.status.get("peers", ())) == 2
                for h in hosts.all
            ),
            30,
            "all three meet",
        )
        time.sleep(5)
        assert hosts.clusters() == {None}
        for host in hosts.all:
            assert host.status["sentence"].startswith("This host holds a one-time token")
            assert not authorities(host)
            state = StateDirectory(host.root).load()
            assert getattr(state, "register", None) == Register()


def chains(host: Host, master: Host) -> bool:
    """Whether a host's certificate is of today, and from the CA its master made long before."""
    made = host.root / "etc/firstboot/pki"
    authority = made / "ca.crt"
    assert authority.read_bytes() == (master.root / "etc/firstboot/pki/ca.crt").read_bytes()
    certificate = next(p for p in made.glob("*.crt") if p.name != "ca.crt")
    argv = ["openssl", "verify", "-x509_strict", "-CAfile", str(authority), str(certificate)]
    subprocess.run(argv, check=True, capture_output=True)
    # No CA is made before the release, whatever the clock says.
    made_at = max(time.time() - DAYS * 86_400, RELEASED)
    of_then = abs(not_after(authority) - AUTHORITY_LIFETIME.total_seconds() - made_at) < 86_400
    return of_then and abs(not_after(certificate) - LIFETIME.total_seconds() - time.time()) < 3600


def not_after(path: Path) -> float:
    argv = ["openssl", "x509", "-noout", "-enddate", "-dateopt", "iso_8601", "-in", str(path)]
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    moment = time.strptime(done.stdout.strip(), "notAfter=%Y-%m-%d %H:%M:%SZ")
    return float(calendar.timegm(moment))
