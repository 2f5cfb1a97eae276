"""Origin's steps for a master and for a node, in the order in which they must happen.

Paths, modes and names of units are those openshift-ansible 3.9 makes and looks for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from firstboot.payloads.origin.certificates import (
    ETCD_CA_DIRECTORY,
    MASTER_DIRECTORY,
    MASTER_LEAVES,
    NODE_LEAVES,
    SERVICE_ACCOUNTS,
    SIGNERS,
)
from firstboot.payloads.origin.variables import CONTROLLERS_PORT, derive
from firstboot.protocol.model import Profile
from firstboot.protocol.plan import (
    GetCertificates,
    InstallContainer,
    MakeDirectory,
    MakeLink,
    Payload,
    Probe,
    RolePlan,
    SetKernel,
    StartUnit,
    Step,
    UseResolver,
    WriteBlock,
    WriteFile,
)

NODE_DIRECTORY, ETCD_DIRECTORY = "/etc/origin/node", "/etc/etcd"
API, CONTROLLERS, SINGLE = "origin-master-api", "origin-master-controllers", "origin-master"
NODE, OPENVSWITCH = "origin-node", "openvswitch"
READY_SECONDS = 120.0  # an API server on a small host takes 20 s; then it is said why, and waited
MASTER_SECONDS = 300.0  # a node's master may have images to fetch first
HOSTS = "@{hosts}"  # lines of hosts(5), by `supply`
NODE_READY = '"type":"Ready","status":"True"'  # in a Node, as Kubernetes writes it
_FILES = Path(__file__).parent / "files"
_MASTERS_ONLY, _SECRET = 0o700, 0o600
_API_PORTS = ("0.0.0.0:8443", "0.0.0.0:8053")


def _file(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- certificates and kubeconfigs


def _pair(directory: str, name: str, credential: str = "", public: int = 0o644) -> Iterator[Step]:
    """A certificate and its key."""
    source = credential or name
    yield WriteFile(f"{directory}/{name}.crt", credential=f"{source}.crt", mode=public)
    yield WriteFile(f"{directory}/{name}.key", credential=f"{source}.key", mode=_SECRET)


def _kubeconfig(
    path: str, user: str, credential: str, server: str, nick: str, when: str, second: str = ""
) -> WriteFile:
    """A kubeconfig as Origin names what is in it; `second` adds the public address."""
    servers = [(server, nick)] + ([(f"${{{second}api}}", f"${{{second}nick}}")] if second else [])
    clusters = "".join(
        f'- name: "{name}"\n  cluster:\n    certificate-authority-data: @{{base64:ca.crt}}\n'
        f'    server: "https://{at}"\n'
        for at, name in servers
    )
    contexts = "".join(
        f'- name: "default/{name}/{user}"\n  context:\n    cluster: "{name}"\n'
        f'    namespace: default\n    user: "{user}/{nick}"\n'
        for _, name in servers
    )
    text = (
        f"apiVersion: v1\nkind: Config\npreferences: {{}}\nclusters:\n{clusters}"
        f'contexts:\n{contexts}current-context: "default/{nick}/{user}"\n'
        f'users:\n- name: "{user}/{nick}"\n  user:\n'
        f"    client-certificate-data: @{{base64:{credential}.crt}}\n"
        f"    client-key-data: @{{base64:{credential}.key}}\n"
    )
    return WriteFile(path, text, mode=_SECRET, when=when)


def _admin(path: str) -> Iterator[Step]:
    """The administrator's kubeconfig, with a second context where the public name differs."""
    user, server, nick = "system:admin", "${api}", "${api_nick}"
    yield _kubeconfig(path, user, "admin", server, nick, "${public_same}")
    yield _kubeconfig(path, user, "admin", server, nick, "${public_differs}", "public_")


