"""The origin payload: what lies on hosts in the end, against what Origin 3.9 wants.

Certificates are looked at in test_pki_origin; here it is files, their modes, what they say, the
order of what is started, and what each waits for.
"""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.protocol import events, plan, status
from firstboot.protocol.messages import MAX_BYTES, encode
from firstboot.protocol.model import Member, Value
from tests.adapters.origin_hosts import Cluster, Host

MASTER, NODE, ETCD = "/etc/origin/master", "/etc/origin/node", "/etc/etcd"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """One master, two nodes, and a public name."""
    options = {"origin_public_hostname": "openshift.example.org"}
    cluster = Cluster(tmp_path_factory.mktemp("three"), 1, 2, options)
    cluster.connect()
    cluster.run()
    assert [h.failures for h in cluster.hosts] == [[], [], []]
    assert all(h.core.running for h in cluster.hosts)
    return cluster


def tree(root: Path, *tops: str) -> dict[str, str]:
    """Every directory and file below `tops`: what it is, and its mode."""
    found = {}
    for top in tops:
        for path in sorted((root / top).rglob("*")):
            kind = "d" if path.is_dir() else "f"
            found[path.relative_to(root).as_posix()] = f"{kind}{path.stat().st_mode & 0o7777:o}"
    return found


def keys(*names: str) -> dict[str, str]:
    return {**dict.fromkeys((f"{n}.crt" for n in names), "f644")} | {
        f"{n}.key": "f600" for n in names
    }


NODE_TREE = {
    "origin/cloudprovider": "d755",
    "origin/host": "f755",
    "origin/kubelet-plugins": "d755",
    "origin/kubelet-plugins/volume": "d755",
    "origin/kubelet-plugins/volume/exec": "d755",
    "origin/node": "d700",
    "origin/node/ca.crt": "f644",
    "origin/node/node-client-ca.crt": "f644",
    "origin/node/node-config.yaml": "f600",
    "origin/node/node-dnsmasq.conf": "f644",
    "origin/node/node-registration.json": "f644",
    "origin/node/resolv.conf": "f644",
    "origin/node/server.crt": "f644",
    "origin/node/server.key": "f600",
    "origin/openvswitch": "d755",
    "origin/sdn": "d755",
}
MASTER_FILES = keys(
    "ca",
    "service-signer",
    "front-proxy-ca",
    "frontproxy-ca",
    "master.server",
    "etcd.server",
    "openshift-master",
    "admin",
    "master.kubelet-client",
    "master.proxy-client",
    "aggregator-front-proxy",
    "openshift-aggregator",
) | {
    "ca-bundle.crt": "f644",
    "client-ca-bundle.crt": "f644",
    "ca.serial.txt": "f644",
    "frontproxy-ca.serial.txt": "f644",
    "master.etcd-ca.crt": "f600",
    "master.etcd-client.crt": "f600",
    "master.etcd-client.key": "f600",
    "serviceaccounts.private.key": "f600",
    "serviceaccounts.public.key": "f600",
    "openshift-master.kubeconfig": "f600",
    "aggregator-front-proxy.kubeconfig": "f600",
    "admin.kubeconfig": "f600",
    "master-config.yaml": "f600",
}
ETCD_TREE = {
    "etcd/ca": "d700",
    **dict.fromkeys((f"etcd/ca/{d}" for d in ("certs", "crl", "fragments")), "d700"),
    **dict.fromkeys(
        (
            f"etcd/{f}"
            for f in (
                "ca.crt",
                "etcd.conf",
                "peer.crt",
                "peer.key",
                "server.crt",
                "server.key",
                "ca/ca.crt",
                "ca/ca.key",
                "ca/crlnumber",
                "ca/index.txt",
                "ca/openssl.cnf",
                "ca/serial",
                "ca/fragments/openssl.cnf",
            )
        ),
        "f600",
    ),
}


def node_tree(name: str) -> dict[str, str]:
    user = f"origin/node/system:node:{name}"
    own = {f"{user}.crt": "f644", f"{user}.key": "f600", f"{user}.kubeconfig": "f600"}
    return {f"etc/{path}": mode for path, mode in {**NODE_TREE, **own}.items()}


