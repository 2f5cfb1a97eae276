"""Certificates, field by field: what they say, what is refused, and what openssl reads in them."""

from __future__ import annotations

import ipaddress
import shutil
import subprocess
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from firstboot import pki
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.messages import MAX_BLOB, Certificate
from firstboot.protocol.model import FINGERPRINT, NODE_ID, Member, Profile

TOKEN = "fb1-not-a-real-token-but-long-enough"
NOW = 1_800_000_000.0  # 2027-01-15
DAY = 86_400
SERVER_AUTH, CLIENT_AUTH = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
LOCAL = ["127.0.0.1", "::1"]

KEY = pki.make_key()
OTHER_KEY = pki.make_key()
MEMBER = Member(pki.node_id(KEY), "node-1", "10.0.0.5")
CSR = pki.make_request(KEY, MEMBER.node_id)
AUTHORITY = pki.make_authority("blue", 3, NOW)
FOREIGN = pki.make_authority("blue", 3, NOW)


def issue(profile: Profile, authority: pki.Authority = AUTHORITY) -> Certificate:
    return Certificate(profile, pki.sign(authority, CSR, MEMBER, profile, "firstboot:node", NOW))


GRANTED = tuple(issue(profile) for profile in Profile)


def read(der: bytes) -> x509.Certificate:
    return x509.load_der_x509_certificate(der)


