"""A21: one token, two formation ids, one LAN: two clusters that know nothing of one another.

The id salts everything that follows from the token (`pki.derive`): the tag in discovery records
and the bootstrap CA. So hosts of the other formation are not found, and where a static list names
them all the same, no connection stands.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from firstboot.userdata import make_token
from tests.machines.document import document
from tests.network.hosts import Hosts

pytestmark = [pytest.mark.network, pytest.mark.scenario("A21")]

EVERYBODY = "[mdns, {static: [10.77.0.11, 10.77.0.12, 10.77.0.13, 10.77.0.14]}]"


@pytest.mark.parametrize("discovery", ["[mdns]", EVERYBODY], ids=["mdns", "named to all"])
def test_a21_one_token_with_two_formation_ids_makes_two_clusters(
    tmp_path: Path, discovery: str
) -> None:
    token = make_token()
    blue, red = (
        document(2, token, payload="none", formation=name, discovery=discovery)
        for name in ("blue", "red")
    )
    with Hosts(4, tmp_path, blue, overrides={3: red, 4: red}) as hosts:
        hosts.start()
        hosts.wait_running()
        assert len(hosts.clusters(1, 2)) == len(hosts.clusters(3, 4)) == 1
        assert hosts.clusters(1, 2) != hosts.clusters(3, 4)
        assert hosts.masters(1, 2) == hosts.masters(3, 4) == 1
        for host in hosts.all:
            # Only a formation's own members ever count, in what is enrolled and in what is seen.
            assert host.status["present"] <= 2
            mine = {1, 2} if host.number < 3 else {3, 4}
            theirs = {hosts[n].status["node_id"] for n in {1, 2, 3, 4} - mine}
            assert not any(node_id in host.log for node_id in theirs)
            told = {p["node_id"] for p in host.status["peers"]}
            assert not told & theirs


def test_a21_the_cluster_name_separates_as_well(tmp_path: Path) -> None:
    token = make_token()
    one = document(2, token, payload="none", discovery=EVERYBODY)
    other = one.replace("cluster: demo", "cluster: other")
    assert one != other
    with Hosts(4, tmp_path, one, overrides={3: other, 4: other}) as hosts:
        hosts.start()
        hosts.wait_running()
        assert len(hosts.clusters(1, 2)) == len(hosts.clusters(3, 4)) == 1
        assert hosts.clusters(1, 2) != hosts.clusters(3, 4)