def test_a_nodes_tree(three: Cluster) -> None:
    node = three.hosts[1]
    assert tree(node.root, "etc/origin", "etc/etcd") == node_tree("host-2")
    sysconfig = {"docker-network", "openvswitch", "origin-node", "origin-node-dep"}
    assert {p.name for p in (node.root / "etc/sysconfig").iterdir()} == sysconfig


def test_a_masters_tree(three: Cluster) -> None:
    master = three.hosts[0]
    expected = node_tree("host-1") | {f"etc/{p}": m for p, m in ETCD_TREE.items()}
    expected |= {f"etc/origin/master/{p}": m for p, m in MASTER_FILES.items()}
    expected |= {"etc/origin/master": "d700", "etc/origin/generated-configs": "d700"}
    expected |= {"etc/origin/inventory": "f644"}
    assert tree(master.root, "etc/origin", "etc/etcd") == expected
    assert stat.S_IMODE((master.root / "etc/etcd").stat().st_mode) == 0o700
    assert stat.S_IMODE((master.root / "var/lib/etcd").stat().st_mode) == 0o700
    assert master.read("/root/.kube/config") == master.read(f"{MASTER}/admin.kubeconfig")
    names = {"origin-master-api", "origin-master-controllers"}
    assert names < {p.name for p in (master.root / "etc/sysconfig").iterdir()}
    for program in ("oc", "kubectl", "openshift"):
        assert (master.root / "usr/local/bin" / program).is_symlink()


def test_nothing_is_left_to_fill_in(three: Cluster) -> None:
    for one in three.hosts:
        for path in (one.root / "etc").rglob("*"):
            if path.is_file() and path.name != "openssl.cnf":
                text = path.read_text().replace("${component}:${version}", "")
                assert "@{" not in text and "${" not in text, path


def test_sources_of_binds_are_there(three: Cluster) -> None:
    """What the node's container binds and firstboot can make; the rest is any Linux host's."""
    for one in three.hosts:
        for path in (
            "etc/localtime",
            "run/secrets",
            "lib/modules",
            "etc/origin/openvswitch",
            "var/lib/origin",
            "etc/cni/net.d",
            "var/lib/dockershim",
            "var/lib/cni",
            "etc/resolv.conf",
            "var/lib/docker/containers",
            "etc/origin/sdn",
            "etc/origin/node",
            "etc/origin/cloudprovider",
            "etc/pki",
            "opt/cni/bin",
        ):
            assert (one.root / path).exists(), path


# ---------------------------------------------------------------- configuration