def dates(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    """(not before, not after) with either generation of the cryptography package."""
    if hasattr(certificate, "not_valid_after_utc"):
        return certificate.not_valid_before_utc, certificate.not_valid_after_utc
    naive = (certificate.not_valid_before, certificate.not_valid_after)
    return naive[0].replace(tzinfo=UTC), naive[1].replace(tzinfo=UTC)


def private(key: bytes) -> ec.EllipticCurvePrivateKey:
    loaded = serialization.load_pem_private_key(key, None)
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    return loaded


def spki(certificate: x509.Certificate) -> bytes:
    return certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


# ---------------------------------------------------------------- identity and derivation


def test_a_key_is_a_p256_key_in_pkcs8_and_never_the_same_twice() -> None:
    assert KEY.startswith(b"-----BEGIN PRIVATE KEY-----")
    assert private(KEY).curve.name == "secp256r1"
    assert KEY != OTHER_KEY


def test_a_node_id_is_the_first_half_of_its_key_digest() -> None:
    assert NODE_ID.match(pki.node_id(KEY))
    assert FINGERPRINT.match(pki.key_digest(KEY))
    assert pki.key_digest(KEY).startswith(pki.node_id(KEY))
    assert pki.node_id(KEY) != pki.node_id(OTHER_KEY)


def test_a_peer_certificate_proves_the_same_node_id_as_its_key() -> None:
    leaf = pki.to_der(pki.derive(TOKEN, "blue").credentials(KEY).chain)
    assert pki.node_id_of_certificate(leaf) == pki.node_id(KEY)


@pytest.mark.parametrize("pem", [b"", b"nonsense", b"-----BEGIN PRIVATE KEY-----\nAAAA\n"])
def test_an_unreadable_private_key_is_a_local_error(pem: bytes) -> None:
    with pytest.raises(LocalError, match="cannot be read"):
        pki.node_id(pem)


def test_a_private_key_on_another_curve_is_a_local_error() -> None:
    other = ec.generate_private_key(ec.SECP384R1())
    pem = other.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(LocalError, match="P-256"):
        pki.node_id(pem)


def test_derivation_is_fixed_for_ever() -> None:
    """Hosts of different releases must meet, so these numbers may never change."""
    derived = pki.derive("token", "formation")
    assert derived.tag == "458ec34a0e730634"
    assert (
        hex(derived.scalar) == "0xe14884178842fedf7f4b298aa02b2515005fe2d6b9060d9d0a29e7c12508c040"
    )


def test_token_and_formation_both_separate() -> None:
    tags = {
        pki.derive(token, formation).tag
        for token in (TOKEN, TOKEN + "x")
        for formation in ("blue", "blue/2", "blue\0")
    }
    assert len(tags) == 6


def test_the_tag_is_not_part_of_the_scalar() -> None:
    derived = pki.derive(TOKEN, "blue")
    assert len(derived.tag) == 16
    assert derived.tag not in hex(derived.scalar)


def test_nothing_secret_shows_in_a_repr() -> None:
    derived = pki.derive(TOKEN, "blue")
    shown = repr((derived, derived.credentials(KEY), AUTHORITY))
    assert str(derived.scalar) not in shown
    assert hex(derived.scalar)[2:] not in shown
    assert "PRIVATE" not in shown
    assert KEY.splitlines()[1].decode() not in shown


# ---------------------------------------------------------------- bootstrap credentials


def test_two_hosts_bootstrap_authorities_agree_in_name_and_key_only() -> None:
    one = pki.derive(TOKEN, "blue").credentials(KEY)
    two = pki.derive(TOKEN, "blue").credentials(OTHER_KEY)
    first, second = (x509.load_pem_x509_certificate(c.authority) for c in (one, two))
    assert first.subject == second.subject == first.issuer
    assert spki(first) == spki(second)
    assert first.serial_number == second.serial_number
    leaf = x509.load_pem_x509_certificate(one.chain)
    issuer_key = second.public_key()
    assert isinstance(issuer_key, ec.EllipticCurvePublicKey)
    # The other host's copy of the authority verifies this host's leaf.
    issuer_key.verify(leaf.signature, leaf.tbs_certificate_bytes, ec.ECDSA(hashes.SHA256()))


def test_the_bootstrap_leaf_is_for_both_sides_of_a_connection() -> None:
    credentials = pki.derive(TOKEN, "blue").credentials(KEY)
    leaf = x509.load_pem_x509_certificate(credentials.chain)
    usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert set(usage.value) == {SERVER_AUTH, CLIENT_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.issuer == x509.load_pem_x509_certificate(credentials.authority).subject
    assert dates(leaf) == (
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC),
    )
    assert credentials.key == KEY


# ---------------------------------------------------------------- the cluster CA


def test_the_authority_says_what_an_authority_must() -> None:
    authority = read(AUTHORITY.certificate)
    assert authority.subject == authority.issuer
    assert authority.subject.rfc4514_string() == "CN=firstboot CA 3,O=blue"
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value == key_usage(authority=True)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    public = private(AUTHORITY.key).public_key()
    assert identifier.value == x509.SubjectKeyIdentifier.from_public_key(public)
    assert len(authority.extensions) == 3
    begin, end = dates(authority)
    assert begin.timestamp() == pki.RELEASED - DAY
    assert end.timestamp() == NOW + 3652 * DAY


def test_the_longest_cluster_name_fits_into_an_authority() -> None:
    authority = read(pki.make_authority("c" * 63, 2**31 - 1).certificate)
    assert authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)[0].value == "c" * 63


def test_every_authority_is_another_one() -> None:
    assert pki.fingerprint(AUTHORITY.certificate) != pki.fingerprint(FOREIGN.certificate)
    assert AUTHORITY.key != FOREIGN.key
    assert FINGERPRINT.match(pki.fingerprint(AUTHORITY.certificate))


def key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


# ---------------------------------------------------------------- requests


def test_a_good_request_yields_the_digest_of_its_key() -> None:
    assert pki.check_request(CSR, MEMBER.node_id) == pki.key_digest(KEY)
    assert len(CSR) < 400


def request(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    name: x509.Name | None = None,
    algorithm: hashes.SHA256 | hashes.SHA512 | None = None,
    extension: x509.ExtensionType | None = None,
    password: bytes = b"",
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, MEMBER.node_id)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name or subject)
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    if password:
        builder = builder.add_attribute(AttributeOID.CHALLENGE_PASSWORD, password)
    signed = builder.sign(key, algorithm or hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def two_names() -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, MEMBER.node_id),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters"),
        ]
    )


