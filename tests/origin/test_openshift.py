"""The double's checks: each refuses its broken input, and takes what firstboot makes."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from tests.adapters.origin_hosts import Cluster
from tests.origin import api, configuration, credentials, images, openshift
from tests.origin.credentials import CLIENT, SERVER, Refused

MASTER, NODE = "etc/origin/master", "etc/origin/node"
MASTER_CONFIG, NODE_CONFIG = f"{MASTER}/master-config.yaml", f"{NODE}/node-config.yaml"
LOOPBACK, NODE_USER = f"{MASTER}/openshift-master", f"{NODE}/system:node:host-1"
Tree = dict[str, Any]
Change = Callable[["Host"], object]


class Host:
    """A master's /etc/origin as firstboot wrote it, to be broken."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def master(self) -> configuration.Configuration:
        return configuration.master(self.root / MASTER_CONFIG, self.root)

    def node(self) -> configuration.Configuration:
        return configuration.node(self.root / NODE_CONFIG, self.root)[0]

    def edit(self, file: str, key: str, value: object = None) -> None:
        """Set a value, or take it away."""
        path = self.root / file
        tree = found = yaml.safe_load(path.read_text())
        *parents, last = key.split(".")
        for part in parents:
            found = found.setdefault(part, {})
        if value is None:
            del found[last]
        else:
            found[last] = value
        path.write_text(yaml.safe_dump(tree))

    def copy(self, source: str, target: str) -> None:
        shutil.copy(self.root / source, self.root / target)

    def reissue(
        self,
        name: str,
        use: x509.ObjectIdentifier,
        user: str,
        groups: tuple[str, ...] = (),
        days: tuple[int, int] = (-1, 30),
        signer: str = "ca",
    ) -> None:
        """Another certificate for the same key, from one of the cluster's own signers."""
        ca = x509.load_pem_x509_certificate((self.root / MASTER / f"{signer}.crt").read_bytes())
        secret = load_pem_private_key((self.root / MASTER / f"{signer}.key").read_bytes(), None)
        key = load_pem_private_key((self.root / f"{name}.key").read_bytes(), None)
        assert isinstance(secret, rsa.RSAPrivateKey) and isinstance(key, rsa.RSAPrivateKey)
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, g) for g in groups]
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([*subject, x509.NameAttribute(NameOID.COMMON_NAME, user)]))
            .issuer_name(ca.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=days[0]))
            .not_valid_after(now + timedelta(days=days[1]))
            .add_extension(x509.ExtendedKeyUsage([use]), critical=False)
            .sign(secret, SHA256())
        )
        (self.root / f"{name}.crt").write_bytes(made.public_bytes(Encoding.PEM))

    def rewrite(self, config: str, name: str) -> None:
        """A kubeconfig with that certificate in it."""
        path = self.root / f"{config}.kubeconfig"
        tree = yaml.safe_load(path.read_text())
        for key, file in (("client-certificate-data", "crt"), ("client-key-data", "key")):
            content = (self.root / f"{name}.{file}").read_bytes()
            tree["users"][0]["user"][key] = base64.b64encode(content).decode()
        path.write_text(yaml.safe_dump(tree))

    def node_user(self, user: str, *groups: str, **more: Any) -> None:
        self.reissue(NODE_USER, CLIENT, user, groups, **more)
        self.rewrite(NODE_USER, NODE_USER)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What firstboot makes of a master that is a node as well."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 1, 0)
    cluster.connect()
    cluster.run()
    assert cluster.hosts[0].core.running and not cluster.hosts[0].failures
    return cluster.hosts[0].root


@pytest.fixture
def host(made: Path, tmp_path: Path) -> Host:
    shutil.copytree(made / "etc/origin", tmp_path / "etc/origin")
    return Host(tmp_path)


def test_what_firstboot_makes_is_taken(host: Host) -> None:
    host.master()
    host.node()


# ---------------------------------------------------------------- keys and files that must be there