def document(one: Host, path: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(one.read(path))
    return loaded


def test_master_config_says_all_that_origin_needs(three: Cluster) -> None:
    config = document(three.hosts[0], f"{MASTER}/master-config.yaml")
    assert (config["apiVersion"], config["kind"]) == ("v1", "MasterConfig")
    assert config["servingInfo"] == {
        "bindAddress": "0.0.0.0:8443",
        "bindNetwork": "tcp4",
        "certFile": "master.server.crt",
        "keyFile": "master.server.key",
        "clientCA": "ca.crt",
        "maxRequestsInFlight": 500,
        "requestTimeoutSeconds": 3600,
    }
    assert config["etcdClientInfo"] == {
        "ca": "master.etcd-ca.crt",
        "certFile": "master.etcd-client.crt",
        "keyFile": "master.etcd-client.key",
        "urls": ["https://10.77.0.11:2379"],
    }
    assert config["imageConfig"]["format"] == "openshift/origin-${component}:${version}"
    assert config["kubeletClientInfo"] == {
        "ca": "ca-bundle.crt",
        "certFile": "master.kubelet-client.crt",
        "keyFile": "master.kubelet-client.key",
        "port": 10250,
    }
    kubernetes = config["kubernetesMasterConfig"]
    assert kubernetes["masterIP"] == "10.77.0.11"
    assert kubernetes["masterCount"] == 1
    assert kubernetes["servicesSubnet"] == config["networkConfig"]["serviceNetworkCIDR"]
    assert kubernetes["apiServerArguments"] == {
        "storage-backend": ["etcd3"],
        "storage-media-type": ["application/vnd.kubernetes.protobuf"],
    }
    assert kubernetes["controllerArguments"] == {
        "cluster-signing-cert-file": ["/etc/origin/master/ca.crt"],
        "cluster-signing-key-file": ["/etc/origin/master/ca.key"],
    }
    assert config["masterClients"]["openshiftLoopbackKubeConfig"] == "openshift-master.kubeconfig"
    assert config["policyConfig"]["openshiftSharedResourcesNamespace"] == "openshift"
    assert config["controllerConfig"] == {
        "election": {"lockName": "openshift-master-controllers"},
        "serviceServingCert": {
            "signer": {"certFile": "service-signer.crt", "keyFile": "service-signer.key"}
        },
    }
    assert config["serviceAccountConfig"] == {
        "limitSecretReferences": False,
        "managedNames": ["default", "builder", "deployer"],
        "masterCA": "ca-bundle.crt",
        "privateKeyFile": "serviceaccounts.private.key",
        "publicKeyFiles": ["serviceaccounts.public.key"],
    }
    assert config["authConfig"]["requestHeader"] == {
        "clientCA": "front-proxy-ca.crt",
        "clientCommonNames": ["aggregator-front-proxy"],
        "usernameHeaders": ["X-Remote-User"],
        "groupHeaders": ["X-Remote-Group"],
        "extraHeaderPrefixes": ["X-Remote-Extra-"],
    }
    assert config["masterPublicURL"] == "https://openshift.example.org:8443"
    oauth = config["oauthConfig"]
    assert oauth["masterURL"] == "https://10.77.0.11:8443"
    assert oauth["masterPublicURL"] == config["masterPublicURL"]
    assert oauth["assetPublicURL"] == "https://openshift.example.org:8443/console/"
    assert config["dnsConfig"] == {"bindAddress": "0.0.0.0:8053", "bindNetwork": "tcp4"}


def test_the_network_is_said_in_both_ways(three: Cluster) -> None:
    network = document(three.hosts[0], f"{MASTER}/master-config.yaml")["networkConfig"]
    (first,) = network["clusterNetworks"]
    assert first == {"cidr": "10.128.0.0/14", "hostSubnetLength": 9}
    assert network["clusterNetworkCIDR"] == first["cidr"]
    assert network["hostSubnetLength"] == first["hostSubnetLength"]
    assert network["networkPluginName"] == "redhat/openshift-ovs-subnet"


def files_named(config: Any) -> set[str]:
    """Every relative file a configuration names."""
    if isinstance(config, dict):
        found: set[str] = set()
        for key, item in config.items():
            named = key.endswith(("File", "CA")) or key in ("ca", "masterKubeConfig")
            named |= key == "openshiftLoopbackKubeConfig"
            if named and isinstance(item, str):
                found.add(item)
            elif key.endswith("Files"):
                found |= set(item)
            else:
                found |= files_named(item)
        return found
    return set().union(*map(files_named, config)) if isinstance(config, list) else set()


def test_every_file_a_configuration_names_is_there(three: Cluster) -> None:
    config = document(three.hosts[0], f"{MASTER}/master-config.yaml")
    named = files_named(config)
    assert len(named) >= 19
    for name in named:
        assert (three.hosts[0].root / "etc/origin/master" / name).is_file(), name
    for one in three.hosts:
        named = files_named(document(one, f"{NODE}/node-config.yaml"))
        assert len(named) == 4
        for name in named:
            assert (one.root / "etc/origin/node" / name).is_file(), name


def test_node_config_says_all_that_origin_needs(three: Cluster) -> None:
    config = document(three.hosts[1], f"{NODE}/node-config.yaml")
    assert (config["apiVersion"], config["kind"]) == ("v1", "NodeConfig")
    assert config["nodeName"] == "host-2"
    assert config["nodeIP"] == config["dnsIP"] == "10.77.0.12"
    assert config["dnsDomain"] == "cluster.local"
    assert config["dnsBindAddress"] == "127.0.0.1:53"
    assert config["dnsRecursiveResolvConf"] == "/etc/origin/node/resolv.conf"
    assert config["masterKubeConfig"] == "system:node:host-2.kubeconfig"
    assert config["imageConfig"]["format"] == "openshift/origin-${component}:${version}"
    assert config["volumeDirectory"] == "/var/lib/origin/openshift.local.volumes"
    assert config["networkConfig"] == {
        "mtu": 1450,
        "networkPluginName": "redhat/openshift-ovs-subnet",
    }
    assert config["proxyArguments"] == {"proxy-mode": ["iptables"]}
    assert config["kubeletArguments"] == {}
    assert config["servingInfo"] == {
        "bindAddress": "0.0.0.0:10250",
        "bindNetwork": "tcp4",
        "certFile": "server.crt",
        "keyFile": "server.key",
        "clientCA": "ca.crt",
    }


def test_environment_files(three: Cluster) -> None:
    master, node = three.hosts[:2]
    api = environment(master.read("/etc/sysconfig/origin-master-api"))
    assert api == {
        "OPTIONS": "--loglevel=2 --listen=https://0.0.0.0:8443 --master=https://10.77.0.11:8443",
        "CONFIG_FILE": "/etc/origin/master/master-config.yaml",
        "OPENSHIFT_DEFAULT_REGISTRY": "docker-registry.default.svc:5000",
        "IMAGE_VERSION": "v3.9.0",
    }
    controllers = environment(master.read("/etc/sysconfig/origin-master-controllers"))
    assert controllers["OPTIONS"] == "--loglevel=2 --listen=https://0.0.0.0:8444"
    assert {k: v for k, v in controllers.items() if k != "OPTIONS"} == {
        k: v for k, v in api.items() if k != "OPTIONS"
    }
    assert environment(node.read("/etc/sysconfig/origin-node")) == {
        "OPTIONS": "--loglevel=2",
        "CONFIG_FILE": "/etc/origin/node/node-config.yaml",
        "IMAGE_VERSION": "v3.9.0",
    }
    assert environment(node.read("/etc/sysconfig/openvswitch")) == {"IMAGE_VERSION": "v3.9.0"}
    etcd = environment(master.read(f"{ETCD}/etcd.conf"))
    assert etcd["ETCD_NAME"] == "host-1"
    assert etcd["ETCD_INITIAL_CLUSTER"] == "host-1=https://10.77.0.11:2380"
    assert etcd["ETCD_CLIENT_CERT_AUTH"] == etcd["ETCD_PEER_CLIENT_CERT_AUTH"] == "true"
    assert etcd["ETCD_HEARTBEAT_INTERVAL"] == "500"
    assert etcd["ETCD_ELECTION_TIMEOUT"] == "2500"
    assert etcd["ETCD_QUOTA_BACKEND_BYTES"] == "4294967296"
    for key, value in etcd.items():
        if key.endswith("_FILE"):
            assert (master.root / value[1:]).is_file()


def environment(text: str) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in text.splitlines())


