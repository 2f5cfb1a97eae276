"""Keys, certificate authorities, requests and certificates: bytes in, bytes out, no files.

Two authorities exist. The *bootstrap CA* follows from the token, is the same on every host and
proves no more than "this peer holds the token". The *cluster CA* is random, made by the master,
and pinned by its fingerprint before anybody trusts it. Keys are PKCS#8 in PEM, certificates and
requests travel as DER. Profiles follow RFC 5280; private keys never show in a repr.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from firstboot.pki.parts import DER, PEM, UNREADABLE, beginning, expand, expiry, moment, reading
from firstboot.protocol.errors import LocalError, RemoteError
from firstboot.protocol.messages import MAX_BLOB, Certificate
from firstboot.protocol.model import NODE_ID, Member, Profile
from firstboot.protocol.record import dataclass

AUTHORITY_LIFETIME = timedelta(days=3652)  # ten years
LIFETIME = timedelta(days=1826)  # five years, but never beyond the authority
MAX_REQUEST = 2048  # bytes; a P-256 request has about 250
NODE_URI = "urn:firstboot:node:"  # the SAN that names a host on the cluster channel

# What a payload's `WriteFile.credential` may name, and the profile of the certificate meant.
CREDENTIALS: Mapping[str, Profile | None] = MappingProxyType(
    {
        "ca.crt": None,
        "host.key": None,
        "server.crt": Profile.SERVER,
        "client.crt": Profile.CLIENT,
        "peer.crt": Profile.PEER,
    }
)

_USAGES = {
    Profile.SERVER: (ExtendedKeyUsageOID.SERVER_AUTH,),
    Profile.CLIENT: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Profile.PEER: (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
}
_LOCAL_NAMES = (
    x509.DNSName("localhost"),
    x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    x509.IPAddress(ipaddress.ip_address("::1")),
)
# NIST P-256's order (SEC 2, section 2.4.2); a private scalar lies in [1, order - 1].
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# RFC 5280, section 4.1.2.5: the date that says "no well-defined expiration".
_ALWAYS = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one side of a channel needs, all PEM: its chain, its key, and whom it trusts."""

    chain: bytes
    key: bytes = field(repr=False)
    authority: bytes


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate (DER) and private key (PEM)."""

    certificate: bytes
    key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What the token yields: a public `tag` and the bootstrap CA's private scalar."""

    tag: str
    scalar: int = field(repr=False)

    def credentials(
        self, host_key: bytes, valid: tuple[datetime, datetime] = _ALWAYS
    ) -> Credentials:
        """The bootstrap CA's certificate and a leaf for this host's own key, signed by it.

        Each host signs its own copy of the CA certificate. Copies differ in their signature, so
        verification rests on the name and the key, which are the same everywhere. The channel
        ignores `valid`, the (not before, not after) dates: clocks may be unset.
        """
        signer = ec.derive_private_key(self.scalar, ec.SECP256R1())
        issuer = _name(f"firstboot bootstrap {self.tag}")
        root = _authority_builder(issuer, signer.public_key(), valid).serial_number(1)
        key = _private(host_key)
        usages = _USAGES[Profile.PEER]
        leaf = _leaf_builder(_name(node_id(host_key)), issuer, key.public_key(), valid, usages)
        leaf = leaf.add_extension(_issuer_identifier(signer.public_key()), critical=False)
        return Credentials(
            chain=leaf.sign(signer, hashes.SHA256()).public_bytes(PEM),
            key=host_key,
            authority=root.sign(signer, hashes.SHA256()).public_bytes(PEM),
        )


# ---------------------------------------------------------------- identity


def make_key() -> bytes:
    """A new P-256 private key (PKCS#8, PEM, not encrypted)."""
    return _pem_of(ec.generate_private_key(ec.SECP256R1()))


def key_digest(key: bytes) -> str:
    """SHA-256 of the key's SubjectPublicKeyInfo, 64 hex digits."""
    return _digest(_private(key).public_key())


def node_id(key: bytes) -> str:
    """The host identity a key proves: the first 16 bytes of `key_digest`, 32 hex digits."""
    return key_digest(key)[:32]


def node_id_of_certificate(der: bytes) -> str:
    """The identity of a peer on the bootstrap channel, from its certificate's public key."""
    return _digest(_public(_certificate(der)))[:32]


def cluster_node_id(der: bytes) -> str:
    """The identity of a peer on the cluster channel, from the one URI its certificate names."""
    certificate = _certificate(der)
    with reading("the certificate names no host"):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    found = uris[0].removeprefix(NODE_URI) if len(uris) == 1 else ""
    if uris[:1] != [NODE_URI + found] or not NODE_ID.match(found):
        raise RemoteError("the certificate names no host")
    return found


