"""One document on networks of every kind, and addresses that come late, change, or are IPv6."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import pytest

from firstboot.userdata import make_token
from tests.clouds.double import METADATA, Double, Instance
from tests.machines.document import document, user_data
from tests.machines.rig import PROJECT, Machine, Rig
from tests.machines.test_cluster import (
    FORM,
    Launch,
    by_role,
    etcdctl,
    firstboot,
    wait_running,
)
from tests.network.servers import dns_server

pytestmark = pytest.mark.machine

LATE = 45.0  # seconds after its boot
EXAMPLE = (PROJECT / "cloud-config/anywhere.yaml").read_text()
CREDENTIALS = """
clouds:
  openstack:
    auth_type: v3applicationcredential
    auth:
      auth_url: {url}
      application_credential_id: firstboot-credential
      application_credential_secret: firstboot-secret
"""
DHCP = "[Match]\nName=eth0\n[Network]\nDHCP=ipv4\nLinkLocalAddressing=no\nIPv6AcceptRA=no\n"
STATIC = "[Match]\nName={}\n[Network]\nAddress={}/24\n{}LinkLocalAddressing=no\n"
PORT = "[Match]\nName=eth0\n[Network]\nBridge=br0\n"
BRIDGE = "[NetDev]\nName=br0\nKind=bridge\nMACAddress={mac}\n[Bridge]\nSTP=no\nForwardDelaySec=0\n"
ADVERTISED = "[Match]\nName=br0\n[Network]\nDHCP=no\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=yes\n"
NETWORK_FILE = "/etc/systemd/network/10-eth0.network"


def found(machine: Machine) -> dict[str, int]:
    """How many peers each provider of a machine found, if any. Who is met first need not look."""
    shown = machine.status() or {}
    return {p["name"]: p["found"] for p in shown["providers"] if p["found"]}


def one_cluster(rig: Rig) -> None:
    """Wait until all run; they must be one cluster, whose store all reach."""
    wait_running(rig)
    roles = by_role(rig)
    assert {role: len(machines) for role, machines in roles.items()} == {"master": 1, "node": 2}
    assert len({(m.status() or {})["cluster_id"] for m in rig}) == 1
    one, other = roles["node"]
    assert etcdctl(one, "put", "greeting", "hello") == "OK\n"
    assert etcdctl(other, "get", "greeting", "--print-value-only") == "hello\n"


# ---------------------------------------------------------------- addresses that come late


def dhcp_server(rig: Rig, directory: Path, *leases: str) -> Any:
    """A DHCP server that knows these machines only: ``MAC,ADDRESS``."""
    network = rig.network
    return network.serve(
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root"),
        *("--pid-file=", f"--dhcp-leasefile={directory / 'leases'}", "--interface=bridge"),
        *("--bind-interfaces", "--dhcp-authoritative", "--dhcp-range=10.77.0.0,static,2m"),
        *(f"--dhcp-option=3,{network.gateway}", "--no-ping", "--log-dhcp"),
        *(f"--dhcp-host={lease}" for lease in leases),
    )


def mac(machine: Machine) -> str:
    """Of its eth0, as the network made it."""
    return f"02:00:00:00:00:{10 + machine.number:02x}"


class Late:
    """Three machines: the DHCP server knows the first one only 45 s after its boot.

    Meanwhile the second's address is changed by that server. The third has static addresses on
    two interfaces, and its default route, to tell which one counts, on the one.
    """

    def __init__(self, directory: Path) -> None:
        self.rig = rig = Rig(3, user_data(document(3)))
        self._directory = directory
        for machine in rig.machines[:2]:
            rig.network.take_address(machine.number, machine.address)
            machine.install(NETWORK_FILE, DHCP)
            # So that firstboot itself meets a host without an address, whatever booting waits for.
            machine.install("/etc/systemd/system/systemd-networkd-wait-online.service", "")
        third, network = rig[3], rig.network
        network.take_address(3, third.address)
        network.run(3, "ip", "link", "add", "eth1", "type", "veth", "peer", "name", "storage")
        gateway = f"Gateway={network.gateway}\n"
        third.install(NETWORK_FILE, STATIC.format("eth0", third.address, gateway))
        third.install(f"{NETWORK_FILE}.eth1.network", STATIC.format("eth1", "192.168.9.3", ""))
        third.install(f"{NETWORK_FILE}.other.network", STATIC.format("storage", "192.168.9.1", ""))
        self._second = f"{mac(rig[2])},{rig[2].address}"
        self._server = dhcp_server(rig, directory, self._second)
        rig.start()
        self._started = time.monotonic()
        self.waited = False  # whether the first one had waited until then
        self._timer = threading.Timer(LATE, self._give)
        self._timer.start()

    def _serve(self, *more: str) -> None:
        self._server.kill()
        self._server.wait()
        self._server = dhcp_server(self.rig, self._directory, self._second, *more)

    def _give(self) -> None:
        """The first machine's address; without a nudge it would ask at the end of its back-off."""
        self.waited = says(self.rig[1], "Waiting for a network address.")
        self._serve(f"{mac(self.rig[1])},{self.rig[1].address}")
        self.rig[1].exec("networkctl", "reconfigure", "eth0")

    def move(self, address: str) -> None:
        """From now on the second machine gets another address, and asks at once."""
        machine = self.rig[2]
        self._second, machine.address = f"{mac(machine)},{address}", address
        self._serve()
        machine.exec("networkctl", "reconfigure", "eth0")

    @property
    def seconds(self) -> float:
        """Since they were switched on."""
        return time.monotonic() - self._started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.rig.close()


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Late]:
    """They boot, and other tests of this file run while they wait."""
    with Late(tmp_path_factory.mktemp("late")) as made:
        yield made


