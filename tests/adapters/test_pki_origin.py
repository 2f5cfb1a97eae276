"""Origin's certificates, row by row, as cryptography and as openssl read them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firstboot import host, pki
from firstboot.payloads.rows import OPTIONS, PAYLOADS
from firstboot.pki import signers
from firstboot.protocol.credentials import Leaf
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.messages import Item, Place, Supplies, decode, encode
from firstboot.protocol.model import Member, Profile, Role, Value
from firstboot.protocol.plan import make_leaves
from firstboot.supply import Order, Supply

NOW = 1_800_000_000.0
ORIGIN = PAYLOADS["origin"]
OPENSHIFT = tuple(f"openshift{end}" for end in ("", ".default", ".default.svc"))
OPENSHIFT = (*OPENSHIFT, "openshift.default.svc.cluster.local")
KUBERNETES = tuple(name.replace("openshift", "kubernetes") for name in OPENSHIFT)
MASTER_NAMES = sorted(("host-1", "www.example.org", *OPENSHIFT, *KUBERNETES))
MASTER_ADDRESSES = ["10.77.0.11", "172.30.0.1"]
REGISTRY = ["docker-registry.default.svc", "docker-registry.default.svc.cluster.local"]
S, C = "serverAuth", "clientAuth"

# file: signer, CN, O, EKU, SAN (DNS, IP), days
MASTER_ROWS = {
    "master.server": ("ca", "10.77.0.11", set(), {S}, "master", 730),
    "etcd.server": ("ca", "10.77.0.11", set(), {S}, "master", 730),
    "openshift-master": ("ca", "system:openshift-master", {"system:masters"}, {C}, "", 730),
    "admin": ("ca", "system:admin", {"system:cluster-admins", "system:masters"}, {C}, "", 730),
    "master.kubelet-client": (
        "ca",
        "system:openshift-node-admin",
        {"system:node-admins"},
        {C},
        "",
        730,
    ),
    "master.proxy-client": ("ca", "system:master-proxy", set(), {C}, "", 730),
    "openshift-aggregator": (
        "front-proxy-ca",
        "system:openshift-aggregator",
        set(),
        {C},
        "",
        730,
    ),
    "aggregator-front-proxy": ("front-proxy-ca", "aggregator-front-proxy", set(), {C}, "", 730),
    "etcd-server": ("etcd-ca", "host-1", set(), {S}, "etcd", 1825),
    "etcd-peer": ("etcd-ca", "host-1", set(), {S, C}, "etcd", 1825),
    "master.etcd-client": ("etcd-ca", "host-1", set(), {C}, "etcd", 1825),
    "registry": ("ca", REGISTRY[0], set(), {S}, "registry", 730),
    "node.server": ("ca", "10.77.0.11", set(), {S}, "node", 730),
    "node.client": ("ca", "system:node:host-1", {"system:nodes"}, {C}, "", 730),
}
SIGNER_ROWS = {
    "ca": ("openshift-signer", 2048, None, 1),
    "service-signer": ("openshift-service-serving-signer", 2048, None, 1),
    "front-proxy-ca": ("aggregator-proxy-ca", 2048, None, 1),
    "etcd-ca": ("etcd-signer", 4096, 0, None),
}
EKU = {ExtendedKeyUsageOID.SERVER_AUTH: S, ExtendedKeyUsageOID.CLIENT_AUTH: C}


class Host:
    """One host's disk, its host key, and its certificate from the cluster CA."""

    def __init__(self, path: Path, number: int, role: Role, founder: bool = False) -> None:
        self.root, self.founder, self.role = path, founder, role
        self.key = pki.make_key()
        self.member = Member(pki.node_id(self.key), f"host-{number}", f"10.77.0.{10 + number}")
        self.directory = host.StateDirectory(path)
        self.supply = Supply(path, self.directory)

    def order(self, masters: tuple[Member, ...], fingerprint: str = "ab" * 32) -> Order:
        value = Value(1, fingerprint, masters, True, 3)
        options = {**OPTIONS["origin"], "origin_public_hostname": "www.example.org"}
        options["origin_images_registry"] = "registry.example.org/registry:v1"
        leaves = make_leaves(ORIGIN, value, self.member, "demo", options)
        master = self.role is Role.MASTER
        shared = make_leaves(ORIGIN, value, masters[0], "demo", options)
        shared = tuple(leaf for leaf in shared if leaf.shared)
        return Order(ORIGIN, fingerprint, self.member, leaves, shared, master, self.founder)

    @property
    def certificate(self) -> bytes:
        authority = pki.make_authority("demo", 1)
        csr = pki.make_request(self.key, self.member.node_id)
        return pki.sign(authority, csr, self.member, Profile.CLIENT, "firstboot")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> tuple[Host, Host]:
    """A master and a node, both with all their certificates."""
    top = tmp_path_factory.mktemp("hosts")
    master = Host(top / "master", 1, Role.MASTER, founder=True)
    node = Host(top / "node", 2, Role.NODE)
    for each in (master, node):
        assert each.supply.has(each.order((master.member,))) is False
        get(each, master)
        assert each.supply.has(each.order((master.member,))) is True
    return master, node