# ---------------------------------------------------------------- kubeconfigs


def decoded(text: str) -> str:
    return base64.b64decode(text, validate=True).decode()


@pytest.mark.parametrize(
    ("number", "path", "user", "nick", "stem"),
    [
        (0, f"{MASTER}/admin", "system:admin", "10-77-0-11:8443", f"{MASTER}/admin"),
        (
            0,
            f"{MASTER}/openshift-master",
            "system:openshift-master",
            "10-77-0-11:8443",
            f"{MASTER}/openshift-master",
        ),
        (
            1,
            f"{NODE}/system:node:host-2",
            "system:node:host-2",
            "10-77-0-11:8443",
            f"{NODE}/system:node:host-2",
        ),
    ],
    ids=lambda value: str(value).rpartition("/")[2],
)
def test_kubeconfigs(
    three: Cluster, number: int, path: str, user: str, nick: str, stem: str
) -> None:
    one = three.hosts[number]
    config = document(one, f"{path}.kubeconfig")
    assert (config["apiVersion"], config["kind"]) == ("v1", "Config")
    assert config["current-context"] == f"default/{nick}/{user}"
    contexts = {c["name"]: c["context"] for c in config["contexts"]}
    assert contexts[config["current-context"]] == {
        "cluster": nick,
        "namespace": "default",
        "user": f"{user}/{nick}",
    }
    clusters = {c["name"]: c["cluster"] for c in config["clusters"]}
    assert clusters[nick]["server"] == "https://10.77.0.11:8443"
    folder = str(Path(path).parent)
    for cluster in clusters.values():
        assert decoded(cluster["certificate-authority-data"]) == one.read(f"{folder}/ca.crt")
    (found,) = config["users"]
    assert found["name"] == f"{user}/{nick}"
    assert decoded(found["user"]["client-certificate-data"]) == one.read(f"{stem}.crt")
    assert decoded(found["user"]["client-key-data"]) == one.read(f"{stem}.key")