@pytest.mark.parametrize(
    "key", [*configuration.MASTER_KEYS, "controllerConfig.serviceServingCert.signer"]
)
def test_a_master_wants_each_key(host: Host, key: str) -> None:
    host.edit(MASTER_CONFIG, key)
    with pytest.raises(Refused, match=rf"{key}.*Required value"):
        host.master()


@pytest.mark.parametrize("key", configuration.REQUEST_HEADER)
def test_a_request_header_is_whole(host: Host, key: str) -> None:
    host.edit(MASTER_CONFIG, f"authConfig.requestHeader.{key}")
    with pytest.raises(Refused, match=rf"requestHeader.{key}: Required value"):
        host.master()


@pytest.mark.parametrize("key", configuration.NODE_KEYS)
def test_a_node_wants_each_key(host: Host, key: str) -> None:
    host.edit(NODE_CONFIG, key)
    with pytest.raises(Refused, match=rf"{key}: Required value"):
        host.node()


MASTER_FILES = (
    "master-config.yaml",
    "ca.crt",
    "ca.key",
    "ca-bundle.crt",
    "front-proxy-ca.crt",
    "service-signer.crt",
    "service-signer.key",
    "master.server.crt",
    "master.server.key",
    "master.etcd-ca.crt",
    "master.etcd-client.crt",
    "master.etcd-client.key",
    "master.kubelet-client.crt",
    "master.kubelet-client.key",
    "master.proxy-client.crt",
    "master.proxy-client.key",
    "aggregator-front-proxy.crt",
    "aggregator-front-proxy.key",
    "openshift-master.kubeconfig",
    "serviceaccounts.private.key",
    "serviceaccounts.public.key",
)
NODE_FILES = (
    "node-config.yaml",
    "ca.crt",
    "server.crt",
    "server.key",
    "system:node:host-1.kubeconfig",
)


@pytest.mark.parametrize("content", [None, b"nothing of the kind\n"], ids=["missing", "garbage"])
@pytest.mark.parametrize(
    "file", [*(f"{MASTER}/{f}" for f in MASTER_FILES), *(f"{NODE}/{f}" for f in NODE_FILES)]
)
def test_each_file_is_read(host: Host, file: str, content: bytes | None) -> None:
    path = host.root / file
    path.unlink()
    if content:
        path.write_bytes(content)
    with pytest.raises(Refused) as refused:
        host.master() if file.startswith(MASTER) else host.node()
    assert content or (path.name in str(refused.value) and "No such file" in str(refused.value))


# ---------------------------------------------------------------- what they say


def edit(key: str, value: object, file: str = MASTER_CONFIG) -> Change:
    return lambda host: host.edit(file, key, value)


def reissue(name: str, *words: Any, **more: Any) -> Change:
    return lambda host: host.reissue(f"{MASTER}/{name}", *words, **more)


def other_services(host: Host) -> None:
    for key in (f"{KUBERNETES}.servicesSubnet", f"{NETWORK}.serviceNetworkCIDR"):
        host.edit(MASTER_CONFIG, key, "172.29.0.0/16")


def expired_loopback(host: Host) -> None:
    host.reissue(LOOPBACK, CLIENT, "x", ("system:masters",), (-9, -1))
    host.rewrite(LOOPBACK, LOOPBACK)


def other_public_key(host: Host) -> None:
    key = rsa.generate_private_key(65537, 2048).public_key()
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (host.root / MASTER / "serviceaccounts.public.key").write_bytes(pem)


