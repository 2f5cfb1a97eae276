"""What Origin 3.9 refuses in master-config.yaml and node-config.yaml, or dies of later.

Found by starting the real programs with one thing missing each; where they only warn and then do
not work (no `clientCA`: nobody is known), this refuses too.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from tests.origin import credentials
from tests.origin.credentials import CLIENT, SERVER, Kubeconfig, Refused

MASTER_KEYS = (
    "masterPublicURL",
    "etcdClientInfo.urls",
    "imageConfig.format",
    "kubeletClientInfo.port",
    "kubernetesMasterConfig",
    "masterClients.openshiftLoopbackKubeConfig",
    "policyConfig.openshiftSharedResourcesNamespace",
    "servingInfo.bindAddress",
    "servingInfo.certFile",
    "servingInfo.keyFile",
    "servingInfo.clientCA",
    "kubernetesMasterConfig.servicesSubnet",
)
NODE_KEYS = (
    "nodeName",
    "servingInfo.bindAddress",
    "servingInfo.certFile",
    "servingInfo.keyFile",
    "servingInfo.clientCA",
    "imageConfig.format",
    "masterKubeConfig",
    "volumeDirectory",
)
REQUEST_HEADER = (
    "clientCA",
    "clientCommonNames",
    "usernameHeaders",
    "groupHeaders",
    "extraHeaderPrefixes",
)
PLUGINS = ("", *(f"redhat/openshift-ovs-{n}" for n in ("subnet", "multitenant", "networkpolicy")))
_SERVICE = tuple(
    f"{name}{end}"
    for name in ("kubernetes", "openshift")
    for end in ("", ".default", ".default.svc", ".default.svc.cluster.local")
)


class Configuration:
    """One file, and the files it names: relative to its directory, or below `root`."""

    def __init__(self, path: Path, kind: str, root: Path = Path("/")) -> None:
        self.directory, self.root = path.parent, root
        try:
            self.tree = yaml.safe_load(path.read_text())
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}") from error
        except yaml.YAMLError as error:
            raise Refused(f"{path}: {error}") from error
        said = (self.get("kind"), self.get("apiVersion"))
        if said != (kind, "v1"):
            raise Refused(f"{path}: {kind} v1 is wanted, not {said[0]} {said[1]}")

    def find(self, key: str) -> Any:
        """A value, None if it or what it is in is not there."""
        found: Any = self.tree
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    def get(self, key: str) -> Any:
        """A value that must be there."""
        found = self.find(key)
        if found is None or found == "" or found == []:
            raise Refused(f"{key}: Required value")
        return found

    def read(self, key: str) -> bytes:
        """The content of the file that a key names."""
        return self.content(key, str(self.get(key)))

    def content(self, key: str, name: str) -> bytes:
        path = self.place(name)
        try:
            return path.read_bytes()
        except OSError as error:
            raise Refused(f"{key}: could not read {path}: {error.strerror}") from error

    def place(self, name: str) -> Path:
        """Where a file lies that the configuration names."""
        return self.root / name.lstrip("/") if name.startswith("/") else self.directory / name

    def client(self, key: str, authority: str) -> tuple[str, set[str]]:
        """The user of a client's `certFile` and `keyFile`, signed by the file `authority` names."""
        leaf = credentials.pair(self.read(f"{key}.certFile"), self.read(f"{key}.keyFile"), key)
        signers = credentials.signer(self.read(authority), authority)
        credentials.issued(leaf, signers, CLIENT, key)
        return credentials.subject(leaf)

    def arguments(self, key: str) -> None:
        """Extended arguments are lists of texts."""
        for name, values in (self.find(key) or {}).items():
            if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
                raise Refused(f"{key}.{name}: a list of texts is wanted")

    def serving(self, hosts: list[str], signers: bytes) -> None:
        """The serving certificate is valid for `hosts`, and an authority of clients' is there."""
        where = "servingInfo.certFile"
        leaf = credentials.pair(self.read(where), self.read("servingInfo.keyFile"), where)
        credentials.issued(leaf, credentials.signer(signers, where), SERVER, where)
        credentials.covers(leaf, hosts, where)
        credentials.signer(self.read("servingInfo.clientCA"), "servingInfo.clientCA")


