"""What docs/scale.md says of thousands of hosts, by a few hundred."""

from __future__ import annotations

from firstboot.protocol.model import Topology
from tests.sim import scale

COUNTED = ("sent", "received", "bytes_sent", "bytes_received", "peers")


def test_with_more_hosts_a_node_costs_the_same_and_the_master_the_same_for_each() -> None:
    few, many = scale.formation(60, "seeds"), scale.formation(240, "seeds")
    for what in COUNTED:
        assert getattr(many.node, what) <= 1.3 * getattr(few.node, what), what
        assert getattr(many.master, what) / 240 <= 1.3 * getattr(few.master, what) / 60, what


def test_hosts_that_all_connect_to_all_are_noticed() -> None:
    mesh = Topology(mesh=1000)
    few, many = scale.formation(20, "seeds", mesh), scale.formation(60, "seeds", mesh)
    assert many.node.peers > 2 * few.node.peers
