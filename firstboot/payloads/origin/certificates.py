"""Origin's own certificates: what each file says, and who signs it.

Subjects, uses and names are those of `oc adm ca create-master-certs` and `create-node-config` of
Origin 3.9, and of openshift-ansible 3.9 for etcd; so are the files' names, see `rows`.
"""

from __future__ import annotations

from firstboot.protocol.credentials import Leaf, Signer
from firstboot.protocol.model import Profile

MASTER_DIRECTORY = "/etc/origin/master"
ETCD_CA_DIRECTORY = "/etc/etcd/ca"

SIGNERS = (
    Signer("ca", "openshift-signer", serial_file=f"{MASTER_DIRECTORY}/ca.serial.txt"),
    Signer("service-signer", "openshift-service-serving-signer"),
    Signer(
        "front-proxy-ca",
        "aggregator-proxy-ca",
        serial_file=f"{MASTER_DIRECTORY}/frontproxy-ca.serial.txt",
    ),
    Signer(
        "etcd-ca",
        "etcd-signer",
        bits=4096,
        path_length=0,
        own_serial=0,
        serial_file=f"{ETCD_CA_DIRECTORY}/serial",
        index_file=f"{ETCD_CA_DIRECTORY}/index.txt",
        openssl=True,
        shared=False,
    ),
)
SERVICE_ACCOUNTS = "serviceaccounts"

_MASTER_HOSTS = (
    "${name}",
    "${address}",
    "${origin_public_hostname}",
    "${origin_cluster_hostname}",
    "openshift",
    "openshift.default",
    "openshift.default.svc",
    "openshift.default.svc.cluster.local",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    "${service_ip}",
)
_REGISTRY_HOSTS = ("docker-registry.default.svc", "docker-registry.default.svc.cluster.local")
_ETCD_HOSTS = ("${address}", "${name}")


def _client(name: str, user: str, *groups: str, signer: str = "ca", shared: bool = True) -> Leaf:
    return Leaf(name, signer, Profile.CLIENT, user, groups, shared=shared)


def _etcd(name: str, use: Profile) -> Leaf:
    return Leaf(name, "etcd-ca", use, "${name}", hosts=_ETCD_HOSTS, days=1825)


def _node(when: str) -> tuple[Leaf, ...]:
    hosts = ("${name}", "${address}")
    return (
        Leaf(
            "node.client",
            "ca",
            Profile.CLIENT,
            "system:node:${name}",
            ("system:nodes",),
            when=when,
        ),
        Leaf("node.server", "ca", Profile.SERVER, hosts=hosts, chain=True, when=when),
    )


MASTER_LEAVES = (
    Leaf("master.server", "ca", Profile.SERVER, hosts=_MASTER_HOSTS, chain=True),
    Leaf("etcd.server", "ca", Profile.SERVER, hosts=_MASTER_HOSTS, chain=True),
    _client("openshift-master", "system:openshift-master", "system:masters", shared=False),
    # Origin 3.6 knows no group system:masters; the text is then empty and left out.
    _client("admin", "system:admin", "system:cluster-admins", "${masters_group}"),
    _client("master.kubelet-client", "system:openshift-node-admin", "system:node-admins"),
    _client("master.proxy-client", "system:master-proxy"),
    _client("aggregator-front-proxy", "aggregator-front-proxy", signer="front-proxy-ca"),
    _client("openshift-aggregator", "system:openshift-aggregator", signer="front-proxy-ca"),
    _etcd("etcd-server", Profile.SERVER),
    _etcd("etcd-peer", Profile.PEER),
    _etcd("master.etcd-client", Profile.CLIENT),
    Leaf(
        "registry", "ca", Profile.SERVER, hosts=_REGISTRY_HOSTS, chain=True, when="${registry_here}"
    ),
    *_node("${node_here}"),
)
NODE_LEAVES = _node("true")
