"""Hosts on a cloud's network, without multicast: they find each other by the cloud's API.

The cloud is a double that runs at the switch, where its metadata service has the address it has
in every cloud; see tests/clouds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.clouds.double import METADATA, Double, Instance
from tests.machines.document import document
from tests.network.hosts import PROJECT, QUICK, Hosts
from tests.network.rig import Network, call
from tests.network.run import wait_until

pytestmark = pytest.mark.network

AT = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:5000"}
EC2 = f"[{{ec2: {{endpoint: 'http://{METADATA}:5000'}}}}]"
CLOUDS_YAML = f"""\
clouds:
  openstack:
    auth_type: v3applicationcredential
    region_name: eu-west-1
    auth:
      auth_url: http://{METADATA}:5000/identity/v3
      application_credential_id: firstboot-credential
      application_credential_secret: firstboot-secret
"""


def instances(count: int) -> list[Instance]:
    """As many of one launch call, at the addresses of a network's hosts."""
    return [Instance(Network.address(n)) for n in range(1, count + 1)]


def on_ec2(count: int) -> str:
    """A document for hosts that have nothing but EC2's API to find each other."""
    return document(count, payload="none", election=QUICK, discovery=EC2)


@pytest.mark.scenario("A12")
def test_three_hosts_form_by_ec2_alone(tmp_path: Path) -> None:
    with Hosts(3, tmp_path, on_ec2(3)) as hosts:
        hosts.network.no_multicast()
        with Double("ec2", on=hosts.network, instances=instances(3), **AT) as cloud:
            hosts.start()
            hosts.wait_running()
            assert len(hosts.clusters()) == hosts.masters() == 1
            calls = cloud.tell()
            # Who asks does so for the cloud's hosts and for its own group, and not again and
            # again. One that is found first need not ask: nothing else led them to each other.
            assert 2 <= calls["api"] <= 24
        peers = [peer for host in hosts.all for peer in host.status["peers"]]
        assert any("ec2" in peer["via"] for peer in peers)


@pytest.mark.scenario("A12")
def test_three_hosts_form_by_openstack_alone(tmp_path: Path) -> None:
    text = document(3, payload="none", election=QUICK, discovery="[openstack]")
    with Hosts(3, tmp_path, text) as hosts:
        for host in hosts.all:
            path = host.root / "etc/openstack/clouds.yaml"
            path.parent.mkdir()
            path.write_text(CLOUDS_YAML)
        hosts.network.no_multicast()
        with Double("openstack", on=hosts.network, instances=instances(3), **AT):
            hosts.start()
            hosts.wait_running()
        assert len(hosts.clusters()) == hosts.masters() == 1
        for host in hosts.all:
            assert host.process is not None
            host.process.wait(30)
            with_secret = [
                path.relative_to(host.root).as_posix()
                for path in host.root.rglob("*")
                if path.is_file() and b"firstboot-secret" in path.read_bytes()
            ]
            assert with_secret == ["etc/openstack/clouds.yaml"]


def test_a_role_that_is_granted_late(tmp_path: Path) -> None:
    """The status says what to grant; once that is done, they form without a restart."""
    with Hosts(2, tmp_path, on_ec2(2)) as hosts:
        hosts.network.no_multicast()
        settings = {"instances": instances(2), "granted": [], **AT}
        with Double("ec2", on=hosts.network, **settings) as cloud:
            hosts.start()

            def told() -> bool:
                return all("Allow the action ec2:Describe" in str(h.status) for h in hosts.all)

            wait_until(told, 30, "both tell what to grant")
            ask = [sys.executable, "-m", "firstboot", "status", "--root", str(hosts[1].root)]
            page = call(ask, cwd=PROJECT).stdout
            assert "the role node may not ec2:DescribeInstances" in page
            assert "next try in" in page
            cloud.tell(granted=["ec2:DescribeInstances"])
            hosts.wait_running()
        assert len(hosts.clusters()) == 1


def test_the_cloud_prefers_a_master(tmp_path: Path) -> None:
    """Without cloud-init the metadata service is asked which host is which, as a hint."""
    election = "{grace: 5s, prefer: [{tag: {disk: fast}}], strict: true}"
    text = document(3, payload="none", election=election, discovery=EC2)
    with Hosts(3, tmp_path, text) as hosts:
        hosts.network.no_multicast()
        for host in hosts.all:
            dmi = host.root / "sys/class/dmi/id"
            dmi.mkdir(parents=True)
            (dmi / "sys_vendor").write_text("Amazon EC2\n")
        fast = Instance(Network.address(2), tags={"disk": "fast"})
        listed = [fast if i.address == fast.address else i for i in instances(3)]
        with Double("ec2", on=hosts.network, instances=listed, **AT):
            hosts.start()
            hosts.wait_running()
        assert [h.status["role"] for h in hosts.all] == ["node", "master", "node"]


def test_behind_a_router_the_hop_limit_is_told() -> None:
    """As in a container: the token's answer does not get that far, whatever else does."""
    program = (
        "from firstboot.discovery.imds import Ec2Metadata\n"
        "from firstboot.discovery.cloud import Trouble\n"
        "try:\n"
        "    print(Ec2Metadata().get('meta-data/local-ipv4'))\n"
        "except Trouble as trouble:\n"
        "    print(trouble, trouble.remedy)\n"
    )
    with Network(1) as network:
        inside = f"{network.owner.prefix}-inside"
        call(["ip", "netns", "add", inside], check=True)
        host = network.namespace(1).name
        for line in (
            f"-n {host} link add bridge0 type veth peer name eth0 netns {inside}",
            f"-n {host} addr add 10.88.0.1/24 dev bridge0",
            f"-n {host} link set bridge0 up",
            f"-n {inside} addr add 10.88.0.2/24 dev eth0",
            f"-n {inside} link set eth0 up",
            f"-n {inside} route add default via 10.88.0.1",
        ):
            call(["ip", *line.split()], check=True)
        network.run(1, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        masquerade = (
            "table ip n { chain c { type nat hook postrouting priority 100; masquerade; }; }"
        )
        network.run(1, "nft", masquerade)
        enter = ["nsenter", f"--net=/run/netns/{inside}", "--", sys.executable, "-c", program]
        with Double("ec2", on=network, instances=instances(1), **AT) as cloud:
            said = call(enter, cwd=PROJECT, check=True).stdout
            assert "gives no session token: no whole answer within 5 s" in said
            assert "--http-put-response-hop-limit 2" in said
            cloud.tell(hop_limit=2)
            assert call(enter, cwd=PROJECT, check=True).stdout == "10.77.0.11\n"