def test_the_administrator_has_the_public_name_too(three: Cluster) -> None:
    config = document(three.hosts[0], f"{MASTER}/admin.kubeconfig")
    servers = {c["name"]: c["cluster"]["server"] for c in config["clusters"]}
    assert servers == {
        "10-77-0-11:8443": "https://10.77.0.11:8443",
        "openshift-example-org:8443": "https://openshift.example.org:8443",
    }
    names = {c["name"] for c in config["contexts"]}
    assert "default/openshift-example-org:8443/system:admin" in names
    users = {u["name"] for u in config["users"]}
    assert all(c["context"]["user"] in users for c in config["contexts"])


def test_openssl_takes_the_files_as_they_lie(three: Cluster) -> None:
    root = three.hosts[0].root
    for ca, leaf in (
        ("etc/origin/master/ca.crt", "etc/origin/master/master.server.crt"),
        ("etc/origin/master/front-proxy-ca.crt", "etc/origin/master/aggregator-front-proxy.crt"),
        ("etc/origin/master/master.etcd-ca.crt", "etc/etcd/peer.crt"),
        ("etc/etcd/ca/ca.crt", "etc/origin/master/master.etcd-client.crt"),
        ("etc/origin/node/ca.crt", "etc/origin/node/server.crt"),
    ):
        words = ("openssl", "verify", "-x509_strict", "-CAfile", str(root / ca), str(root / leaf))
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- names and the host


def test_every_host_resolves_every_member(three: Cluster) -> None:
    for one in three.hosts:
        lines = one.read("/etc/hosts").splitlines()
        for other in three.hosts:
            assert f"{other.member.host} {other.member.name}" in lines
        assert one.read("/etc/resolv.conf").splitlines()[1:] == [
            "search cluster.local",
            f"nameserver {one.member.host}",
        ]
        assert "net.ipv4.ip_forward = 1" in one.read("/etc/sysctl.d/99-openshift.conf")
        dns = one.read("/etc/dnsmasq.d/origin-dns.conf").split()
        assert {"no-resolv", "domain-needed", "bind-dynamic", "except-interface=lo"} < set(dns)
        assert one.read("/etc/dnsmasq.hosts/firstboot").splitlines() == lines[1:-1]
        assert one.read("/etc/dnsmasq.d/node-dnsmasq.conf").split() == [
            "server=/in-addr.arpa/127.0.0.1",
            "server=/cluster.local/127.0.0.1",
        ]


def test_who_asks_in_another_hosts_name_is_refused_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(tmp_path, 1, 2)
    master, thief, victim = cluster.hosts
    asked = thief.carrier.supply.requests

    def in_their_name(_order: Any) -> Any:
        return asked(thief.carrier._order(victim.member))

    monkeypatch.setattr(thief.carrier.supply, "requests", in_their_name)
    cluster.connect()
    cluster.run(20.0)
    assert master.core.running and victim.core.running and not thief.core.running
    (problem,) = (p for p in status.problems(thief.core) if p.code == "DENIED")
    assert "names CN=system:node:host-3,O=system:nodes" in problem.text
    assert "but this host is CN=system:node:host-2,O=system:nodes" in problem.text
    assert "Confirmed" not in thief.sent
    used = master.read(f"{MASTER}/ca.serial.txt")
    monkeypatch.undo()
    own = asked(thief.carrier._order(thief.member))
    cluster.tell(thief, events.RequestsMade(thief.core.steps_done, own))
    cluster.run(30.0)
    assert all(h.core.running for h in cluster.hosts)  # and what was refused took no number
    assert int(master.read(f"{MASTER}/ca.serial.txt"), 16) == int(used, 16) + 2