NETWORK, KUBERNETES = "networkConfig", "kubernetesMasterConfig"
KUBELET = ("master.kubelet-client", CLIENT, "system:openshift-node-admin")
BROKEN_MASTERS: dict[str, tuple[Change, str]] = {
    "another kind": (edit("kind", "NodeConfig"), "MasterConfig v1 is wanted"),
    "no CIDR": (edit(f"{KUBERNETES}.servicesSubnet", "172.30.0.1/16"), "invalid CIDR address"),
    "services differ": (edit(f"{NETWORK}.serviceNetworkCIDR", "172.31.0.0/16"), "is not"),
    "pods differ": (edit(f"{NETWORK}.clusterNetworkCIDR", "10.0.0.0/14"), "older keys"),
    "lengths differ": (edit(f"{NETWORK}.hostSubnetLength", 8), "older keys"),
    "one old key": (edit(f"{NETWORK}.hostSubnetLength", None), "Required value"),
    "no such plugin": (edit(f"{NETWORK}.networkPluginName", "redhat/x"), "no plugin"),
    "a bare argument": (
        edit(f"{KUBERNETES}.apiServerArguments.storage-backend", "etcd3"),
        "a list of texts",
    ),
    "plain etcd": (edit("etcdClientInfo.urls", ["http://10.77.0.11:2379"]), "not https"),
    "another console": (edit("assetConfig.publicURL", "https://x/console/"), "assetPublicURL"),
    "another public name": (
        edit("masterPublicURL", "https://www.example.org:8443"),
        "not valid for www.example.org",
    ),
    "another address": (edit(f"{KUBERNETES}.masterIP", "10.77.0.99"), "not valid for 10.77.0.99"),
    "another service address": (
        other_services,
        "not valid for 172.29.0.1",
    ),
    "no names": (reissue("master.server", SERVER, "10.77.0.11"), "no alternative names"),
    "a client's, serving": (reissue("master.server", CLIENT, "x"), "not for this use"),
    "another's key": (
        lambda host: host.copy(f"{MASTER}/admin.key", f"{MASTER}/master.server.key"),
        "the key is not the certificate's",
    ),
    "a server's, as client": (reissue("master.proxy-client", SERVER, "x"), "not for this use"),
    "expired": (reissue(*KUBELET, ("system:node-admins",), (-9, -1)), "expired"),
    "too early": (reissue(*KUBELET, ("system:node-admins",), (1, 9)), "not valid yet"),
    "no group": (reissue(*KUBELET), "not of the group system:node-admins"),
    "a foreign signer": (
        reissue(*KUBELET, ("system:node-admins",), signer="service-signer"),
        "unknown authority",
    ),
    "no signer": (edit("servingInfo.clientCA", "admin.crt"), "not a signer"),
    "another clients' signer": (
        edit("servingInfo.clientCA", "service-signer.crt"),
        "unknown authority",
    ),
    "another signer of etcd": (edit("etcdClientInfo.ca", "ca.crt"), "unknown authority"),
    "a signer's key that is not": (
        edit("controllerConfig.serviceServingCert.signer.keyFile", "ca.key"),
        "the key is not the certificate's",
    ),
    "a signer that is none": (
        edit(f"{KUBERNETES}.controllerArguments.cluster-signing-cert-file", ["admin.crt"]),
        "the key is not the certificate's",
    ),
    "another aggregator": (
        edit("authConfig.requestHeader.clientCommonNames", ["somebody"]),
        "aggregator-front-proxy is not one",
    ),
    "others' tokens": (other_public_key, "none of publicKeyFiles"),
    "a loopback with little to say": (
        lambda host: host.copy(f"{NODE_USER}.kubeconfig", f"{LOOPBACK}.kubeconfig"),
        "not of the group system:masters",
    ),
    "an expired loopback": (expired_loopback, "expired"),
}
BROKEN_NODES: dict[str, tuple[Change, str]] = {
    "another kind": (edit("kind", "MasterConfig", NODE_CONFIG), "NodeConfig v1 is wanted"),
    "upper case": (edit("nodeName", "Host-1", NODE_CONFIG), "not in lower case"),
    "another name": (edit("nodeName", "host-2", NODE_CONFIG), "is not node host-2"),
    "another address": (edit("nodeIP", "10.77.0.99", NODE_CONFIG), "not valid for 10.77.0.99"),
    "volumes anywhere": (edit("volumeDirectory", "volumes", NODE_CONFIG), "must be absolute"),
    "no dns": (edit("dnsIP", "0.0.0.0", NODE_CONFIG), "dnsIP"),
    "no such plugin": (edit("networkPluginName", "x", NODE_CONFIG), "no plugin"),
    "a bare argument": (edit("kubeletArguments.max-pods", "9", NODE_CONFIG), "a list of texts"),
    "numbers": (edit("proxyArguments.x", [1], NODE_CONFIG), "a list of texts"),
    "cert-dir": (edit("kubeletArguments.cert-dir", ["/x"], NODE_CONFIG), "nobody knows"),
    "another node": (lambda h: h.node_user("system:node:host-2", "system:nodes"), "is not node"),
    "another group": (lambda h: h.node_user("system:node:host-1", "system:masters"), "is not node"),
    "no group": (lambda h: h.node_user("system:node:host-1"), "is not node"),
    "expired": (
        lambda h: h.node_user("system:node:host-1", "system:nodes", days=(-9, -1)),
        "expired",
    ),
    "a foreign signer": (
        lambda h: h.node_user("system:node:host-1", "system:nodes", signer="front-proxy-ca"),
        "unknown authority",
    ),
    "another's key": (
        lambda host: host.copy(f"{MASTER}/admin.key", f"{NODE}/server.key"),
        "the key is not the certificate's",
    ),
    "no context": (
        edit("current-context", "other", f"{NODE_USER}.kubeconfig"),
        "not a kubeconfig",
    ),
}


