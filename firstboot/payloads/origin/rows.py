"""Origin's steps for a master and for a node, in the order in which they must happen.

Names of units and containers, and the containers' values, are those of openshift-ansible 3.9.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from firstboot.payloads.origin.certificates import (
    MASTER_DIRECTORY,
    MASTER_LEAVES,
    NODE_LEAVES,
    SERVICE_ACCOUNTS,
    SIGNERS,
)
from firstboot.payloads.origin.configuration import (
    API,
    CONTROLLERS,
    ETCD_DIRECTORY,
    HOST_UNIT,
    NODE,
    NODE_DIRECTORY,
    OPENVSWITCH,
    SINGLE,
    host,
    master_files,
    names,
    node_files,
    text_of,
)
from firstboot.payloads.origin.objects import objects
from firstboot.payloads.origin.variables import CONTROLLERS_PORT, derive
from firstboot.protocol.model import Profile
from firstboot.protocol.plan import (
    GetCertificates,
    InstallContainer,
    MakeLink,
    Payload,
    Probe,
    RolePlan,
    StartUnit,
    Step,
    WriteFile,
)

READY_SECONDS = 120.0  # an API server on a small host takes 20 s; then it is said why, and waited
MASTER_SECONDS = 300.0  # a node's master may have images to fetch first
NODE_READY = '"type":"Ready","status":"True"'  # in a Node, as Kubernetes writes it
_API_PORTS = ("0.0.0.0:8443", "0.0.0.0:8053")


# ---------------------------------------------------------------- containers


def _etcd_values() -> tuple[tuple[str, str], ...]:
    """For an image with the usual template every setting; for firstboot's own, its arguments."""
    own = [f"--{name}={value}" for name, value in _ETCD_ARGUMENTS]
    mounts = (
        {"type": "bind", "source": source, "destination": target, "options": options}
        for source, target, options in (
            ("/etc/", "/etc/", ["rbind", "rw", "rslave"]),
            ("/var/lib/etcd", "/var/lib/etcd/", ["rbind", "rw", "rslave"]),
        )
    )
    files = {"CA": "ca.crt", "TRUSTED_CA": "ca.crt", "CERT": "server.crt", "KEY": "server.key"}
    peers = {"CA": "ca.crt", "TRUSTED_CA": "ca.crt", "CERT": "peer.crt", "KEY": "peer.key"}
    return (
        ("ETCD_DATA_DIR", "/var/lib/etcd"),
        ("ETCD_LISTEN_PEER_URLS", "https://${url_host}:2380"),
        ("ETCD_NAME", "${name}"),
        ("ETCD_INITIAL_CLUSTER", "${peer_urls}"),
        ("ETCD_LISTEN_CLIENT_URLS", "https://${url_host}:2379"),
        ("ETCD_INITIAL_ADVERTISE_PEER_URLS", "https://${url_host}:2380"),
        ("ETCD_INITIAL_CLUSTER_STATE", "new"),
        ("ETCD_INITIAL_CLUSTER_TOKEN", "etcd-cluster-1"),
        ("ETCD_ADVERTISE_CLIENT_URLS", "https://${url_host}:2379"),
        *((f"ETCD_{key}_FILE", f"{ETCD_DIRECTORY}/{file}") for key, file in files.items()),
        *((f"ETCD_PEER_{key}_FILE", f"{ETCD_DIRECTORY}/{file}") for key, file in peers.items()),
        ("ADDTL_MOUNTS", "".join(f",{json.dumps(mount)}" for mount in mounts)),
        ("ETCD_ARGS", "".join(f",{json.dumps(item)}" for item in own)),
        ("ETCD_ENV", "".join(f",{json.dumps(item)}" for item in _ETCDCTL)),
    )


_ETCD_ARGUMENTS = (
    ("name", "${name}"),
    ("data-dir", "/var/lib/etcd"),
    ("heartbeat-interval", "500"),
    ("election-timeout", "2500"),
    ("listen-client-urls", "https://${url_host}:2379"),
    ("advertise-client-urls", "https://${url_host}:2379"),
    ("listen-peer-urls", "https://${url_host}:2380"),
    ("initial-advertise-peer-urls", "https://${url_host}:2380"),
    ("initial-cluster", "${peer_urls}"),
    ("initial-cluster-state", "new"),
    ("initial-cluster-token", "etcd-cluster-1"),
    ("quota-backend-bytes", "4294967296"),
    ("cert-file", f"{ETCD_DIRECTORY}/server.crt"),
    ("key-file", f"{ETCD_DIRECTORY}/server.key"),
    ("trusted-ca-file", f"{ETCD_DIRECTORY}/ca.crt"),
    ("client-cert-auth", "true"),
    ("peer-cert-file", f"{ETCD_DIRECTORY}/peer.crt"),
    ("peer-key-file", f"{ETCD_DIRECTORY}/peer.key"),
    ("peer-trusted-ca-file", f"{ETCD_DIRECTORY}/ca.crt"),
    ("peer-client-cert-auth", "true"),
    # It would use the server's certificate as a client's, which that one is not.
    ("enable-grpc-gateway", "false"),
)
_ETCDCTL = (
    "ETCDCTL_ENDPOINTS=https://${url_host}:2379",
    f"ETCDCTL_CACERT={ETCD_DIRECTORY}/ca.crt",
    f"ETCDCTL_CERT={ETCD_DIRECTORY}/peer.crt",
    f"ETCDCTL_KEY={ETCD_DIRECTORY}/peer.key",
)