def test_a_master_learns_of_members_that_come_late(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 1, 2)
    master, early, late = cluster.hosts
    cluster.hosts = [master, early]
    cluster.connect()
    cluster.run()
    assert "host-3" in master.read("/etc/hosts")  # enrolled members are known at once
    cluster.hosts = [master, early, late]
    master.carrier.supply.place([], cluster.value.fingerprint)
    master.carrier.deeds.tell_places(master.core.plan or ())
    assert "host-3" not in master.read("/etc/hosts")
    cluster.connect()
    cluster.run()
    assert late.core.running
    for path in ("/etc/hosts", "/etc/dnsmasq.hosts/firstboot"):
        assert "10.77.0.13 host-3\n" in master.read(path)


# ---------------------------------------------------------------- order


def outside(one: Host) -> list[str]:
    """What was started and waited for, in order."""
    found = []
    for step in one.did:
        match step:
            case plan.StartUnit():
                found.append(step.unit.removesuffix(".service"))
            case plan.Probe():
                found.append(step.url)
    return found


def test_a_master_starts_in_order(three: Cluster) -> None:
    assert outside(three.hosts[0]) == [
        "systemd-journald",
        "dnsmasq",
        "docker",
        "origin-host",
        "etcd",
        "https://10.77.0.11:2379/health",
        "origin-master-api",
        "https://10.77.0.11:8443/healthz/ready",
        "origin-master-controllers",
        "https://10.77.0.11:8444/healthz",
        "https://10.77.0.11:8443/healthz/ready",
        "openvswitch",
        "origin-node",
        "https://10.77.0.11:8443/api/v1/nodes/host-1",
    ]


def test_a_node_waits_for_its_masters_api(three: Cluster) -> None:
    assert outside(three.hosts[1]) == [
        "systemd-journald",
        "dnsmasq",
        "docker",
        "origin-host",
        "https://10.77.0.11:8443/healthz/ready",
        "openvswitch",
        "origin-node",
        "https://10.77.0.11:8443/api/v1/nodes/host-2",
    ]
    gates = [s for s in three.hosts[1].did if isinstance(s, plan.Probe)]
    assert all(0 < g.deadline <= 300 and g.authority for g in gates)


def test_the_target_holds_what_runs(three: Cluster) -> None:
    target = three.hosts[1].did[-1]
    assert isinstance(target, plan.ReachTarget)
    expected = ("dnsmasq", "docker", "origin-host", "openvswitch", "origin-node")
    assert target.units == tuple(f"{unit}.service" for unit in expected)


def test_containers_get_the_values_they_know(three: Cluster) -> None:
    found = {s.name: s for s in three.hosts[0].did if isinstance(s, plan.InstallContainer)}
    names = ["etcd", "origin-master-api", "origin-master-controllers", "openvswitch", "origin-node"]
    assert list(found) == names
    assert found["origin-node"].image == "docker.io/openshift/node:v3.9.0"
    assert found["openvswitch"].image == "docker.io/openshift/openvswitch:v3.9.0"
    assert dict(found["origin-master-api"].values) == {
        "COMMAND": "api",
        "NODE_SERVICE": "origin-node.service",
        "DOCKER_SERVICE": "docker.service",
    }
    assert dict(found["origin-master-controllers"].values)["COMMAND"] == "controllers"
    assert dict(found["openvswitch"].values) == {"DOCKER_SERVICE": "docker.service"}
    assert dict(found["origin-node"].values) == {
        "DNS_DOMAIN": "cluster.local",
        "DOCKER_SERVICE": "docker.service",
        "MASTER_SERVICE": "origin-master-controllers.service",
    }
    etcd = dict(found["etcd"].values)
    assert etcd["ETCD_LISTEN_CLIENT_URLS"] == "https://10.77.0.11:2379"
    assert etcd["ETCD_PEER_CERT_FILE"] == "/etc/etcd/peer.crt"
    mounts = json.loads(f"[0{etcd['ADDTL_MOUNTS']}]")[1:]
    assert [m["source"] for m in mounts] == ["/etc/", "/var/lib/etcd"]
    assert all(m["type"] == "bind" and m["options"] == ["rbind", "rw", "rslave"] for m in mounts)