# ---------------------------------------------------------------- the token's keys


def derive(token: str, formation_id: str) -> Bootstrap:
    """What the bootstrap channel and discovery need of the token, for one formation."""
    # 128 bits more than the order has: the remainder's bias is negligible (FIPS 186-5, A.2.1).
    surplus = int.from_bytes(expand(token, formation_id, b"firstboot 1 bootstrap ca", 48), "big")
    return Bootstrap(
        tag=expand(token, formation_id, b"firstboot 1 discovery tag", 8).hex(),
        scalar=surplus % (_ORDER - 1) + 1,
    )


# ---------------------------------------------------------------- the cluster CA


def make_authority(cluster: str, epoch: int, now: float | None = None) -> Authority:
    """A new random cluster CA. `now` is Unix time, by default the clock's."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"firstboot CA {epoch}", cluster)
    valid = beginning(now), moment(now) + AUTHORITY_LIFETIME
    builder = _authority_builder(name, key.public_key(), valid)
    signed = builder.serial_number(x509.random_serial_number()).sign(key, hashes.SHA256())
    return Authority(signed.public_bytes(DER), _pem_of(key))


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate, 64 hex digits."""
    return hashlib.sha256(der).hexdigest()


def not_after(der: bytes) -> float:
    """When a certificate expires, Unix time."""
    return expiry(_certificate(der)).timestamp()


def to_pem(der: bytes) -> bytes:
    """A certificate as PEM."""
    return _certificate(der).public_bytes(PEM)


def to_der(pem: bytes) -> bytes:
    """A certificate (the first, if there are several) as DER. LocalError if there is none."""
    try:
        return x509.load_pem_x509_certificate(pem).public_bytes(DER)
    except UNREADABLE:
        raise LocalError("a certificate on this host cannot be read") from None


# ---------------------------------------------------------------- enrolment


