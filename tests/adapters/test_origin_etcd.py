"""Three masters' real etcd under a real runtime, with what the origin payload gives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from firstboot.protocol.plan import InstallContainer, Probe, StartUnit
from tests.adapters import origin_hosts
from tests.adapters.test_payload_etcd import Host, Network, image, network, run

__all__ = ["image", "network"]  # fixtures
MASTER = "etc/origin/master/master.etcd"


@pytest.fixture
def cluster(image: Path, tmp_path: Path) -> origin_hosts.Cluster:
    options = {"origin_images_etcd": f"oci:{image}"}
    found = origin_hosts.Cluster(tmp_path, 3, 0, options)
    found.connect()
    found.run()
    return found


@pytest.fixture
def masters(
    cluster: origin_hosts.Cluster, network: Network, tmp_path: Path
) -> Iterator[list[Host]]:
    hosts: list[Host] = []
    for each in cluster.hosts:
        host = Host(network, each.member, tmp_path, "runc")
        hosts.append(host)
        containers = [s for s in each.did if isinstance(s, InstallContainer) and s.name == "etcd"]
        units = [s for s in each.did if isinstance(s, StartUnit) and s.unit == "etcd.service"]
        gates = [s for s in each.did if isinstance(s, Probe) and s.url.endswith(":2379/health")]
        assert len(containers) == len(units) == len(gates) == 1
        host.prepare((*containers, *units, *gates), {})
    yield hosts
    for host in hosts:
        host.close()


@pytest.mark.network
def test_three_members_serve_the_api_servers_certificates(masters: list[Host]) -> None:
    for host in masters:
        host.start()
    for host in masters:
        host.wait_ready()
        host.wait_healthy()
    first, second, third = masters
    assert first.etcdctl("put", "written", "on the first") == "OK"
    assert third.etcdctl("get", "written", "--print-value-only") == "on the first"
    # As the API server does: its own client certificate, and etcd's CA as it has it.
    url = f"https://{second.me.host}:2379/health"
    files = [
        str(second.root / f"{MASTER}-{name}") for name in ("ca.crt", "client.crt", "client.key")
    ]
    words = ("--cacert", files[0], "--cert", files[1], "--key", files[2])
    enter = ("nsenter", f"--net=/run/netns/{second.namespace}")
    assert '"true"' in run(*enter, "curl", "--silent", "--show-error", *words, url)
    # Somebody of the same cluster, but of another signer, is not let in.
    other = str(second.root / "etc/origin/master/admin")
    wrong = ("--cacert", files[0], "--cert", f"{other}.crt", "--key", f"{other}.key")
    assert run(*enter, "curl", "--silent", *wrong, url, check=False) == ""
    for host in masters:
        refused = [line for line in host.log().splitlines() if "rejected connection" in line]
        assert all("signed by unknown authority" in line for line in refused), refused