def says(machine: Machine, text: str) -> bool:
    """Whether its status says that."""
    return text in str((machine.status() or {}).get("sentence")) if machine.running else False


def test_machines_wait_for_a_late_address_and_follow_one_that_changes(late: Late) -> None:
    """The last test of this file has their end."""
    rig = late.rig

    def two_meet() -> bool:
        return all(says(rig[n], "2 of 3 hosts are present") for n in (2, 3))

    rig.wait(two_meet, FORM, "two hosts meet")
    rig.wait(lambda: says(rig[1], "Waiting for a network address."), FORM, "one has no address")
    assert firstboot(rig[1], "status").returncode == 2
    late.move("10.77.0.62")
    rig.wait(lambda: (rig[2].status() or {}).get("address") == "10.77.0.62", FORM, "it has moved")
    rig.wait(two_meet, FORM, "both meet again")
    assert "10.77.0.62: starting anew" in rig[2].journal("firstboot.service")


# ---------------------------------------------------------------- one file, five networks


def resolve(rig: Rig, directory: Path, *records: str) -> None:
    """Give the network a DNS server with these records, and the machines its address."""
    conf = dns_server(rig.network, directory, *records)
    for machine in rig:
        machine.install("/etc/resolv.conf", conf.read_text())


def on_a_bridge(rig: Rig, _directory: Path, _stack: ExitStack) -> None:
    """Multicast works."""


def nothing_else(rig: Rig, _directory: Path, _stack: ExitStack) -> None:
    rig.network.no_multicast()


def instances(rig: Rig) -> list[Instance]:
    """The machines as a cloud knows them, and a stranger's."""
    mine = [Instance(m.address, tags={"cluster": "demo"}, launch=m.number) for m in rig]
    return [*mine, Instance("10.77.0.99", tags={"cluster": "other"}, launch=9)]


def on_ec2(rig: Rig, directory: Path, stack: ExitStack) -> None:
    rig.network.no_multicast()
    at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:443", "tls": str(directory / "tls")}
    cloud = Double("ec2", on=rig.network, instances=instances(rig), **at)
    stack.enter_context(cloud)
    resolve(rig, directory, f"--address=/ec2.eu-west-1.amazonaws.com/{METADATA}")
    for machine in rig:
        authority = Path(cloud.urls["authority"]).read_text()
        machine.install("/etc/ssl/certs/ca-certificates.crt", authority)