def bad_requests() -> dict[str, tuple[bytes, str]]:
    key = private(KEY)
    swapped = CSR.replace(spki_of(KEY), spki_of(OTHER_KEY))
    assert swapped != CSR
    flipped = CSR[:-1] + bytes([CSR[-1] ^ 1])
    wildcard = x509.SubjectAlternativeName([x509.DNSName("*")])
    authority = x509.BasicConstraints(ca=True, path_length=None)
    return {
        "empty": (b"", "cannot be read"),
        "text": (b"-----BEGIN CERTIFICATE REQUEST-----", "cannot be read"),
        "truncated": (CSR[:-7], "cannot be read"),
        "trailing bytes": (CSR + b"\0", "cannot be read"),
        "oversized": (b"0" * (pki.MAX_REQUEST + 1), "at most"),
        "a certificate": (AUTHORITY.certificate, "cannot be read"),
        "another's key": (swapped, "not signed"),
        "bad signature": (flipped, "not signed|cannot be read"),
        "RSA": (request(rsa.generate_private_key(65537, 2048)), "P-256"),
        "P-384": (request(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        "another hash": (request(key, algorithm=hashes.SHA512()), "not signed"),
        "another host": (pki.make_request(KEY, pki.node_id(OTHER_KEY)), "another host"),
        "two names": (request(key, two_names()), "another host"),
        "alternative names": (request(key, extension=wildcard), "extensions"),
        "CA": (request(key, extension=authority), "extensions"),
        "password": (request(key, password=b"hunter2"), "attributes"),
    }


def spki_of(key: bytes) -> bytes:
    return (
        private(key)
        .public_key()
        .public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


BAD_REQUESTS = bad_requests()


@pytest.mark.parametrize("what", BAD_REQUESTS)
def test_a_request_that_is_not_in_order_is_refused(what: str) -> None:
    csr, reason = BAD_REQUESTS[what]
    with pytest.raises(RemoteError, match=reason):
        pki.check_request(csr, MEMBER.node_id)
    with pytest.raises(RemoteError, match=reason):
        pki.sign(AUTHORITY, csr, MEMBER, Profile.PEER, "firstboot:node", NOW)


def mutated(original: bytes, changes: list[tuple[int, int]]) -> bytes:
    changed = bytearray(original)
    for place, value in changes:
        changed[place % len(changed)] = value
    return bytes(changed)


CHANGES = st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(CHANGES)
def test_a_mutated_request_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    csr = mutated(CSR, changes)
    try:
        digest = pki.check_request(csr, MEMBER.node_id)
    except RemoteError:
        return
    assert digest == pki.key_digest(KEY)


@settings(max_examples=300, deadline=None)
@given(CHANGES)
def test_a_mutated_certificate_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    original = GRANTED[-1]
    der = mutated(original.der, changes)
    for identify in (pki.node_id_of_certificate, pki.cluster_node_id):
        with suppress(RemoteError):
            assert NODE_ID.match(identify(der))
    changed = replace(original, der=der)
    pinned = pki.fingerprint(AUTHORITY.certificate)
    try:
        pki.check_granted([changed], AUTHORITY.certificate, pinned, KEY, MEMBER)
    except RemoteError:
        return
    assert read(der).tbs_certificate_bytes == read(original.der).tbs_certificate_bytes


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(RemoteError):
        pki.check_request(noise, MEMBER.node_id)
    for identify in (pki.node_id_of_certificate, pki.cluster_node_id, pki.not_after, pki.to_pem):
        with pytest.raises(RemoteError):
            identify(noise)


# ---------------------------------------------------------------- signed certificates


@pytest.mark.parametrize(
    ("profile", "usages", "names", "addresses"),
    [
        (Profile.SERVER, [SERVER_AUTH], ["node-1", "localhost"], ["10.0.0.5", *LOCAL]),
        (Profile.CLIENT, [CLIENT_AUTH], ["node-1"], ["10.0.0.5"]),
        (Profile.PEER, [SERVER_AUTH, CLIENT_AUTH], ["node-1", "localhost"], ["10.0.0.5", *LOCAL]),
    ],
)
def test_a_certificate_says_exactly_this(
    profile: Profile,
    usages: list[x509.ObjectIdentifier],
    names: list[str],
    addresses: list[str],
) -> None:
    certificate, authority = read(issue(profile).der), read(AUTHORITY.certificate)
    assert certificate.version is x509.Version.v3
    common_name = "" if profile is Profile.CLIENT else "CN=node-1,"
    assert certificate.subject.rfc4514_string() == f"{common_name}O=firstboot:node"
    assert certificate.issuer == authority.subject
    assert isinstance(certificate.signature_hash_algorithm, hashes.SHA256)
    assert spki(certificate) == spki_of(KEY)
    extensions = certificate.extensions
    assert len(extensions) == 6

    constraints = extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=False, path_length=None)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert usage.value == key_usage(authority=False)
    extended = extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    assert list(extended.value) == usages
    subject_id = extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert subject_id == x509.SubjectKeyIdentifier.from_public_key(private(KEY).public_key())
    issuer_id = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    authority_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert issuer_id.key_identifier == authority_id.digest
    assert issuer_id.authority_cert_issuer is None

    alternative = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert not alternative.critical
    general = alternative.value
    assert general.get_values_for_type(x509.DNSName) == names
    found = general.get_values_for_type(x509.IPAddress)
    assert found == [ipaddress.ip_address(a) for a in addresses]
    uris = general.get_values_for_type(x509.UniformResourceIdentifier)
    assert uris == [f"urn:firstboot:node:{MEMBER.node_id}"]
    assert len(list(general)) == len(names) + len(addresses) + 1


def test_dates_begin_before_this_release_and_last_five_years() -> None:
    begin, end = dates(read(issue(Profile.PEER).der))
    assert begin.timestamp() == pki.RELEASED - DAY
    assert end.timestamp() == NOW + 1826 * DAY
    assert pki.not_after(issue(Profile.PEER).der) == end.timestamp()


def test_no_certificate_outlives_its_authority() -> None:
    late = NOW + 3000 * DAY
    der = pki.sign(AUTHORITY, CSR, MEMBER, Profile.PEER, "firstboot:node", late)
    assert pki.not_after(der) == pki.not_after(AUTHORITY.certificate)


def test_an_expired_authority_signs_nothing() -> None:
    with pytest.raises(LocalError, match="expired"):
        pki.sign(AUTHORITY, CSR, MEMBER, Profile.PEER, "x", NOW + 3653 * DAY)


def test_without_a_date_the_clock_is_used() -> None:
    authority = pki.make_authority("blue", 1)
    before = datetime.now(UTC).timestamp()
    der = pki.sign(authority, CSR, MEMBER, Profile.PEER, "x")
    _, end = dates(read(der))
    assert abs(end.timestamp() - 1826 * DAY - before) < 600


def test_serial_numbers_are_long_and_differ() -> None:
    serials = {read(issue(Profile.PEER).der).serial_number for _ in range(20)}
    assert len(serials) == 20
    assert max(serials).bit_length() > 140
    assert max(serials).bit_length() <= 159
    assert min(serials) > 0


def test_an_address_with_a_zone_is_certified_without_it() -> None:
    member = replace(MEMBER, host="fe80::5%eth0")
    certificate = read(pki.sign(AUTHORITY, CSR, member, Profile.CLIENT, "x", NOW))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.IPAddress) == [ipaddress.ip_address("fe80::5")]


# ---------------------------------------------------------------- the cluster channel's identity


def test_a_signed_certificate_names_its_host() -> None:
    assert pki.cluster_node_id(issue(Profile.CLIENT).der) == MEMBER.node_id


def signed_with(*extensions: x509.ExtensionType) -> bytes:
    """A certificate for KEY by AUTHORITY that says only what a test wants."""
    issuer = read(AUTHORITY.certificate)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, MEMBER.name)]))
        .issuer_name(issuer.subject)
        .public_key(private(KEY).public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2028, 1, 1, tzinfo=UTC))
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    signed = builder.sign(private(AUTHORITY.key), hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.DER)