@pytest.mark.parametrize("name", BROKEN_MASTERS)
def test_a_broken_master_is_refused(host: Host, name: str) -> None:
    change, message = BROKEN_MASTERS[name]
    change(host)
    with pytest.raises(Refused, match=message):
        host.master()
    host.node()  # and nothing else was broken


@pytest.mark.parametrize("name", BROKEN_NODES)
def test_a_broken_node_is_refused(host: Host, name: str) -> None:
    change, message = BROKEN_NODES[name]
    change(host)
    with pytest.raises(Refused, match=message):
        host.node()
    host.master()


# ---------------------------------------------------------------- over TLS


class Server:
    """The double's API on a port of this machine, with the master's certificate."""

    def __init__(self, host: Host) -> None:
        self.host, found = host, host.master()
        self.api = api.Api(configuration.public_keys(found))
        context = openshift.serving(found, ssl.CERT_OPTIONAL)
        self.server = api.server(("127.0.0.1", 0), context, self.api)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def ask(
        self, who: str, method: str, path: str, body: object = None, token: str = ""
    ) -> tuple[int, str]:
        """`who` is a certificate's place, "" for none."""
        trusted = str(self.host.root / MASTER / "ca.crt")
        context = ssl.create_default_context(cafile=trusted)
        if who:
            names = [str(self.host.root / f"{who}.{end}") for end in ("crt", "key")]
            context.load_cert_chain(*names)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = json.dumps(body) if body else None
        where = ("127.0.0.1", self.server.server_address[1])
        with (
            socket.create_connection(where, 5) as plain,
            context.wrap_socket(plain, server_hostname="10.77.0.11") as channel,
            contextlib.closing(http.client.HTTPConnection(*where)) as connection,
        ):
            connection.sock = channel
            connection.request(method, path, content, {"Connection": "close", **headers})
            answer = connection.getresponse()
            return answer.status, answer.read().decode()


@pytest.fixture
def served(host: Host) -> Iterator[Server]:
    found = Server(host)
    found.thread.start()
    yield found
    found.server.shutdown()
    found.thread.join()
    found.server.server_close()


WHOAMI, NODES = "/apis/user.openshift.io/v1/users/~", "/api/v1/nodes"
ADMIN = f"{MASTER}/admin"


def test_it_is_ready_only_once_it_says_so(served: Server) -> None:
    assert served.ask("", "GET", "/healthz/ready")[0] == 500
    served.api.ready = True
    assert served.ask("", "GET", "/healthz/ready") == (200, "ok")


