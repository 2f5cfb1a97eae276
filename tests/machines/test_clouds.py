"""Machines that a cloud made: cloud-init's own datasource gets them their user-data from it.

What firstboot knows of the cloud then is what the real cloud-init left behind, in that datasource's
spelling; `discovery: auto` follows from it.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from firstboot.userdata import make_token
from tests.clouds.double import METADATA, Double, Instance
from tests.machines.rig import IMAGE, NEWEST, PROJECT, Machine, Rig
from tests.machines.test_cluster import SEARCH, Launch, firstboot, wait_running
from tests.network.test_clouds import CLOUDS_YAML

pytestmark = pytest.mark.machine

EXAMPLE = (PROJECT / "cloud-config/three-hosts.yaml").read_text()
# The last of the launch call shall be master: a fact that only the cloud knows.
PREFER = "      election: {prefer: [{launch_index: 2, zone: ZONE, tag: {disk: fast}}]}\n"
CLOUD_CFG = "/etc/cloud/cloud.cfg.d/95-datasource.cfg"
DATASOURCES = {
    # Outside of AWS this datasource asks by the metadata service's version 1.
    "ec2": f"""\
datasource_list: [Ec2]
datasource: {{Ec2: {{strict_id: false, metadata_urls: ['http://{METADATA}'], max_wait: 30}}}}
""",
    "openstack": f"""\
datasource_list: [OpenStack]
datasource: {{OpenStack: {{metadata_urls: ['http://{METADATA}'], max_wait: 30}}}}
""",
}


def launched(rig: Rig) -> list[Instance]:
    """The machines as one launch call's instances; the last one's disk is fast."""
    return [Instance(m.address, tags={"disk": "fast"} if m.number == 3 else {}) for m in rig]


def settle_ec2(rig: Rig, stack: ExitStack, **settings: Any) -> None:
    """The cloud, whose API machines reach by its name and trust."""
    tls = str(rig.run.directory / "tls")
    at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:443", "tls": tls}
    cloud = stack.enter_context(Double("ec2", on=rig.network, tokens="optional", **at, **settings))
    authority = Path(cloud.urls["authority"]).read_text()
    for machine in rig:
        machine.install("/etc/ssl/certs/ca-certificates.crt", authority)
        machine.install("/etc/hosts", f"{METADATA} ec2.eu-west-1.amazonaws.com\n")


def settle_openstack(rig: Rig, stack: ExitStack, **settings: Any) -> None:
    at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:5000"}
    stack.enter_context(Double("openstack", on=rig.network, **at, **settings))
    for machine in rig:
        machine.install("/etc/openstack/clouds.yaml", CLOUDS_YAML)


# The cloud, cloud-init's generation and what it takes it for, where the machines are.
CLOUDS = {
    "ec2": (settle_ec2, IMAGE, (), "eu-west-1a"),
    "openstack": (settle_openstack, NEWEST, ("ds=openstack",), "nova"),
}


NAMES = {"ec2": "", "openstack": "openstack"}
REMEDIES = {"ec2": "a hop limit of 1", "openstack": "with nftables"}


def exposed(machine: Machine) -> bool:
    return bool((machine.status() or {}).get("exposed"))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_what_a_cloud_launched_becomes_a_cluster(launch: Launch, cloud: str) -> None:
    settle, image, words, zone = CLOUDS[cloud]
    prefer = PREFER.replace("ZONE", zone)
    token = make_token()
    text = EXAMPLE.replace("fb1-REPLACE-ME", token).rstrip("\n") + "\n" + prefer
    rig = launch(3, "", image=image, words=words, prefix=16)  # too large a subnet for a sweep
    rig.network.no_multicast()
    rig.set_seed()
    for machine in rig:
        machine.install(CLOUD_CFG, DATASOURCES[cloud])
        # No DHCP here: cloud-init would wait a minute for it, and then ask as it does now.
        machine.install("/usr/sbin/dhclient", "")
    with ExitStack() as stack:
        settle(rig, stack, instances=launched(rig), user_data=text)
        rig.start()
        wait_running(rig)
        shown = [machine.status() or {} for machine in rig]
    assert [s["role"] for s in shown] == ["node", "node", "master"]
    assert len({s["cluster_id"] for s in shown}) == 1
    for machine, status in zip(rig, shown, strict=True):
        data = json.loads(machine.read("/run/cloud-init/instance-data.json"))
        assert data["v1"]["platform"] == cloud
        assert [p["name"] for p in status["providers"]] == ["mdns", cloud, "sweep"]
        assert {p["name"] for p in status["providers"] if p["found"]} <= {cloud}
        assert firstboot(machine, "status").returncode == 0
    assert any(p["found"] == 2 for s in shown for p in s["providers"])
    # The token is off the nodes' disks; that any process may ask the cloud for it is told.
    for machine in (rig[1], rig[2]):
        rig.wait(lambda m=machine: exposed(m), 60, "it is told")  # type: ignore[misc]
        page = firstboot(machine, "status").stdout
        assert f"token      still in the metadata service ({NAMES[cloud]}" in page
        assert REMEDIES[cloud] in page
        assert machine.exec("python3", "-c", SEARCH, input=token).stdout == "[]\n"
