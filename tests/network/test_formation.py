"""Formation with real processes, sockets, TLS, mDNS and disks, in network namespaces."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from firstboot.userdata import make_token
from tests.machines.document import document
from tests.network.hosts import PROJECT, QUICK, Host, Hosts
from tests.network.run import wait_until

pytestmark = pytest.mark.network

NONE = {"payload": "none"}


@pytest.mark.scenario("A01")
def test_three_hosts_form_over_mdns(tmp_path: Path) -> None:
    with Hosts(3, tmp_path) as hosts:
        hosts.start()
        hosts.wait_running()
        assert hosts.masters() == 1
        assert len(hosts.clusters()) == 1
        # Nothing is resident: every process ends by itself, and well.
        for host in hosts.all:
            assert host.process is not None
            assert host.process.wait(30) == 0
            assert (host.root / "var/lib/firstboot/complete").exists()


def files_with(host: Host, token: str) -> list[str]:
    return [
        path.relative_to(host.root).as_posix()
        for path in host.root.rglob("*")
        if path.is_file() and token.encode() in path.read_bytes()
    ]


def goes_on_without(host: Host, token: str) -> None:
    """Start a host that closed before; its processes end only when the others are there as well."""
    (host.root / "run/firstboot/status.json").unlink()
    host.start()
    wait_until(lambda: host.state == "running", 60, "it goes on")
    wait_until(lambda: not files_with(host, token), 60, "the token goes")
    host.kill()


@pytest.mark.scenario("A31")
def test_files_are_private_and_the_token_is_on_no_disk_after_close(tmp_path: Path) -> None:
    token = make_token()
    text = document(2, token, election=QUICK, **NONE)
    with Hosts(2, tmp_path, text) as hosts:
        for host in hosts.all:
            copy = host.root / "var/lib/cloud/instances/i-1/user-data.txt"
            copy.parent.mkdir(parents=True)
            copy.write_text(text)
            assert len(files_with(host, token)) == 2
        hosts.start()
        hosts.wait_running()
        for host in hosts.all:
            assert host.process is not None
            assert host.process.wait(30) == 0
            assert files_with(host, token) == []
            state = host.root / "var/lib/firstboot"
            assert stat.S_IMODE(state.stat().st_mode) == 0o700
            keys = [p for p in host.root.rglob("*") if p.is_file() and b"PRIVATE" in p.read_bytes()]
            assert len(keys) >= 2
            assert {stat.S_IMODE(p.stat().st_mode) for p in keys} == {0o600}
            authorities = list((state / "secrets").glob("authority/*"))
            assert bool(authorities) == (host.status["role"] == "master")
        # A power cut between CLOSE and that: the state says closed, and the token is there still.
        # Then another: without it, what is left to do is done all the same.
        for host, there in ((h, there) for h in hosts.all for there in (True, False)):
            if there:
                host.configure(text)
            (host.root / "var/lib/firstboot/complete").unlink(missing_ok=True)
            goes_on_without(host, token)
        # A host that is done has no use for it either: whatever brings it back, it goes.
        for host in hosts.all:
            host.configure(text)
            (host.root / "var/lib/firstboot/complete").touch()
            host.start()
            assert host.process is not None
            assert host.process.wait(60) == 0, host.log
            assert files_with(host, token) == []
        assert len(hosts.clusters()) == 1


def test_a_host_that_lost_its_disk_after_close_says_what_it_lacks(tmp_path: Path) -> None:
    with Hosts(1, tmp_path, document(1, election="{grace: 1s}", **NONE)) as hosts:
        host = hosts[1]
        host.start()
        hosts.wait_running()
        assert host.process is not None
        assert host.process.wait(30) == 0
        shutil.rmtree(host.root / "var/lib/firstboot")
        host.start()
        assert host.process.wait(30) == 78
        assert "config.yaml: the token was removed when admission closed" in host.status["sentence"]
        assert "firstboot join" in host.status["sentence"]


@pytest.mark.scenario("A12")
def test_static_addresses_without_multicast(tmp_path: Path) -> None:
    listed = "[{static: [10.77.0.11, 10.77.0.12, '10.77.0.13:7443']}]"
    with Hosts(3, tmp_path, document(3, discovery=listed, **NONE)) as hosts:
        hosts.network.no_multicast()
        hosts.start()
        hosts.wait_running()
        assert len(hosts.clusters()) == 1


@pytest.mark.scenario("A11")
def test_multicast_that_comes_late(tmp_path: Path) -> None:
    with Hosts(3, tmp_path) as hosts:
        hosts.network.no_multicast()
        hosts.start()
        # Longer than zeroconf's own queries go on: only asking again helps.
        time.sleep(20)
        assert all(h.status["present"] == 1 for h in hosts.all)
        hosts.network.heal()
        hosts.wait_running(timeout=15)


def test_a_partition_forms_nothing_on_either_side_until_grace(tmp_path: Path) -> None:
    with Hosts(3, tmp_path, document(3, election="{strict: true}", **NONE)) as hosts:
        hosts.network.partition({1, 2}, {3})
        hosts.start()
        wait_until(
            lambda: hosts[1].status.get("present") == hosts[2].status.get("present") == 2,
            30,
            "two hosts see one another",
        )
        assert hosts.clusters(1, 2) == {None}
        hosts.network.heal()
        hosts.wait_running()
        assert len(hosts.clusters()) == 1


@pytest.mark.scenario("A06")
def test_two_of_three_form_after_the_grace_period_and_the_third_joins(tmp_path: Path) -> None:
    with Hosts(3, tmp_path, document(3, election="{grace: 2s}", **NONE)) as hosts:
        hosts.start(1, 2)
        wait_until(lambda: all(h.status.get("active") for h in hosts.all[:2]), 30, "two hosts form")
        master = next(h for h in hosts.all[:2] if h.status["role"] == "master")
        codes = {p["code"] for p in master.status["problems"]}
        assert codes == {"INCOMPLETE"}
        hosts.start(3)
        hosts.wait_running()
        assert len(hosts.clusters()) == 1


def test_a_wrong_token_in_a_static_list_is_told(tmp_path: Path) -> None:
    listed = "[{static: [10.77.0.11, 10.77.0.12, 10.77.0.13]}]"
    good = document(2, discovery=listed, **NONE)
    other = document(2, discovery=listed, **NONE)
    with Hosts(3, tmp_path, good, overrides={3: other}) as hosts:
        hosts.start()
        hosts.wait_running(1, 2)
        wait_until(lambda: "TOKEN_MISMATCH" in str(hosts[3].status), 30, "host 3 tells")
        assert hosts[3].status["cluster_id"] is None


@pytest.mark.scenario("A19")
def test_another_expect_is_told_on_both(tmp_path: Path) -> None:
    token = make_token()
    two, three = document(2, token, **NONE), document(3, token, **NONE)
    with Hosts(2, tmp_path, two, overrides={2: three}) as hosts:
        hosts.start()
        wait_until(
            lambda: all("CONFIG_MISMATCH" in str(h.status) for h in hosts.all), 30, "both tell"
        )
        assert hosts.clusters() == {None}


@pytest.mark.scenario("A22")
def test_a_copied_disk_stops_both(tmp_path: Path) -> None:
    with Hosts(3, tmp_path) as hosts:
        hosts.start(1)
        wait_until(lambda: hosts[1].state == "waiting", 30, "host 1 waits")
        hosts[1].kill()
        copied = hosts[2].root / "var/lib"
        copied.mkdir(parents=True)
        subprocess.run(["cp", "-a", hosts[1].root / "var/lib/firstboot", copied], check=True)
        (hosts[2].root / "etc/machine-id").write_text(f"{1:032x}\n")  # looks the same
        hosts.start(1, 2)
        both = hosts.all[:2]
        wait_until(lambda: all(h.state == "failed" for h in both), 30, "both copies stand still")
        for host in both:
            assert host.status["problems"][0]["code"] == "DUPLICATE_IDENTITY"


def test_a_late_address_is_waited_for_and_used(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        hosts.network.run(2, "ip", "address", "flush", "dev", "eth0")
        hosts.start()
        wait_until(
            lambda: hosts[2].status.get("sentence") == "Waiting for a network address.",
            30,
            "host 2 says what it waits for",
        )
        hosts.network.run(2, "ip", "address", "add", "10.77.0.12/24", "dev", "eth0")
        hosts.wait_running()
        assert len(hosts.clusters()) == 1


def test_an_address_that_changes_is_followed(tmp_path: Path) -> None:
    """DHCP gives another address while the host waits: the old one is no way to reach it."""
    with Hosts(2, tmp_path) as hosts:
        hosts.start(1)
        wait_until(lambda: hosts[1].state == "waiting", 30, "host 1 waits")
        hosts.network.take_address(1, hosts[1].address)
        hosts.network.give_address(1, "10.77.0.61")
        wait_until(lambda: hosts[1].status["address"] == "10.77.0.61", 30, "it says the new one")
        hosts.start(2)
        hosts.wait_running()
        assert len(hosts.clusters()) == 1
        assert "10.77.0.61: starting anew" in hosts[1].log


@pytest.mark.scenario("A28")
def test_strangers_disturb_nobody(tmp_path: Path) -> None:
    with Hosts(3, tmp_path) as hosts:
        hosts.start(1, 2)
        wait_until(lambda: hosts[1].status.get("present") == 2, 30, "two hosts meet")
        stranger = (
            "import os, socket\n"
            "open_ones = []\n"
            "for n in range(300):\n"
            "    s = socket.create_connection(('10.77.0.11', 7443), 5)\n"
            "    s.sendall(os.urandom(1 + n)) if n % 3 else None\n"
            "    open_ones.append(s) if n % 2 else s.close()\n"
            "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
            "for n in range(2000):\n"
            "    u.sendto(os.urandom(n % 1400), ('224.0.0.251', 5353))\n"
            "print('done', flush=True)\n"
            "import time; time.sleep(30)\n"
        )
        flood = hosts.network.popen(3, sys.executable, "-c", stranger, stdout=subprocess.PIPE)
        assert flood.stdout is not None
        assert flood.stdout.readline() == "done\n"
        hosts.start(3)
        hosts.wait_running()
        assert len(hosts.clusters()) == 1
        assert any(h.status["strangers"]["count"] for h in hosts.all)
        flood.kill()
        flood.communicate()


@pytest.mark.scenario("A29")
def test_after_close_the_bootstrap_channel_answers_nobody(tmp_path: Path) -> None:
    """A29: the founder is kept alive here by a member that never confirms."""
    with Hosts(2, tmp_path) as hosts:
        hosts.start()
        hosts.wait_running()
        for host in hosts.all:
            assert host.process is not None
            host.process.wait(30)
        probe = "import socket; socket.create_connection(('10.77.0.11', 7443), 2)"
        done = hosts.network.run(2, sys.executable, "-c", probe, check=False)
        assert "ConnectionRefusedError" in done.stderr


def test_status_and_timeline_speak_at_every_phase(tmp_path: Path) -> None:
    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "firstboot", *words, "--root", str(tmp_path / "h1")]
        return subprocess.run(argv, capture_output=True, text=True, cwd=PROJECT, check=False)

    with Hosts(2, tmp_path) as hosts:
        before = ask("status")
        assert (before.returncode, before.stdout.splitlines()[0]) == (
            2,
            "firstboot has not run on this host yet.",
        )
        hosts.start(1)
        wait_until(lambda: hosts[1].state == "waiting", 30, "host 1 waits")
        waiting = ask("status")
        assert waiting.returncode == 2
        assert "1 of 2 hosts are present; waiting for 1 more" in waiting.stdout
        assert "mdns" in waiting.stdout
        hosts.start(2)
        hosts.wait_running()
        done = ask("status", "--wait", "--format", "json")
        assert done.returncode == 0
        assert json.loads(done.stdout)["stage"] == "running"
        assert "running" in ask("timeline").stdout


# ---------------------------------------------------------------- kill -9

RUNS = 20


@pytest.mark.scenario("A13")
@pytest.mark.parametrize("run", range(RUNS))
def test_killed_at_any_moment_it_is_one_cluster(tmp_path: Path, run: int) -> None:
    """Every host is killed at its own random moment of the formation and restarted."""
    rng = random.Random(os.urandom(8) if "CI" not in os.environ else run)
    listed = "[mdns, {static: [10.77.0.11, 10.77.0.12, 10.77.0.13]}]"
    with Hosts(3, tmp_path, document(3, discovery=listed, **NONE)) as hosts:
        hosts.start()
        # A formation takes about a second from process start to the end.
        due = sorted((rng.uniform(0.2, 1.6), host.number) for host in hosts.all)
        started = time.monotonic()
        for at, number in due:
            time.sleep(max(0.0, started + at - time.monotonic()))
            hosts[number].kill()
            hosts[number].start()
        hosts.wait_running(timeout=90)
        assert len(hosts.clusters()) == 1
        assert hosts.masters() == 1