# ---------------------------------------------------------------- the master's


def master(path: Path, root: Path = Path("/")) -> Configuration:
    """The master's configuration and every file it names, or Refused."""
    found = Configuration(path, "MasterConfig", root)
    for key in MASTER_KEYS:
        found.get(key)
    for section in ("apiServerArguments", "controllerArguments"):
        found.arguments(f"kubernetesMasterConfig.{section}")
    subnet = _networks(found)
    _etcd(found)
    _signers(found)
    _clients(found)
    _service_accounts(found)
    loopback = loopback_kubeconfig(found)
    hosts = [urlsplit(u).hostname or "" for u in (found.get("masterPublicURL"), loopback.server)]
    hosts += [str(found.get("kubernetesMasterConfig.masterIP")), *_SERVICE]
    found.serving([*hosts, str(subnet[1])], loopback.authority)
    return found


def first_policy(found: Configuration) -> None:
    """Until 3.7 the API server reads its first policy from a file, if the configuration says so."""
    key = "policyConfig.bootstrapPolicyFile"
    if not found.find(key):
        return
    try:
        json.loads(found.read(key))
    except ValueError as error:
        raise Refused(f"{key}: {error}") from error


def loopback_kubeconfig(found: Configuration) -> Kubeconfig:
    """By which the master's own parts reach the API: as a user who may do everything."""
    key = "masterClients.openshiftLoopbackKubeConfig"
    config = credentials.kubeconfig(found.place(str(found.get(key))), key)
    leaf = credentials.pair(config.certificate, config.key, key)
    known = credentials.signer(found.read("servingInfo.clientCA"), "servingInfo.clientCA")
    credentials.issued(leaf, known, CLIENT, key)
    if "system:masters" not in credentials.subject(leaf)[1]:
        raise Refused(f"{key}: not of the group system:masters")
    return config


def _networks(found: Configuration) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    key = "kubernetesMasterConfig.servicesSubnet"
    try:
        subnet = ipaddress.ip_network(found.get(key))
    except ValueError as error:
        raise Refused(f"{key}: invalid CIDR address: {error}") from error
    said = found.find("networkConfig.serviceNetworkCIDR")
    if said not in (None, found.get(key)):
        raise Refused(f"networkConfig.serviceNetworkCIDR: {said} is not {key}")
    if found.find("networkConfig.clusterNetworks"):
        first = found.get("networkConfig.clusterNetworks")[0]
        old = [found.get(f"networkConfig.{k}") for k in ("clusterNetworkCIDR", "hostSubnetLength")]
        if old != [first.get("cidr"), first.get("hostSubnetLength")]:
            raise Refused("networkConfig.clusterNetworks: the first is not what the older keys say")
    _plugin(found, "networkConfig.networkPluginName")
    return subnet


def _plugin(found: Configuration, key: str) -> None:
    if (found.find(key) or "") not in PLUGINS:
        raise Refused(f"{key}: there is no plugin {found.find(key)}")


def _etcd(found: Configuration) -> None:
    for url in found.get("etcdClientInfo.urls"):
        if urlsplit(url).scheme != "https":
            raise Refused(f"etcdClientInfo.urls: {url} is not https")
    found.client("etcdClientInfo", "etcdClientInfo.ca")


def _signers(found: Configuration) -> None:
    signing = found.find("kubernetesMasterConfig.controllerArguments") or {}
    pairs = [("controllerConfig.serviceServingCert.signer", "", "")]
    if "cluster-signing-cert-file" in signing or "cluster-signing-key-file" in signing:
        names = [(signing.get(f"cluster-signing-{n}-file") or [""])[0] for n in ("cert", "key")]
        pairs.append(("kubernetesMasterConfig.controllerArguments", names[0], names[1]))
    for key, certificate, secret in pairs:
        files = (
            found.content(key, certificate or str(found.get(f"{key}.certFile"))),
            found.content(key, secret or str(found.get(f"{key}.keyFile"))),
        )
        credentials.pair(*files, key)
        credentials.signer(files[0], key)


