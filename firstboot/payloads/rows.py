"""The payloads this version knows, as rows: files, containers, units and health gates per role."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from firstboot.protocol.model import Profile
from firstboot.protocol.plan import (
    InstallContainer,
    Payload,
    Probe,
    RolePlan,
    StartUnit,
    Step,
    WriteFile,
)

ETCD_DIRECTORY = "/etc/etcd"
ETCD_START_SECONDS = 120.0  # a member is healthy once a majority of the masters is


def _spliced(*items: str) -> str:
    """`items` as the rest of a JSON list: a system container's template splices them in."""
    return "".join(f",{json.dumps(item)}" for item in items)


def _etcd_client_files() -> tuple[Step, ...]:
    return (
        WriteFile(f"{ETCD_DIRECTORY}/ca.crt", credential="ca.crt"),
        WriteFile(f"{ETCD_DIRECTORY}/client.crt", credential="client.crt"),
        WriteFile(f"{ETCD_DIRECTORY}/client.key", credential="host.key", mode=0o600),
    )


_MEMBER = _spliced(
    "--name=${name}",
    # A data directory per cluster: one that is left over never joins another cluster.
    "--data-dir=/var/lib/etcd/${cluster_id}",
    "--listen-client-urls=https://${url_host}:2379,https://127.0.0.1:2379",
    "--advertise-client-urls=https://${url_host}:2379",
    "--listen-peer-urls=https://${url_host}:2380",
    "--initial-advertise-peer-urls=https://${url_host}:2380",
    "--initial-cluster=${peer_urls}",
    "--initial-cluster-state=new",
    "--initial-cluster-token=${cluster_id}",
    # Used as client certificate too, when etcd's own gateway dials its own listener.
    f"--cert-file={ETCD_DIRECTORY}/peer.crt",
    f"--key-file={ETCD_DIRECTORY}/peer.key",
    f"--trusted-ca-file={ETCD_DIRECTORY}/ca.crt",
    "--client-cert-auth=true",
    f"--peer-cert-file={ETCD_DIRECTORY}/peer.crt",
    f"--peer-key-file={ETCD_DIRECTORY}/peer.key",
    f"--peer-trusted-ca-file={ETCD_DIRECTORY}/ca.crt",
    "--peer-client-cert-auth=true",
    "--logger=zap",
    "--log-outputs=stderr",
)
_MEMBER_ENV = _spliced(
    "ETCDCTL_ENDPOINTS=https://${url_host}:2379",
    f"ETCDCTL_CACERT={ETCD_DIRECTORY}/ca.crt",
    f"ETCDCTL_CERT={ETCD_DIRECTORY}/client.crt",
    f"ETCDCTL_KEY={ETCD_DIRECTORY}/client.key",
)
_PROXY = _spliced(
    "grpc-proxy",
    "start",
    "--listen-addr=127.0.0.1:2379",
    "--endpoints=${client_urls}",
    # etcd refuses a certificate whose subject has a common name here (it would lend that name's
    # rights to everyone behind the proxy), so CLIENT certificates carry names in the SAN only.
    f"--cert={ETCD_DIRECTORY}/client.crt",
    f"--key={ETCD_DIRECTORY}/client.key",
    f"--cacert={ETCD_DIRECTORY}/ca.crt",
)
_PROXY_ENV = _spliced("ETCDCTL_ENDPOINTS=http://127.0.0.1:2379")

ETCD = Payload(
    name="etcd",
    master=RolePlan(
        profiles=(Profile.PEER, Profile.CLIENT),
        steps=(
            *_etcd_client_files(),
            WriteFile(f"{ETCD_DIRECTORY}/peer.crt", credential="peer.crt"),
            WriteFile(f"{ETCD_DIRECTORY}/peer.key", credential="host.key", mode=0o600),
            InstallContainer(
                "etcd", "${etcd_image}", (("ETCD_ARGS", _MEMBER), ("ETCD_ENV", _MEMBER_ENV))
            ),
            StartUnit("etcd.service"),
            Probe(
                "https://${url_host}:2379/health",
                authority=f"{ETCD_DIRECTORY}/ca.crt",
                certificate=f"{ETCD_DIRECTORY}/client.crt",
                key=f"{ETCD_DIRECTORY}/client.key",
                deadline=ETCD_START_SECONDS,
            ),
        ),
    ),
    node=RolePlan(
        profiles=(Profile.CLIENT,),
        steps=(
            *_etcd_client_files(),
            InstallContainer(
                "etcd-proxy", "${etcd_image}", (("ETCD_ARGS", _PROXY), ("ETCD_ENV", _PROXY_ENV))
            ),
            StartUnit("etcd-proxy.service"),
            # The proxy answers 200 only after a linearizable read from a master.
            Probe("http://127.0.0.1:2379/health", deadline=ETCD_START_SECONDS),
        ),
    ),
)
# No role to run: the host's certificates are laid where a unit of the operator's own finds them.
PKI_DIRECTORY = "/etc/firstboot/pki"
_CREDENTIALS = RolePlan(
    profiles=(Profile.SERVER, Profile.CLIENT),
    steps=(
        WriteFile(f"{PKI_DIRECTORY}/ca.crt", credential="ca.crt"),
        WriteFile(f"{PKI_DIRECTORY}/server.crt", credential="server.crt"),
        WriteFile(f"{PKI_DIRECTORY}/client.crt", credential="client.crt"),
        WriteFile(f"{PKI_DIRECTORY}/host.key", credential="host.key", mode=0o600),
    ),
)
NONE = Payload(name="none", master=_CREDENTIALS, node=_CREDENTIALS)


class _Payloads(Mapping[str, Payload]):
    """The payloads by name; Origin's many rows are made only where somebody asks for them."""

    _small: Mapping[str, Payload] = MappingProxyType({p.name: p for p in (NONE, ETCD)})

    def __getitem__(self, name: str) -> Payload:
        if name == "origin":
            from firstboot.payloads.origin.rows import ORIGIN

            return ORIGIN
        return self._small[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._small, "origin")

    def __len__(self) -> int:
        return len(self._small) + 1


PAYLOADS: Mapping[str, Payload] = _Payloads()

# What a payload's texts may use beside `plan.variables`, and the values without configuration.
OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "none": MappingProxyType({}),
        "etcd": MappingProxyType({"etcd_image": "oci:/usr/lib/firstboot/images/etcd:latest"}),
        "origin": MappingProxyType(
            {
                "origin_version": "v3.9.0",
                "origin_images_etcd": "oci:/usr/lib/firstboot/images/etcd:latest",
                "origin_images_origin": "",
                "origin_images_node": "",
                "origin_images_openvswitch": "",
                "origin_images_router": "",
                "origin_images_registry": "",
                "origin_infra_selector": "{}",
                "origin_network_plugin": "ovs-subnet",
                "origin_network_cluster_cidr": "10.128.0.0/14",
                "origin_network_services_cidr": "172.30.0.0/16",
                "origin_network_host_subnet_length": "9",
                "origin_public_hostname": "",
                "origin_cluster_hostname": "",
                "origin_masters_are_nodes": "true",
                "origin_schedulable_masters": "true",
                "origin_unidling": "true",
                "origin_dns": "dnsmasq",
                "origin_kubelet_arguments": "{}",
                "origin_node_labels": "[]",
                "origin_labels": "{}",
            }
        ),
    }
)