def _master_pki() -> Iterator[Step]:
    here = MASTER_DIRECTORY
    yield from _pair(here, "ca")
    for bundle in ("ca-bundle.crt", "client-ca-bundle.crt"):
        yield WriteFile(f"{here}/{bundle}", credential="ca.crt")
    for name in ("service-signer", "front-proxy-ca"):
        yield from _pair(here, name)
    # Two names for one thing: what Origin's own program makes, and what openshift-ansible makes.
    yield from _pair(here, "frontproxy-ca", "front-proxy-ca")
    for leaf in MASTER_LEAVES:
        if leaf.signer in ("ca", "front-proxy-ca") and not leaf.name.startswith("node."):
            yield from _pair(here, leaf.name)
    for half in ("private", "public"):
        name = f"{SERVICE_ACCOUNTS}.{half}.key"
        yield WriteFile(f"{here}/{name}", credential=name, mode=_SECRET)
    yield from _pair(here, "master.etcd-client", public=_SECRET)
    yield WriteFile(f"{here}/master.etcd-ca.crt", credential="etcd-ca.crt", mode=_SECRET)
    for name, user in (
        ("openshift-master", "system:openshift-master"),
        ("aggregator-front-proxy", "aggregator-front-proxy"),
    ):
        path = f"{here}/{name}.kubeconfig"
        yield _kubeconfig(path, user, name, "${loopback}", "${loopback_nick}", "true")
    yield from _admin(f"{here}/admin.kubeconfig")
    yield MakeDirectory("/root/.kube", 0o700)
    yield from _admin("/root/.kube/config")


def _etcd_files() -> Iterator[Step]:
    yield WriteFile(f"{ETCD_DIRECTORY}/ca.crt", credential="etcd-ca.crt", mode=_SECRET)
    yield from _pair(ETCD_DIRECTORY, "server", "etcd-server", public=_SECRET)
    yield from _pair(ETCD_DIRECTORY, "peer", "etcd-peer", public=_SECRET)
    yield WriteFile(f"{ETCD_DIRECTORY}/etcd.conf", _file("etcd.conf"), mode=_SECRET)
    yield WriteFile("/etc/tmpfiles.d/etcd-dir.conf", "d /var/lib/etcd/ 0700 root root - -\n")
    founder = "${founder_here}"
    yield MakeDirectory(ETCD_CA_DIRECTORY, _MASTERS_ONLY, when=founder)
    for name in ("certs", "crl", "fragments"):
        yield MakeDirectory(f"{ETCD_CA_DIRECTORY}/{name}", 0o700, when=founder)
    for half in ("crt", "key"):
        path, credential = f"{ETCD_CA_DIRECTORY}/ca.{half}", f"etcd-ca.{half}"
        yield WriteFile(path, credential=credential, mode=_SECRET, when=founder)
    for path in (f"{ETCD_CA_DIRECTORY}/openssl.cnf", f"{ETCD_CA_DIRECTORY}/fragments/openssl.cnf"):
        yield WriteFile(path, _file("openssl.cnf"), mode=_SECRET, when=founder)
    yield WriteFile(f"{ETCD_CA_DIRECTORY}/crlnumber", "01\n", mode=_SECRET, keep=True, when=founder)


def _node_pki(when: str) -> Iterator[Step]:
    here, anchors = NODE_DIRECTORY, "/etc/pki/ca-trust/source/anchors"
    for path in (f"{here}/ca.crt", f"{anchors}/openshift-ca.crt"):
        yield WriteFile(path, credential="ca.crt", when=when)
    user = "system:node:${name}"
    for name, credential in (("server", "node.server"), (user, "node.client")):
        yield WriteFile(f"{here}/{name}.crt", credential=f"{credential}.crt", when=when)
        path = f"{here}/{name}.key"
        yield WriteFile(path, credential=f"{credential}.key", mode=_SECRET, when=when)
    server, nick = "${node_api}", "${node_api_nick}"
    path = f"{here}/{user}.kubeconfig"
    yield _kubeconfig(path, user, "node.client", server, nick, when)


# ---------------------------------------------------------------- the host


