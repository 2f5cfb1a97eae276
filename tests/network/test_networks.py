"""Formation on networks of other kinds: IPv6, several interfaces, addresses that come late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.machines.document import document
from tests.network.hosts import QUICK, Host, Hosts
from tests.network.run import wait_until
from tests.network.servers import dns_server, resolves_by, web_server

pytestmark = pytest.mark.network

NONE = {"payload": "none", "election": QUICK}


def formed(hosts: Hosts) -> None:
    hosts.wait_running()
    assert len(hosts.clusters()) == 1
    assert hosts.masters() == 1
    assert [h.status["address"] for h in hosts.all] == [h.address for h in hosts.all]


def at(host: Host) -> str:
    """The address it uses, empty while there is none."""
    return str(host.status.get("address", ""))


def says(host: Host, sentence: str) -> None:
    """Wait until its status begins with that."""
    wait_until(
        lambda: str(host.status.get("sentence", "")).startswith(sentence),
        30,
        f"host {host.number} says: {sentence}",
    )


def ip(hosts: Hosts, number: int) -> Callable[[str], object]:
    """ip(8) on a host."""
    return lambda line: hosts.network.run(number, "ip", *line.split())


@pytest.mark.parametrize("kind", ["6", "46"])
def test_hosts_form_over_mdns(tmp_path: Path, kind: str) -> None:
    with Hosts(3, tmp_path, ip=kind) as hosts:
        hosts.start()
        formed(hosts)


def test_link_local_addresses_are_enough_whatever_each_host_calls_its_interface(
    tmp_path: Path,
) -> None:
    with Hosts(3, tmp_path, ip="local") as hosts:
        rename = ip(hosts, 2)
        for line in ("link set eth0 down", "link set eth0 name ens3", "link set ens3 up"):
            rename(line)
        hosts.start()
        formed(hosts)


def test_static_addresses_of_ipv6_without_multicast(tmp_path: Path) -> None:
    listed = "[{static: ['fd77::b', '[fd77::c]', '[fd77::d]:7443']}]"
    with Hosts(3, tmp_path, document(3, discovery=listed, **NONE), ip="6") as hosts:
        hosts.network.no_multicast()
        hosts.start()
        formed(hosts)


def test_static_link_local_addresses_name_their_zone(tmp_path: Path) -> None:
    listed = ", ".join(f"'fe80::ff:fe00:{10 + n:x}%eth0'" for n in (1, 2))
    text = document(2, discovery=f"[{{static: [{listed}]}}]", **NONE)
    with Hosts(2, tmp_path, text, ip="local") as hosts:
        hosts.network.no_multicast()
        hosts.start()
        formed(hosts)


def test_network_cidr_makes_hosts_of_both_kinds_use_ipv6(tmp_path: Path) -> None:
    """One has no IPv4 at all: the others must not choose theirs."""
    text = document(3, network="{cidr: '::/0'}", **NONE)
    with Hosts(3, tmp_path, text, ip="46") as hosts:
        hosts.network.take_address(2, hosts.network.address(2))
        for host in hosts.all:
            host.address = hosts.network.address6(host.number)
        hosts.start()
        formed(hosts)


def test_hosts_named_by_their_other_kind_of_address_form(tmp_path: Path) -> None:
    """AAAA records, say, of hosts that use IPv4."""
    listed = "[{static: ['fd77::b', 'fd77::c', 'fd77::d']}]"
    with Hosts(3, tmp_path, document(3, discovery=listed, **NONE), ip="46") as hosts:
        hosts.network.no_multicast()
        hosts.start()
        formed(hosts)


@pytest.mark.parametrize("way", ["dns", "http"])
def test_other_ways_over_ipv6(tmp_path: Path, way: str) -> None:
    ways = {
        "dns": "{dns: nodes.example.org}",
        "http": "{http: {url: 'http://[fd77::1]:8080/demo'}}",
    }
    with Hosts(3, tmp_path, document(3, discovery=f"[{ways[way]}]", **NONE), ip="6") as hosts:
        hosts.network.no_multicast()
        if way == "dns":
            records = (f"--host-record=nodes.example.org,{h.address}" for h in hosts.all)
            conf = dns_server(hosts.network, tmp_path, *records)
            for host in hosts.all:
                resolves_by(host, conf)
        else:
            web_server(hosts.network, tmp_path / "web")
        hosts.start()
        formed(hosts)


def test_an_ipv6_address_that_changes_is_followed(tmp_path: Path) -> None:
    with Hosts(2, tmp_path, ip="6") as hosts:
        hosts.start(1)
        wait_until(lambda: at(hosts[1]) != "", 30, "host 1 looks for others")
        hosts.network.take_address(1, hosts[1].address)
        hosts.network.give_address(1, "fd77::61")
        hosts[1].address = "fd77::61"
        wait_until(lambda: at(hosts[1]) == "fd77::61", 30, "it says the new one")
        hosts.start(2)
        formed(hosts)


def test_ipv4_that_comes_later_than_ipv6_is_used_as_everywhere_else(tmp_path: Path) -> None:
    """DHCP is slower than a router's advertisement here, and was quicker there."""
    with Hosts(2, tmp_path, ip="46") as hosts:
        hosts.network.take_address(1, hosts[1].address)
        hosts.start()
        wait_until(lambda: at(hosts[1]) == "fd77::b", 30, "host 1 uses IPv6")
        wait_until(lambda: at(hosts[2]) != "", 30, "host 2 looks for others")
        hosts.network.give_address(1, hosts[1].address)
        formed(hosts)