def on_openstack(rig: Rig, _directory: Path, stack: ExitStack) -> None:
    rig.network.no_multicast()
    at = {"metadata": f"{METADATA}:80", "api": f"{METADATA}:5000"}
    cloud = Double("openstack", on=rig.network, instances=instances(rig), **at)
    stack.enter_context(cloud)
    for machine in rig:
        text = CREDENTIALS.format(url=cloud.urls["api"])
        machine.install("/etc/openstack/clouds.yaml", text)


def behind_a_router(rig: Rig, directory: Path, _stack: ExitStack) -> None:
    rig.network.no_multicast()
    rig[3].address = rig.network.behind_a_router(3)
    resolve(rig, directory, *(f"--address=/demo.example.org/{m.address}" for m in rig))


# What makes each network, who finds the others there, and the rig's options. A cloud's subnet is
# too large for a sweep; on the bridge the machines have IPv6 as well.
PLACES: dict[str, tuple[Callable[[Rig, Path, ExitStack], None], str, dict[str, Any]]] = {
    "bridge": (on_a_bridge, "mdns", {"ip": "46"}),
    "ec2": (on_ec2, "ec2", {"prefix": 16}),
    "openstack": (on_openstack, "openstack", {"prefix": 16}),
    "nothing": (nothing_else, "sweep", {}),
    "router": (behind_a_router, "dns", {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_one_file_assembles_a_cluster_anywhere(launch: Launch, tmp_path: Path, place: str) -> None:
    """The same example file, byte for byte but for the token, on every network."""
    make, provider, options = PLACES[place]
    rig = launch(3, EXAMPLE.replace("fb1-REPLACE-ME", make_token()), **options)
    with ExitStack() as stack:
        make(rig, tmp_path, stack)
        rig.start()
        one_cluster(rig)
        assert [(m.status() or {})["address"] for m in rig] == [m.address for m in rig]
        by = [found(machine) for machine in rig]
        print(place, by)
        # A sweep may have been quicker for some: the others of its small subnet are few to try.
        assert {name for each in by for name in each} - ({"sweep"} - {provider}) == {provider}, by
        assert "prefix" not in options or not any("sweep" in each for each in by), by


# ---------------------------------------------------------------- IPv6


def test_ipv6_only_machines_on_an_interface_made_while_they_boot(launch: Launch) -> None:
    """A router advertises their addresses on a bridge of theirs, as it would on a bond or VLAN."""
    rig = launch(3, user_data(document(3, network="{interface: br0}")), ip="6")
    network = rig.network
    for machine in rig:
        network.take_address(machine.number, machine.address)
        # A machine that is off hears no advertisement; its part of the network is there already.
        network.run(machine.number, "sysctl", "-qw", "net.ipv6.conf.eth0.accept_ra=0")
        machine.install(NETWORK_FILE, PORT)
        machine.install("/etc/systemd/network/10-br0.netdev", BRIDGE.format(mac=mac(machine)))
        machine.install("/etc/systemd/network/10-br0.network", ADVERTISED)
        machine.address = f"fd77::ff:fe00:{10 + machine.number:x}"
    network.serve(
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--port=0", "--user=root"),
        *("--pid-file=", "--interface=bridge", "--bind-interfaces", "--enable-ra"),
        "--dhcp-range=fd77::,ra-only,64",
    )
    rig.start()
    one_cluster(rig)
    assert [(m.status() or {})["address"] for m in rig] == [m.address for m in rig]
    for machine in rig:
        assert "inet 10." not in machine.exec("ip", "address").stdout
        assert firstboot(machine, "status").returncode == 0


# ---------------------------------------------------------------- and have come


def test_the_address_came_45_s_late_and_they_are_one_cluster(late: Late) -> None:
    rig = late.rig
    one_cluster(rig)
    assert late.waited
    assert late.seconds >= LATE
    assert [(m.status() or {})["address"] for m in rig] == [
        "10.77.0.11",
        "10.77.0.62",
        "10.77.0.13",
    ]