def _host() -> Iterator[Step]:
    """What containers bind, and what a host of Origin is expected to have."""
    for path in ("/etc/pki/ca-trust/source/anchors", "/var/lib/origin", "/etc/origin"):
        yield MakeDirectory(path)
    # Every host resolves every member's name, whatever DNS there is.
    yield WriteBlock("/etc/hosts", HOSTS)
    # dnsmasq looks into /etc/hosts at its start only, but follows files in a directory.
    yield WriteFile("/etc/dnsmasq.hosts/firstboot", HOSTS)
    yield WriteFile("/etc/sysctl.d/99-openshift.conf", _file("sysctl.conf"))
    # Without it Origin's network refuses to start; else docker sees to it.
    yield SetKernel("net.ipv4.ip_forward", "1", when="${ovs_here}")
    yield WriteFile(
        "/etc/dnsmasq.d/origin-dns.conf", _file("dnsmasq.conf"), restarts="dnsmasq.service"
    )
    yield UseResolver(
        "${address}",
        search="cluster.local",
        saved=f"{NODE_DIRECTORY}/resolv.conf",
        servers="/etc/dnsmasq.d/origin-upstream-dns.conf",
        restarts="dnsmasq.service",
    )
    yield WriteFile(
        "/etc/sysconfig/docker-network",
        'DOCKER_NETWORK_OPTIONS="--mtu=1450"\n',
        restarts="docker.service",
    )
    yield StartUnit("dnsmasq.service", ports=("${address}:53",))
    yield StartUnit("docker.service")


def _node_files(when: str) -> Iterator[Step]:
    yield MakeDirectory(NODE_DIRECTORY, 0o700)
    for path in (
        "/etc/origin/openvswitch",
        "/etc/origin/sdn",
        "/etc/origin/cloudprovider",
        "/etc/origin/kubelet-plugins/volume/exec",
        "/var/lib/origin/openshift.local.volumes",
        "/etc/cni/net.d",
        "/opt/cni/bin",
        "/var/lib/cni",
        "/var/lib/dockershim",
        "/var/lib/docker/containers",
        "/lib/modules",
        "/run/secrets",
    ):
        yield MakeDirectory(path, when=when)
    # /run is new at every boot, and a minimal image has no time zone.
    yield WriteFile("/etc/tmpfiles.d/firstboot-origin.conf", "d /run/secrets 0755 root root - -\n")
    yield WriteFile("/etc/localtime", "", keep=True, when=when)
    dns = _file("node-dnsmasq.conf")
    yield WriteFile(f"{NODE_DIRECTORY}/node-dnsmasq.conf", dns, when=when)
    yield WriteFile("/etc/dnsmasq.d/node-dnsmasq.conf", dns, restarts="dnsmasq.service", when=when)
    yield from _node_pki(when)
    yield WriteFile(
        f"{NODE_DIRECTORY}/node-config.yaml",
        _file("node-config.yaml"),
        mode=_SECRET,
        restarts=f"{NODE}.service",
        when=when,
    )
    text = (
        f"OPTIONS=--loglevel=2\nCONFIG_FILE={NODE_DIRECTORY}/node-config.yaml\n"
        "IMAGE_VERSION=${image_version}\n"
    )
    yield WriteFile(f"/etc/sysconfig/{NODE}", text, when=when)
    # Origin 3.6 and 3.7 want the file to be there; openshift-ansible fills it for docker only.
    yield WriteFile(f"/etc/sysconfig/{NODE}-dep", "", when=when)
    version = "IMAGE_VERSION=${image_version}\n"
    yield WriteFile(f"/etc/sysconfig/{OPENVSWITCH}", version, when="${ovs_here}")
    oom = "[Service]\nOOMScoreAdjust=-1000\n"  # with it the whole host's network would go
    path = f"/etc/systemd/system/{OPENVSWITCH}.service.d/01-avoid-oom.conf"
    yield WriteFile(path, oom, when="${ovs_here}")
    # The kubelet refuses to start while swap is in use.
    swap = "[Service]\nExecStartPre=-/sbin/swapoff -a\n"
    yield WriteFile(f"/etc/systemd/system/{NODE}.service.d/10-swap.conf", swap, when=when)