def _clients(found: Configuration) -> None:
    if found.find("kubeletClientInfo.certFile"):
        user, groups = found.client("kubeletClientInfo", "kubeletClientInfo.ca")
        if "system:node-admins" not in groups:
            raise Refused(f"kubeletClientInfo: {user} is not of the group system:node-admins")
    if found.find("kubernetesMasterConfig.proxyClientInfo"):
        found.client("kubernetesMasterConfig.proxyClientInfo", "servingInfo.clientCA")
    if found.find("authConfig.requestHeader"):
        for key in REQUEST_HEADER:
            found.get(f"authConfig.requestHeader.{key}")
    if found.find("aggregatorConfig.proxyClientInfo"):
        here = "authConfig.requestHeader"
        user, _ = found.client("aggregatorConfig.proxyClientInfo", f"{here}.clientCA")
        if user not in found.get(f"{here}.clientCommonNames"):
            raise Refused(f"{here}.clientCommonNames: {user} is not one of them")
    assets = found.find("assetConfig.publicURL")
    if assets and assets != found.find("oauthConfig.assetPublicURL"):
        raise Refused("assetConfig.publicURL: is not oauthConfig.assetPublicURL")


def _service_accounts(found: Configuration) -> None:
    """Without them no pod and no build has a token."""
    here = "serviceAccountConfig"
    key = credentials.private_key(found.read(f"{here}.privateKeyFile"), f"{here}.privateKeyFile")
    if not any(credentials.same_key(key, public) for public in public_keys(found)):
        raise Refused(f"{here}: none of publicKeyFiles belongs to privateKeyFile")
    credentials.signer(found.read(f"{here}.masterCA"), f"{here}.masterCA")
    if found.find("oauthConfig"):
        credentials.signer(found.read("oauthConfig.masterCA"), "oauthConfig.masterCA")


def public_keys(found: Configuration) -> list[Any]:
    """What tokens of service accounts are verified with."""
    key = "serviceAccountConfig.publicKeyFiles"
    return [credentials.public_key(found.content(key, name), key) for name in found.get(key)]


# ---------------------------------------------------------------- a node's


def node(path: Path, root: Path = Path("/")) -> tuple[Configuration, Kubeconfig]:
    """A node's configuration, every file it names, and how it reaches the master; or Refused."""
    found = Configuration(path, "NodeConfig", root)
    for key in NODE_KEYS:
        found.get(key)
    name = str(found.get("nodeName"))
    if name != name.lower():
        raise Refused(f"nodeName: {name} is not in lower case")
    if not str(found.get("volumeDirectory")).startswith("/"):
        raise Refused("volumeDirectory: must be absolute")
    if found.find("dnsIP") == "0.0.0.0":
        raise Refused("dnsIP: 0.0.0.0 is for a node that asks the master for its configuration")
    for key in ("networkConfig.networkPluginName", "networkPluginName"):
        _plugin(found, key)
    for section in ("kubeletArguments", "proxyArguments"):
        found.arguments(section)
    if found.find("kubeletArguments.cert-dir"):
        raise Refused("kubeletArguments.cert-dir: then nobody knows who this node is")
    key = "masterKubeConfig"
    config = credentials.kubeconfig(found.place(str(found.get(key))), key)
    user, groups = credentials.subject(credentials.pair(config.certificate, config.key, key))
    if user != f"system:node:{name}" or "system:nodes" not in groups:
        raise Refused(f"{key}: {user} of {sorted(groups)} is not node {name}")
    hosts = [name, *([str(found.get("nodeIP"))] if found.find("nodeIP") else [])]
    found.serving(hosts, config.authority)
    return found, config