def uris(*values: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(v) for v in values])


GOOD_URI = pki.NODE_URI + MEMBER.node_id


@pytest.mark.parametrize(
    "names",
    [
        (),
        (GOOD_URI, GOOD_URI),
        (GOOD_URI, "urn:firstboot:node:" + "0" * 32),
        ("urn:firstboot:node:",),
        ("urn:firstboot:node:" + "A" * 32,),
        ("urn:firstboot:node:" + "0" * 33,),
        (MEMBER.node_id,),
        ("https://example.org/" + MEMBER.node_id,),
    ],
)
def test_a_certificate_that_does_not_name_one_host_names_none(names: tuple[str, ...]) -> None:
    extensions = [uris(*names)] if names else []
    with pytest.raises(RemoteError, match="names no host"):
        pki.cluster_node_id(signed_with(*extensions))


def test_an_oversized_certificate_is_not_even_parsed() -> None:
    with pytest.raises(RemoteError, match="too large"):
        pki.cluster_node_id(b"0" * (MAX_BLOB + 1))


# ---------------------------------------------------------------- what a node accepts


def check(
    certificates: tuple[Certificate, ...] = GRANTED,
    authority: bytes = AUTHORITY.certificate,
    pinned: str = "",
    key: bytes = KEY,
    member: Member = MEMBER,
) -> None:
    pinned = pinned or pki.fingerprint(AUTHORITY.certificate)
    pki.check_granted(certificates, authority, pinned, key, member)