def _sysconfig(name: str, options: str, when: str) -> WriteFile:
    text = (
        f"OPTIONS={options}\nCONFIG_FILE={MASTER_DIRECTORY}/master-config.yaml\n"
        "OPENSHIFT_DEFAULT_REGISTRY=docker-registry.default.svc:5000\n"
        "IMAGE_VERSION=${image_version}\n"
    )
    return WriteFile(f"/etc/sysconfig/{name}", text, restarts=f"{name}.service", when=when)


def _master_files() -> Iterator[Step]:
    for path in (MASTER_DIRECTORY, ETCD_DIRECTORY):
        yield MakeDirectory(path, _MASTERS_ONLY)
    yield MakeDirectory("/var/lib/etcd", _MASTERS_ONLY, claim=True)
    yield MakeDirectory("/etc/origin/generated-configs", _MASTERS_ONLY, when="${founder_here}")
    yield from _master_pki()
    yield from _etcd_files()
    config = _file("master-config.yaml")
    path = f"{MASTER_DIRECTORY}/master-config.yaml"
    for name, when in ((API, "${split}"), (SINGLE, "${single}")):
        yield WriteFile(path, config, mode=_SECRET, restarts=f"{name}.service", when=when)
    api = "--loglevel=2 --listen=https://0.0.0.0:8443 --master=https://${loopback}"
    yield _sysconfig(API, api, "${split}")
    controllers = f"--loglevel=2 --listen=https://0.0.0.0:{CONTROLLERS_PORT}"
    yield _sysconfig(CONTROLLERS, controllers, "${split}")
    yield _sysconfig(SINGLE, "--loglevel=2", "${single}")


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
        OPENVSWITCH, "${image_openvswitch}", (("DOCKER_SERVICE", "docker"),), when="${ovs_here}"
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


def _api_ready(netloc: str, authority: str, seconds: float, when: str = "true") -> Probe:
    url = f"https://{netloc}/healthz/ready"
    return Probe(url, authority, deadline=seconds, when=when)


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
    )
    # Up to 3.7 the API server reads its first policy from a file that its own program makes.
    unit = f"{API}-policy.service"
    for name, when in ((API, "${policy_split}"), (SINGLE, "${policy_single}")):
        text = _file("policy.service").replace("@CONTAINER@", name)
        yield WriteFile(f"/etc/systemd/system/{unit}", text, when=when)
    yield StartUnit(unit, lasting=False, when="${policy_file}")
    yield StartUnit(f"{API}.service", ports=_API_PORTS, deadline=READY_SECONDS, when="${split}")
    yield StartUnit(f"{SINGLE}.service", ports=_API_PORTS, deadline=READY_SECONDS, when="${single}")
    yield _api_ready("${loopback}", ca, READY_SECONDS)
    yield StartUnit(
        f"{CONTROLLERS}.service", ports=(f"0.0.0.0:{CONTROLLERS_PORT}",), when="${split}"
    )
    yield Probe(
        f"https://${{url_host}}:{CONTROLLERS_PORT}/healthz",
        ca,
        deadline=READY_SECONDS,
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
        when=when,
    )


ORIGIN = Payload(
    name="origin",
    master=RolePlan(
        profiles=(Profile.SERVER, Profile.CLIENT),
        steps=(
            GetCertificates(),
            *_master_files(),
            *_node_files("${node_here}"),
            *_host(),
            *_master_containers(),
            *_node_containers("${node_here}"),
            *_start_master(),
            *_start_node("${node_here}"),
        ),
        leaves=MASTER_LEAVES,
    ),
    node=RolePlan(
        profiles=(Profile.SERVER, Profile.CLIENT),
        steps=(
            GetCertificates(),
            *_node_files("true"),
            *_host(),
            *_node_containers("true"),
            *_start_node("true"),
        ),
        leaves=NODE_LEAVES,
    ),
    signers=SIGNERS,
    pairs=(SERVICE_ACCOUNTS,),
    derive=derive,
)