def second(hosts: Hosts, number: int) -> Callable[[str], object]:
    """A second interface with an address of its own, up at once; the first one has none yet."""
    run = ip(hosts, number)
    hosts.network.take_address(number, hosts[number].address)
    for line in (
        "link add eth1 type veth peer name other",
        f"addr add 192.168.9.{number}/24 dev eth1",
        "link set eth1 up",
        "link set other up",
    ):
        run(line)
    return run


def test_with_two_interfaces_it_is_the_default_routes_even_if_that_comes_last(
    tmp_path: Path,
) -> None:
    with Hosts(2, tmp_path) as hosts:
        second(hosts, 1)
        hosts.start()
        wait_until(lambda: at(hosts[1]) == "192.168.9.1", 30, "it uses eth1")
        hosts.network.give_address(1, hosts[1].address)
        formed(hosts)


def test_two_interfaces_without_a_default_route_wait_for_one_and_say_so(tmp_path: Path) -> None:
    with Hosts(2, tmp_path) as hosts:
        run = second(hosts, 1)
        run("addr add 10.77.0.11/24 dev eth0")
        hosts.start()
        says(hosts[1], "This host has several addresses and no default route: 10.77.0.11 on eth0")
        assert "network.interface" in hosts[1].status["hint"]
        run("route add default via 10.77.0.1")
        formed(hosts)


def test_an_interface_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    """A bridge, a bond or a VLAN is made while the host boots: all are links that come late."""
    text = document(2, network="{interface: br0}", **NONE)
    with Hosts(2, tmp_path, text) as hosts:
        for number in (1, 2):
            ip(hosts, number)("addr flush dev eth0")
        hosts.start()
        says(hosts[1], "Waiting for the network interface br0: there is none of that name.")
        assert "This host has eth0." in hosts[1].status["hint"]
        for number in (1, 2):
            ip(hosts, number)("link add name br0 type bridge stp_state 0 forward_delay 0")
        says(hosts[1], "Waiting for the network interface br0: it is down.")
        for number in (1, 2):
            ip(hosts, number)("link set br0 up")
            ip(hosts, number)("link set eth0 master br0")
        says(hosts[1], "Waiting for a network address on br0.")
        for number in (1, 2):
            ip(hosts, number)(f"addr add 10.77.0.{10 + number}/24 dev br0")
        formed(hosts)


def test_an_interface_that_is_made_anew_is_used_anew(tmp_path: Path) -> None:
    """With the same address: multicast groups were joined on the old one."""
    text = document(2, network="{interface: br0}", **NONE)
    with Hosts(2, tmp_path, text) as hosts:
        run = ip(hosts, 1)
        make = (
            "link add name br0 type bridge stp_state 0 forward_delay 0",
            "link set eth0 master br0",
            "link set br0 up",
            "addr add 10.77.0.11/24 dev br0",
        )
        hosts[2].configure(text.replace("br0", "eth0"))
        run("addr flush dev eth0")
        for line in make:
            run(line)
        hosts.start(1)
        wait_until(lambda: at(hosts[1]) != "", 30, "host 1 looks for others")
        run("link del br0")
        for line in make:
            run(line)
        hosts.start(2)
        formed(hosts)