# ---------------------------------------------------------------- options and releases


def steps(role: str = "master", masters: int = 1, **options: str) -> tuple[plan.Step, ...]:
    members = tuple(Member(f"{n:032x}", f"host-{n}", f"10.77.0.{10 + n}") for n in range(1, 6))
    value = Value(1, "ab" * 32, members[:masters], True, 3)
    me = members[0] if role == "master" else members[masters]
    given = {f"origin_{key}": text for key, text in options.items()}
    return plan.make_plan(PAYLOADS["origin"], value, me, "demo", {**OPTIONS["origin"], **given})


def config_in(made: tuple[plan.Step, ...], path: str) -> dict[str, Any]:
    (text,) = (s.content for s in made if isinstance(s, plan.WriteFile) and s.path == path)
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def units(made: tuple[plan.Step, ...]) -> list[str]:
    """What is started, without the host's own journal and `origin-host`."""
    started = [s.unit.removesuffix(".service") for s in made if isinstance(s, plan.StartUnit)]
    assert started[0] == "systemd-journald" and "origin-host" in started
    return [name for name in started[1:] if name != "origin-host"]


MASTER_CONFIG, NODE_CONFIG = f"{MASTER}/master-config.yaml", f"{NODE}/node-config.yaml"


@pytest.mark.parametrize("plugin", ["ovs-subnet", "ovs-multitenant", "ovs-networkpolicy"])
def test_network_plugins(plugin: str) -> None:
    made = steps(network_plugin=plugin)
    name = f"redhat/openshift-{plugin}"
    assert config_in(made, MASTER_CONFIG)["networkConfig"]["networkPluginName"] == name
    assert config_in(made, NODE_CONFIG)["networkConfig"]["networkPluginName"] == name
    assert "openvswitch" in units(made)


def test_no_network_plugin_no_openvswitch() -> None:
    made = steps("node", network_plugin="none")
    assert config_in(made, NODE_CONFIG)["networkConfig"]["networkPluginName"] == ""
    assert units(made) == ["dnsmasq", "docker", "origin-node"]
    assert not any(isinstance(s, plan.InstallContainer) and s.name == "openvswitch" for s in made)


def test_a_host_may_keep_its_name_servers() -> None:
    made = steps("node", dns="none")
    assert config_in(made, NODE_CONFIG)["dnsIP"] == "172.30.0.1"
    assert units(made) == ["docker", "openvswitch", "origin-node"]
    assert not any(isinstance(s, plan.UseResolver) for s in made)
    assert not any("dnsmasq.d" in getattr(s, "path", "") for s in made)
    assert config_in(steps("node"), NODE_CONFIG)["dnsIP"] == "10.77.0.12"


def test_masters_that_are_no_nodes() -> None:
    made = steps(masters_are_nodes="false")
    assert units(made)[2:] == ["etcd", "origin-master-api", "origin-master-controllers"]
    assert not any(getattr(s, "path", "") == NODE_CONFIG for s in made)
    paths = {s.path for s in made if isinstance(s, plan.WriteFile)}
    assert not any("system:node" in path for path in paths)


def test_labels_arguments_and_unschedulable_masters() -> None:
    made = steps(
        schedulable_masters="false",
        labels='{"region": "infra", "zone": "a"}',
        kubelet_arguments='{"cgroup-driver": ["cgroupfs"], "fail-swap-on": ["false"]}',
        unidling="false",
    )
    config = config_in(made, NODE_CONFIG)
    assert config["kubeletArguments"] == {
        "cgroup-driver": ["cgroupfs"],
        "fail-swap-on": ["false"],
        "node-labels": ["region=infra", "zone=a"],
        "register-schedulable": ["false"],
    }
    assert config["enableUnidling"] is False
    assert (
        "register-schedulable"
        not in config_in(steps("node", schedulable_masters="false"), NODE_CONFIG)[
            "kubeletArguments"
        ]
    )