def test_a_node_registers_by_its_own_certificate_only(served: Server) -> None:
    node = {"metadata": {"name": "host-1"}, "status": {}}
    for who in ("", ADMIN, f"{MASTER}/master.proxy-client"):
        assert served.ask(who, "POST", NODES, node)[0] == 403
    served.host.reissue(ADMIN, CLIENT, "system:node:host-1")  # the name, and no group
    assert served.ask(ADMIN, "POST", NODES, node)[0] == 403
    assert served.ask(NODE_USER, "POST", NODES, {"metadata": {"name": "host-2"}})[0] == 403
    assert served.ask(NODE_USER, "POST", NODES, node)[0] == 200
    status = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    assert served.ask(NODE_USER, "PUT", f"{NODES}/host-2/status", status)[0] == 403
    assert served.ask(NODE_USER, "PUT", f"{NODES}/host-1/status", status)[0] == 200
    assert '"type":"Ready","status":"True"' in served.ask(NODE_USER, "GET", f"{NODES}/host-1")[1]


@pytest.mark.parametrize("days", [(-9, -1), (-1, 9)])
def test_strangers_and_expired_clients_shake_no_hands(
    served: Server, days: tuple[int, int]
) -> None:
    signer = "ca" if days[1] < 0 else "service-signer"
    served.host.reissue(ADMIN, CLIENT, "system:admin", ("system:masters",), days, signer)
    with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
        served.ask(ADMIN, "GET", WHOAMI)


def test_users_are_who_their_certificate_or_token_says(served: Server) -> None:
    assert json.loads(served.ask(ADMIN, "GET", WHOAMI)[1])["metadata"]["name"] == "system:admin"
    assert served.ask("", "GET", WHOAMI)[0] == 403
    pem = (served.host.root / MASTER / "serviceaccounts.private.key").read_bytes()
    key = credentials.private_key(pem, "key")
    good = api.make_token("default", "builder", key)
    strange = api.make_token("default", "builder", rsa.generate_private_key(65537, 2048))
    secrets = "/api/v1/namespaces/default/secrets"

    def bring(token: str, who: str = ADMIN) -> int:
        data = {"token": base64.b64encode(token.encode()).decode()}
        body = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": token}, "data": data}
        return served.ask(who, "POST", secrets, body)[0]

    assert served.ask("", "GET", WHOAMI, token=good)[0] == 401  # signed, but nobody's
    assert bring(good, NODE_USER) == 403
    assert (bring(good), bring(strange), bring(good)) == (201, 201, 409)
    answer = json.loads(served.ask("", "GET", WHOAMI, token=good)[1])
    assert answer["metadata"]["name"] == "system:serviceaccount:default:builder"
    for bad in (strange, good[:-8] + good[-8:].swapcase(), "x"):
        assert served.ask("", "GET", WHOAMI, token=bad)[0] == 401
    assert served.ask(NODE_USER, "GET", secrets)[0] == 403
    assert served.ask(ADMIN, "GET", secrets)[0] == 200


# ---------------------------------------------------------------- the program


def test_a_default_route_is_seen() -> None:
    head = "Iface\tDestination\tGateway\n"
    assert not openshift.default_route(head + "eth0\t00004D0A\t00000000\n")
    assert openshift.default_route(head + "eth0\t00000000\t00000000\n")


def test_what_a_unit_exported_is_read() -> None:
    text = 'declare -x CONFIG_FILE="/x y"\ndeclare -x OLDPWD\ndeclare -x OPTIONS="--a=1 --b=2"\n'
    assert openshift.exported(text) == {"CONFIG_FILE": "/x y", "OPTIONS": "--a=1 --b=2"}


@pytest.mark.parametrize("name", images.exports())
def test_the_images_programs_need_nothing_else(name: str, tmp_path: Path) -> None:
    images.fill(tmp_path, name)
    program = [sys.executable, "-I", str(tmp_path / "usr/bin/oc"), "whoami", "--config=/none"]
    done = subprocess.run(program, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "oc: --config: /none: No such file or directory\n"