def make_request(key: bytes, node_id: str) -> bytes:
    """A certificate request (DER PKCS#10, RFC 2986) for this key in the name of this host."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(node_id))
    return builder.sign(_private(key), hashes.SHA256()).public_bytes(DER)


def check_request(csr: bytes, node_id: str) -> str:
    """SHA-256 (hex) of the request's public key; RemoteError unless it may be signed.

    The request's signature proves possession of the key. What the certificate will say is the
    master's decision, so a request that asks for extensions is refused, not trimmed.
    """
    return _digest(_requested_key(csr, node_id))


def sign(
    authority: Authority,
    csr: bytes,
    member: Member,
    profile: Profile,
    organization: str,
    now: float | None = None,
) -> bytes:
    """A certificate (DER) for that member; RemoteError if its request is not in order.

    `organization` becomes the subject's O; `now` is Unix time, by default the clock's.
    """
    key = _requested_key(csr, member.node_id)
    issuer = _certificate(authority.certificate)
    begin, end = beginning(now), min(moment(now) + LIFETIME, expiry(issuer))
    if end <= moment(now):
        raise LocalError("the cluster CA has expired, or this host's clock is wrong")
    # etcd's gRPC proxy refuses a client certificate that lends a common name's rights to all.
    name = "" if profile is Profile.CLIENT else member.name
    subject = _name(name, organization)
    builder = _leaf_builder(subject, issuer.subject, key, (begin, end), _USAGES[profile])
    builder = builder.add_extension(_alternative_names(member, profile), critical=False)
    signer = _private(authority.key)
    builder = builder.add_extension(_issuer_identifier(signer.public_key()), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(DER)


def check_granted(
    certificates: Sequence[Certificate],
    authority: bytes,
    pinned: str,
    key: bytes,
    member: Member,
) -> None:
    """RemoteError unless these certificates are this member's, for its key, from the pinned CA.

    `authority` is the CA's certificate (DER), `pinned` its expected fingerprint. Dates are not
    looked at: this host's clock may still be unset.
    """
    if fingerprint(authority) != pinned:
        raise RemoteError("the CA's certificate is not the one the cluster decided on")
    issuer = _certificate(authority)
    if not certificates:
        raise RemoteError("the answer holds no certificate")
    if len({c.profile for c in certificates}) != len(certificates):
        raise RemoteError("the answer holds two certificates of one profile")
    for certificate in certificates:
        with reading(f"the {certificate.profile} certificate cannot be read"):
            reason = _why_not_ours(certificate, issuer, key_digest(key), member)
        if reason:
            raise RemoteError(f"the {certificate.profile} certificate {reason}")


def credential(
    name: str, certificates: Iterable[Certificate], authority: bytes, key: bytes
) -> bytes:
    """The PEM bytes of one of `CREDENTIALS`; LocalError if this host has none of that name."""
    if name == "ca.crt":
        return to_pem(authority)
    if name == "host.key":
        return key
    profile = CREDENTIALS.get(name)
    for certificate in certificates:
        if certificate.profile is profile:
            return to_pem(certificate.der)
    raise LocalError(f"this host holds no credential {name!r}")


# ---------------------------------------------------------------- parts


def _name(common_name: str, organization: str = "") -> x509.Name:
    parts = ((NameOID.ORGANIZATION_NAME, organization), (NameOID.COMMON_NAME, common_name))
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts if text])


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(PEM, form, serialization.NoEncryption())


def _private(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(pem, None)
    except UNREADABLE:
        raise LocalError("a private key on this host cannot be read") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise LocalError("a private key on this host is not a P-256 key")
    return key


def _digest(key: ec.EllipticCurvePublicKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(DER, form)).hexdigest()


def _certificate(der: bytes) -> x509.Certificate:
    if len(der) > MAX_BLOB:
        raise RemoteError("the certificate is too large")
    with reading("the certificate cannot be read"):
        return x509.load_der_x509_certificate(der)


def _public(
    source: x509.Certificate | x509.CertificateSigningRequest,
) -> ec.EllipticCurvePublicKey:
    with reading("the public key cannot be read"):
        key = source.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise RemoteError("the public key is not a P-256 key")
    return key


def _requested_key(csr: bytes, node_id: str) -> ec.EllipticCurvePublicKey:
    if len(csr) > MAX_REQUEST:
        raise RemoteError(f"the request has {len(csr)} bytes; at most {MAX_REQUEST} are allowed")
    with reading("the request cannot be read"):
        request = x509.load_der_x509_csr(csr)
        subject, attributes = request.subject, list(request.attributes)
        algorithm, proven = request.signature_hash_algorithm, request.is_signature_valid
    key = _public(request)
    if not proven or not isinstance(algorithm, hashes.SHA256):
        raise RemoteError("the request is not signed by the key it names")
    if attributes:
        raise RemoteError("the request asks for extensions or attributes")
    if subject != _name(node_id):
        raise RemoteError("the request is in the name of another host")
    return key


def _authority_builder(
    name: x509.Name, key: ec.EllipticCurvePublicKey, valid: tuple[datetime, datetime]
) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
    )


def _leaf_builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    valid: tuple[datetime, datetime],
    usages: Sequence[x509.ObjectIdentifier],
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())  # 159 random bits: never the same again
        .not_valid_before(valid[0])
        .not_valid_after(valid[1])
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """RFC 5280, section 4.2.1.3. Key encipherment is for RSA key transport, so not here."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _issuer_identifier(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _alternative_names(member: Member, profile: Profile) -> x509.SubjectAlternativeName:
    address = ipaddress.ip_address(member.host.partition("%")[0])  # a zone is no one else's
    names: list[x509.GeneralName] = [x509.DNSName(member.name), x509.IPAddress(address)]
    if profile is not Profile.CLIENT:
        names += _LOCAL_NAMES
    return x509.SubjectAlternativeName(
        [*names, x509.UniformResourceIdentifier(NODE_URI + member.node_id)]
    )


def _why_not_ours(
    granted: Certificate, issuer: x509.Certificate, digest: str, member: Member
) -> str:
    """What is wrong with a granted certificate, or nothing. Parsing errors pass through."""
    certificate = _certificate(granted.der)
    if certificate.issuer != issuer.subject or not _signed_by(certificate, issuer):
        return "is not signed by the cluster CA"
    if _digest(_public(certificate)) != digest:
        return "is for another key"
    if cluster_node_id(granted.der) != member.node_id:
        return "is for another host"
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    if set(usage) != set(_USAGES[granted.profile]) or constraints.ca:
        return "is for another use"
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    expected = [] if granted.profile is Profile.CLIENT else [member.name]
    san = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if [n.value for n in common] != expected or (
        member.name not in san.get_values_for_type(x509.DNSName)
    ):
        return "is for another name"
    return ""


def _signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    algorithm = certificate.signature_hash_algorithm
    if not isinstance(algorithm, hashes.SHA256):
        return False
    try:
        signed = certificate.tbs_certificate_bytes
        _public(issuer).verify(certificate.signature, signed, ec.ECDSA(algorithm))
    except InvalidSignature:
        return False
    return True
