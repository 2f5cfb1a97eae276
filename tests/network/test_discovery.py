"""Ways to find each other where multicast does not reach: real servers, real sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.clouds.double import METADATA, Double, Instance
from tests.machines.document import document
from tests.network.hosts import PROJECT, QUICK, Host, Hosts
from tests.network.run import wait_until
from tests.network.servers import dns_server, resolves_by, web_server

pytestmark = pytest.mark.network


def listed(hosts: int, discovery: str, **more: str) -> str:
    return document(hosts, payload="none", election=QUICK, discovery=discovery, **more)


def via(hosts: Hosts) -> set[str]:
    """The providers by which some host was found."""
    shown = [p for h in hosts.all for p in h.status["providers"] if p["found"]]
    return {provider["name"] for provider in shown}


def formed(hosts: Hosts, provider: str) -> None:
    hosts.wait_running(timeout=120)
    assert len(hosts.clusters()) == 1
    assert hosts.masters() == 1
    assert via(hosts) == {provider}


@pytest.mark.parametrize("discovery", ["auto", "[sweep]"])
def test_the_sweep_alone(tmp_path: Path, discovery: str) -> None:
    with Hosts(3, tmp_path, listed(3, discovery)) as hosts:
        hosts.network.no_multicast()
        hosts.start()
        formed(hosts, "sweep")


def test_names_in_the_dns(tmp_path: Path) -> None:
    """A records of some hosts, an SRV record of another, with a port of its own."""
    text = listed(3, "[mdns, {dns: nodes.example.org}]")
    other = text + "network: {port: 9443}\n"
    with Hosts(3, tmp_path, text, overrides={3: other}) as hosts:
        hosts.network.no_multicast()
        conf = dns_server(
            hosts.network,
            tmp_path,
            *(f"--host-record=nodes.example.org,10.77.0.{n}" for n in (11, 12)),
            "--host-record=third.example.org,10.77.0.13",
            "--srv-host=_firstboot._tcp.nodes.example.org,third.example.org,9443",
        )
        for host in hosts.all:
            resolves_by(host, conf)
        hosts.start()
        formed(hosts, "dns")


def test_ipv6_addresses_in_the_dns(tmp_path: Path) -> None:
    text = listed(3, "[{dns: nodes.example.org}]", network="{cidr: 'fd77::/64'}")
    with Hosts(3, tmp_path, text) as hosts:
        hosts.network.no_multicast()
        own = {n: f"fd77::{n}" for n in hosts.network.hosts}
        for n, address in own.items():
            hosts.network.run(n, *f"ip addr add {address}/64 dev eth0 nodad".split())
        conf = dns_server(
            hosts.network, tmp_path, *(f"--host-record=nodes.example.org,{a}" for a in own.values())
        )
        for host in hosts.all:
            resolves_by(host, conf)
        hosts.start()
        formed(hosts, "dns")
        assert {h.status["address"] for h in hosts.all} == set(own.values())


def test_two_subnets_joined_by_a_router(tmp_path: Path) -> None:
    with Hosts(3, tmp_path, listed(3, "[auto, {dns: nodes.example.org}]")) as hosts:
        behind = hosts.network.behind_a_router(3)
        records = [f"10.77.0.{n}" for n in (11, 12)] + [behind]
        conf = dns_server(
            hosts.network, tmp_path, *(f"--address=/nodes.example.org/{a}" for a in records)
        )
        for host in hosts.all:
            resolves_by(host, conf)
        hosts.start()
        hosts.wait_running(timeout=120)
        assert len(hosts.clusters()) == 1
        assert {p["address"] for p in hosts[1].status["peers"]} == {"10.77.0.12", behind}


def test_a_file_on_a_web_server(tmp_path: Path) -> None:
    text = listed(3, "[{http: {url: 'http://10.77.0.1:8080/demo'}}]")
    with Hosts(3, tmp_path / "hosts", text) as hosts:
        hosts.network.no_multicast()
        files = web_server(hosts.network, tmp_path / "web")
        (files / "demo").write_text("left by somebody else\n")
        hosts.start()
        formed(hosts, "http")
        left = (files / "demo").read_bytes()
        assert len(left.splitlines()) == 3
        assert b"10.77" not in left


NOTHING = """[auto, {static: [10.77.0.99, gone.example.org]}, {dns: nodes.example.org},
  {ec2: {tag: {cluster: demo}, endpoint: 'http://169.254.169.254:5000'}},
  {openstack: {metadata: {cluster: demo}}}, {http: {url: 'http://10.77.0.1:8080/demo'}}]"""
# What each must say: what it tried, why that failed, and what to open or to grant.
SAYS = {
    "mdns": ("asked 224.0.0.251 from 10.77.0.11", "nobody answers", "Open UDP 5353"),
    "ec2": ("", "the role node may not", "Allow the action ec2:DescribeInstances"),
    "sweep": ("253 addresses of 10.77.0.0/24", "no host listens", "rule of the security group"),
    "static": ("2 listed", "gone.example.org: the DNS does not answer", "UDP and TCP 53"),
    "dns": ("A and AAAA of nodes.example.org", "the DNS does not answer", "UDP and TCP 53"),
    "openstack": ("", "no application credential in /etc", "application credential create"),
    "http": ("GET and PUT http://10.77.0.1:8080/demo", "connection refused", "10.77.0.1:8080"),
}


def test_a_host_that_finds_nobody_says_what_it_tried_and_what_to_open(tmp_path: Path) -> None:
    """On EC2, with a role that may nothing, a name server that never answers, and no peers."""
    with Hosts(1, tmp_path, listed(3, NOTHING)) as hosts:
        dmi = hosts[1].root / "sys/class/dmi/id"
        dmi.mkdir(parents=True)
        (dmi / "sys_vendor").write_text("Amazon EC2\n")
        hosts.network.no_multicast()
        silent = "import socket, time; s = socket.socket(2, 2); s.bind(('10.77.0.1', 53))"
        hosts.network.serve(sys.executable, "-c", f"{silent}; time.sleep(999)")
        conf = tmp_path / "resolv.conf"
        conf.write_text("nameserver 10.77.0.1\noptions timeout:30 attempts:5\n")
        resolves_by(hosts[1], conf)
        at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:5000"}
        with Double("ec2", hosts.network, instances=[Instance("10.77.0.11")], granted=[], **at):
            hosts.start()
            wait_until(lambda: has_failed(hosts[1]), 120, "every provider has failed")
        argv = [sys.executable, "-m", "firstboot", "status", "--root", str(tmp_path / "h1")]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=PROJECT, check=False)
        assert done.returncode == 2
        lines = done.stdout.splitlines()
        assert len(lines) < 25, done.stdout
        print(done.stdout)
        for name, (tried, why, remedy) in SAYS.items():
            number = next(n for n, s in enumerate(lines) if s.startswith(f"  discovery  {name}: "))
            assert tried in lines[number], name
            assert why in lines[number], name
            assert remedy in lines[number + 1], name
        # Names that are still being looked up, for minutes, do not keep it from ending.
        process = hosts[1].process
        assert process is not None
        process.terminate()
        process.wait(30)


def has_failed(host: Host) -> bool:
    """Whether each of its providers has told an error and a remedy."""
    told = host.status.get("providers", [])
    return len(told) == len(SAYS) and all(p["error"] and p["remedy"] for p in told)