def get(each: Host, master: Host, masters: tuple[Member, ...] = ()) -> Supplies:
    order = each.order(masters or (master.member,))
    places = [Place("host-1", "10.77.0.11"), Place("host-2", "10.77.0.12")]
    asked = each.supply.requests(order)
    answer = master.supply.issue(order, asked, each.certificate, places, 1, NOW)
    told = decode(encode(answer))  # it fits into one message
    assert isinstance(told, Supplies)
    each.supply.store(order, told, each.key)
    return told


@pytest.fixture
def master(cluster: tuple[Host, Host], tmp_path: Path) -> Host:
    """A copy of the master with a disk of its own: to make all those keys takes seconds."""
    shutil.copytree(cluster[0].root, tmp_path / "m", symlinks=True)
    copy = Host(tmp_path / "m", 1, Role.MASTER, founder=True)
    copy.key, copy.member = cluster[0].key, cluster[0].member
    return copy


def pem(each: Host, name: str) -> bytes:
    found = each.supply.credential(name, "ab" * 32)
    assert found is not None, name
    return found


def leaf(each: Host, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem(each, f"{name}.crt"))


def openssl(*words: str, data: bytes = b"") -> str:
    done = subprocess.run(["openssl", *words], input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def san_of(kind: str, number: int = 1) -> tuple[list[str], list[str]]:
    """The DNS names and the IP addresses, in their order."""
    if kind == "master":
        return [*MASTER_NAMES, *MASTER_ADDRESSES], MASTER_ADDRESSES
    if kind == "registry":
        return REGISTRY, []
    name, address = f"host-{number}", f"10.77.0.{10 + number}"
    return ([name] if kind == "etcd" else [name, address]), [address]


# ---------------------------------------------------------------- rows


def test_every_row_is_looked_at() -> None:
    assert {row.name for row in ORIGIN.master.leaves} == set(MASTER_ROWS)
    assert {row.name for row in ORIGIN.node.leaves} == {"node.server", "node.client"}
    assert {row.name for row in ORIGIN.signers} == set(SIGNER_ROWS)


@pytest.mark.parametrize("name", MASTER_ROWS)
def test_a_certificate_says_what_its_row_says(cluster: tuple[Host, Host], name: str) -> None:
    signer, common, groups, uses, san, days = MASTER_ROWS[name]
    found = leaf(cluster[0], name)
    check_common_to_all(found, days)
    issuer = leaf(cluster[0], signer)
    assert found.issuer == issuer.subject
    public = issuer.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    hashed = found.signature_hash_algorithm
    assert hashed is not None
    public.verify(found.signature, found.tbs_certificate_bytes, padding.PKCS1v15(), hashed)
    assert [a.value for a in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [common]
    organizations = found.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    assert {a.value for a in organizations} == groups
    assert len(found.subject.rdns) == 1 + bool(groups)  # several O in one relative name, as Go's
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert {EKU[oid] for oid in usage.value} == uses
    assert not usage.critical
    constraints = found.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert not constraints.value.ca
    key_usage = found.extensions.get_extension_for_class(x509.KeyUsage)
    assert key_usage.critical is (signer != "etcd-ca")
    check_key_usage(key_usage.value, signs=False)
    check_names(found, san)


def check_common_to_all(found: x509.Certificate, days: int) -> None:
    public = found.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert found.signature_algorithm_oid._name == "sha256WithRSAEncryption"
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    assert ends.timestamp() == NOW + days * 86_400
    assert begins.timestamp() == pki.RELEASED - 86_400


def check_key_usage(usage: x509.KeyUsage, *, signs: bool) -> None:
    assert usage.digital_signature
    assert usage.key_encipherment
    assert usage.key_cert_sign is signs
    assert not (usage.crl_sign or usage.content_commitment or usage.data_encipherment)
    assert not usage.key_agreement


def check_names(found: x509.Certificate, kind: str) -> None:
    if not kind:
        with pytest.raises(x509.ExtensionNotFound):
            found.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        return
    san = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    names, addresses = san_of(kind)
    assert san.get_values_for_type(x509.DNSName) == names
    assert [str(a) for a in san.get_values_for_type(x509.IPAddress)] == addresses


@pytest.mark.parametrize("name", SIGNER_ROWS)
def test_a_signer_says_what_its_row_says(cluster: tuple[Host, Host], name: str) -> None:
    common, bits, path_length, serial = SIGNER_ROWS[name]
    found = leaf(cluster[0], name)
    check_common_to_all(found, 1825)
    assert found.issuer == found.subject
    assert found.subject.rfc4514_string() == f"CN={common}@{int(NOW)}"
    public = found.public_key()
    assert isinstance(public, rsa.RSAPublicKey)
    assert public.key_size == bits
    constraints = found.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value.ca
    assert constraints.value.path_length == path_length
    usage = found.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    check_key_usage(usage.value, signs=True)
    assert serial is None or found.serial_number == serial
    with pytest.raises(x509.ExtensionNotFound):
        found.extensions.get_extension_for_class(x509.ExtendedKeyUsage)


def test_a_node_gets_its_two_certificates_and_no_secret(cluster: tuple[Host, Host]) -> None:
    master, node = cluster
    client, server = leaf(node, "node.client"), leaf(node, "node.server")
    assert client.subject.rfc4514_string() == "CN=system:node:host-2,O=system:nodes"
    assert server.subject.rfc4514_string() == "CN=10.77.0.12"
    san = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert san.get_values_for_type(x509.DNSName) == ["host-2", "10.77.0.12"]
    assert pem(node, "ca.crt") == pem(master, "ca.crt")
    for name in ("ca.key", "admin.key", "serviceaccounts.private.key", "etcd-ca.crt"):
        assert node.supply.credential(name, "ab" * 32) is None
    kept = "".join(
        p.read_text() for p in (node.root / "var/lib/firstboot").rglob("*") if p.is_file()
    )
    assert "serviceaccounts" not in kept


def test_a_key_of_a_node_never_leaves_it(cluster: tuple[Host, Host]) -> None:
    """Nothing on the master's disk holds a private key of the node's."""
    master, node = cluster
    held = [p.read_text() for p in (master.root / "var/lib/firstboot").rglob("*") if p.is_file()]
    for name in ("node.client.key", "node.server.key"):
        body = pem(node, name).decode().splitlines()[-4]  # of the private part
        assert all(body not in text for text in held)


def test_server_files_hold_the_chain_and_client_files_do_not(cluster: tuple[Host, Host]) -> None:
    blocks = {
        name: pem(cluster[0], f"{name}.crt").count(b"BEGIN CERTIFICATE") for name in MASTER_ROWS
    }
    expected = dict.fromkeys(MASTER_ROWS, 1)
    expected |= {"master.server": 2, "etcd.server": 2, "node.server": 2, "registry": 2}
    assert blocks == expected
    chain = pem(cluster[0], "master.server.crt")
    assert chain.endswith(pem(cluster[0], "ca.crt"))


def test_keys_are_pkcs1_and_service_account_keys_a_pair(cluster: tuple[Host, Host]) -> None:
    master = cluster[0]
    for name in (*MASTER_ROWS, *SIGNER_ROWS, "serviceaccounts.private"):
        assert pem(master, f"{name}.key").startswith(b"-----BEGIN RSA PRIVATE KEY-----\n"), name
    public = pem(master, "serviceaccounts.public.key")
    assert public.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    made = openssl("rsa", "-pubout", data=pem(master, "serviceaccounts.private.key"))
    assert made.encode() == public


def test_a_node_may_be_the_first_to_apply(tmp_path: Path) -> None:
    master, node = Host(tmp_path / "m", 1, Role.MASTER, True), Host(tmp_path / "n", 2, Role.NODE)
    get(node, master)
    get(master, master)
    assert leaf(master, "admin").subject.rfc4514_string().startswith("CN=system:admin")


# ---------------------------------------------------------------- serial numbers


def test_serials_follow_one_another_and_the_files_say_so(master: Host, tmp_path: Path) -> None:
    text = (master.root / "etc/origin/master/ca.serial.txt").read_text()
    serials = {n: leaf(master, n).serial_number for n, r in MASTER_ROWS.items() if r[0] == "ca"}
    assert sorted(serials.values()) == list(range(2, 2 + len(serials)))
    assert text == "0C\n"  # the node of the fixture has two
    file = master.root / "etc/origin/master/ca.serial.txt"
    assert file.stat().st_mode & 0o777 == 0o644
    nodes = [Host(tmp_path / f"n{i}", i, Role.NODE) for i in (2, 3)]
    last = 12
    for node in nodes:
        get(node, master)
        numbers = sorted(leaf(node, n).serial_number for n in ("node.client", "node.server"))
        assert numbers == [last + 1, last + 2]
        last += 2
    assert file.read_text() == f"{last:02X}\n"


def test_a_number_another_program_used_is_not_used_again(master: Host, tmp_path: Path) -> None:
    file = master.root / "etc/origin/master/ca.serial.txt"
    file.write_text("01F3\n")
    node = Host(tmp_path / "n", 2, Role.NODE)
    get(node, master)
    assert {leaf(node, n).serial_number for n in ("node.client", "node.server")} == {500, 501}
    assert file.read_text() == "01F5\n"
    file.unlink()  # lost: what firstboot itself remembers still counts
    get(Host(tmp_path / "o", 3, Role.NODE), master)
    assert file.read_text() == "01F7\n"


def test_a_serial_file_that_makes_no_sense_stops_signing(master: Host, tmp_path: Path) -> None:
    (master.root / "etc/origin/master/ca.serial.txt").write_text("many\n")
    with pytest.raises(LocalError, match=r"ca\.serial\.txt holds no serial number"):
        get(Host(tmp_path / "n", 2, Role.NODE), master)


def test_the_same_request_again_gets_the_same_certificates(master: Host) -> None:
    first = get(master, master)
    again = get(master, master)
    assert first.certificates == again.certificates
    assert first.signers == again.signers


def test_another_cluster_gets_other_authorities(master: Host) -> None:
    before = pem(master, "ca.crt")
    order = master.order((master.member,), "cd" * 32)
    assert not master.supply.has(order)
    assert master.supply.credential("ca.crt", "cd" * 32) is None
    asked = master.supply.requests(order)
    answer = master.supply.issue(order, asked, master.certificate, [], 1, NOW + 1)
    master.supply.store(order, answer, master.key)
    assert master.supply.credential("ca.crt", "cd" * 32) not in (None, before)
    text = (master.root / "etc/origin/master/ca.serial.txt").read_text()
    assert text == "0A\n"  # counted anew: the last of them, from 2


def test_etcd_authority_is_one_openssl_goes_on_with(master: Host, tmp_path: Path) -> None:
    """Written as a plan's files, openssl-ca signs the next member with the next number."""
    here = master.root / "etc/etcd/ca"
    assert (here / "serial").read_text() == "04\n"
    index = (here / "index.txt").read_text().splitlines()
    assert [line.split("\t")[3] for line in index] == ["01", "02", "03"]
    (here / "certs").mkdir()
    (here / "ca.crt").write_bytes(pem(master, "etcd-ca.crt"))
    (here / "ca.key").write_bytes(pem(master, "etcd-ca.key"))
    template = Path(__file__).parents[2] / "firstboot/payloads/origin/files/openssl.cnf"
    text = template.read_text().replace("$$", "$").replace("/etc/etcd/ca", str(here))
    (here / "openssl.cnf").write_text(text)
    config = ("-config", str(here / "openssl.cnf"))
    key, csr, crt = (str(tmp_path / name) for name in ("new.key", "new.csr", "new.crt"))
    wanted = ("-addext", "subjectAltName=IP:10.77.0.12,DNS:host-2", "-subj", "/CN=host-2")
    env = ("-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", csr)
    openssl("req", "-new", *env, *wanted)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAN", "IP:10.77.0.12,DNS:host-2")
        signing = ("-name", "etcd_ca", "-extensions", "etcd_v3_ca_peer", "-batch", "-notext")
        openssl("ca", *config, *signing, "-in", csr, "-out", crt)
    made = x509.load_pem_x509_certificate(Path(crt).read_bytes())
    assert made.serial_number == 4
    assert made.issuer == leaf(master, "etcd-ca").subject
    assert (here / "serial").read_text() == "05\n"
    assert len((here / "index.txt").read_text().splitlines()) == 4
    second, third = (Host(tmp_path / str(n), n, Role.MASTER) for n in (2, 3))
    get(
        second, master, (master.member, second.member, third.member)
    )  # and firstboot goes on with the number after openssl's
    assert (here / "serial").read_text() == "08\n"


# ---------------------------------------------------------------- bad requests


def test_a_request_in_another_hosts_name_is_refused_and_named(master: Host, tmp_path: Path) -> None:
    thief, victim = Host(tmp_path / "n", 2, Role.NODE), Host(tmp_path / "v", 3, Role.NODE)
    order, other = thief.order((master.member,)), victim.order((master.member,))
    file = master.root / "etc/origin/master/ca.serial.txt"
    before = file.read_text()
    asked = thief.supply.requests(other)
    with pytest.raises(RemoteError) as caught:
        master.supply.issue(order, asked, thief.certificate, [], 1, NOW)
    assert "system:node:host-3" in str(caught.value) or "10.77.0.13" in str(caught.value)
    assert "host-2" in str(caught.value) or "10.77.0.12" in str(caught.value)
    assert file.read_text() == before


def request(subject: str, key: str = "rsa:2048", *more: str) -> bytes:
    words = ("req", "-new", "-newkey", key, "-nodes", "-keyout", "/dev/null", "-outform", "DER")
    done = subprocess.run(
        ["openssl", *words, "-subj", subject, *more], capture_output=True, check=True
    )
    return done.stdout


GOOD = "/O=system:nodes/CN=system:node:host-2"
BAD = {
    "another host": (request("/O=system:nodes/CN=system:node:host-3"), "names CN=system:node:host"),
    "another group": (request("/O=system:masters/CN=system:node:host-2"), "names"),
    "one more group": (request("/O=system:nodes/O=system:masters/CN=system:node:host-2"), "names"),
    "a weak key": (request(GOOD, "rsa:1024"), "2048 bits"),
    "an EC key": (pki.make_request(pki.make_key(), "1" * 32), "not for an RSA key"),
    "an extension": (request(GOOD, "rsa:2048", "-addext", "subjectAltName=DNS:x"), "extensions"),
    "noise": (b"noise", "cannot be read"),
    "too much": (b"\x30" * 5000, "too large"),
}


@pytest.mark.parametrize("why", BAD)
def test_requests_that_are_refused(why: str) -> None:
    csr, words = BAD[why]
    row = Leaf("node.client", "ca", Profile.CLIENT, "system:node:host-2", ("system:nodes",))
    with pytest.raises(RemoteError, match=words):
        signers.check_leaf_request(row, csr)


def test_the_good_request_is_not_refused() -> None:
    row = Leaf("node.client", "ca", Profile.CLIENT, "system:node:host-2", ("system:nodes",))
    signers.check_leaf_request(row, request(GOOD))


def test_a_request_nobody_has_a_row_for_is_refused(master: Host, tmp_path: Path) -> None:
    node = Host(tmp_path / "n", 2, Role.NODE)
    order = node.order((master.member,))
    asked = (*node.supply.requests(order), Item("admin", request("/CN=system:admin")))
    with pytest.raises(RemoteError, match="nobody asked for"):
        master.supply.issue(order, asked, node.certificate, [], 1, NOW)
    with pytest.raises(RemoteError, match=r"node\.client is missing"):
        master.supply.issue(order, asked[1:], node.certificate, [], 1, NOW)


def test_new_keys_are_signed_a_few_times_only(master: Host, tmp_path: Path) -> None:
    node = Host(tmp_path / "n", 2, Role.NODE)
    for _ in range(16):
        get(node, master)
        node.directory.drop("payload/")
    with pytest.raises(RemoteError, match="16 times"):
        get(node, master)


# ---------------------------------------------------------------- bad answers


def broken(answer: Supplies) -> Iterator[tuple[str, Supplies]]:
    client, server = answer.certificates

    def swap(certificates: tuple[Item, ...], signers: tuple[Item, ...]) -> Supplies:
        return Supplies(answer.epoch, certificates, signers, answer.sealed, answer.places)

    yield "missing", swap((client,), answer.signers)
    crossed = (Item(client.name, server.data), Item(server.name, client.data))
    yield "is for another key", swap(crossed, answer.signers)
    yield "cannot be read", swap((Item(client.name, b"x"), server), answer.signers)
    key = rsa.generate_private_key(65537, 2048)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    false = pki.to_der(signers.make_signer(ORIGIN.signer("ca"), private, NOW))
    yield "is not signed by the ca", swap(answer.certificates, (Item("ca", false),))
    yield "not that of openshift-signer", swap(answer.certificates, (Item("ca", client.data),))


def test_an_answer_that_is_not_right_is_refused_whole(master: Host, tmp_path: Path) -> None:
    node = Host(tmp_path / "n", 2, Role.NODE)
    order = node.order((master.member,))
    asked = node.supply.requests(order)
    answer = master.supply.issue(order, asked, node.certificate, [], 1, NOW)
    for words, false in broken(answer):
        with pytest.raises(RemoteError, match=words):
            node.supply.store(order, false, node.key)
        assert not node.supply.has(order)
    node.supply.store(order, answer, node.key)


# ---------------------------------------------------------------- three masters, and sealing


def test_masters_share_signers_and_service_account_keys(tmp_path: Path) -> None:
    first, second = Host(tmp_path / "1", 1, Role.MASTER, True), Host(tmp_path / "2", 2, Role.MASTER)
    third = Host(tmp_path / "3", 3, Role.MASTER)
    masters = (first.member, second.member, third.member)
    answers = [get(each, first, masters) for each in (first, second, third)]
    shared = ["ca.key", "service-signer.key", "front-proxy-ca.key", "serviceaccounts.private.key"]
    shared += ["admin.crt", "admin.key", "master.kubelet-client.key", "master.proxy-client.key"]
    for name in shared:
        assert pem(second, name) == pem(first, name) == pem(third, name)
    for name in ("master.server", "openshift-master", "etcd-peer", "node.client"):
        assert pem(second, f"{name}.key") != pem(first, f"{name}.key")
    assert second.supply.credential("etcd-ca.key", "ab" * 32) is None  # its CA stays on the first
    clear = signers.key_to_der(pem(first, "ca.key"))
    assert all(clear not in item.data for answer in answers for item in answer.sealed)
    # What is sealed to one master is of no use to another.
    with pytest.raises(RemoteError, match="not for this host"):
        third.supply.store(third.order(masters), answers[1], third.key)


def test_a_seal_opens_for_its_key_and_purpose_only() -> None:
    key, other = pki.make_key(), pki.make_key()
    member = Member(pki.node_id(key), "host-1", "10.0.0.1")
    authority = pki.make_authority("demo", 1)
    csr = pki.make_request(key, member.node_id)
    certificate = pki.sign(authority, csr, member, Profile.CLIENT, "firstboot")
    sealed = signers.seal(certificate, b"secret", "ca.key")
    assert signers.unseal(key, sealed, "ca.key") == b"secret"
    assert b"secret" not in sealed
    for wrong in (b"", sealed[:70], sealed[:-1], sealed[:-1] + bytes([sealed[-1] ^ 1])):
        with pytest.raises(RemoteError, match="not for this host"):
            signers.unseal(key, wrong, "ca.key")
    for a_key, about in ((other, "ca.key"), (key, "other.key")):
        with pytest.raises(RemoteError, match="not for this host"):
            signers.unseal(a_key, sealed, about)


# ---------------------------------------------------------------- what openssl says


def test_openssl_verifies_them_and_prints_what_the_rows_say(
    cluster: tuple[Host, Host], tmp_path: Path
) -> None:
    master = cluster[0]
    for name, (signer, common, groups, uses, _, _) in MASTER_ROWS.items():
        (tmp_path / "ca").write_bytes(pem(master, f"{signer}.crt"))
        (tmp_path / "leaf").write_bytes(pem(master, f"{name}.crt"))
        purpose = "sslserver" if S in uses else "sslclient"
        verify = ("verify", "-x509_strict", "-attime", str(int(NOW)), "-purpose", purpose)
        openssl(*verify, "-CAfile", str(tmp_path / "ca"), str(tmp_path / "leaf"))
        text = openssl("x509", "-in", str(tmp_path / "leaf"), "-noout", "-text")
        subject = " + ".join(f"O = {g}" for g in sorted(groups, key=len))
        assert f"Subject: {subject}{', ' if groups else ''}CN = {common}\n" in text
        assert "Signature Algorithm: sha256WithRSAEncryption" in text
        assert "Public-Key: (2048 bit)" in text
        assert ("TLS Web Server Authentication" in text) is (S in uses)
        assert ("TLS Web Client Authentication" in text) is (C in uses)