def test_what_the_master_signed_is_accepted() -> None:
    check()


def test_another_authority_than_the_pinned_one_is_rejected() -> None:
    with pytest.raises(RemoteError, match="decided"):
        check(authority=FOREIGN.certificate)
    with pytest.raises(RemoteError, match="decided"):
        check(pinned="0" * 64)


def test_an_empty_or_doubled_answer_is_rejected() -> None:
    with pytest.raises(RemoteError, match="no certificate"):
        check(certificates=())
    with pytest.raises(RemoteError, match="two certificates"):
        check(certificates=(GRANTED[0], GRANTED[0]))


def test_a_certificate_by_an_authority_of_the_same_name_is_rejected() -> None:
    with pytest.raises(RemoteError, match="not signed by"):
        check(certificates=(issue(Profile.PEER, FOREIGN),))


def test_a_certificate_for_another_key_host_or_name_is_rejected() -> None:
    with pytest.raises(RemoteError, match="another key"):
        check(key=OTHER_KEY)
    with pytest.raises(RemoteError, match="another host"):
        check(member=replace(MEMBER, node_id=pki.node_id(OTHER_KEY)))
    with pytest.raises(RemoteError, match="another name"):
        check(member=replace(MEMBER, name="node-2"))


def test_a_certificate_for_another_use_is_rejected() -> None:
    with pytest.raises(RemoteError, match="server certificate is for another use"):
        check(certificates=(replace(issue(Profile.CLIENT), profile=Profile.SERVER),))
    with pytest.raises(RemoteError, match="another use"):
        check(certificates=(replace(issue(Profile.PEER), profile=Profile.CLIENT),))


def test_a_certificate_that_may_sign_others_is_rejected() -> None:
    usage = x509.ExtendedKeyUsage([CLIENT_AUTH])
    authority = x509.BasicConstraints(ca=True, path_length=None)
    der = signed_with(uris(GOOD_URI), usage, authority)
    with pytest.raises(RemoteError, match="another use"):
        check(certificates=(Certificate(Profile.CLIENT, der),))


def test_a_certificate_without_a_use_is_rejected() -> None:
    der = signed_with(uris(GOOD_URI))
    with pytest.raises(RemoteError, match="cannot be read"):
        check(certificates=(Certificate(Profile.CLIENT, der),))


