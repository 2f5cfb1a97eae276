"""What Origin's hosts hold before anything starts: directories, certificates, configuration.

Paths and modes are those openshift-ansible 3.9 makes and looks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from firstboot.payloads.origin.certificates import (
    ETCD_CA_DIRECTORY,
    MASTER_DIRECTORY,
    MASTER_LEAVES,
    SERVICE_ACCOUNTS,
)
from firstboot.payloads.origin.variables import CONTROLLERS_PORT
from firstboot.protocol.plan import (
    MakeDirectory,
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
HOSTS = "@{hosts}"  # lines of hosts(5), by `supply`
REGISTRY_TRUST = "/etc/docker/certs.d/docker-registry.default.svc:5000"
HOST_UNIT = "origin-host.service"
_FILES = Path(__file__).parent / "files"
_MASTERS_ONLY, _SECRET = 0o700, 0o600


def text_of(name: str) -> str:
    """A file's text, to be filled in."""
    return (_FILES / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- certificates and kubeconfigs


def _pair(
    directory: str, name: str, credential: str = "", public: int = 0o644, when: str = "true"
) -> Iterator[Step]:
    """A certificate and its key."""
    for half, mode in (("crt", public), ("key", _SECRET)):
        source = f"{credential or name}.{half}"
        yield WriteFile(f"{directory}/{name}.{half}", credential=source, mode=mode, when=when)


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
            yield from _pair(here, leaf.name, when=leaf.when)
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
    yield WriteFile(f"{ETCD_DIRECTORY}/etcd.conf", text_of("etcd.conf"), mode=_SECRET)
    yield WriteFile("/etc/tmpfiles.d/etcd-dir.conf", "d /var/lib/etcd/ 0700 root root - -\n")
    founder = "${founder_here}"
    yield MakeDirectory(ETCD_CA_DIRECTORY, _MASTERS_ONLY, when=founder)
    for name in ("certs", "crl", "fragments"):
        yield MakeDirectory(f"{ETCD_CA_DIRECTORY}/{name}", 0o700, when=founder)
    for half in ("crt", "key"):
        path, credential = f"{ETCD_CA_DIRECTORY}/ca.{half}", f"etcd-ca.{half}"
        yield WriteFile(path, credential=credential, mode=_SECRET, when=founder)
    for path in (f"{ETCD_CA_DIRECTORY}/openssl.cnf", f"{ETCD_CA_DIRECTORY}/fragments/openssl.cnf"):
        yield WriteFile(path, text_of("openssl.cnf"), mode=_SECRET, when=founder)
    yield WriteFile(f"{ETCD_CA_DIRECTORY}/crlnumber", "01\n", mode=_SECRET, keep=True, when=founder)


def _node_pki(when: str) -> Iterator[Step]:
    here, anchors = NODE_DIRECTORY, "/etc/pki/ca-trust/source/anchors"
    # The same authority by the names that openshift-ansible, Origin's own program and docker know.
    for path in (f"{here}/ca.crt", f"{here}/node-client-ca.crt", f"{anchors}/openshift-ca.crt"):
        yield WriteFile(path, credential="ca.crt", when=when)
    yield WriteFile(f"{REGISTRY_TRUST}/node-client-ca.crt", credential="ca.crt", when=when)
    user = "system:node:${name}"
    for name, credential in (("server", "node.server"), (user, "node.client")):
        yield WriteFile(f"{here}/{name}.crt", credential=f"{credential}.crt", when=when)
        path = f"{here}/{name}.key"
        yield WriteFile(path, credential=f"{credential}.key", mode=_SECRET, when=when)
    server, nick = "${node_api}", "${node_api_nick}"
    path = f"{here}/{user}.kubeconfig"
    yield _kubeconfig(path, user, "node.client", server, nick, when)


# ---------------------------------------------------------------- the host


def host(node: str) -> Iterator[Step]:
    """What containers bind, and what a host of Origin is expected to have; no secret in it."""
    for path in ("/etc/pki/ca-trust/source/anchors", "/var/lib/origin"):
        yield MakeDirectory(path)
    yield MakeDirectory("/etc/dnsmasq.hosts", when="${dns_here}")
    yield MakeDirectory(NODE_DIRECTORY, 0o700)
    for path in _BOUND:
        yield MakeDirectory(path, when=node)
    # /run is new at every boot, and a minimal image has no time zone.
    yield WriteFile("/etc/tmpfiles.d/firstboot-origin.conf", "d /run/secrets 0755 root root - -\n")
    yield WriteFile("/etc/localtime", "", keep=True, when=node)
    yield from _drop_ins(node)
    yield WriteFile("/etc/sysctl.d/99-openshift.conf", text_of("sysctl.conf"))
    # Without it Origin's network refuses to start; else docker sees to it.
    yield SetKernel("net.ipv4.ip_forward", "1", when="${ovs_here}")
    dns, dnsmasq = text_of("node-dnsmasq.conf"), "dnsmasq.service"
    yield WriteFile(f"{NODE_DIRECTORY}/node-dnsmasq.conf", dns, when=node)
    when = "${dns_node_here}"
    yield WriteFile("/etc/dnsmasq.d/node-dnsmasq.conf", dns, restarts=dnsmasq, when=when)
    text, when = text_of("dnsmasq.conf"), "${dns_here}"
    yield WriteFile("/etc/dnsmasq.d/origin-dns.conf", text, restarts=dnsmasq, when=when)
    yield UseResolver(
        "${address}",
        search="cluster.local",
        saved=f"{NODE_DIRECTORY}/resolv.conf",
        servers="/etc/dnsmasq.d/origin-upstream-dns.conf",
        restarts=dnsmasq,
        when=when,
    )
    yield from _limits()
    text = 'DOCKER_NETWORK_OPTIONS="--mtu=1450"\n'
    yield WriteFile("/etc/sysconfig/docker-network", text, restarts="docker.service")
    yield StartUnit(dnsmasq, ports=("${address}:53",), when=when)
    yield StartUnit("docker.service")


def _limits() -> Iterator[Step]:
    """What the host's other services are told: its journal, its firewall, SELinux."""
    journald = "systemd-journald.service"
    path = "/etc/systemd/journald.conf.d/50-origin.conf"
    yield WriteFile(path, text_of("journald.conf"), restarts=journald)
    yield StartUnit(journald, lasting=False)
    path = f"/etc/systemd/system/{HOST_UNIT}"
    yield WriteFile(path, text_of("host.service"), restarts=HOST_UNIT)
    yield WriteFile("/etc/origin/host", text_of("host.sh"), mode=0o755, restarts=HOST_UNIT)


_BOUND = (
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
)


def _drop_ins(node: str) -> Iterator[Step]:
    units = "/etc/systemd/system"
    oom = "[Service]\nOOMScoreAdjust=-1000\n"  # with it the whole host's network would go
    yield WriteFile(f"{units}/{OPENVSWITCH}.service.d/01-avoid-oom.conf", oom, when="${ovs_here}")
    # The kubelet refuses to start while swap is in use.
    swap = "[Service]\nExecStartPre=-/sbin/swapoff -a\n"
    yield WriteFile(f"{units}/{NODE}.service.d/10-swap.conf", swap, when=node)


def names() -> Iterator[Step]:
    """Every host resolves every member's name, whatever DNS there is."""
    yield WriteBlock("/etc/hosts", HOSTS)
    # dnsmasq looks into /etc/hosts at its start only, but follows files in a directory.
    yield WriteFile("/etc/dnsmasq.hosts/firstboot", HOSTS, when="${dns_here}")


def node_files(when: str) -> Iterator[Step]:
    """A node's certificates and configuration."""
    yield from _node_pki(when)
    yield WriteFile(
        f"{NODE_DIRECTORY}/node-config.yaml",
        text_of("node-config.yaml"),
        mode=_SECRET,
        restarts=f"{NODE}.service",
        when=when,
    )
    text = (
        f"OPTIONS=--loglevel=2\nCONFIG_FILE={NODE_DIRECTORY}/node-config.yaml\n"
        "IMAGE_VERSION=${image_version}\n"
    )
    yield WriteFile(f"/etc/sysconfig/{NODE}", text, when=when)
    yield WriteFile(
        f"{NODE_DIRECTORY}/node-registration.json", text_of("node-registration.json"), when=when
    )
    # Origin 3.6 and 3.7 want the file to be there; openshift-ansible fills it for docker only.
    yield WriteFile(f"/etc/sysconfig/{NODE}-dep", "", when=when)
    version = "IMAGE_VERSION=${image_version}\n"
    yield WriteFile(f"/etc/sysconfig/{OPENVSWITCH}", version, when="${ovs_here}")


def _sysconfig(name: str, options: str, when: str) -> WriteFile:
    text = (
        f"OPTIONS={options}\nCONFIG_FILE={MASTER_DIRECTORY}/master-config.yaml\n"
        "OPENSHIFT_DEFAULT_REGISTRY=docker-registry.default.svc:5000\n"
        "IMAGE_VERSION=${image_version}\n"
    )
    return WriteFile(f"/etc/sysconfig/{name}", text, restarts=f"{name}.service", when=when)


def master_files() -> Iterator[Step]:
    """A master's certificates and configuration, etcd's too."""
    for path in (MASTER_DIRECTORY, ETCD_DIRECTORY):
        yield MakeDirectory(path, _MASTERS_ONLY)
    yield MakeDirectory("/var/lib/etcd", _MASTERS_ONLY, claim=True)
    yield MakeDirectory("/etc/origin/generated-configs", _MASTERS_ONLY, when="${founder_here}")
    yield from _master_pki()
    yield from _etcd_files()
    yield WriteFile("/etc/origin/inventory", text_of("inventory"))
    config = text_of("master-config.yaml")
    path = f"{MASTER_DIRECTORY}/master-config.yaml"
    for name, when in ((API, "${split}"), (SINGLE, "${single}")):
        yield WriteFile(path, config, mode=_SECRET, restarts=f"{name}.service", when=when)
    api = "--loglevel=2 --listen=https://0.0.0.0:8443 --master=https://${loopback}"
    yield _sysconfig(API, api, "${split}")
    controllers = f"--loglevel=2 --listen=https://0.0.0.0:{CONTROLLERS_PORT}"
    yield _sysconfig(CONTROLLERS, controllers, "${split}")
    yield _sysconfig(SINGLE, "--loglevel=2", "${single}")
