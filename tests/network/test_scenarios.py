"""Acceptance scenarios that are shown with real processes nowhere else: A02, A04, A07."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.machines.document import document
from tests.network.hosts import Hosts
from tests.network.run import wait_until

pytestmark = pytest.mark.network


@pytest.mark.scenario("A02")
@pytest.mark.parametrize("count", [5, 9])
def test_a02_five_and_nine_hosts(tmp_path: Path, count: int) -> None:
    with Hosts(count, tmp_path, document(count, payload="none")) as hosts:
        hosts.start()
        hosts.wait_running(timeout=120)
        assert len(hosts.clusters()) == 1
        assert hosts.masters() == 1
        names = {h.status["name"] for h in hosts.all}
        assert len(names) == count


@pytest.mark.scenario("A04")
def test_a04_one_host_forms_without_the_network(tmp_path: Path) -> None:
    with Hosts(1, tmp_path, document(1, payload="none")) as hosts:
        hosts.network.no_multicast()
        hosts.start()
        hosts.wait_running()
        assert hosts[1].status["role"] == "master"


@pytest.mark.scenario("A07")
def test_a07_the_majority_forms_and_the_other_joins_when_healed(tmp_path: Path) -> None:
    text = document(3, election="{grace: 3s}", payload="none")
    with Hosts(3, tmp_path, text) as hosts:
        hosts.network.partition({1, 2}, {3})
        hosts.start()
        wait_until(lambda: all(hosts[n].status.get("active") for n in (1, 2)), 60, "two form")
        assert hosts[3].status["cluster_id"] is None
        assert hosts[3].status["sentence"].startswith("1 of 3 hosts are present; waiting for")
        hosts.network.heal()
        hosts.wait_running(timeout=60)
        assert len(hosts.clusters()) == 1
        assert hosts.masters() == 1