# ---------------------------------------------------------------- what goes to disk


def test_pem_and_der_are_each_others_inverse() -> None:
    pem = pki.to_pem(AUTHORITY.certificate)
    assert pem.startswith(b"-----BEGIN CERTIFICATE-----\n")
    assert pki.to_der(pem) == AUTHORITY.certificate
    with pytest.raises(LocalError):
        pki.to_der(b"nothing")


def test_every_credential_can_be_written() -> None:
    certificate = AUTHORITY.certificate
    by_name = {n: pki.credential(n, GRANTED, certificate, KEY) for n in pki.CREDENTIALS}
    assert by_name.pop("host.key") == KEY
    assert by_name.pop("ca.crt") == pki.to_pem(AUTHORITY.certificate)
    by_profile = {c.profile: pki.to_pem(c.der) for c in GRANTED}
    assert by_name == {f"{profile}.crt": pem for profile, pem in by_profile.items()}


@pytest.mark.parametrize("name", ["", "ca.key", "../../etc/shadow", "admin.crt", "peer.crt"])
def test_a_credential_this_host_does_not_hold_is_a_local_error(name: str) -> None:
    with pytest.raises(LocalError, match="holds no credential"):
        pki.credential(name, [issue(Profile.CLIENT)], AUTHORITY.certificate, KEY)


# ---------------------------------------------------------------- openssl agrees


def openssl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("openssl")
    assert program, "these tests need the openssl program"
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    for name in pki.CREDENTIALS:
        content = pki.credential(name, GRANTED, AUTHORITY.certificate, KEY)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "foreign.crt").write_bytes(pki.to_pem(FOREIGN.certificate))
    return tmp_path


def test_openssl_reads_the_uses_and_names(written: Path) -> None:
    text = openssl("x509", "-noout", "-text", "-in", written / "peer.crt").stdout
    assert "TLS Web Server Authentication, TLS Web Client Authentication" in text
    assert (
        "DNS:node-1, IP Address:10.0.0.5, DNS:localhost, IP Address:127.0.0.1, "
        f"IP Address:0:0:0:0:0:0:0:1, URI:urn:firstboot:node:{MEMBER.node_id}"
    ) in text
    assert "Key Usage: critical\n                Digital Signature\n" in text
    assert "CA:FALSE" in text


@pytest.mark.parametrize(
    ("name", "authority", "purpose", "good"),
    [
        ("server.crt", "ca.crt", "sslserver", True),
        ("server.crt", "ca.crt", "sslclient", False),
        ("client.crt", "ca.crt", "sslclient", True),
        ("client.crt", "ca.crt", "sslserver", False),
        ("peer.crt", "ca.crt", "sslserver", True),
        ("peer.crt", "ca.crt", "sslclient", True),
        ("peer.crt", "foreign.crt", "sslclient", False),
    ],
)
def test_openssl_verifies_strictly(
    written: Path, name: str, authority: str, purpose: str, good: bool
) -> None:
    done = openssl(
        *("verify", "-x509_strict", "-purpose", purpose, "-attime", str(int(NOW))),
        *("-CAfile", written / authority, written / name),
    )
    assert (done.returncode == 0) is good, done.stderr


def test_openssl_verifies_bootstrap_leaves_of_the_same_token_only(tmp_path: Path) -> None:
    mine = pki.derive(TOKEN, "blue").credentials(KEY)
    (tmp_path / "leaf.crt").write_bytes(mine.chain)
    for token, formation, good in [
        (TOKEN, "blue", True),
        (TOKEN + "x", "blue", False),
        (TOKEN, "red", False),
    ]:
        theirs = pki.derive(token, formation).credentials(OTHER_KEY)
        (tmp_path / "ca.crt").write_bytes(theirs.authority)
        done = openssl(
            "verify", "-x509_strict", "-CAfile", tmp_path / "ca.crt", tmp_path / "leaf.crt"
        )
        assert (done.returncode == 0) is good, done.stderr