def test_images_may_be_named() -> None:
    made = steps(images_origin="oci:/images/origin:latest", version="v3.9.1")
    images = {s.name: s.image for s in made if isinstance(s, plan.InstallContainer)}
    assert images["origin-master-api"] == "oci:/images/origin:latest"
    assert images["origin-node"] == "docker.io/openshift/node:v3.9.1"


@pytest.mark.parametrize("release", ["v3.6.1", "v3.7.2", "v3.9.0"])
@pytest.mark.parametrize("masters", [1, 3])
def test_releases(release: str, masters: int) -> None:
    made = steps(masters=masters, version=release)
    config = config_in(made, MASTER_CONFIG)
    old, first = release < "v3.9", release < "v3.7"
    assert ("aggregatorConfig" in config) is not first
    assert ("requestHeader" in config.get("authConfig", {})) is not first
    assert ("clusterNetworks" in config["networkConfig"]) is not first
    assert ("bootstrapPolicyFile" in config["policyConfig"]) is old
    assert ("assetConfig" in config) is old
    console = config.get("assetConfig", {}).get(
        "publicURL", config["oauthConfig"]["assetPublicURL"]
    )
    assert console == config["oauthConfig"]["assetPublicURL"]
    assert config["kubernetesMasterConfig"]["masterCount"] == masters
    started = units(made)
    assert ("origin-master-api-policy" in started) is old
    single = first and masters == 1
    assert ("origin-master" in started) is single
    assert ("origin-master-api" in started) is not single
    assert ("origin-master-controllers" in started) is not single
    if old:
        assert started.index("origin-master-api-policy") < started.index(
            "origin-master" if single else "origin-master-api"
        )
    target = made[-1]
    assert isinstance(target, plan.ReachTarget)
    assert "origin-master-api-policy.service" not in target.units


def test_a_load_balancer_before_three_masters() -> None:
    made = steps("node", 3, cluster_hostname="api.example.org")
    (probe,) = (s for s in made if isinstance(s, plan.Probe) and s.url.endswith("ready"))
    assert probe.url == "https://api.example.org:8443/healthz/ready"


def test_three_masters_form_one_etcd_and_share_what_they_must(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 1)
    cluster.connect()
    cluster.run()
    assert [h.failures for h in cluster.hosts] == [[], [], [], []]
    masters = cluster.hosts[:3]
    for name in ("ca.key", "serviceaccounts.private.key", "service-signer.key", "admin.crt"):
        assert len({h.read(f"{MASTER}/{name}") for h in masters}) == 1
    for name in ("master.server.key", "openshift-master.key", "master.etcd-client.key"):
        assert len({h.read(f"{MASTER}/{name}") for h in masters}) == 3
    members = {environment(h.read(f"{ETCD}/etcd.conf"))["ETCD_INITIAL_CLUSTER"] for h in masters}
    assert len(members) == 1
    assert members.pop().count("https://") == 3
    for one in masters:
        config = document(one, f"{MASTER}/master-config.yaml")
        assert config["kubernetesMasterConfig"]["masterCount"] == 3
        assert len(config["etcdClientInfo"]["urls"]) == 3
    assert not (masters[1].root / "etc/etcd/ca").exists()
    assert (masters[0].root / "etc/etcd/ca/ca.key").exists()
    assert not (cluster.hosts[3].root / "etc/origin/master").exists()


def test_the_largest_answer_fits_into_a_message(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3, 0)
    cluster.connect()
    sizes: list[int] = []
    deliver = cluster._deliver

    def measured(one: Host, action: Any) -> None:
        sizes.append(len(encode(action.message)))
        deliver(one, action)

    cluster._deliver = measured  # type: ignore[method-assign]
    cluster.run()
    assert 20_000 < max(sizes) < MAX_BYTES - 14_000  # room for 200 places