def _master_container(name: str, command: str, when: str) -> InstallContainer:
    values = (("NODE_SERVICE", f"{NODE}.service"), ("DOCKER_SERVICE", "docker.service"))
    return InstallContainer(name, "${image_origin}", (("COMMAND", command), *values), when=when)


def _master_containers() -> Iterator[Step]:
    yield InstallContainer("etcd", "${image_etcd}", _etcd_values())
    yield _master_container(API, "api", "${split}")
    yield _master_container(CONTROLLERS, "controllers", "${split}")
    yield _master_container(SINGLE, "", "${single}")
    for program, source in (("oc", "oc"), ("kubectl", "oc"), ("openshift", "openshift")):
        for name, when in ((API, "${split}"), (SINGLE, "${single}")):
            binary = f"/var/lib/containers/atomic/{name}/rootfs/usr/bin/{source}"
            yield MakeLink(f"/usr/local/bin/{program}", binary, when=when)


def _node_containers(when: str) -> Iterator[Step]:
    yield InstallContainer(
        OPENVSWITCH,
        "${image_openvswitch}",
        # With openshift-ansible's value, "docker", systemd ignores the order and the dependency.
        (("DOCKER_SERVICE", "docker.service"),),
        when="${ovs_here}",
    )
    yield InstallContainer(
        NODE,
        "${image_node}",
        (
            ("DNS_DOMAIN", "cluster.local"),
            ("DOCKER_SERVICE", "docker.service"),
            ("MASTER_SERVICE", f"{CONTROLLERS}.service"),
        ),
        when=when,
    )


# ---------------------------------------------------------------- order and gates


def _api_ready(
    netloc: str, authority: str, seconds: float, when: str = "true", unit: str = ""
) -> Probe:
    url = f"https://{netloc}/healthz/ready"
    return Probe(url, authority, deadline=seconds, unit=unit, when=when)


def _start_master() -> Iterator[Step]:
    ca = f"{MASTER_DIRECTORY}/ca.crt"
    yield StartUnit("etcd.service", ports=("${address}:2379", "${address}:2380"))
    peer = f"{ETCD_DIRECTORY}/peer"
    yield Probe(
        "https://${url_host}:2379/health",
        f"{ETCD_DIRECTORY}/ca.crt",
        f"{peer}.crt",
        f"{peer}.key",
        deadline=120.0,  # a majority of the masters must be there
        unit="etcd.service",
    )
    # Up to 3.7 the API server reads its first policy from a file that its own program makes.
    unit = f"{API}-policy.service"
    for name, when in ((API, "${policy_split}"), (SINGLE, "${policy_single}")):
        text = text_of("policy.service").replace("@CONTAINER@", name)
        yield WriteFile(f"/etc/systemd/system/{unit}", text, when=when)
    yield StartUnit(unit, lasting=False, when="${policy_file}")
    yield StartUnit(f"{API}.service", ports=_API_PORTS, deadline=READY_SECONDS, when="${split}")
    yield StartUnit(f"{SINGLE}.service", ports=_API_PORTS, deadline=READY_SECONDS, when="${single}")
    for name, when in ((API, "${split}"), (SINGLE, "${single}")):
        yield _api_ready("${loopback}", ca, READY_SECONDS, when, f"{name}.service")
    yield StartUnit(
        f"{CONTROLLERS}.service", ports=(f"0.0.0.0:{CONTROLLERS_PORT}",), when="${split}"
    )
    yield Probe(
        f"https://${{url_host}}:{CONTROLLERS_PORT}/healthz",
        ca,
        deadline=READY_SECONDS,
        unit=f"{CONTROLLERS}.service",
        when="${split}",
    )


def _start_node(when: str) -> Iterator[Step]:
    ca, client = f"{NODE_DIRECTORY}/ca.crt", f"{NODE_DIRECTORY}/system:node:${{name}}"
    yield _api_ready("${node_api}", ca, MASTER_SECONDS, when)
    yield StartUnit(f"{OPENVSWITCH}.service", when="${ovs_here}")
    yield StartUnit(f"{NODE}.service", ports=("0.0.0.0:10250",), deadline=READY_SECONDS, when=when)
    yield Probe(
        "https://${node_api}/api/v1/nodes/${name}",
        ca,
        f"{client}.crt",
        f"{client}.key",
        contains=NODE_READY,
        lacks="the node is registered, but not ready",
        deadline=READY_SECONDS,
        unit=f"{NODE}.service",
        when=when,
    )


ORIGIN = Payload(
    name="origin",
    master=RolePlan(
        profiles=(Profile.SERVER, Profile.CLIENT),
        steps=(
            # Others apply at once. The founder makes many keys, in the background, and large ones.
            GetCertificates(when="${founder_elsewhere}"),
            *host("${node_here}"),
            *_master_containers(),
            *_node_containers("${node_here}"),
            GetCertificates(when="${founder_here}"),
            *master_files(),
            *node_files("${node_here}"),
            *names(),
            StartUnit(HOST_UNIT),
            *_start_master(),
            *_start_node("${node_here}"),
            *objects(),
        ),
        leaves=MASTER_LEAVES,
    ),
    node=RolePlan(
        profiles=(Profile.SERVER, Profile.CLIENT),
        steps=(
            GetCertificates(),
            *host("true"),
            *_node_containers("true"),
            *node_files("true"),
            *names(),
            StartUnit(HOST_UNIT),
            *_start_node("true"),
        ),
        leaves=NODE_LEAVES,
    ),
    signers=SIGNERS,
    pairs=(SERVICE_ACCOUNTS,),
    derive=derive,
)
